"use strict";
// Draws the data beside this script. One state (layer, head, frame, budget, what to show), kept in
// the address; `draw` makes the whole page of it. "token" is a place in the prompt, "layer" a place
// among the layers that are compressed, "head" one less than the slider's value: -1 is all of them.

const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const UNLISTED = 2 ** 32 - 1;
const tokens = data.words.length, layers = data.layers.length, heads = data.heads;

function unpack({ type, bytes }) {
  const buffer = Uint8Array.from(atob(bytes), c => c.charCodeAt(0)).buffer;
  if (type === "u32") return new Uint32Array(buffer);
  const halves = new Uint16Array(buffer);
  if (type === "u16") return halves;
  const upper = Uint32Array.from(halves, half => half << 16);
  return new Float32Array(upper.buffer);
}

/** Ranks [layers, heads, tokens] of tokens listed best first; UNLISTED for those that are not. */
function ranksOf({ listed, order }) {
  const ranks = new Uint32Array(layers * heads * tokens).fill(UNLISTED), places = unpack(order);
  let next = 0;
  for (let row = 0; row < layers * heads; row++) {
    const count = listed[Math.floor(row / heads)];
    for (let rank = 0; rank < count; rank++) ranks[row * tokens + places[next++]] = rank;
  }
  return ranks;
}

const frameOf = unpack(data.frame); // 1 is the first, 0 is text
const rowOf = unpack(data.row), columnOf = unpack(data.column);
const rankings = data.rankings.map(ranksOf);
const axes = data.axes.map(axis => ({ ...axis, values: unpack(axis.values) }));
const tokensOfFrame = data.frames.map(() => []), textTokens = [];
frameOf.forEach((frame, token) => (frame ? tokensOfFrame[frame - 1] : textTokens).push(token));
const cells = data.frames.map((frame, number) => {
  const grid = new Int32Array(frame.rows * frame.columns).fill(-1);
  for (const token of tokensOfFrame[number]) grid[rowOf[token] * frame.columns + columnOf[token]] = token;
  return grid;
});
const pictures = data.frames.map(frame => {
  if (!frame.image) return null;
  const image = new Image();
  image.onload = draw;
  image.src = frame.image;
  return image;
});

// Cividis, of equal steps in brightness and alike to all kinds of colour vision.
const CIVIDIS = [[0, 34, 78], [36, 57, 110], [87, 92, 109], [112, 113, 115], [139, 137, 120], [176, 164, 111], [217, 193, 90], [254, 232, 56]];
const KEPT = "#e69f00", NEEDED = "#d000a0";

const state = { layer: 0, head: heads > 1 ? -1 : 0, frame: 0, budget: 0, show: "kept", token: -1 };

// What is kept

function rankOf(token, head) {
  const ranks = rankings[data.budgets[state.budget].ranking];
  return ranks[(state.layer * heads + head) * tokens + token];
}

/** Share of the chosen heads that keep a token: 0 or 1 where there is one. */
function keptShare(token, layer = state.layer) {
  const budget = data.budgets[state.budget], ranks = rankings[budget.ranking];
  if (state.head >= 0) return +(ranks[(layer * heads + state.head) * tokens + token] < budget.kept[layer]);
  let count = 0;
  for (let head = 0; head < heads; head++) count += ranks[(layer * heads + head) * tokens + token] < budget.kept[layer];
  return count / heads;
}

const inWindow = token => token >= tokens - data.budgets[state.budget].window[state.layer];

/** Tokens of a list that are kept, a mean over heads where each has a set. */
const countKept = (list, layer) => list.reduce((sum, token) => sum + keptShare(token, layer), 0);

function stateOf(token) {
  const share = keptShare(token);
  if (state.head < 0 && share > 0 && share < 1) return `kept by ${Math.round(share * heads)} of ${heads} heads`;
  if (!share) return "dropped";
  return inWindow(token) ? "kept, as one of the last" : "kept";
}

