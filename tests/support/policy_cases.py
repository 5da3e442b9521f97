"""One layer made by hand: its attention is what a test says it is."""

import torch

from starkv_compile import StarKVConfig
from starkv_compile.kernels.ops import STARKV
from starkv_compile.kernels.reference.star import fresh_state
from starkv_compile.policies import ScoreInputs, find_policy

FIELDS = set(ScoreInputs.__dataclass_fields__)


def text(length):
    """The layout of a prompt without frames."""
    frame = torch.full((1, length), -1)
    return frame, torch.zeros_like(frame), torch.zeros_like(frame), torch.full((1, 1), -1)


def frames(length, *spans, columns=2):
    """The layout of a prompt whose frames stand at `spans`, each `columns` wide."""
    frame, row, column, _ = text(length)
    for number, (start, end) in enumerate(spans):
        places = torch.arange(end - start)
        frame[0, start:end] = number
        row[0, start:end], column[0, start:end] = places // columns, places % columns
    return frame, row, column, torch.arange(*spans[-1])[None]


def attended(*weights):
    """query, key [1, G, L, D] of which each query sees `weights[g]` times as much at each token.

    Queries are the first axis; a key's part there is the logarithm of its weight. No mask, so the
    window's own keys are seen as well.
    """
    key = torch.zeros(1, len(weights), len(weights[0]), 4)
    key[0, :, :, 0] = torch.tensor(weights).log()
    query = torch.zeros_like(key)
    query[..., 0] = 1.0
    return query, key


def kept(policy, query, key, capacity, layout=None, **changes):
    """Places kept of the only row, [C] or [G][C], by a policy on real tensors.

    A window of one token and no pooling, unless `changes`, options and inputs, say otherwise.
    """
    plain = {"window": 1, "pool": 1} if "pool" in find_policy(policy).options() else {"window": 1}
    changes = {**plain, **changes}
    layout = layout or text(key.shape[2])
    return kept_rows(policy, query, key, capacity, layout, **changes)[0].tolist()


def config_of(policy, **options):
    return StarKVConfig.from_options({"policy": policy, **options})


def kept_rows(policy, query, key, capacity, layout, **changes):
    """The same of all rows, [B, (G,) C], with the options' own defaults; or by a configuration."""
    inputs = {n: changes.pop(n) for n in list(changes) if n in FIELDS - {"window"}}
    config = policy if isinstance(policy, StarKVConfig) else config_of(policy, **changes)
    scorer = config.policy
    length = key.shape[2]
    state = tuple(fresh_state(key, layout[3]))
    if scorer.per_head:
        heads = key.shape[1]
        layout = (*(t[:, None].expand(-1, heads, -1) for t in layout[:3]), layout[3])
    inputs = {
        "query": query,
        "key": key,
        "value": torch.ones_like(key),
        "mask": None,
        "scale": 1.0,
        "log_sum_exp": None,
        "hidden": None,
        "real": None,
        "layout": layout,
        "layer": 0,
        "counts": None,
        "state": state,
        "index": None,
        "novelty": None,
        "capacity": capacity,
        "window": config.scoring_window,
        **inputs,
    }
    given = ScoreInputs(**inputs)
    scores = scorer.score(given).scores
    return STARKV.select_tokens(scores, given.real, length, given.window, capacity)
