"""A frame that is cut by the end of a chunk is one frame."""

import pytest
import torch

import starkv_compile
from starkv_compile import StarKVCache
from starkv_compile.cache.chunk import describe_chunk
from starkv_compile.kernels.reference.star import frame_boost
from starkv_compile.testing import TinyPrompt, generate, tiny_inputs, tiny_model
from starkv_compile.vision.layout import stored_slots
from tests.support.chunks import skip_if_images_cannot_be_cut
from tests.support.crossing import first_in_ci

GRIDS = ((4, 4), (3, 5), (2, 6))


def described(model, inputs, *ends):
    """The layout after chunks that end at `ends`, described as `generate` passes them."""
    cache, start = StarKVCache(model.config), 0
    for end in ends:
        for layer in cache.compressed_layers:
            layer.seen = start
        chunk = {"input_ids": inputs["input_ids"][:, start:end]}
        if "position_ids" in inputs:
            chunk["position_ids"] = inputs["position_ids"][..., start:end]
        chunk["attention_mask"] = inputs["attention_mask"][:, :end]
        describe_chunk(cache, model, chunk)
        start = end
    return cache.shared.layout


def prompt(family, *prompts):
    model, inputs = tiny_model(family), tiny_inputs(family, *prompts)
    if family != "llava":
        inputs["position_ids"], _ = model.model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
    return model, inputs


def same(one, other):
    """Whether two layouts say the same. Rows and columns of text mean nothing."""
    visual = one.frame >= 0
    return (
        torch.equal(one.frame, other.frame)
        and torch.equal(one.counted, other.counted)
        and torch.equal(one.row[visual], other.row[visual])
        and torch.equal(one.column[visual], other.column[visual])
    )


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"])
def test_a_prompt_in_chunks_is_described_as_in_one(family):
    """Wherever it is cut: after the first token of a frame, or before its last."""
    grids = ((4, 4),) * 3 if family == "llava" else GRIDS
    model, inputs = prompt(family, TinyPrompt(grids, 9))
    length = inputs["input_ids"].shape[1]
    whole = described(model, inputs, length)
    assert whole.frame.max() == 2
    for size in range(2, length):
        ends = [*range(size, length, size), length]
        assert same(described(model, inputs, *ends), whole), size
    if family != "llava":
        cache = StarKVCache(model.config)
        describe_chunk(cache, model, {**inputs, "position_ids": None})
        assert cache.shared.layout.grid == "grid"
        assert same(cache.shared.layout, whole)


def test_rows_of_a_batch_are_cut_at_different_places():
    model, inputs = prompt("qwen2_5_vl", TinyPrompt(GRIDS, 9), TinyPrompt(((3, 5),), 4, seed=2))
    length = inputs["input_ids"].shape[1]
    whole = described(model, inputs, length)
    padding = int((inputs["attention_mask"] == 0).sum())
    for size in (padding + 1, padding + 6, padding + 14, length - 8):
        ends = [*range(size, length, size), length]
        assert same(described(model, inputs, *ends), whole), size


def test_the_current_frame_is_the_whole_frame():
    model, inputs = prompt("qwen2_5_vl", TinyPrompt(((4, 4), (3, 5)), 9))
    frame = described(model, inputs, inputs["input_ids"].shape[1]).frame[0]
    newest = (frame == 1).nonzero()[:, 0]
    cut = int(newest[6])
    layout = described(model, inputs, cut, len(frame))
    assert layout.earlier[0].tolist()[:6] == newest[:6].tolist()
    assert (layout.earlier[0][6:] == -1).all()
    assert (layout.current[0][:9] + cut).tolist() == newest[6:].tolist()
    everything = torch.arange(len(frame))[None]
    current = torch.where(layout.current >= 0, layout.current + cut, -1)
    slots = stored_slots(everything, layout.earlier, current)
    assert slots[0].tolist() == newest.tolist()
    dropped = [*range(10), int(newest[1]), int(newest[4])]
    kept = torch.tensor([[i for i in range(len(frame)) if i not in dropped]])
    current = torch.where(layout.current >= 0, layout.current + cut - len(dropped), -1)
    slots = stored_slots(kept, layout.earlier, current)[0]
    stay = [i for i in newest.tolist() if i not in dropped]
    assert kept[0][slots[slots >= 0]].tolist() == stay
    assert slots.tolist().index(-1) == len(stay), "no gap"
    heads = torch.stack([everything, everything], 1)
    heads[:, 1] += 1  # a head that dropped the first token stores all others a slot earlier
    current = torch.where(layout.current >= 0, layout.current + cut, -1)
    slots = stored_slots(heads, layout.earlier, current)
    assert slots[0].tolist() == [*newest[6:].tolist(), *[-1] * 6]


