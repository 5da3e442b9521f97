"""easy-VQA's benchmark, on a package of the same form made here."""

from __future__ import annotations

import random
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from benchmarks import easy_vqa_data
from benchmarks.easy_vqa import EasyVqa, EasyVqaBench, make_asked, make_prompts
from benchmarks.easy_vqa_data import IDS, PATCH, SIDE, fill, load_split, opening, sample_dialogues
from benchmarks.easy_vqa_model import build_model, predict
from starkv_compile.agent.batches import IGNORE
from starkv_compile.quality.variants import FULL, VARIANTS

WORDS = list(IDS)
SHAPES = {"black": (0, 0, 0), "red": (255, 0, 0), "blue": (0, 0, 255)}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Twelve images, a rectangle each, with three to five questions."""
    texts, answers, numbers, paths = [], [], [], {}
    for number in range(12):
        color = list(SHAPES)[number % 3]
        image = Image.new("RGB", (64, 64), (240, 250, 240))
        ImageDraw.Draw(image).rectangle((8, 16, 19, 23), SHAPES[color])
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


def test_every_question_is_put_to_the_cache_of_its_image(package):
    """The full cache answers as the model itself does, given image and questions in one."""
    design = EasyVqa(prompts=12)
    model = build_model(0).eval()
    bench = EasyVqaBench(design, (build_model(0).eval(), build_model(0).eval()), lambda: None)
    cell = bench.measure(FULL, 1.0)
    order = [image for images in design.batches() for image in images]
    assert sorted(order) == list(range(12))
    split, ordered = load_split("test"), design.ordered()
    for row, image in enumerate(order):
        for column, question in enumerate(ordered[image]):
            ids = opening(ordered[image][0])
            ids += make_asked([ordered[image]], column).ids[0].tolist()
            with torch.no_grad():
                said = predict(model, split.screens([image]), fill([ids]))
            assert cell.right[row, column] == (int(said[0, -1].argmax()) == question.answer)
    assert cell.same.all()
    assert cell.nbytes == cell.full_nbytes
    parts = design.slices()
    assert parts["all"].sum() == design.questions == 48
    assert parts["again"].sum() == 12
    assert sum(parts[kind].sum() for kind in ("yes or no", "shape", "colour")) == 48


@pytest.mark.parametrize("name", ["default", "oracle", "pyramidkv"])
def test_a_compacted_cache_is_measured_at_its_budget(package, name):
    model = build_model(0).eval()
    bench = EasyVqaBench(EasyVqa(prompts=6), (model, build_model(0).eval()), lambda: None)
    cell = bench.measure(VARIANTS[name], 0.2)
    assert cell.nbytes == pytest.approx(0.2 * cell.full_nbytes, rel=0.03)
    assert np.isnan(cell.recall)
    assert not (cell.right & ~(EasyVqa(6).slices()["all"] > 0)).any()


def test_the_oracle_keeps_the_shape(package):
    split, ordered = load_split("test"), EasyVqa(3).ordered()
    prompts = make_prompts(split, [0, 1], [ordered[0], ordered[0]])
    assert prompts.is_asked.sum(1).tolist() == [6, 6]
    assert (prompts.is_asked & ~prompts.is_image).sum() == 0


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    load_split.cache_clear()
    with pytest.raises(SystemExit, match="pip install easy-vqa"):
        easy_vqa_data.load_split("test")
