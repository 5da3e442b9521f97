"""The demo, on an agent with random weights: pictures, tables, and how it fails."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from starkv_lab.agent import load_agent, save_agent
from starkv_lab.agent.architecture import build_config
from starkv_lab.demo import demo
from starkv_lab.demo.demo import DemoOptions, run_demo
from starkv_lab.demo.kept import LayerKept, frame_grids, kept_by_layer
from starkv_lab.demo.picture import EDGE, MAX_WIDTH, PAPER, TITLE, Shot, draw_kept, geometry
from starkv_lab.demo.turns import episode_turns, image_turns
from starkv_lab.demo.ways import ways
from transformers import Qwen3VLForConditionalGeneration

from starkv_compile.cli import main
from starkv_compile.errors import StarKVError
from starkv_compile.reporting import readable_bytes


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agent")
    torch.manual_seed(0)
    save_agent(Qwen3VLForConditionalGeneration(build_config()), folder)
    return folder


@pytest.fixture(scope="module")
def ran(agent, tmp_path_factory):
    """(results, what was printed, output folder) of one demo of two frames."""
    out = tmp_path_factory.mktemp("out")
    console = Console(file=io.StringIO(), width=160)
    results = run_demo(DemoOptions(frames=2, budget=0.5, out=out, agent=agent), console)
    return results, console.file.getvalue(), out


def test_checkpoint_round_trip(agent, tmp_path):
    model, processor = load_agent(agent)
    assert not model.training
    assert processor.tokenizer.decode(model.generation_config.eos_token_id) == "<|end|>"
    assert processor.tokenizer.decode(model.generation_config.pad_token_id) == "<|pad|>"
    save_agent(model.state_dict(), tmp_path / "again")
    again, _ = load_agent(tmp_path / "again")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


@pytest.mark.slow(ci=True)
def test_same_questions_full_and_compressed(ran):
    full, paper, default = ran[0]
    assert [r.way.name for r in ran[0]] == ["full", "paper", "default"]
    assert len(full.replies) == len(paper.replies) == len(default.replies) == 4
    assert full.stored == full.seen
    assert full.nbytes == full.full_nbytes
    for result in (paper, default):
        assert result.stored < 0.6 * result.seen
        assert result.nbytes == result.full_nbytes * result.stored // result.seen
        assert 0 < result.nbytes < result.peak_nbytes < full.peak_nbytes
        assert result.token_seconds > 0
        assert 0 < result.run_seconds < result.first_run_seconds


@pytest.mark.slow
def test_tables_say_what_was_measured(ran):
    results, text, out = ran
    assert f" -> {results[-1].replies[0]}" in text, "shown as it came"
    for result in results:
        assert result.way.title in text
        assert f"{result.seen:,}" in text
        for number in (result.nbytes, result.full_nbytes, result.peak_nbytes):
            assert readable_bytes(number) in text
    assert "right answers" in text
    for turn in episode_turns(2, 0):
        assert turn.text in text
        assert turn.question.answer in text
    assert str(out / "kept-paper.png") in text


def yellow_cells(picture, left, top, grid, cell):
    """Cells of one drawn screenshot whose corner pixel has the colour of the kept."""
    pixels = np.asarray(picture)
    return {
        (row, column)
        for row in range(grid[0])
        for column in range(grid[1])
        if tuple(pixels[top + row * cell, left + column * cell]) == EDGE
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", [1, 2])
def test_picture_shows_what_the_cache_keeps(ran, way):
    results, _, out = ran
    result = results[way]
    cache = result.cache
    kept, grids = kept_by_layer(cache), frame_grids(cache)
    shots = [
        Shot(turn.image, "", grid) for turn, grid in zip(episode_turns(2, 0), grids, strict=False)
    ]
    assert [(g[1] * 32, g[0] * 32) for g in grids] == [shot.image.size for shot in shots]
    place = geometry(shots, len(kept))
    with Image.open(out / f"kept-{result.way.name}.png") as file:
        picture = file.convert("RGB")
    assert picture.size == place.size
    assert picture.width <= MAX_WIDTH
    assert picture.height > (1 + len(kept)) * grids[0][0] * place.cell
    assert picture.getpixel((0, 0)) == PAPER
    assert len(kept) == 4
    for number, layer in enumerate(kept):
        stored = cache.compressed_layers[number].kept
        assert layer.tokens == stored.shape[1] == int(0.5 * layer.seen)
        assert sum(map(len, layer.frames)) == int(
            (cache.shared.layout.frame[0][stored[0]] >= 0).sum()
        )
        top = place.top + TITLE + (1 + number) * place.row_height + TITLE
        for shot, left, cells in zip(shots, place.left, layer.frames, strict=True):
            assert yellow_cells(picture, left, top, shot.grid, place.cell) == cells


@pytest.mark.parametrize("grids", [[(6, 6)], [(10, 11)] * 8, [(2, 36), (36, 2)], [(1, 1)] * 3])
def test_pictures_of_any_grids_fit(grids):
    shots = [Shot(Image.new("RGB", (99, 50)), "step 1", grid) for grid in grids]
    layer = LayerKept(tuple(frozenset({(0, 0)}) for _ in grids), 3, 50)
    picture = draw_kept("title", shots, [layer, layer])
    assert picture.width <= MAX_WIDTH
    place = geometry(shots, 2)
    ends = [x + g[1] * place.cell for x, g in zip(place.left, grids, strict=True)]
    next_ones = [*place.left[1:], picture.width]
    assert all(end < after for end, after in zip(ends, next_ones, strict=True))


@pytest.mark.slow
def test_own_images(agent, tmp_path, capsys, monkeypatch):
    """Any size and mode; the answers are said to mean nothing. One way, to save compiling."""
    monkeypatch.setattr(demo, "ways", lambda *options: ways(*options)[2:])
    Image.effect_noise((300, 170), 80).save(tmp_path / "grey.png")
    Image.new("RGBA", (31, 200), (30, 120, 220, 90)).save(tmp_path / "narrow.png")
    images = [x for name in ("grey.png", "narrow.png") for x in ("--image", str(tmp_path / name))]
    out = tmp_path / "out"
    code = main(["demo", "--agent", str(agent), "--out", str(out), *images])
    printed = capsys.readouterr().out
    assert code == 0
    assert "answers mean" in printed
    assert "right answers" not in printed
    with Image.open(out / "kept-default.png") as file:
        assert file.format == "PNG"


def test_default_question_is_in_the_agents_words(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (turn,) = image_turns([tmp_path / "a.png"])
    (same,) = image_turns([tmp_path / "a.png"], turn.text)
    assert same.text == turn.text == "what step 1 x=500 y=500"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.png"], "nowhere.png: there is no such file"),
        (["--image", __file__], "not an image that can be read"),
        (["--budget", "1.5"], "at most 1 or 100%"),
        (["--budget", "0"], "budget=0.0: expected a number"),
        (["--budget", "1"], "keeps everything"),
        (["--budget", "100%"], "keeps everything"),
        (["--budget", "150%"], "at most 1 or 100%"),
        (["--budget", "x"], "budget 'x': expected a share such as 0.2, or 20%"),
        (["--frames", "0"], "1 to 8 screenshots"),
        (
            ["--question", "click step 1 red star"],
            "--question needs --image: a generated",
        ),
        (["--image", "a.png", "--frames", "2"], "--frames needs a generated episode"),
        (["--exported", "a"], "--exported needs --runtime onnx"),
        (["--agent", "nowhere"], "python -m starkv_lab.training.train --out FOLDER"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(arguments, message, capsys, tmp_path):
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("starkv: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""
    assert not out.exists()


def test_a_missing_runtime_is_one_sentence(capsys, tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code = main(["demo", "--runtime", "onnx", "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("starkv: onnxruntime is not installed (")
    assert "pip install '.[export]'" in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_output_folder_that_is_a_file(agent, capsys, tmp_path):
    (tmp_path / "file").touch()
    code = main(["demo", "--agent", str(agent), "--out", str(tmp_path / "file")])
    assert code == 2
    said = capsys.readouterr().err
    assert "cannot be written (" in said
    assert said.endswith("give another --out\n")


def test_pictures_the_agent_cannot_take(tmp_path):
    Image.new("RGB", (400, 3)).save(tmp_path / "line.png")
    with pytest.raises(StarKVError, match="400 x 3 pixels"):
        image_turns([tmp_path / "line.png"])
    Image.new("RGB", (40, 30)).save(tmp_path / "small.png")
    with pytest.raises(StarKVError, match="does not know teleport"):
        image_turns([tmp_path / "small.png"], "teleport step 1")
    with pytest.raises(StarKVError, match="9 images"):
        image_turns([tmp_path / "small.png"] * 9)


def test_unknown_command_exits_with_2(capsys):
    assert main(["fly"]) == 2
    assert "there is no command 'fly'" in capsys.readouterr().err
