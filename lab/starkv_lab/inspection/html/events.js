// Handles sliders, pointer and keys, fills in the header, and draws for the first time.

for (const [name, list] of [["layer", data.layers], ["frame", data.frames], ["budget", data.budgets]]) {
  at(name).max = Math.max(0, list.length - 1);
  at(name).oninput = event => set({ [name]: +event.target.value });
}
at("head").max = heads;
at("head").oninput = event => set({ head: event.target.value - 1 });
// A slider with one position has nothing to say.
const positions = { layer: layers, head: heads, frame: data.frames.length, budget: data.budgets.length };
for (const [name, count] of Object.entries(positions)) at(name).parentNode.hidden = count < 2;
at("show").append(new Option("kept and dropped", "kept"), ...axes.map(axis => new Option(axis.title, axis.name)));
at("show").onchange = event => set({ show: event.target.value });
at("controls").onsubmit = () => false;

function choose(token) {
  if (token === state.token) return;
  state.token = token;
  drawScreen();
  markEntry();
}
board.onpointermove = event => {
  if (!data.frames.length) return;
  const { rows, columns } = data.frames[state.frame], box = board.getBoundingClientRect();
  const row = Math.floor((event.clientY - box.top) / box.height * rows);
  const column = Math.floor((event.clientX - box.left) / box.width * columns);
  const token = tokenAt(state.frame, row, column) ?? -1;
  tip.hidden = token < 0;
  if (token < 0) return;
  choose(token);
  tip.textContent = describe(token);
  const right = event.clientX + 16 + tip.offsetWidth > window.innerWidth;
  tip.style.left = `${right ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16}px`;
  tip.style.top = `${event.clientY + 18}px`;
};
board.onclick = writeAddress;
board.onpointerleave = () => { tip.hidden = true; };
const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
board.onkeydown = event => {
  const step = STEPS[event.key];
  if (!step || !data.frames.length) return;
  event.preventDefault();
  const isHere = state.token >= 0 && frameOf[state.token] - 1 === state.frame;
  const [row, column] = isHere ? [rowOf[state.token] + step[0], columnOf[state.token] + step[1]] : [0, 0];
  const token = tokenAt(state.frame, row, column) ?? -1;
  if (token < 0) return;
  choose(token);
  at("spoken").textContent = describe(token);
  writeAddress();
};

/** Chooses what an entry of the text stands for: a text token, or a screenshot. */
function chooseEntry(entry) {
  const token = Number(entry.id.slice("token-".length)), frame = frameOf[token];
  at("text").setAttribute("aria-activedescendant", entry.id);
  if (frame) set({ frame: frame - 1 });
  else choose(token);
  at("spoken").textContent = frame ? entry.textContent : describe(token);
  writeAddress();
}
at("text").onclick = event => {
  const entry = event.target.closest("[role=option]");
  if (entry) chooseEntry(entry);
};
at("text").onkeydown = event => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const entries = [...at("text").children], active = at("text").getAttribute("aria-activedescendant");
  const place = entries.findIndex(entry => entry.id === active) + step;
  if (!(place in entries)) return;
  const { id } = entries[place];
  chooseEntry(entries[place]);
  at(id).scrollIntoView({ block: "nearest" });
};
window.onhashchange = () => { readAddress(); draw(); };
window.onresize = draw;

const options = Object.entries(data.options).filter(([name]) => name !== "policy").map(option => option.join("="));
const counted = [`${whole(tokens)} tokens`, several(data.frames.length, "screenshot"), several(layers, "layer")];
if (heads > 1) counted.push(`one kept set for each of ${heads} KV heads`);
const policy = [data.policy, ...options.length ? [`(${options.join(", ")})`] : []].join(" ");
at("about").textContent = [data.model, `policy ${policy}`, counted.join(", ")].join(" · ");
at("prompt").textContent = `Prompt: ${data.text}`;
if (!data.frames.length) at("caption").textContent = "The page cannot tell which tokens belong to a screenshot, so it shows all tokens as text.";
readAddress();
draw();
