"""Which token is text and which a place on a frame, from every source there is."""

import pytest
import torch

from starkv_compile.cache.cache import StarKVCache
from starkv_compile.cache.chunk import describe_chunk
from starkv_compile.kernels.reference.layout import layout_from_image_mask, layout_from_positions
from starkv_compile.testing import TinyPrompt, tiny_inputs, tiny_model

GRIDS = ((4, 4), (3, 5), (2, 6))


def expected(prompt):
    """frame, row, column of each token, written out."""
    tokens = [(-1, 0, 0)] * 2
    for frame, (rows, columns) in enumerate(prompt.grids):
        places = [(frame, r, c) for r in range(rows) for c in range(columns)]
        tokens += [(-1, 0, 0), *places, (-1, 0, 0)]
    return tokens + [(-1, 0, 0)] * prompt.text


def described(frame, row, column):
    return [
        (f, max(r, 0), max(c, 0))
        for f, r, c in zip(frame.tolist(), row.tolist(), column.tolist(), strict=True)
    ]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("source", ["grid", "positions"])
def test_multimodal_rope_models(family, source):
    model, prompt = tiny_model(family), TinyPrompt(GRIDS, 11)
    inputs = tiny_inputs(family, prompt)
    if source == "positions":
        positions, _ = model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs.pop("image_grid_thw")
        )
        inputs["position_ids"] = positions
    cache = StarKVCache(model.config)
    describe_chunk(cache, model, inputs)
    layout = cache.shared.layout
    assert layout.grid == source
    assert described(layout.frame[0], layout.row[0], layout.column[0]) == expected(prompt)
    newest = (layout.frame[0] == 2).nonzero()[:, 0]
    assert layout.current[0].tolist() == newest.tolist()


def test_left_padding_is_no_frame():
    family = "qwen2_5_vl"
    model = tiny_model(family)
    inputs = tiny_inputs(family, TinyPrompt(GRIDS, 11), TinyPrompt(((4, 4),), 5))
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    frame = layout_from_positions(positions)[0]
    assert torch.equal(frame >= 0, inputs["mm_token_type_ids"] > 0)


def test_square_guess_where_nothing_tells_the_shape():
    model = tiny_model("llava")
    prompt = TinyPrompt(((4, 4), (4, 4)), 6)
    cache = StarKVCache(model.config)
    describe_chunk(cache, model, tiny_inputs("llava", prompt))
    layout = cache.shared.layout
    assert layout.grid == "square"
    assert described(layout.frame[0], layout.row[0], layout.column[0]) == expected(prompt)


def test_image_mask_of_a_frame_that_is_no_square():
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[0, 3:15] = True  # 12 tokens read as 3 rows of 4
    frame, row, column, current = layout_from_image_mask(mask)
    assert row[0, 3:15].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert column[0, 3:15].tolist() == [0, 1, 2, 3] * 3
    assert frame[0].tolist() == [-1] * 3 + [0] * 12 + [-1] * 5
    assert current[0].tolist() == [*range(3, 15), *[-1] * 8]


def test_later_chunks_count_frames_on():
    family = "qwen2_5_vl"
    model = tiny_model(family)
    cache = StarKVCache(model.config)
    first, second = TinyPrompt(((4, 4),), 3), TinyPrompt(((2, 2), (3, 3)), 4)
    describe_chunk(cache, model, tiny_inputs(family, first))
    seen = 2 + 18 + 3 + 5  # five tokens were generated in between
    for layer in cache.compressed_layers:
        layer.seen = seen
    describe_chunk(cache, model, tiny_inputs(family, second))
    frame = cache.shared.layout.frame[0]
    assert frame.max() == 2
    assert frame[23:seen].tolist() == [-1] * 5
    assert (frame == 0).sum() == 16
    assert (frame == 2).sum() == 9
    offset = (frame == 2).nonzero()[0, 0] - seen
    assert cache.shared.layout.current[0, 0] == offset


def test_a_turn_without_a_frame_keeps_the_pattern_as_wide():
    family = "qwen2_5_vl"
    model = tiny_model(family)
    cache = StarKVCache(model.config)
    describe_chunk(cache, model, tiny_inputs(family, TinyPrompt(((4, 4),), 3)))
    describe_chunk(cache, model, tiny_inputs(family, TinyPrompt((), 3)))
    assert cache.shared.layout.current.tolist() == [[-1] * 16]


def test_embeddings_alone_leave_the_layout_unknown():
    model = tiny_model("llava")
    cache = StarKVCache(model.config)
    describe_chunk(cache, model, {"inputs_embeds": torch.zeros(1, 9, 64)})
    assert cache.shared.layout is None


def test_counts_are_of_the_tokens_that_a_budget_counts():
    """No padding; replies are text; what is rolled back is not counted."""
    model = tiny_model("qwen2_5_vl")
    inputs = tiny_inputs("qwen2_5_vl", TinyPrompt(GRIDS[:1], 11), TinyPrompt(GRIDS, 4))
    padding = (inputs["attention_mask"] == 0).sum(1)
    assert int(padding.max()) > 0
    cache = StarKVCache(model.config)
    describe_chunk(cache, model, inputs)
    layout = cache.shared.layout
    visual = torch.tensor([16, 43])
    text = inputs["input_ids"].shape[1] - padding - visual
    assert layout.counts.tolist() == torch.stack([text, visual], dim=1).tolist()
    described = layout.seen
    layout.pad_text(described + 3)
    assert layout.counts.tolist() == torch.stack([text + 3, visual], dim=1).tolist()
    layout.truncate(described - 2)
    assert layout.counts.tolist() == torch.stack([text - 2, visual], dim=1).tolist()
    describe_chunk(cache, model, inputs)  # the call failed, and is repeated
    assert layout.counts.tolist() == torch.stack([text, visual], dim=1).tolist()
    layout.truncate(int(padding.max()) - 1)
    assert layout.counts[padding.argmax()].tolist() == [0, 0]
    describe_chunk(cache, model, inputs)
    layout.select(torch.tensor([1]))
    assert layout.counts.tolist() == [[int(text[1]), 43]]


def test_positions_of_other_rows_are_not_the_prompts():
    """As transformers 5.17 passes them with the second chunk of a prompt: of no row."""
    model, inputs = tiny_model("qwen2_5_vl"), tiny_inputs("qwen2_5_vl", TinyPrompt(((4, 4),), 6))
    del inputs["image_grid_thw"]
    inputs["position_ids"] = torch.zeros(4, 0, inputs["input_ids"].shape[1], dtype=torch.int64)
    cache = StarKVCache(model.config)
    describe_chunk(cache, model, inputs)
    assert cache.shared.layout.grid == "square"
    assert cache.shared.layout.frame.shape == inputs["input_ids"].shape
