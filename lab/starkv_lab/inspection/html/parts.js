const element = (kind, content, attributes = {}) => {
  const made = Object.assign(document.createElement(kind), attributes);
  made.append(...[content].flat());
  return made;
};
const line = (name, ...values) =>
  element("tr", [element("th", name, { scope: "row" }), ...values.map(value => element("td", value))]);
const bar = (share, kind = "kept") => element("span", element("i", "", { style: `width:${100 * share}%` }), {
  className: `bar ${kind}`, role: "img", ariaLabel: `${mean(100 * share)} % ${kind}`,
});

function drawControls() {
  const { layer, head, frame, budget } = state;
  const newest = frame === data.frames.length - 1 && frame > 0 ? " (newest)" : "";
  const places = {
    layer: [layer, `${data.layers[layer]} (of ${data.layers[0]} to ${data.layers.at(-1)})`],
    head: [head + 1, head < 0 ? `all ${heads}` : `${head + 1} of ${heads}`],
    frame: [frame, `${frame + 1} of ${data.frames.length}${newest}`],
    budget: [budget, `${data.budgets[budget].percent} %`],
  };
  for (const [name, [value, said]] of Object.entries(places)) {
    at(name).value = value;
    at(name).setAttribute("aria-valuetext", said);
    at(`${name}-name`).textContent = said;
  }
  at("show").value = state.show;
}

function drawReply() {
  if (!data.replies.length) return;
  const judged = isRight => isRight === null ? "" : isRight ? " (right)" : element("b", " (wrong)");
  const said = ({ text, isRight }) => [`“${text}”`, judged(isRight)];
  const [full, now] = [data.replies[0], data.replies[state.budget + 1]];
  const answer = full.isRight === false ? `; the right answer is “${data.answer}”` : "";
  const percent = data.budgets[state.budget].percent;
  at("reply").replaceChildren("Reply from the full cache: ", ...said(full), `; with a budget of ${percent} %: `, ...said(now), answer);
}

function drawSummary() {
  const { layer, frame, budget } = state;
  const kept = data.budgets[budget].kept[layer];
  const whose = heads > 1 && state.head >= 0 ? `, KV head ${state.head + 1}` : "";
  const average = heads > 1 && state.head < 0 ? " (mean over heads)" : "";
  const screens = tokensOfFrame.flat();
  let text = `Layer ${data.layers[layer]}${whose} keeps ${whole(kept)} of ${whole(tokens)} tokens: ${ofList(screens)} of the ` +
    `screenshots, ${ofList(textTokens)} of the text${average}.`;
  if (data.frames.length) {
    const here = tokensOfFrame[frame];
    text += ` It keeps ${mean(countKept(here))} of the ${whole(here.length)} tokens of screenshot ${frame + 1}`;
    const needed = data.frames.flatMap((one, i) => one.needed.map(([row, column]) => tokenAt(i, row, column)));
    if (needed.length) text += `, and ${mean(countKept(needed))} of the ${needed.length} that the question needs`;
    text += ".";
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
    if (low === high) parts.push(`All tokens of the screenshots have the same value: ${scoreText(axis, low)}.`);
    else {
      const stops = CIVIDIS.map(rgb => `rgb(${rgb})`).join(",");
      const ramp = element("span", "", { className: "ramp", style: `background:linear-gradient(90deg,${stops})` });
      parts.push(scoreText(axis, low), ramp, scoreText(axis, high), ". Colours follow the rank within the layer. Kept tokens have white frames.");
    }
  } else parts.push(...key("kept", "kept"), ...key("dropped", "dropped"), " — one square is one visual token");
  if (data.frames[state.frame].needed.length) parts.push(...key("needed", "what the question needs"));
  if (!pictures[state.frame]) parts.push(" The processor cut the pictures into several frames, so the page shows their tokens only.");
  caption.replaceChildren(...parts);
}

function drawAxes() {
  const box = at("axes");
  if (!box.children.length) {
    for (const axis of axes) {
      const parts = [axis.title, element("small", ""), element("canvas", "")];
      const button = element("button", parts, { type: "button", title: axis.about });
      button.onclick = () => set({ show: state.show === axis.name ? "kept" : axis.name });
      box.append(button);
    }
  }
  axes.forEach((axis, i) => {
    const [low, high] = standing(axis).range, button = box.children[i];
    button.setAttribute("aria-pressed", state.show === axis.name);
    const [least, most] = [low, high].map(value => scoreText(axis, value));
    button.querySelector("small").textContent = low === high ? `${least} everywhere` : `${least} to ${most}`;
    drawFrame(button.querySelector("canvas"), state.frame, axis.name, { width: 125, height: 200 }, false);
  });
}

