// A colour shows the rank of a value among the layer's screenshots, so that one large value does
// not darken all others. Equal values have the same colour.

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

/** Makes the canvas as large as `room` allows, in CSS pixels. Returns its context and a cell's size. */
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

/** Draws one frame. marks: whether to frame the kept cells and to encircle the needed cells. */
function drawFrame(canvas, frame, show, room, marks = true) {
  const { context, wide, tall } = prepare(canvas, frame, room);
  const picture = pictures[frame], { columns, needed } = data.frames[frame];
  if (picture && picture.complete) context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const axis = axes.find(one => one.name === show), places = axis && standing(axis).place;
  const edge = Math.max(1, Math.min(wide, tall) / 14), hasEdges = marks && Math.min(wide, tall) >= 5;
  cells[frame].forEach((token, cell) => {
    const row = Math.floor(cell / columns), column = cell % columns;
    const [x, right] = [column * wide, (column + 1) * wide].map(Math.round);
    const [y, bottom] = [row * tall, (row + 1) * tall].map(Math.round);
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
    if (share && hasEdges) {
      context.strokeStyle = axis ? "#ffffff" : KEPT;
      context.lineWidth = edge;
      const inner = edge / 2 + 0.5;
      context.strokeRect(x + inner, y + inner, right - x - 2 * inner, bottom - y - 2 * inner);
    }
    context.globalAlpha = 1;
  });
  context.strokeStyle = NEEDED;
  context.lineWidth = Math.max(2, edge * 1.5);
  context.setLineDash([6, 4]);
  for (const [row, column] of marks ? needed : []) {
    context.beginPath();
    context.ellipse((column + 0.5) * wide, (row + 0.5) * tall, wide * 0.75, tall * 0.75, 0, 0, 7);
    context.stroke();
  }
  context.setLineDash([]);
  if (state.token >= 0 && frameOf[state.token] - 1 === frame && canvas === board) {
    context.strokeStyle = "#fff";
    context.lineWidth = 6;
    const [x, y] = [columnOf[state.token] * wide, rowOf[state.token] * tall];
    context.strokeRect(x, y, wide, tall);
    context.strokeStyle = "#0072b2";
    context.lineWidth = 3;
    context.strokeRect(x, y, wide, tall);
  }
}