function rankText(token) {
  if (inWindow(token)) return "none: the last tokens always stay";
  const window = data.budgets[state.budget].window[state.layer];
  const { listed } = data.rankings[data.budgets[state.budget].ranking];
  const last = listed[state.layer] - window;
  const name = head => rankOf(token, head) === UNLISTED ? `after ${last}` : `${rankOf(token, head) - window + 1}`;
  const of = `of ${tokens - window}`;
  if (state.head >= 0) return `${name(state.head)} ${of}`;
  return `${[...Array(heads).keys()].map(name).join(", ")} ${of}, by head`;
}

// Numbers for people

const whole = number => number.toLocaleString("en");
const mean = number => number.toLocaleString("en", { maximumFractionDigits: 1 });
const digits = number => number === 0 ? "0" : Math.abs(number) >= 1e-3 && Math.abs(number) < 1e4 ? `${+number.toPrecision(3)}` : number.toExponential(1);
const scoreText = (axis, value) => Number.isNaN(value) ? "none" : (axis.isFactor ? "×\u202f" : "") + digits(value);
const valueOf = (axis, token) => axis.values[state.layer * tokens + token];
const wordOf = token => data.words[token].replaceAll("\n", "⏎") || "␣";

// Colours: where a value stands among those of the layer's screens, so that one large value does
// not leave all others dark. Equal values have one colour.

const standings = new Map();
function standing(axis) {
  const key = `${axis.name} ${state.layer}`;
  if (standings.has(key)) return standings.get(key);
  const known = tokensOfFrame.flat().filter(token => !Number.isNaN(valueOf(axis, token)));
  known.sort((a, b) => valueOf(axis, a) - valueOf(axis, b));
  const place = new Float32Array(tokens).fill(NaN);
  for (let start = 0, end; start < known.length; start = end) {
    end = start + 1;
    while (end < known.length && valueOf(axis, known[end]) === valueOf(axis, known[start])) end++;
    for (let i = start; i < end; i++) place[known[i]] = (start + end) / 2 / known.length;
  }
  const range = known.length ? [valueOf(axis, known[0]), valueOf(axis, known[known.length - 1])] : [NaN, NaN];
  const made = { place, range };
  standings.set(key, made);
  return made;
}

function colour(place) {
  const x = place * (CIVIDIS.length - 1), i = Math.min(Math.floor(x), CIVIDIS.length - 2);
  return `rgb(${CIVIDIS[i].map((low, c) => Math.round(low + (x - i) * (CIVIDIS[i + 1][c] - low)))})`;
}

// Drawing

