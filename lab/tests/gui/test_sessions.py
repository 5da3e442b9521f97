"""`bench gui --sessions`: every trajectory on one cache, in the words of its prompts."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from rich.console import Console
from starkv_lab.gui.agentnet_bench import AGENTNET_BENCH
from starkv_lab.gui.families import FAMILIES
from starkv_lab.gui.run import GuiOptions, run_gui
from starkv_lab.gui.samples import Reading, open_screen
from starkv_lab.gui.screens import Screen
from starkv_lab.gui.shards import Shard
from starkv_lab.gui.summary import summarise
from starkv_lab.gui.trajectories import GuiSession, part_of

from lab.tests.support import published
from starkv_compile import OptionError, StarKVConfig, StarKVError
from starkv_compile.cli import main

STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return published.agentnet_bench(tmp_path_factory.mktemp("data"), STEPS)


def run(data, out, budget=0.3, name="agentnetbench", **options):
    config = StarKVConfig(budget=budget, inner="eager")
    values = {"dataset": name, "data": data, "model": "shipped", "out": out, **options}
    return run_gui(
        GuiOptions(**{"config": config, "sessions": True, **values}), Console(quiet=True)
    )


def records(out, shard="0-of-1"):
    lines = (out / f"answers-{shard}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def screens_of(screenshots):
    return [Screen(size, size) for size in (open_screen(one).size for one in screenshots)]


@pytest.mark.parametrize("name", ["ui-tars", "qwen2.5-vl", "qwen3-vl"])
def test_the_turns_of_a_session_are_the_prompt_of_its_last_step(data, name):
    """As that prompt is without --sessions, if it shows every screenshot."""
    family = FAMILIES[name]
    samples = list(AGENTNET_BENCH.read(data, Reading(images=STEPS)))[:STEPS]
    chat = []
    for number, sample in enumerate(samples):
        shown = sample.screens[-2:]
        assert len(shown) == min(number + 1, 2)
        turns = family.turns(replace(sample, screens=shown), screens_of(shown))
        chat += turns[-2:] if number else turns
    last = samples[-1]
    assert chat == family.messages(last, screens_of(last.screens))


@pytest.mark.slow
def test_a_session_keeps_its_share_of_all_steps_and_goes_on_where_it_was(
    data, tmp_path, monkeypatch
):
    summary = run(data, tmp_path / "whole")
    whole = records(tmp_path / "whole")
    assert [r["id"] for r in whole] == [f"{t}-{k}" for t in ("s_1a", "s_2b") for k in range(STEPS)]
    for record in whole:
        assert record["kept"] == record["seen"] * 3 // 10
    seen = [record["seen"] for record in whole[:STEPS]]
    assert all(100 < later - earlier < 130 for earlier, later in pairwise(seen))
    assert all(record["correct"] for record in whole[:STEPS]), "clicks, which the agent can answer"
    assert [p.group for p in summary.parts if "steps" in p.group] == [{"steps": "steps 01-05"}]
    assert "click ( x=" in whole[1]["prompt"], "the demonstration's click, not the agent's"
    assert all(record["prompt"].count("<|image_pad|>") == 1 for record in whole)

    answer, asked = GuiSession.answer, []

    def counted(self, sample, tokens):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append((sample.id, tokens))
        return answer(self, sample, tokens)

    monkeypatch.setattr(GuiSession, "answer", counted)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "parts")
    asked.clear()
    monkeypatch.setattr(GuiSession, "answer", answer)
    run(data, tmp_path / "parts")
    for again, record in zip(records(tmp_path / "parts"), whole, strict=True):
        assert {**again, "seconds": 0} == {**record, "seconds": 0}


@pytest.mark.slow(ci=True)
def test_old_screenshots_leave_and_each_shard_takes_whole_trajectories(data, tmp_path):
    first = run(data, tmp_path, 1.0, reading=Reading(images=1), shard=Shard(0, 2))
    assert (first.parts[0].samples, first.missing_shards) == (STEPS, [1])
    sizes = [record["seen"] for record in records(tmp_path, "0-of-2")]
    for record in records(tmp_path, "0-of-2"):
        assert record["bytes"] == record["full_bytes"], "a full cache has no old screenshots either"
    assert max(sizes) - min(sizes) < 50, "the text of old turns stays, their screenshots do not"
    with pytest.raises(StarKVError, match=r"was begun with images=1, now it is 5"):
        run(data, tmp_path, 1.0, shard=Shard(1, 2))
    with pytest.raises(StarKVError, match=r"was begun with sessions=True, now it is False"):
        run(data, tmp_path, 1.0, reading=Reading(images=1), sessions=False)


def test_which_part_of_a_session_a_step_is():
    names = [part_of(step) for step in (1, 5, 6, 10, 11, 20, 21, 400)]
    assert names == sorted(names)
    assert len(set(names)) == 4


def test_what_has_no_sessions_is_refused_before_the_model_is_loaded(tmp_path):
    for name, make in (
        ("screenspot-v2", published.screenspot_v2),
        ("androidcontrol", published.android_sample),
        ("androidcontrol", published.android_records),
    ):
        folder = tmp_path / make.__name__
        make(folder)
        with pytest.raises(StarKVError, match=r"single questions, .* leave out --sessions"):
            run(folder, tmp_path / make.__name__ / "out", name=name, model="no", family="ui-tars")
    with pytest.raises(OptionError, match=r"family opencua: .*leave out --sessions"):
        run(tmp_path, tmp_path / "out", model="xlangai/OpenCUA-7B")
    options = {"dataset": "agentnetbench", "data": tmp_path, "model": "shipped", "out": tmp_path}
    for values, said in (
        ({"reading": Reading(level="low")}, r"--sessions with level low.*give --level high"),
        ({"config": StarKVConfig(policy="pyramidkv")}, r"--sessions with policy='pyramidkv'"),
        ({"config": StarKVConfig(layer_budgets=(1, 2))}, r"layer_budgets=\(1.0, 2.0\)"),
    ):
        with pytest.raises(OptionError, match=said):
            GuiOptions(**{**options, "sessions": True, **values})


def test_earlier_steps_in_words_are_refused(data, tmp_path, capsys):
    command = ["bench", "gui", "agentnetbench", "--data", str(data), "--model", "shipped"]
    assert main([*command, "--out", str(tmp_path), "--sessions", "--texts", "3"]) == 2
    assert "--texts 3 with --sessions" in capsys.readouterr().err


def test_a_shard_without_a_trajectory_is_no_error(data, tmp_path):
    for index in (2, 3):
        assert run(data, tmp_path, shard=Shard(index, 4)) is None
    assert {path.name for path in tmp_path.iterdir()} == {
        f"answers-{index}-of-4.jsonl" for index in (2, 3)
    }
    with pytest.raises(StarKVError, match="no sample was answered yet"):
        summarise(tmp_path)
