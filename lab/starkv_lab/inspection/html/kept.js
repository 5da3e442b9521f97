// Says which tokens the chosen state keeps.

function rankOf(token, head) {
  const ranks = rankings[data.budgets[state.budget].ranking];
  return ranks[(state.layer * heads + head) * tokens + token];
}

/** Returns the share of the chosen heads that keep a token; for one head 0 or 1. */
function keptShare(token, layer = state.layer) {
  const budget = data.budgets[state.budget], ranks = rankings[budget.ranking];
  if (state.head >= 0) return +(ranks[(layer * heads + state.head) * tokens + token] < budget.kept[layer]);
  let count = 0;
  for (let head = 0; head < heads; head++) count += ranks[(layer * heads + head) * tokens + token] < budget.kept[layer];
  return count / heads;
}

const inWindow = token => token >= tokens - data.budgets[state.budget].window[state.layer];

/** Counts the kept tokens of a list; the mean over heads where each head keeps its own set. */
const countKept = (list, layer) => list.reduce((sum, token) => sum + keptShare(token, layer), 0);

function stateOf(token) {
  const share = keptShare(token);
  if (state.head < 0 && share > 0 && share < 1) return `kept by ${Math.round(share * heads)} of ${heads} heads`;
  if (!share) return "dropped";
  return inWindow(token) ? "kept: the last tokens always stay" : "kept";
}

function rankText(token) {
  if (inWindow(token)) return "no rank: the last tokens always stay";
  const window = data.budgets[state.budget].window[state.layer];
  const { listed } = data.rankings[data.budgets[state.budget].ranking];
  const last = listed[state.layer] - window;
  const name = head => rankOf(token, head) === UNLISTED ? `after ${last}` : `${rankOf(token, head) - window + 1}`;
  const of = `of ${tokens - window}`;
  if (state.head >= 0) return `${name(state.head)} ${of}`;
  return `${[...Array(heads).keys()].map(name).join(", ")} ${of}, by head`;
}
