"""easy-VQA's benchmark, on a package of the same form made here."""

from __future__ import annotations

import random
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from starkv_lab.agent.batches import IGNORE
from starkv_lab.quality.variants import FULL, VARIANTS

from benchmarks import easy_vqa_data
from benchmarks.easy_vqa import EasyVqa, EasyVqaBench, make_asked, make_prompts
from benchmarks.easy_vqa_data import IDS, PATCH, SIDE, fill, load_split, opening, sample_dialogues
from benchmarks.easy_vqa_model import build_model, predict
from starkv_compile.errors import OptionError
from tests.support.crossing import slow

WORDS = list(IDS)
SHAPES = {"black": (0, 0, 0), "red": (255, 0, 0), "blue": (0, 0, 255)}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Twelve images, a rectangle each, with three to five questions."""
    texts, answers, numbers, paths = [], [], [], {}
    for number in range(12):
        color = list(SHAPES)[number % 3]
        image = Image.new("RGB", (64, 64), (240, 250, 240))
        top = 16 + 4 * (number // 3)
        ImageDraw.Draw(image).rectangle((8, top, 19, top + 7), SHAPES[color])
        paths[number] = str(tmp_path / f"{number}.png")
        image.save(paths[number])
        asked = [
            ("what color is the rectangle?", color),
            ("Is there a red shape?", "yes" if color == "red" else "no"),
            ("what shape is in the image?", "rectangle"),
            ("is there not a circle in the image?", "yes"),
            ("is no blue shape present?", "no" if color == "blue" else "yes"),
        ][: 3 + number % 3]
        for text, answer in [*asked, asked[0]]:  # one of them twice
            texts.append(text)
            answers.append(answer)
            numbers.append(number)
    made = types.ModuleType("easy_vqa")
    for name in ("train", "test"):
        setattr(made, f"get_{name}_image_paths", lambda: paths)
        setattr(made, f"get_{name}_questions", lambda: (texts, answers, numbers))
    monkeypatch.setitem(sys.modules, "easy_vqa", made)
    load_split.cache_clear()
    yield
    load_split.cache_clear()


def test_a_split_is_read_as_published(package):
    split = load_split("test")
    assert [len(questions) for questions in split.questions] == [3, 4, 5] * 4
    assert " ".join(WORDS[i] for i in split.questions[1][1].text) == "is there a red shape"
    assert WORDS[split.questions[1][1].answer] == "yes"
    screens = split.screens([1])
    assert screens.grid_thw.tolist() == [[1, SIDE, SIDE]]
    shape = screens.cells.view(SIDE, SIDE)
    assert shape.nonzero().tolist() == [[r, c] for r in (4, 5) for c in (2, 3, 4)]
    red = split.pixels[1].view(SIDE, SIDE, 3, PATCH, PATCH)[4, 2]
    assert red[0].eq(1).all()
    assert red[1:].eq(-1).all()


def test_an_answer_is_learned_where_the_reply_begins(package):
    _, text = sample_dialogues(random.Random(0), load_split("train"), 8, 4, 0.5)
    assert text.input_ids[text.labels != IGNORE].eq(IDS["<|agent|>"]).all()
    spoken = silent = 0
    for ids, labels in zip(text.input_ids, text.labels, strict=True):
        for place in (labels != IGNORE).nonzero()[:, 0].tolist():
            follows = int(ids[place + 1]) if place + 1 < len(ids) else IDS["<|pad|>"]
            spoken += follows == labels[place]
            silent += follows in (IDS["<|end|>"], IDS["<|pad|>"])
    assert spoken
    assert silent
    assert spoken + silent == int((text.labels != IGNORE).sum())


@pytest.mark.slow
def test_every_question_is_put_to_the_cache_of_its_image(package):
    """The full cache gives the logits of the model itself, given image and questions in one.

    Untrained, it says one word to everything: words would not tell the questions apart.
    """
    design, split = EasyVqa(prompts=12), load_split("test")
    model, ordered = build_model(0).eval(), EasyVqa(prompts=12).ordered()
    bench = EasyVqaBench(design, (build_model(0).eval(), build_model(0).eval()), lambda: None)
    found = []
    for images, (seen, asked) in zip(design.batches(), bench.batches, strict=True):
        cache = bench.reader.read(seen)
        for column, one in enumerate(asked):
            logits = bench.reader.put(cache, seen, one.ids)
            for row, image in enumerate(images):
                questions = ordered[image]
                assert one.there[row] == (column < len(questions))
                if not one.there[row]:
                    continue
                ids = opening(questions[0]) + make_asked([questions], column).ids[0].tolist()
                with torch.no_grad():
                    said = predict(model, split.screens([image]), fill([ids]))[0, -1]
                torch.testing.assert_close(logits[row, one.last[row]], said, rtol=0, atol=2e-4)
                assert one.answer[row] == questions[column].answer
                found.append(said)
    assert len(found) == design.questions == 48
    apart = torch.cdist(torch.stack(found), torch.stack(found), p=torch.inf)
    assert apart.fill_diagonal_(1).min() > 1e-3, "some other question would have passed"
    cell = bench.measure(FULL, 1.0)
    assert cell.same.all()
    assert cell.nbytes == cell.full_nbytes
    parts = design.slices()
    assert parts["all"].sum() == 48
    assert parts["again"].sum() == 12
    assert sum(parts[kind].sum() for kind in ("yes or no", "shape", "colour")) == 48


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", slow("oracle"), slow("pyramidkv")])
def test_a_compacted_cache_is_measured_at_its_budget(package, name):
    model = build_model(0).eval()
    bench = EasyVqaBench(EasyVqa(prompts=6), (model, build_model(0).eval()), lambda: None)
    cell = bench.measure(VARIANTS[name], 0.2)
    assert cell.nbytes == pytest.approx(0.2 * cell.full_nbytes, rel=0.03)
    assert np.isnan(cell.recall)
    assert not (cell.right & ~(EasyVqa(6).slices()["all"] > 0)).any()


def test_the_oracle_is_told_where_the_shape_is(package):
    split, ordered = load_split("test"), EasyVqa(3).ordered()
    prompts = make_prompts(split, [0, 1], [ordered[0], ordered[0]])
    assert prompts.is_asked.sum(1).tolist() == [6, 6]
    assert (prompts.is_asked & ~prompts.is_image).sum() == 0


def test_more_images_than_there_are(package):
    with pytest.raises(OptionError, match="images=13: expected 1 to 12"):
        EasyVqa(13)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    load_split.cache_clear()
    with pytest.raises(SystemExit, match="pip install easy-vqa"):
        easy_vqa_data.load_split("test")
