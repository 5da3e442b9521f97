// Writes numbers and tokens as text.

const whole = number => number.toLocaleString("en");
const mean = number => number.toLocaleString("en", { maximumFractionDigits: 1 });
const ofList = list => `${mean(countKept(list))} of ${whole(list.length)}`;
const bytes = number => {
  const power = number < 1024 ? 0 : number < 2 ** 20 ? 1 : number < 2 ** 30 ? 2 : 3;
  return `${mean(number / 1024 ** power)} ${["B", "KiB", "MiB", "GiB"][power]}`;
};
const several = (count, name) => `${count} ${name}${count === 1 ? "" : "s"}`;
function digits(number) {
  const size = Math.abs(number);
  return size === 0 || (size >= 1e-3 && size < 1e4) ? `${+number.toPrecision(3)}` : number.toExponential(1);
}
const scoreText = (axis, value) => Number.isNaN(value) ? "none" : (axis.isFactor ? "×\u202f" : "") + digits(value);
const valueOf = (axis, token) => axis.values[state.layer * tokens + token];
const wordOf = token => data.words[token].replaceAll("\n", "⏎") || "␣";