/** Makes the canvas as large as fits into CSS pixels; returns its context and a cell's size. */
function prepare(canvas, frame, room) {
  const { rows, columns, size } = data.frames[frame];
  const shape = size ? size[0] / size[1] : columns / rows, ratio = window.devicePixelRatio || 1;
  const width = Math.min(room.width, room.height * shape);
  canvas.style.width = `${width}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(width / shape * ratio);
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  return { context, wide: canvas.width / columns, tall: canvas.height / rows };
}

/** marks: whether kept cells are framed in the colours of an axis, and needed ones encircled. */
function drawFrame(canvas, frame, show, room, marks = true) {
  const { context, wide, tall } = prepare(canvas, frame, room);
  const picture = pictures[frame], { columns, needed } = data.frames[frame];
  if (picture && picture.complete) context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const axis = axes.find(one => one.name === show), places = axis && standing(axis).place;
  const line = Math.max(1, Math.min(wide, tall) / 14), drawEdges = marks && Math.min(wide, tall) >= 5;
  cells[frame].forEach((token, cell) => {
    const [x, y, right, bottom] = [cell % columns * wide, Math.floor(cell / columns) * tall, (cell % columns + 1) * wide,
      (Math.floor(cell / columns) + 1) * tall].map(Math.round);
    const share = token < 0 ? 0 : keptShare(token);
    if (axis) {
      context.globalAlpha = picture ? 0.78 : 1;
      if (token >= 0 && !Number.isNaN(places[token])) {
        context.fillStyle = colour(places[token]);
        context.fillRect(x, y, right - x, bottom - y);
      }
    } else {
      context.globalAlpha = 0.76 * (1 - share);
      context.fillStyle = "#10151f";
      context.fillRect(x, y, right - x, bottom - y);
    }
    context.globalAlpha = share;
    if (share && drawEdges) {
      context.strokeStyle = axis ? "#ffffff" : KEPT;
      context.lineWidth = line;
      context.strokeRect(x + line / 2 + 0.5, y + line / 2 + 0.5, right - x - line - 1, bottom - y - line - 1);
    }
    context.globalAlpha = 1;
  });
  context.strokeStyle = NEEDED;
  context.lineWidth = Math.max(2, line * 1.5);
  context.setLineDash([6, 4]);
  for (const [row, column] of marks ? needed : []) {
    context.beginPath();
    context.ellipse((column + 0.5) * wide, (row + 0.5) * tall, wide * 0.75, tall * 0.75, 0, 0, 7);
    context.stroke();
  }
  context.setLineDash([]);
  if (state.token >= 0 && frameOf[state.token] - 1 === frame && canvas.id === "screen") {
    context.strokeStyle = "#fff";
    context.lineWidth = 6;
    const [x, y] = [columnOf[state.token] * wide, rowOf[state.token] * tall];
    context.strokeRect(x, y, wide, tall);
    context.strokeStyle = "#0072b2";
    context.lineWidth = 3;
    context.strokeRect(x, y, wide, tall);
  }
}

const element = (kind, content, attributes = {}) => {
  const made = Object.assign(document.createElement(kind), attributes);
  made.append(...[content].flat());
  return made;
};
const line = (...values) => element("tr", values.map(value => element("td", value)));
const bar = share => element("span", Object.assign(document.createElement("i"), { style: `width:${100 * share}%` }), { className: "bar" });

function drawControls() {
  const { layer, head, frame, budget } = state;
  for (const name of ["layer", "frame", "budget"]) at(name).value = state[name];
  at("head").value = head + 1;
  at("show").value = state.show;
  at("layer-name").textContent = `${data.layers[layer]} (of ${data.layers[0]} to ${data.layers[layers - 1]})`;
  at("head-name").textContent = head < 0 ? `all ${heads}` : `${head + 1} of ${heads}`;
  at("frame-name").textContent = data.frames.length ? `${frame + 1} of ${data.frames.length}` : "none";
  at("budget-name").textContent = `${data.budgets[budget].percent} %`;
}

function drawReply() {
  if (!data.replies.length) return;
  const said = ({ text, isRight }) => [`“${text}”`, isRight === null ? "" : isRight ? " (right)" : element("b", " (wrong)")];
  const [full, now] = [data.replies[0], data.replies[state.budget + 1]];
  at("reply").replaceChildren("Reply from the full cache: ", ...said(full), `; at ${data.budgets[state.budget].percent} %: `, ...said(now),
    full.isRight === false ? `; the right answer: “${data.answer}”` : "");
}

function drawSummary() {
  const { layer, frame, budget } = state;
  const kept = data.budgets[budget].kept[layer];
  const whose = heads > 1 && state.head >= 0 ? `, KV head ${state.head + 1}` : "";
  const average = heads > 1 && state.head < 0 ? " (mean over heads)" : "";
  const screens = tokensOfFrame.flat();
  let text = `Layer ${data.layers[layer]}${whose} keeps ${whole(kept)} of ${whole(tokens)} tokens: ` +
    `${mean(countKept(screens))} of ${whole(screens.length)} of the screenshots, ${mean(countKept(textTokens))} of ${whole(textTokens.length)} of the text${average}.`;
  if (data.frames.length) {
    const here = tokensOfFrame[frame];
    text += ` Of screenshot ${frame + 1}: ${mean(countKept(here))} of ${whole(here.length)}.`;
    const needed = data.frames.flatMap((one, i) => one.needed.map(([row, column]) => cells[i][row * one.columns + column]));
    if (needed.length) text += ` What the question needs: ${mean(countKept(needed))} of ${needed.length}.`;
  }
  at("summary").textContent = text;
}

function drawCaption() {
  const caption = at("caption"), axis = axes.find(one => one.name === state.show);
  const parts = [`${data.frames[state.frame].title}. `];
  const key = (kind, text) => [element("span", "", { className: `key ${kind}` }), text];
  if (axis) {
    const [low, high] = standing(axis).range;
    parts.push(`${axis.title}: ${axis.about}. `);
    if (low === high) parts.push(`The same on all screenshots: ${scoreText(axis, low)}.`);
    else {
      const stops = CIVIDIS.map(rgb => `rgb(${rgb})`).join(",");
      parts.push(scoreText(axis, low), element("span", "", { className: "ramp", style: `background:linear-gradient(90deg,${stops})` }),
        scoreText(axis, high), " (by rank within the layer). White frames: kept.");
    }
  } else parts.push(...key("kept", "kept"), ...key("dropped", "dropped"), " — one square is one visual token");
  if (data.frames[state.frame].needed.length) parts.push(...key("needed", "what the question needs"));
  if (!pictures[state.frame]) parts.push(" The processor cut the pictures into several frames: only their tokens are shown.");
  caption.replaceChildren(...parts);
}

function drawAxes() {
  const box = at("axes");
  if (!box.children.length) {
    for (const axis of axes) {
      const button = element("button", [axis.title, element("small", ""), document.createElement("canvas")], { type: "button", title: axis.about });
      button.onclick = () => set({ show: state.show === axis.name ? "kept" : axis.name });
      box.append(button);
    }
  }
  axes.forEach((axis, i) => {
    const [low, high] = standing(axis).range, button = box.children[i];
    button.setAttribute("aria-pressed", state.show === axis.name);
    button.querySelector("small").textContent = low === high ? `${scoreText(axis, low)} everywhere` : `${scoreText(axis, low)} to ${scoreText(axis, high)}`;
    drawFrame(button.querySelector("canvas"), state.frame, axis.name, { width: 125, height: 200 }, false);
  });
}

function drawStrip() {
  const box = at("strip");
  if (!box.children.length) {
    data.frames.forEach((frame, number) => {
      const button = element("button", ["", document.createElement("br"), document.createElement("canvas")], { type: "button" });
      button.onclick = () => set({ frame: number });
      box.append(button);
    });
  }
  data.frames.forEach((frame, number) => {
    const button = box.children[number], list = tokensOfFrame[number];
    button.firstChild.textContent = `${frame.title}: ${mean(countKept(list))} of ${whole(list.length)}`;
    button.setAttribute("aria-pressed", state.frame === number);
    drawFrame(button.querySelector("canvas"), number, state.show, { width: 300, height: 130 });
  });
}

function drawText() {
  const parts = [];
  for (let token = 0; token < tokens; token++) {
    const frame = frameOf[token];
    if (!frame) {
      const share = keptShare(token);
      const span = element("span", wordOf(token), { className: share === 1 ? "kept" : share ? "part" : "dropped" });
      span.title = describe(token);
      parts.push(span);
    } else if (token === 0 || frameOf[token - 1] !== frame) {
      const list = tokensOfFrame[frame - 1];
      parts.push(element("span", `screenshot ${frame}: ${mean(countKept(list))} of ${whole(list.length)}`, { className: "screen" }));
    }
  }
  at("text").replaceChildren(...parts);
}

function drawLayers() {
  const budget = data.budgets[state.budget], screens = tokensOfFrame.flat();
  const rows = data.layers.map((number, layer) => {
    const kept = budget.kept[layer], bytes = kept * data.tokenBytes[layer];
    const row = line(`${number}`, whole(kept), whole(tokens), mean(countKept(screens, layer)), mean(countKept(textTokens, layer)),
      bar(kept / tokens), whole(bytes), whole(tokens * data.tokenBytes[layer]));
    row.setAttribute("aria-selected", layer === state.layer);
    row.onclick = () => set({ layer });
    return row;
  });
  at("layers").tBodies[0].replaceChildren(...rows);
  const bytes = data.layers.reduce((sum, _, layer) => sum + budget.kept[layer] * data.tokenBytes[layer], 0);
  const full = data.tokenBytes.reduce((sum, one) => sum + tokens * one, 0);
  at("layers").tFoot.replaceChildren(line("all", "", "", "", "", bar(bytes / full), whole(bytes), whole(full)));
}

function drawDropped() {
  const groups = [...data.frames.map((frame, i) => [`screenshot ${i + 1} (${frame.title})`, tokensOfFrame[i]]), ["text", textTokens]];
  at("dropped").tBodies[0].replaceChildren(...groups.map(([name, list]) => {
    const dropped = list.length - countKept(list);
    return line(name, mean(dropped), whole(list.length), bar(list.length ? 1 - dropped / list.length : 0));
  }));
  const final = axes[axes.length - 1], order = [];
  for (let token = 0; token < tokens; token++) if (!keptShare(token)) order.push(token);
  const byScore = (a, b) => valueOf(final, b) - valueOf(final, a);
  order.sort((a, b) => state.head < 0 ? byScore(a, b) : rankOf(a, state.head) - rankOf(b, state.head) || byScore(a, b));
  at("nearest").replaceChildren(...order.slice(0, 8).map(token => {
    const button = element("button", `${where(token)} · rank ${rankText(token)}`, { type: "button" });
    button.onclick = () => { if (frameOf[token]) set({ frame: frameOf[token] - 1 }); choose(token); };
    return element("li", button);
  }));
}

function where(token) {
  const frame = frameOf[token];
  return frame ? `screenshot ${frame}, row ${rowOf[token]}, column ${columnOf[token]}` : `text “${wordOf(token)}”`;
}

function describe(token) {
  return `${where(token)} · score ${scoreText(axes[axes.length - 1], valueOf(axes[axes.length - 1], token))} · rank ${rankText(token)} · ${stateOf(token)}`;
}

function drawToken() {
  const told = [["place", where], ["token", token => `${token} of ${tokens}`], ["rank", rankText], ["state", stateOf],
    ...axes.map(axis => [axis.title.toLowerCase(), token => scoreText(axis, valueOf(axis, token))])];
  at("token").tBodies[0].replaceChildren(...told.map(([name, tell]) => line(name, state.token < 0 ? "–" : tell(state.token))));
}

function drawScreen() {
  if (data.frames.length) drawFrame(at("screen"), state.frame, state.show, { width: at("screen").parentNode.clientWidth, height: 820 });
  drawToken();
}

function draw() {
  drawControls();
  drawReply();
  drawSummary();
  drawScreen();
  if (data.frames.length) {
    drawCaption();
    drawAxes();
    drawStrip();
  }
  drawText();
  drawLayers();
  drawDropped();
}

// State and address

function set(change) {
  if ("frame" in change && change.frame !== state.frame) state.token = -1;
  Object.assign(state, change);
  writeAddress();
  draw();
}

function writeAddress() {
  const address = { layer: data.layers[state.layer], frame: state.frame + 1, budget: data.budgets[state.budget].percent };
  if (heads > 1) address.head = state.head < 0 ? "all" : state.head + 1;
  if (state.show !== "kept") address.show = state.show;
  if (state.token >= 0 && frameOf[state.token]) Object.assign(address, { row: rowOf[state.token], column: columnOf[state.token] });
  history.replaceState(null, "", `#${new URLSearchParams(address)}`);
}

