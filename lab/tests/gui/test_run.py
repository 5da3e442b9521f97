"""`bench gui` on the four data sets, the demo agent in the model's place."""

import json

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console
from starkv_lab.agent.checkpoints import SHIPPED
from starkv_lab.gui import run as runner
from starkv_lab.gui.families import opencua
from starkv_lab.gui.model import Answer, GuiModel
from starkv_lab.gui.run import GuiOptions, run_gui
from starkv_lab.gui.samples import Reading, open_screen
from starkv_lab.gui.screens import Screen, check_shown, shown_size
from starkv_lab.gui.shards import Shard, device_of, shard_of
from starkv_lab.gui.summary import part_of, summarise
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from lab.tests.support import gui_checkpoints as checkpoints
from lab.tests.support import published
from starkv_compile import OptionError, StarKVConfig, StarKVError
from starkv_compile.cli import main
from tests.support.crossing import slow

RIGHT = {  # of the samples: what the agent, which only clicks, can get right
    "screenspot-v2": (published.screenspot_v2, 6, 6),
    "screenspot-pro": (published.screenspot_pro, 6, 6),
    "androidcontrol": (published.android_sample, 4, 3),
    "agentnetbench": (published.agentnet_bench, 6, 4),
}
FIELDS = {
    "id",
    "trajectory",
    "group",
    "prompt",
    "answer",
    "actions",
    "unparsable",
    "target",
    "size",
    "shown",
    "score",
    "correct",
    "kept",
    "seen",
    "bytes",
    "full_bytes",
    "seconds",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {name: make(folder / name) for name, (make, _, _) in RIGHT.items()}


def run(data, out, name="androidcontrol", budget=0.2, **options):
    config = StarKVConfig(budget=budget, inner="eager")
    values = {"dataset": name, "data": data[name], "model": "shipped", "out": out, **options}
    return run_gui(GuiOptions(**{"config": config, **values}), Console(quiet=True))


def records(out, shard="0-of-1"):
    lines = (out / f"answers-{shard}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("budget", [slow(1.0), 0.2])
def test_the_agent_on_every_benchmark(data, tmp_path, budget):
    """All in one test: what Dynamo traced for the first serves the others."""
    for name, (_, samples, right) in RIGHT.items():
        out = tmp_path / name
        summary = run(data, out, name, budget)
        found = summary.parts[0]
        assert found.samples == samples
        assert right - (budget < 1) <= found.right <= right, "a fifth of a cache may lose one"
        assert found.score == found.right / samples
        for record in records(out):
            assert set(record) == FIELDS
            assert record["answer"].startswith("click (")
            assert record["kept"] == (record["seen"] if budget == 1 else record["seen"] // 5)
            assert record["unparsable"] is None
            assert record["seconds"] > 0
        share = summary.nbytes / summary.full_nbytes
        assert share == 1 if budget == 1 else 0.2 < share < 0.25  # the reply is cached as well
        assert json.loads((out / "summary.json").read_text())["parts"][0]["right"] == right


def test_steps_of_a_trajectory_are_drawn_together():
    """Ten trajectories of ten steps, all right or all wrong, say as much as ten samples."""
    records = [
        {"id": f"{t}-{step}", "score": float(t % 2), "unparsable": None, "trajectory": str(t)}
        for t in range(10)
        for step in range(10)
    ]
    together = part_of({}, records)
    alone = part_of({}, [{**record, "trajectory": None} for record in records])
    assert (together.right, together.accuracy, together.score) == (50, 0.5, 0.5)
    assert (alone.right, alone.accuracy, alone.score) == (50, 0.5, 0.5)
    for wide, narrow in (
        (together.accuracy_interval, alone.accuracy_interval),
        (together.score_interval, alone.score_interval),
    ):
        assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_parts_are_those_the_benchmark_reports(data, tmp_path, answered):
    summary = run(data, tmp_path, "screenspot-v2")
    groups = [part.group for part in summary.parts]
    assert {"platform": "mobile", "type": "text"} in groups
    assert {"type": "icon"} in groups
    for names in ({"platform", "type"}, {"type"}, {"source"}):
        assert sum(p.samples for p in summary.parts if set(p.group) == names) == 6


class Answered(list):
    """Ids of the samples that were answered; `stop_at` interrupts after so many."""

    stop_at = None

    def note(self, sample):
        if len(self) == self.stop_at:
            raise KeyboardInterrupt
        self.append(sample.id)


@pytest.fixture
def answered(monkeypatch):
    """What is answered in a model's place: always a click on the middle of the screen."""
    asked = Answered()

    class Middle:
        def __init__(self, family, *options):
            self.family = family

        def answer(self, sample, tokens):
            asked.note(sample)
            size = open_screen(sample.screens[-1]).size
            return Answer("", "click ( x=500 y=500 )", Screen(size, size), 2, 10, 20, 100, 1.0)

    monkeypatch.setattr(runner, "GuiModel", Middle)
    return asked


@pytest.mark.slow
def test_the_agent_goes_on_where_it_was_cut_off(data, tmp_path, monkeypatch):
    asked, real = Answered(), GuiModel.answer

    def answer(self, sample, tokens):
        asked.note(sample)
        return real(self, sample, tokens)

    monkeypatch.setattr(GuiModel, "answer", answer)
    asked.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path)
    asked.stop_at = None
    summary = run(data, tmp_path)
    assert asked == ["100-0", "101-0", "102-0", "103-0"]
    assert (summary.parts[0].samples, summary.parts[0].right) == (4, 3)


@pytest.mark.parametrize("name", RIGHT)
def test_it_goes_on_where_it_was_cut_off(data, tmp_path, answered, name):
    answered.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, name)
    path = tmp_path / "answers-0-of-1.jsonl"
    whole = path.read_text()
    assert whole.count("\n") == 3  # the settings, two answers
    path.write_text(whole[:-40])  # as if the process had died while it wrote
    first, torn = answered
    answered.stop_at = None
    summary = run(data, tmp_path, name)
    ids = [record["id"] for record in records(tmp_path)]
    assert answered == [first, torn, *ids[1:]]
    assert ids[:2] == [first, torn]
    assert summary.parts[0].samples == len(ids) == RIGHT[name][1]
    before = path.read_text()
    run(data, tmp_path, name)
    assert len(answered) == len(ids) + 1
    assert path.read_text() == before


def test_a_file_cut_off_in_its_first_line_is_begun_anew(data, tmp_path, answered):
    path = tmp_path / "answers-0-of-1.jsonl"
    path.write_text('{"settings": {"datas')
    run(data, tmp_path, limit=1)
    assert len(records(tmp_path)) == 1
    assert json.loads(path.read_text().splitlines()[0])["settings"]["dataset"] == "androidcontrol"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"budget": 0.4}, "config.budget=0.2, now it is 0.4"),
        ({"name": "screenspot-v2"}, "data='.*', now it is"),
        ({"reading": Reading(level="low")}, "level='high', now it is 'low'"),
        ({"max_new_tokens": 12}, "max_new_tokens=256, now it is 12"),
        ({"shard": Shard(0, 2)}, "shards=1, now it is 2"),
    ],
)
def test_a_folder_of_other_settings_is_refused(data, tmp_path, answered, options, named):
    run(data, tmp_path, limit=1)
    with pytest.raises(StarKVError, match=rf"answers-0-of-1\.jsonl was begun with {named}"):
        run(data, tmp_path, **options)
    assert len(answered) == 1


