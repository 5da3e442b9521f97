"""Buffers of fixed length: as the compiled model, token by token.

So is the growing cache of `test_onnx.py`; exporting that as well here would cost half a minute.
"""

from collections import Counter

import pytest
import torch

from starkv_compile import StarKVCache, StarKVError
from starkv_compile.export.capture.slots import write_slots
from starkv_compile.export.runner import OnnxSession
from starkv_compile.export.tensorrt.trt_rules import refused
from starkv_compile.testing import TinyPrompt, generate, tiny_inputs
from tests.support.same import assert_same_cache

onnx_files = pytest.importorskip("onnx", reason="pip install '.[export]'")

pytestmark = pytest.mark.slow
SLOTS = 128


@pytest.fixture(scope="module")
def static(exports):
    return exports("static")


def turn(model, cache, inputs, replies):
    """A prompt on the cache, and `replies` greedy tokens: each token with its logits."""
    seen, ids = cache.get_seq_length(), inputs["input_ids"]
    more = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    for _ in range(replies):
        places = torch.arange(seen, seen + ids.shape[1]).expand(4, len(ids), -1)
        with torch.no_grad():
            out = model(
                input_ids=ids, position_ids=places, past_key_values=cache, logits_to_keep=1, **more
            )
        seen, more = seen + ids.shape[1], {}
        ids = out.logits[:, -1].argmax(-1, keepdim=True)
        yield ids, out.logits[:, -1]


def a_turn(step, family):
    frames = () if step % 3 == 2 else ((4, 4 + step % 2),)
    return tiny_inputs(family, TinyPrompt(frames, text=6 + 5 * step, seed=step))


def test_turns_of_one_session(static):
    left, right = (StarKVCache(static.onnx.config) for _ in static.pair)
    for step in range(5):
        inputs = a_turn(step, static.family)
        runs = turn(static.onnx, left, inputs, 4), turn(static.compiled, right, inputs, 4)
        for (mine, logits), (theirs, others) in zip(*runs, strict=True):
            assert torch.equal(mine, theirs)
            torch.testing.assert_close(logits, others, atol=1e-4, rtol=1e-4)
            assert_same_cache(left, right, static.layers)
    assert {layer.keys.shape[2] for layer in left.compressed_layers} == {SLOTS}


PROMPTS = {
    "shorter than the window": [TinyPrompt((), text=3)],
    "many frames": [TinyPrompt(((4, 4), (2, 3), (5, 5), (4, 6)), text=150)],
    "two alike": [TinyPrompt(((4, 4),), text=20), TinyPrompt(((4, 4),), text=20, seed=1)],
    "padded": [TinyPrompt(((4, 4),), text=9), TinyPrompt(((3, 4), (5, 5)), text=30)],
}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_one_prompt(static, prompts):
    inputs = tiny_inputs(static.family, *prompts)
    mine, theirs = (generate(model, inputs, tokens=5) for model in static.pair)
    assert torch.equal(mine.sequences, theirs.sequences)
    assert_same_cache(mine.past_key_values, theirs.past_key_values, static.layers)


def test_beams(static):
    inputs = tiny_inputs(static.family, TinyPrompt(((4, 4),), text=20))
    mine, theirs = (generate(model, inputs, num_beams=3).sequences for model in static.pair)
    assert torch.equal(mine, theirs)


def test_a_token_is_written_in_place(static):
    cache = StarKVCache(static.onnx.config)
    places = set()
    for _ in turn(static.onnx, cache, a_turn(0, static.family), 5):
        layer = cache.compressed_layers[0]
        places.add((layer.keys.data_ptr(), layer.values.data_ptr()))
    assert len(places) == 1
    assert layer.stored == layer.kept.shape[1] + 4
    assert not layer.keys[:, :, layer.stored :].any()


def test_a_fork_goes_its_own_way(static):
    """Both go on from the same tokens, the first with others than its twin."""
    family, model = static.family, static.onnx
    cache, whole = (StarKVCache(model.config) for _ in range(2))
    for one in (cache, whole):
        list(turn(model, one, a_turn(0, family), 3))
    twin = cache.fork()
    list(turn(model, cache, a_turn(2, family), 3))
    assert_same_cache(twin, whole, static.layers)
    runs = [list(turn(model, one, a_turn(1, family), 3)) for one in (twin, whole)]
    for (mine, _), (theirs, _) in zip(*runs, strict=True):
        assert torch.equal(mine, theirs)
    assert_same_cache(twin, whole, static.layers)


def test_sessions_move_between_kinds_of_cache(static):
    """Each model takes over what the other left: buffers, and a cache that grows."""
    moving, staying = (StarKVCache(static.onnx.config) for _ in range(2))
    for step in range(4):
        inputs = a_turn(step, static.family)
        run = list(turn(static.pair[step % 2], moving, inputs, 3))
        stay = list(turn(static.compiled, staying, inputs, 3))
        assert [int(ids) for ids, _ in run] == [int(ids) for ids, _ in stay]
    assert_same_cache(moving, staying, static.layers)


def test_a_saved_session_goes_on(static, tmp_path):
    family, processor = static.family, object()
    session = OnnxSession(static.folder, processor)
    list(turn(session.model, session.cache, a_turn(0, family), 3))
    session.prompt_length = session.cache.get_seq_length()
    session.input_ids = torch.zeros(1, session.prompt_length + 1, dtype=torch.int64)
    session.save(tmp_path / "session")
    loaded = OnnxSession.load(tmp_path / "session", static.folder, processor)
    runs = [list(turn(s.model, s.cache, a_turn(1, family), 3)) for s in (loaded, session)]
    for (_, mine), (_, theirs) in zip(*runs, strict=True):
        assert torch.equal(mine, theirs)


def test_full_buffers_are_named(static):
    cache = StarKVCache(static.onnx.config)
    run = turn(static.onnx, cache, tiny_inputs(static.family, TinyPrompt((), text=100)), 200)
    with pytest.raises(StarKVError, match=f"with {SLOTS} slots; export it again with --slots 129"):
        list(run)
    assert cache.compressed_layers[0].stored == SLOTS


def test_what_the_graphs_consist_of(static):
    for name in ("prefill", "decode"):
        file = onnx_files.load(static.folder / f"{name}.onnx", load_external_data=False)
        count = Counter(node.op_type for node in file.graph.node)
        assert (count["TensorScatter"], count["Attention"]) == (2 * static.layers, static.layers)
        assert "TensorScatter" not in {one.op for one in refused(file, 300)}
        reads = [(n.op_type, name) for n in file.graph.node for name in n.input]
        buffers = {port.name for port in file.graph.input if port.name.startswith("buffer.")}
        assert {kind for kind, name in reads if name in buffers} <= {"TensorScatter"}
        assert len(buffers) == (2 * static.layers if name == "prefill" else 0)
    lengths = {d.dim_param for port in file.graph.input for d in port.type.tensor_type.shape.dim}
    assert len(lengths - {""}) == 1, "of decoding's lengths the batch alone varies"
    attention = [node for node in file.graph.node if node.op_type == "Attention"]
    written = {n.output[0] for n in file.graph.node if n.op_type == "TensorScatter"}
    read = {name for node in attention for name in node.input[1:3]}
    assert read == written, "attention reads the buffers, whose heads nobody repeats"


def test_the_operator():
    buffer, new = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 2, 4)
    slot = torch.tensor([0, 7])
    expected = buffer.clone()
    expected[0, :, :2], expected[1, :, 7:] = new[0], new[1]
    assert torch.equal(write_slots(buffer, new, slot), expected)
    torch.library.opcheck(write_slots, (buffer, new, slot))
