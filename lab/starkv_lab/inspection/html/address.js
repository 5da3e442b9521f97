// Changes the state, and writes it to and reads it from the address.

function set(change) {
  if ("frame" in change && change.frame !== state.frame) state.token = -1;
  Object.assign(state, change);
  writeAddress();
  draw();
}

function writeAddress() {
  const { percent } = data.budgets[state.budget];
  const address = { layer: data.layers[state.layer], frame: state.frame + 1, budget: percent };
  if (heads > 1) address.head = state.head < 0 ? "all" : state.head + 1;
  if (state.show !== "kept") address.show = state.show;
  const token = state.token;
  if (token >= 0) Object.assign(address, frameOf[token] ? { row: rowOf[token] + 1, column: columnOf[token] + 1 } : { token: token + 1 });
  history.replaceState(null, "", `#${new URLSearchParams(address)}`);
}

/** Takes the state from the address. What the address leaves out, or gets wrong, stays. */
function readAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  const find = (name, list, value) => {
    const found = address.has(name) ? list.findIndex(one => value(one) === Number(address.get(name))) : -1;
    if (found >= 0) state[name] = found;
  };
  find("layer", data.layers, number => number);
  find("frame", data.frames, frame => data.frames.indexOf(frame) + 1);
  find("budget", data.budgets, budget => budget.percent);
  if (heads > 1) find("head", [...Array(heads).keys()], head => head + 1);
  if (heads > 1 && address.get("head") === "all") state.head = -1;
  const show = address.get("show");
  const [row, column, token] = ["row", "column", "token"].map(name => Number(address.get(name) ?? 0) - 1);
  if (data.frames.length) state.token = tokenAt(state.frame, row, column) ?? state.token;
  if (textTokens.includes(token)) state.token = token;
  if (show === "kept" || axes.some(axis => axis.name === show)) state.show = show;
}
