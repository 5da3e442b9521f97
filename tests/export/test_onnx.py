"""Exported graphs against the compiled model: same kept tokens, same answers, same state."""

import json

import pytest
import torch

from starkv_compile import CacheError, StarKVCache, StarKVError
from starkv_compile.export.onnx.graphs import Graph
from starkv_compile.testing import TinyPrompt, generate, tiny_inputs
from tests.support.same import assert_same_cache
from tests.support.trajectory import steps

LENGTHS = {
    "traced": TinyPrompt(((4, 4), (3, 5)), text=20),
    "one frame": TinyPrompt(((6, 7),), text=12),
    "many frames": TinyPrompt(((4, 4), (2, 3), (5, 5), (4, 6)), text=150),
    "text": TinyPrompt((), text=40),
    "shorter than the window": TinyPrompt((), text=3),
    "window clipped": TinyPrompt((), text=18),
    "one token on a frame": TinyPrompt(((1, 1),), text=9),
}


CASES = [
    *((form, length) for form in ("topk", "novelty") for length in LENGTHS),
    *(
        ("threshold", length)
        for length in ("many frames", "window clipped", "one token on a frame")
    ),
]


@pytest.mark.parametrize(
    ("exported", "prompt"),
    [pytest.param(form, LENGTHS[length], id=f"{form}, {length}") for form, length in CASES],
    indirect=["exported"],
)
def test_one_prompt(exported, prompt):
    inputs = tiny_inputs(exported.family, prompt)
    mine, theirs = (generate(model, inputs, tokens=5) for model in exported.pair)
    assert torch.equal(mine.sequences, theirs.sequences)
    assert_same_cache(mine.past_key_values, theirs.past_key_values, exported.layers)
    for a, b in zip(mine.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("exported", ["topk", "novelty"], indirect=True)
def test_rows_of_a_batch_padded_on_the_left(exported):
    inputs = tiny_inputs(
        exported.family, TinyPrompt(((4, 4),), text=9), TinyPrompt(((3, 4), (5, 5)), text=30)
    )
    mine, theirs = (generate(model, inputs) for model in exported.pair)
    assert torch.equal(mine.sequences, theirs.sequences)
    assert_same_cache(mine.past_key_values, theirs.past_key_values, exported.layers)


@pytest.mark.parametrize(
    ("exported", "frames"), [("threshold", 8), ("novelty", 0)], indirect=["exported"]
)
def test_state_of_a_ten_step_trajectory(exported, frames):
    for (mine, left), (theirs, right) in zip(
        *(steps(m, exported.family, 10) for m in exported.pair), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
        assert_same_cache(left, right, exported.layers)
    layer = left.compressed_layers[0]
    assert int(layer.state[1]) == frames, "frames profiled"
    carried = (layer.novelties() != 1).sum()
    assert (carried > 0) == (frames == 0), "the other policy carries how new each token was"


def test_beams_and_right_padding(exported):
    inputs = tiny_inputs(exported.family, TinyPrompt(((4, 4),), text=20))
    mine, theirs = (generate(model, inputs, num_beams=3) for model in exported.pair)
    assert torch.equal(mine.sequences, theirs.sequences)
    inputs["attention_mask"][:, -2:] = 0
    with pytest.raises(CacheError, match="right-padded"):
        generate(exported.onnx, inputs)


def test_more_tokens_than_exported_for(exported):
    with pytest.raises(StarKVError, match="--max-seq 402"):
        generate(exported.onnx, tiny_inputs(exported.family, TinyPrompt((), text=400)))


@pytest.mark.parametrize("tokens", [2, 3, 5, 7, 12, 40])
def test_formulas_of_the_manifest(exported, tokens):
    described = json.loads((exported.folder / "export.json").read_text())
    known = {"budgeted": tokens, "stored": 0, "new": tokens, "max": max, "min": min}
    for name in ("capacity", "window", "kept"):
        known[name] = eval(described[name], {}, known)
    cache = StarKVCache(exported.onnx.config)
    ids = torch.arange(10, 10 + tokens)[None]
    exported.onnx(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    assert {layer.stored for layer in cache.compressed_layers} == {known["kept"]}


def test_manifest_lists_what_the_graphs_have(exported):
    folder = exported.folder
    described = json.loads((folder / "export.json").read_text())
    assert described["capacity"] == "budgeted * 3 // 10"
    for name, ports in described["graphs"].items():
        graph = Graph(folder / name)
        assert graph.inputs == [port["name"] for port in ports["inputs"]]
        assert graph.outputs == [port["name"] for port in ports["outputs"]]
    assert {"torch", "transformers", "onnx"} <= described["versions"].keys()