/** What the address names of the state; what it does not, or names wrongly, stays. */
function readAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  const find = (name, list, value) => {
    const found = address.has(name) ? list.findIndex(one => value(one) === Number(address.get(name))) : -1;
    if (found >= 0) state[name] = found;
  };
  find("layer", data.layers, number => number);
  find("frame", data.frames, frame => data.frames.indexOf(frame) + 1);
  find("budget", data.budgets, budget => budget.percent);
  const head = Number(address.get("head"));
  if (head >= 1 && head <= heads) state.head = head - 1;
  const show = address.get("show");
  const { rows, columns } = data.frames[state.frame] || { rows: 0, columns: 0 };
  const [row, column] = ["row", "column"].map(name => address.has(name) ? Number(address.get(name)) : -1);
  if (row >= 0 && row < rows && column >= 0 && column < columns) state.token = cells[state.frame][row * columns + column];
  if (show === "kept" || axes.some(axis => axis.name === show)) state.show = show;
}

// Events

for (const [name, list] of [["layer", data.layers], ["frame", data.frames], ["budget", data.budgets]]) {
  at(name).max = Math.max(0, list.length - 1);
  at(name).oninput = event => set({ [name]: +event.target.value });
}
at("head").max = heads;
at("head").oninput = event => set({ head: event.target.value - 1 });
at("head-control").hidden = heads === 1;
at("show").append(new Option("kept and dropped", "kept"), ...axes.map(axis => new Option(axis.title, axis.name)));
at("show").onchange = event => set({ show: event.target.value });
at("controls").onsubmit = () => false;