def test_a_frame_after_a_reply_or_after_a_whole_one_is_another():
    model, inputs = prompt("llava", TinyPrompt(((4, 4),), 0))
    ids = inputs["input_ids"][:, :19]  # ends in the frame
    image = {"input_ids": ids[:, 3:]}
    for between, frames in ((0, 1), (1, 2)):
        cache = StarKVCache(model.config)
        describe_chunk(cache, model, {"input_ids": ids})
        for layer in cache.compressed_layers:
            layer.seen = 19 + between
        describe_chunk(cache, model, image)
        assert cache.shared.layout.frame.max() + 1 == frames
    model, inputs = prompt("qwen2_5_vl", TinyPrompt(((4, 4),), 0))
    image = {"input_ids": inputs["input_ids"][:, 3:19], "image_grid_thw": inputs["image_grid_thw"]}
    cache = StarKVCache(model.config)
    for seen in (0, 16):
        for layer in cache.compressed_layers:
            layer.seen = seen
        describe_chunk(cache, model, image)
    assert cache.shared.layout.frame.max() == 1, "grids say that both are whole"


def test_only_tokens_with_hidden_states_are_boosted():
    """Those that an earlier chunk stored have none."""
    torch.manual_seed(0)
    hidden, frame = torch.randn(1, 6, 8), torch.zeros(1, 10, dtype=torch.int64)
    cut = frame_boost(hidden, frame, torch.tensor([[2, 3, 4, 5, 6]]), 8, 3.5)
    alone = frame_boost(hidden, frame, torch.tensor([[4, 5, 6]]), 8, 3.5)
    assert torch.equal(cut, alone)
    assert cut.nonzero()[:, 1].tolist() == [4, 5, 6]


POLICIES = {
    "snapkv_mean": {},
    "current_frame": {},
    "age_decay": {},
    "starkv": {"boost": 0.0},
    "gui_kv": {"boost": 0.0},
}
"""Those of novelty treat what an earlier chunk stored in another way, as of an earlier prompt."""


@pytest.mark.parametrize(
    ("policy", "family"), first_in_ci([(p, f) for f in ("qwen2_5_vl", "llava") for p in POLICIES])
)
def test_a_cut_frame_is_scored_as_a_whole_one(family, policy):
    """The first chunk is below the budget, so the second one scores what a single prompt would."""
    if family.startswith("qwen"):
        skip_if_images_cannot_be_cut()
    inputs = tiny_inputs(family, TinyPrompt(((4, 4), (4, 4)), 13))
    cut = {"window": 4, "policy": policy, "budget_tokens": 40, **POLICIES[policy]}
    model = starkv_compile.compile(tiny_model(family), inner="eager", **cut)
    caches = []
    for size in (None, 30):  # 21 to 36 are the second frame
        caches.append(StarKVCache(model.config))
        generate(model, inputs, 2, past_key_values=caches[-1], prefill_chunk_size=size)
    one, two = (cache.shared.layout for cache in caches)
    assert two.frame.max() == 1
    assert same(one, two)
    for left, right in zip(*(cache.compressed_layers for cache in caches), strict=True):
        assert left.stored == right.stored == 41
        assert left.kept.shape == right.kept.shape
        assert torch.equal(left.kept, right.kept)