def test_an_answer_file_that_is_broken_is_told_with_its_line(data, tmp_path, answered):
    run(data, tmp_path, limit=2)
    path = tmp_path / "answers-0-of-1.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{}", lines[2]]) + "\n")
    with pytest.raises(StarKVError, match=r"jsonl:2: no answer \('id'\)"):
        run(data, tmp_path)
    path.write_text("[]\n")
    with pytest.raises(StarKVError, match=r"jsonl:1: no settings"):
        run(data, tmp_path)


@pytest.mark.parametrize("name", RIGHT)
def test_shards_add_up(data, tmp_path, answered, name):
    samples = RIGHT[name][1]
    first = run(data, tmp_path / "parts", name, shard=Shard(0, 2))
    assert (first.parts[0].samples, first.missing_shards) == (samples // 2, [1])
    both = run(data, tmp_path / "parts", name, shard=Shard(1, 2))
    assert (both.parts[0].samples, both.missing_shards) == (samples, [])
    assert len(set(answered)) == samples
    whole = run(data, tmp_path / "whole", name)
    for part, same in zip(both.parts, whole.parts, strict=True):
        assert part == same


def test_shards_of_different_settings_are_not_merged(data, tmp_path, answered):
    for index, budget in ((0, 0.2), (1, 0.4)):
        run(data, tmp_path / str(index), budget=budget, shard=Shard(index, 2), limit=2)
    moved = tmp_path / "1" / "answers-1-of-2.jsonl"
    moved.rename(tmp_path / "0" / moved.name)
    with pytest.raises(StarKVError, match=r"config\.budget=0\.4, .*0\.2: their answers do not go"):
        summarise(tmp_path / "0")
    with pytest.raises(StarKVError, match=r"no answers-\*-of-\*\.jsonl in it"):
        summarise(tmp_path)


def test_which_shard_a_process_is():
    assert shard_of("1/3") == Shard(1, 3)
    assert shard_of(None, {}) == Shard(0, 1)
    assert shard_of(None, {"RANK": "2", "WORLD_SIZE": "4"}) == Shard(2, 4)
    assert list(Shard(1, 3).of(range(8))) == [1, 4, 7]
    for wrong in ("3/3", "1", "-1/2", "a/b", "0/0"):
        with pytest.raises(OptionError, match=f"shard '{wrong}': expected i/n"):
            shard_of(wrong)
    assert device_of("cuda:3", {"LOCAL_RANK": "1"}) == "cuda:3"


def test_an_error_comes_before_the_model_is_loaded(data, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GuiModel", None)
    with pytest.raises(StarKVError, match=r"no files of ScreenSpot-v2 \(screenspot_\*_v2\.json\)"):
        run_gui(GuiOptions(dataset="screenspot-v2", data=tmp_path, model="shipped", out=tmp_path))
    for values, said in (
        ({"limit": 0}, "limit=0"),
        ({"reading": Reading(images=0)}, "images=0: expected 1 or more"),
        ({"reading": Reading(level="top")}, "level 'top': expected high or low"),
        ({"pixels": (None, 0)}, "max_pixels=0: expected 1 or more"),
        ({"pixels": (9, 8)}, "min_pixels=9, max_pixels=8"),
    ):
        with pytest.raises(OptionError, match=said):
            GuiOptions(dataset="x", data=tmp_path, model="shipped", out=tmp_path, **values)


def test_code_of_a_checkpoint_runs_only_where_it_is_trusted(data, tmp_path):
    with pytest.raises(OptionError, match=r"OpenCUA-7B: .* give --trust-remote-code"):
        run(data, tmp_path, model="xlangai/OpenCUA-7B")
    assert not list(tmp_path.iterdir())  # so the folder is not one of these settings


def test_opencuas_parts_are_called_as_a_processor():
    picture = torch.zeros(32, 64, 3, dtype=torch.uint8).numpy()
    processor = opencua._Processor(checkpoints.tokenizer(), checkpoints.image_processor())
    inputs = processor(text=["word7 <|image_pad|>"], images=[picture], return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[7, checkpoints.IMAGE_TOKEN]]
    assert inputs["grid_thws"].tolist() == [[1, 8, 16]]
    assert len(inputs["pixel_values"]) == 8 * 16
    assert processor.batch_decode(inputs["input_ids"], skip_special_tokens=True) == ["word7"]


def test_a_checkpoint_that_is_none(data, tmp_path):
    with pytest.raises(StarKVError, match=r"no-such: no checkpoint that can be loaded"):
        run(data, tmp_path / "out", model=str(tmp_path / "no-such"), family="ui-tars")


@pytest.mark.slow(ci=True)
def test_from_the_command_line(data, tmp_path, capsys):
    folder, out = str(data["androidcontrol"]), tmp_path / "out"
    command = ["bench", "gui", "androidcontrol", "--data", folder, "--model", "shipped"]
    for index in range(2):
        shard = ["--shard", f"{index}/2", "--budget", "0.4", "--policy", "st_lite"]
        assert main([*command, "--out", str(out), *shard]) == 0
    (out / "summary.json").unlink()
    capsys.readouterr()
    assert main(["bench", "gui", "--summary", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "AndroidControl, shipped" in shown
    assert "75.0%" in shown
    settings = json.loads((out / "summary.json").read_text())["settings"]
    assert (settings["config.policy"], settings["config.budget"]) == ("st_lite", 0.4)
    for wrong, said in (
        (["bench", "gui"], "bench gui needs DATASET, --data, --model, --out"),
        (command, "bench gui needs --out"),
        (["bench", "gui", "androidcontrol", "--summary", str(out)], "--summary stands alone"),
        ([*command, "--out", str(out), "--paper", "--policy", "random"], "--paper is a form of"),
    ):
        assert main(wrong) == 2
        assert said in capsys.readouterr().err


@given(st.tuples(st.integers(1, 6000), st.integers(1, 6000)), st.integers(4, 16384), st.booleans())
def test_what_a_model_sees(size, tokens, large):
    """As transformers resizes: Qwen2.5-VL's tokens of 28 pixels a side, Qwen3-VL's of 32."""
    assume(max(size) <= 200 * min(size))
    side = 32 if large else 28
    limits = {"shortest_edge": 4 * side**2, "longest_edge": tokens * side**2}
    processor = Qwen2VLImageProcessorPil(size=limits, patch_size=side // 2)
    height, width = smart_resize(size[1], size[0], side, *limits.values())
    assert shown_size(size, processor) == (width, height)


def test_how_an_unknown_processor_resizes_is_unknown():
    with pytest.raises(StarKVError, match="object is no image processor of Qwen-VL's kind"):
        shown_size((64, 64), object())


def test_another_resizing_than_expected_is_an_error():
    screens = [Screen((64, 32), (64, 32))]
    check_shown(screens, torch.tensor([[1, 8, 16]]), 4)
    with pytest.raises(StarKVError, match=r"to \[\(32, 64\)\], not to \[\(64, 32\)\]"):
        check_shown(screens, torch.tensor([[1, 16, 8]]), 4)


@pytest.mark.slow
def test_a_checkpoint_by_auto_classes(data, tmp_path, monkeypatch):
    """The agent's folder as any Qwen3-VL's: its answers are not that family's, so none is right."""
    from starkv_lab.agent.processor import AgentProcessor
    from transformers import AutoProcessor, PreTrainedConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    class Unused(PreTrainedConfig):
        model_type = "unused"

    monkeypatch.setattr(PROCESSOR_MAPPING, "_extra_content", {})
    AutoProcessor.register(Unused, AgentProcessor)  # the one class that needs no torchvision
    summary = run(data, tmp_path, "screenspot-v2", model=str(SHIPPED), limit=1, max_new_tokens=12)
    [record] = records(tmp_path)
    assert summary.settings["family"] == "qwen3-vl"
    assert record["unparsable"] == "no <tool_call>...</tool_call>"
    assert (record["correct"], record["actions"]) == (False, [])
    assert summary.parts[0].unparsable == 1
    assert record["kept"] < record["seen"] / 4


@pytest.mark.parametrize(
    ("kind", "family"),
    [("qwen2_5_vl", "ui-tars"), ("qwen2_5_vl", "qwen2.5-vl"), ("qwen3_vl", None)],
)
def test_random_checkpoints_by_auto_classes(data, tmp_path, kind, family):
    pytest.importorskip("torchvision", reason="Qwen-VL's AutoProcessor is built on it")
    model = checkpoints.save_random(kind, tmp_path / "model")
    pixels = (None, 64 * 64)
    options = {"model": str(model), "family": family, "max_new_tokens": 6, "pixels": pixels}
    summary = run(data, tmp_path / "out", "agentnetbench", limit=3, **options)
    made = records(tmp_path / "out")
    assert [len(r["actions"]) for r in made] == [0, 0, 0]
    assert summary.parts[0].unparsable == 3
    assert all(r["kept"] == r["seen"] // 5 for r in made)
    assert all(r["shown"][0] * r["shown"][1] <= 64 * 64 for r in made)