const screen = at("screen"), tip = at("tip");
function choose(token) {
  if (token === state.token) return;
  state.token = token;
  drawScreen();
}
screen.onpointermove = event => {
  if (!data.frames.length) return;
  const { rows, columns } = data.frames[state.frame], box = screen.getBoundingClientRect();
  const row = Math.floor((event.clientY - box.top) / box.height * rows);
  const column = Math.floor((event.clientX - box.left) / box.width * columns);
  const token = row >= 0 && row < rows && column >= 0 && column < columns ? cells[state.frame][row * columns + column] : -1;
  tip.hidden = token < 0;
  if (token < 0) return;
  choose(token);
  tip.textContent = describe(token);
  const right = event.clientX + 16 + tip.offsetWidth > window.innerWidth;
  tip.style.left = `${right ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16}px`;
  tip.style.top = `${event.clientY + 18}px`;
};
screen.onclick = writeAddress;
screen.onpointerleave = () => { tip.hidden = true; };
const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
screen.onkeydown = event => {
  const step = STEPS[event.key];
  if (!step || !data.frames.length) return;
  event.preventDefault();
  const { rows, columns } = data.frames[state.frame];
  const [row, column] = state.token < 0 ? [0, 0] : [rowOf[state.token] + step[0], columnOf[state.token] + step[1]];
  if (row < 0 || row >= rows || column < 0 || column >= columns) return;
  choose(cells[state.frame][row * columns + column]);
  screen.setAttribute("aria-label", state.token < 0 ? "no token" : describe(state.token));
  writeAddress();
};
window.onhashchange = () => { readAddress(); draw(); };
window.onresize = draw;

const options = Object.entries(data.options).filter(([name]) => name !== "policy" && name !== "inner").map(([name, value]) => `${name}=${value}`);
at("about").textContent = `${data.model} · policy ${data.policy}${options.length ? ` (${options.join(", ")})` : ""} · ${whole(tokens)} tokens, ` +
  `${data.frames.length} screenshots, ${layers} layers${heads > 1 ? `, a set for each of ${heads} KV heads` : ""}`;
at("prompt").textContent = `Prompt: ${data.text}`;
if (!data.frames.length) at("caption").textContent = "Nothing told which tokens are a screenshot's: all are shown as text.";
readAddress();
draw();