function drawStrip() {
  const box = at("strip");
  if (!box.children.length) {
    data.frames.forEach((frame, number) => {
      const button = element("button", ["", element("br", ""), element("canvas", "")], { type: "button" });
      button.onclick = () => set({ frame: number });
      box.append(button);
    });
  }
  data.frames.forEach((frame, number) => {
    const button = box.children[number];
    button.firstChild.textContent = `${frame.title}: ${ofList(tokensOfFrame[number])}`;
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
      const kind = share === 1 ? "kept" : share ? "part" : "dropped";
      parts.push(entry(token, wordOf(token), { className: kind, title: describe(token) }));
    } else if (token === 0 || frameOf[token - 1] !== frame) {
      const said = `screenshot ${frame}: ${ofList(tokensOfFrame[frame - 1])}`;
      parts.push(entry(token, said, { className: "screen" }));
    }
  }
  at("text").replaceChildren(...parts);
  markEntry();
}

/** Makes one entry of the text's list; its id says which token it stands for. */
const entry = (token, said, attributes) =>
  element("span", said, { id: `token-${token}`, role: "option", ariaSelected: "false", ...attributes });

/** Marks the text token that is chosen, where one is. */
function markEntry() {
  for (const old of document.querySelectorAll("#text [aria-selected=true]")) old.setAttribute("aria-selected", false);
  if (state.token >= 0) at(`token-${state.token}`)?.setAttribute("aria-selected", true);
}

function drawLayers() {
  const budget = data.budgets[state.budget], screens = tokensOfFrame.flat();
  const rows = data.layers.map((number, layer) => {
    const kept = budget.kept[layer];
    const button = element("button", `${number}`, { type: "button", ariaLabel: `layer ${number}` });
    const [now, full] = [budget.bytes[layer], data.fullBytes[layer]].map(bytes);
    const counts = [kept, tokens].map(whole).concat([screens, textTokens].map(list => mean(countKept(list, layer))));
    const row = line(button, ...counts, bar(kept / tokens), now, full);
    row.setAttribute("aria-current", layer === state.layer);
    row.onclick = () => set({ layer });
    return row;
  });
  const hadFocus = at("layers").contains(document.activeElement);
  at("layers").tBodies[0].replaceChildren(...rows);
  if (hadFocus) rows[state.layer].querySelector("button").focus();
  const [stored, full] = [budget.bytes, data.fullBytes].map(list => list.reduce((sum, one) => sum + one, 0));
  at("layers").tFoot.replaceChildren(line("all", "", "", "", "", bar(stored / full), bytes(stored), bytes(full)));
}

function drawDropped() {
  const screens = data.frames.map((frame, i) => [`screenshot ${i + 1} (${frame.title})`, tokensOfFrame[i]]);
  at("dropped").tBodies[0].replaceChildren(...[...screens, ["text", textTokens]].map(([name, list]) => {
    const dropped = list.length - countKept(list);
    return line(name, mean(dropped), whole(list.length), bar(list.length ? dropped / list.length : 0, "dropped"));
  }));
  const order = [];
  for (let token = 0; token < tokens; token++) if (!keptShare(token)) order.push(token);
  const byScore = (a, b) => valueOf(final, b) - valueOf(final, a);
  const byRank = (a, b) => rankOf(a, state.head) - rankOf(b, state.head) || byScore(a, b);
  order.sort(state.head < 0 ? byScore : byRank);
  at("nearest").replaceChildren(...order.slice(0, 8).map(token => {
    const isListed = state.head >= 0 && rankOf(token, state.head) !== UNLISTED;
    const said = [where(token), ...isListed ? [`rank ${rankText(token)}`] : [], `score ${scoreText(final, valueOf(final, token))}`];
    const button = element("button", said.join(" · "), { type: "button" });
    button.onclick = () => { if (frameOf[token]) set({ frame: frameOf[token] - 1 }); choose(token); writeAddress(); };
    return element("li", button);
  }));
}

function where(token) {
  const frame = frameOf[token];
  if (frame) return `screenshot ${frame}, row ${rowOf[token] + 1}, column ${columnOf[token] + 1}`;
  return `text “${wordOf(token)}”, token ${whole(token + 1)}`;
}

function describe(token) {
  const score = scoreText(final, valueOf(final, token));
  return `${where(token)} · score ${score} · rank ${rankText(token)} · ${stateOf(token)}`;
}

function drawToken() {
  const told = { place: where, token: token => `${whole(token + 1)} of ${whole(tokens)}`, rank: rankText, state: stateOf };
  for (const axis of axes) told[axis.title.toLowerCase()] = token => scoreText(axis, valueOf(axis, token));
  const rows = Object.entries(told).map(([name, tell]) => line(name, state.token < 0 ? "–" : tell(state.token)));
  at("token").tBodies[0].replaceChildren(...rows);
}

function drawScreen() {
  const room = { width: board.parentNode.clientWidth, height: 820 };
  if (data.frames.length) drawFrame(board, state.frame, state.show, room);
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
