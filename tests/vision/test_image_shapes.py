"""Rows and columns of images, from what the vision tower was given and gave."""

import copy
from types import SimpleNamespace

import pytest
import torch
from starkv_lab.matrix.prompts import GRIDS, make_prompt
from starkv_lab.matrix.tiny import families, tiny_model

import starkv_compile
from starkv_compile.vision.image_shapes import deal_out, image_shapes


def tokens(count, total=60):
    return (torch.arange(total) < count)[None]


def encoded(features, **note):
    output = SimpleNamespace(pooler_output=features, starkv_shapes=note)
    return {"mm_encoder_outputs": {"image": output}}


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_grids_of_patches_whatever_a_token_merges(merge):
    grid = torch.tensor([[1, 4 * merge, 6 * merge], [2, 3 * merge, 2 * merge]])
    expected = [(4, 6), (3, 2), (3, 2)]
    assert image_shapes(tokens(36), {"image_grid_thw": grid}) == expected
    assert image_shapes(tokens(36), encoded(None, image_grid_thw=grid)) == expected


def test_images_and_videos_together_are_not_told_apart():
    grid = torch.tensor([[1, 4, 6]])
    assert image_shapes(tokens(48), {"image_grid_thw": grid, "video_grid_thw": grid}) == []
    named = encoded(
        None, image_grid_thw=torch.tensor([[1, 4, 4]])
    )  # a video is three times as long
    named["mm_encoder_outputs"]["video"] = SimpleNamespace()
    assert image_shapes(tokens(16), named) == []


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [(24, (80, 120), [(4, 6)]), (24, (81, 118), [(4, 6)]), (23, (80, 120), []), (24, (16, 16), [])],
)
def test_sizes_in_pixels_where_the_tokens_fit_them(count, size, expected):
    named = encoded([torch.zeros(count, 8)], image_sizes=torch.tensor([size]))
    assert image_shapes(tokens(count), named) == expected


def test_tokens_that_end_a_row_are_text():
    """Pixtral's images: a break token after each row."""
    is_image = torch.tensor([[False, *[True, True, True, False] * 2, True]])
    frame, row, column = deal_out(is_image, [(2, 3), (1, 1)])
    assert frame[0].tolist() == [-1, 0, 0, 0, -1, 0, 0, 0, -1, 1]
    assert row[0][is_image[0]].tolist() == [0, 0, 0, 1, 1, 1, 0]
    assert column[0][is_image[0]].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert deal_out(is_image, [(2, 3)]) is None
    assert deal_out(is_image, [(2, 3), (1, 1), (1, 1)]) is None


def test_models_with_plain_positions_know_their_grids():
    """OpenCUA's layout: Qwen's vision tower, 1-D positions; no graph shows rows and columns."""
    family = "hyperclovax_vision_v2"
    if family not in families():
        pytest.skip(f"no {family} in this transformers")
    model = starkv_compile.compile(tiny_model(family), budget=0.3, inner="eager")
    out = model.generate(
        **make_prompt(family, model).arguments, max_new_tokens=1, return_dict_in_generate=True
    )
    layout = out.past_key_values.shared.layout
    assert layout.grid == "grid"
    for i, (rows, columns) in enumerate(GRIDS):
        here = layout.frame[0] == i
        assert (layout.row[0][here].max() + 1, layout.column[0][here].max() + 1) == (rows, columns)


def test_a_copied_model_encodes_with_its_own_vision_tower():
    family = "llava"
    model = starkv_compile.compile(tiny_model(family), budget=0.3, inner="eager")
    other = copy.deepcopy(model)
    pixels = make_prompt(family, model).arguments["pixel_values"]
    with torch.no_grad():
        before = other.base_model.get_image_features(pixel_values=pixels).pooler_output
        for parameter in model.parameters():
            parameter.zero_()
        after = other.base_model.get_image_features(pixel_values=pixels).pooler_output
    assert torch.equal(torch.cat(list(before)), torch.cat(list(after)))
    assert starkv_compile.undo(model)
    assert "get_image_features" not in vars(model.base_model)
