"use strict";
// Unpacks the data of the page. One state (layer, head, frame, budget, what to show) is kept in the
// address, and `draw` makes the whole page from it. "token" is a place in the prompt. "layer" is a
// place among the compressed layers. "head" is one less than the slider's value; -1 means all heads.

const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const board = at("screen"), tip = at("tip");
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

/** Returns ranks [layers, heads, tokens] from tokens listed best first; UNLISTED for the others. */
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
const final = axes.at(-1);
const tokensOfFrame = data.frames.map(() => []), textTokens = [];
frameOf.forEach((frame, token) => (frame ? tokensOfFrame[frame - 1] : textTokens).push(token));
const cells = data.frames.map((frame, number) => {
  const grid = new Int32Array(frame.rows * frame.columns).fill(-1);
  for (const token of tokensOfFrame[number]) grid[rowOf[token] * frame.columns + columnOf[token]] = token;
  return grid;
});

/** Returns the token in a cell of a frame's grid, -1 for an empty cell, undefined outside the grid. */
function tokenAt(frame, row, column) {
  const { rows, columns } = data.frames[frame];
  const inside = [[row, rows], [column, columns]].every(([at, size]) => Number.isInteger(at) && at >= 0 && at < size);
  return inside ? cells[frame][row * columns + column] : undefined;
}

const pictures = data.frames.map(frame => {
  if (!frame.image) return null;
  const image = new Image();
  image.onload = draw;
  image.src = frame.image;
  return image;
});

// Cividis: its brightness grows evenly, and it looks alike to people with any colour vision.
const CIVIDIS = [
  [0, 34, 78], [33, 59, 110], [76, 85, 108], [108, 110, 114], [142, 137, 120], [177, 165, 112], [217, 197, 92], [254, 232, 56],
];
const KEPT = "#e69f00", NEEDED = "#d000a0";

// The page opens at the newest screenshot, and at the budget nearest to the default.
const DEFAULT_PERCENT = 20;
const distance = budget => Math.abs(budget.percent - DEFAULT_PERCENT);
const state = {
  layer: 0,
  head: heads > 1 ? -1 : 0,
  frame: Math.max(0, data.frames.length - 1),
  budget: data.budgets.reduce((best, budget, i, all) => distance(budget) < distance(all[best]) ? i : best, 0),
  show: "kept",
  token: -1,
};
