"""The page: one file, its data exact, small enough for a long prompt."""

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from starkv_lab.inspection.axes import Axis
from starkv_lab.inspection.collect import Budget, Inspection
from starkv_lab.inspection.page import MAX_WIDTH, data_uri, packed, page_data, render
from starkv_lab.inspection.prompt import InspectedPrompt, Picture

from lab.tests.support.inspection_prompts import Numbers
from starkv_compile import StarKVConfig
from starkv_compile.kernels.reference import TokenBytes
from tests.support.crossing import slow

TYPES = {"u16": "<u2", "u32": "<u4", "bf16": "<u2"}


def unpack(part):
    values = np.frombuffer(base64.b64decode(part["bytes"]), TYPES[part["type"]])
    if part["type"] == "bf16":
        return (values.astype("<u4") << 16).view("<f4")
    return values


def made(pictures, rows, columns, layers, text, heads=1, rankings=1):
    """An inspection with random ranks: text, then frames."""
    generator = torch.Generator().manual_seed(0)
    cells, frames = rows * columns, len(pictures)
    length = text + frames * cells
    place = torch.arange(length) - text
    frame = torch.where(place < 0, -1, place // cells)
    offset = torch.where(place < 0, 0, place % cells)
    shape = (layers, heads, length)
    first = torch.rand(shape, generator=generator).argsort(-1)
    ranks = [(first + 7 * i) % length for i in range(rankings)]
    shares = (0.4, 0.2, 0.1, 0.05)
    budgets = tuple(
        Budget(share, (int(length * share),) * layers, (4,) * layers, ranks[i % rankings])
        for i, share in enumerate(shares)
    )
    names = ["attention", "final"]
    if heads == 1:
        names += ["boost", "spatial", "temporal", "novelty", "entropy"]
    values = torch.rand(len(names), layers, length, generator=generator)
    axes = tuple(
        Axis(name, name.title(), "", False, v) for name, v in zip(names, values, strict=True)
    )
    inputs = {"input_ids": torch.arange(length)[None]}
    prompt = InspectedPrompt(None, "a model", Numbers(), inputs, tuple(pictures), "which?")
    return Inspection(
        prompt,
        StarKVConfig(),
        frame,
        offset // columns,
        offset % columns,
        tuple(range(layers)),
        (TokenBytes(512, 100, 64),) * layers,
        budgets,
        axes,
    )


def screenshots(count, width, height):
    """Noise that no coding makes small: more bytes than a screen has."""
    return [
        Picture(f"s{i}", Image.effect_noise((width, height), 60).convert("RGB"))
        for i in range(count)
    ]


@pytest.mark.parametrize("rankings", [1, 4])
def test_rankings_give_back_the_kept_sets(rankings):
    inspection = made(screenshots(2, 40, 30), 3, 4, 2, text=9, heads=2, rankings=rankings)
    data = page_data(inspection)
    assert [budget["percent"] for budget in data["budgets"]] == [40, 20, 10, 5]
    assert len(data["rankings"]) == rankings
    for shown, budget in zip(data["budgets"], inspection.budgets, strict=True):
        ranking = data["rankings"][shown["ranking"]]
        order, start = unpack(ranking["order"]), 0
        for layer, listed in enumerate(ranking["listed"]):
            for head in range(2):
                best = order[start : start + listed][: shown["kept"][layer]]
                assert sorted(best.tolist()) == budget.places(layer, head)
                start += listed
        assert start == len(order)


def test_layout_and_scores_come_through():
    inspection = made(screenshots(2, 40, 30), 3, 4, 2, text=9)
    data = page_data(inspection)
    assert unpack(data["frame"]).tolist() == (inspection.frame + 1).tolist()
    assert unpack(data["row"]).tolist() == inspection.row.tolist()
    assert unpack(data["column"]).tolist() == inspection.column.tolist()
    assert data["words"][:9] == [f"w{i}" for i in range(9)]
    assert set(data["words"][9:]) == {""}
    for shown, axis in zip(data["axes"], inspection.axes, strict=True):
        given = axis.values.flatten().numpy()
        np.testing.assert_allclose(unpack(shown["values"]), given, rtol=2**-8)


def test_numbers_of_any_size():
    assert unpack(packed(torch.tensor([3, 65535]))).tolist() == [3, 65535]
    assert unpack(packed(torch.tensor([3, 65536]))).tolist() == [3, 65536]
    values = unpack(packed(torch.tensor([1e-30, torch.nan, 2.0**30])))
    np.testing.assert_allclose(values, [1e-30, np.nan, 2.0**30], rtol=2**-8)


def test_pictures_stay_lossless_unless_large():
    uri = data_uri(Image.new("RGB", (320, 200), (1, 2, 3)))
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert (uri[:22], picture.size) == ("data:image/png;base64,", (320, 200))
    assert picture.getpixel((9, 9)) == (1, 2, 3)
    uri = data_uri(Image.effect_noise((3200, 1000), 90).convert("RGB"))
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert (uri[:23], picture.size) == ("data:image/jpeg;base64,", (MAX_WIDTH, 500))


def test_pictures_cut_into_tiles_are_not_drawn_over():
    inspection = made(screenshots(2, 40, 30), 3, 4, 2, text=9)
    one = replace(inspection.prompt, pictures=inspection.prompt.pictures[:1])
    data = page_data(replace(inspection, prompt=one))
    assert [frame["image"] for frame in data["frames"]] == [None, None]
    assert [frame["title"] for frame in data["frames"]] == ["frame 1", "frame 2"]


def test_the_page_needs_nothing_else_and_no_text_ends_its_data():
    inspection = made(screenshots(1, 40, 30), 3, 4, 2, text=2)
    text = "</script><!--<img src=x onerror=alert(1)>"
    page = render(replace(inspection, prompt=replace(inspection.prompt, text=text)), (text,))
    assert page.count("</script>") == 2
    assert "onerror" not in page.replace("\\u003cimg src=x onerror", "")
    rest = re.sub(r"base64,[^\"]*|\"bytes\":\"[^\"]*\"", "", page)
    assert not re.search(r"https?:|//[a-z]|\bimport\b|fetch\(|url\(", rest)
    for link in re.findall(r"(?:src|href)=\"([^\"]*)", rest):
        assert link.startswith("data:")
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', page).group(1)
    assert json.loads(embedded)["text"] == text


@pytest.mark.parametrize(("heads", "rankings"), [slow(1, 1), slow(4, 4, ci=True)])
def test_five_large_screenshots_in_28_layers_stay_below_15_megabytes(heads, rankings):
    inspection = made(
        screenshots(5, 1920, 1080), 38, 69, 28, text=390, heads=heads, rankings=rankings
    )
    assert len(inspection.frame) == 13500
    assert len(render(inspection)) < 15e6
