"""The paper's released scoring, matched step by step.

Each file holds one run of the release on synthetic tensors (float32): inputs, every
intermediate score, and the kept indices. Steps of a file share state, as a trajectory does.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from starkv_compile import StarKVConfig
from starkv_compile.export.capture.counting import RANKS, information_by_table
from starkv_compile.kernels.reference.attention import window_attention
from starkv_compile.kernels.reference.capacity import clip_window
from starkv_compile.kernels.reference.selection import select_tokens
from starkv_compile.kernels.reference.spatial import Counting
from starkv_compile.kernels.reference.star import Layout, State, fresh_state, star_scores

FILES = sorted((Path(__file__).parents[1] / "data" / "golden").glob("*.npz"))


def config_of(meta):
    hyper = meta["hyper"]
    return StarKVConfig.paper(
        budget=meta["budget"] / 100,
        window=hyper["window"],
        boost=hyper["alpha"],
        boost_temperature=hyper["temperature"],
        mi_weight=hyper["lam"],
        mi_warm_steps=hyper["steps"],
        mi_ramp_steps=hyper["ramp"],
        mi_decay=hyper["decay"],
        mi_temperature=hyper["tau"],
        frame_decay=hyper["delta"],
        frame_floor=hyper["dmin"],
        pattern_decay=hyper["rho"],
        stability_floor=hyper["eps"],
        entropy_low=hyper["tmin"],
        entropy_high=hyper["tmax"],
    )


def layout_of(length, spans):
    frame = torch.full((1, length), -1)
    for i, (start, end) in enumerate(spans):
        frame[0, start:end] = i
    start, end = spans[-1] if spans else (0, 0)
    current = torch.arange(start, end)[None] if spans else torch.full((1, 1), -1)
    unused = torch.zeros_like(frame)  # the paper guesses a square
    return Layout(frame, unused, unused, current)


def test_all_files_are_here():
    assert len(FILES) == 10


COUNTINGS = {
    "reference": Counting(),
    **{f"exported as {form}": Counting(RANKS[form], information_by_table(1024)) for form in RANKS},
}


@pytest.mark.parametrize("counting", COUNTINGS.values(), ids=COUNTINGS)
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_matches_release(path, counting):
    data = np.load(path)
    meta = json.loads(str(data["meta"]))
    config = config_of(meta)
    groups = meta["G"]
    state = None
    for i, step in enumerate(meta["steps"]):

        def array(name, i=i):
            return torch.from_numpy(data[f"s{i}_{name}"])[None]

        layout = layout_of(step["length"], step["spans"])
        tokens = layout.current.shape[1]
        if state is None or state.pattern.shape[-1] != tokens:
            fresh = torch.zeros(1, groups, tokens), torch.zeros(1, dtype=torch.long)
            state = (
                State(torch.zeros(1, groups), torch.zeros(1, dtype=torch.long), *fresh)
                if state is None
                else State(state.mi, state.mi_steps, *fresh)
            )
        capacity = config.capacity(step["length"])
        assert capacity == step["capacity"]
        assert clip_window(config.window, capacity, step["length"]) == step["window"]
        read = (
            array("query_window"),
            array("key"),
            None,
            meta["d"] ** -0.5,
            config.window,
            capacity,
        )
        # Each query head as a group of its own: the scores before heads are fused.
        heads = window_attention(*read, per_head=True)
        head_state = fresh_state(heads[..., None], layout.current)
        by_head = star_scores(
            heads, array("hidden"), None, layout, head_state, config.policy, counting
        ).group
        scores = star_scores(
            window_attention(*read),
            array("hidden"),
            None,
            layout,
            state,
            config.policy,
            counting,
        )
        state = scores.state
        kept = select_tokens(scores.final, None, step["length"], config.window, capacity)

        expected = {
            "head_scores": by_head,
            "group_scores": scores.group,
            "group_weights": scores.weights,
            "score_spatial": scores.spatial,
            "score_temporal": scores.temporal,
            "score_final": scores.final,
        }
        if step["spans"]:
            expected["mi_ema"] = state.mi
        for name, ours in expected.items():
            torch.testing.assert_close(
                ours,
                array(name),
                rtol=1e-5,
                atol=1e-7,
                msg=lambda m, at=f"step {i} {name}": f"{at}: {m}",
            )
        assert kept[0].tolist() == array("kept")[0].tolist(), f"step {i}"
