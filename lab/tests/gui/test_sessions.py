"""`bench gui --sessions`: every trajectory on one cache, in the words of its prompts."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from rich.console import Console
from starkv_lab.gui.agentnet_bench import AGENTNET_BENCH
from starkv_lab.gui.android_control import ANDROID_CONTROL
from starkv_lab.gui.families import FAMILIES
from starkv_lab.gui.run import GuiOptions, run_gui
from starkv_lab.gui.samples import Reading, open_screen
from starkv_lab.gui.screens import Screen
from starkv_lab.gui.shards import Shard
from starkv_lab.gui.trajectories import GuiSession, part_of, reading_of, text_of, trajectories

from lab.tests.support import published
from starkv_compile import OptionError, StarKVConfig, StarKVError

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


def test_opencua_numbers_its_replies_as_in_a_prompt(data):
    reading = reading_of(Reading(images=2))
    sample = list(AGENTNET_BENCH.read(data, reading))[STEPS - 1]
    *earlier, reply, turn = FAMILIES["opencua"].turns(sample, screens_of(sample.screens))
    assert text_of(reply).startswith(f"# Step {STEPS - 1}:")
    assert text_of(earlier[0]).startswith("You are a GUI agent.")
    assert [part["type"] for part in turn["content"]] == ["image", "text"]


@pytest.mark.slow(ci=True)
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
    assert max(sizes) - min(sizes) < 50, "the text of old turns stays, their screenshots do not"
    with pytest.raises(StarKVError, match=r"was begun with images=1, now it is 5"):
        run(data, tmp_path, 1.0, shard=Shard(1, 2))
    with pytest.raises(StarKVError, match=r"was begun with sessions=True, now it is None"):
        run(data, tmp_path, 1.0, reading=Reading(images=1), sessions=False)


def test_steps_of_androidcontrol_are_trajectories(tmp_path):
    published.android_records(tmp_path, episodes=2, steps=2)
    parts = list(trajectories(ANDROID_CONTROL.read(tmp_path, reading_of(Reading())), "here"))
    assert [[sample.id for sample in part] for part in parts] == [
        [f"{part[0].trajectory}-{step}" for step in range(2)] for part in parts
    ]
    assert len({part[0].trajectory for part in parts}) == len(parts) == 2
    for name in ("ui-tars", "qwen2.5-vl"):
        first, second = parts[0]
        screens = [first.screens[-1], second.screens[-1]]
        turns = FAMILIES[name].turns(replace(second, screens=screens), screens_of(screens))
        assert second.past[-1].said in text_of(turns[-2])
        assert turns[-1]["content"] == [{"type": "image"}]


def test_which_part_of_a_session_a_step_is():
    names = [part_of(step) for step in (1, 5, 6, 10, 11, 20, 21, 400)]
    assert names == sorted(names)
    assert len(set(names)) == 4


def test_what_has_no_sessions_is_refused_before_the_model_is_loaded(tmp_path):
    for name, make in (
        ("screenspot-v2", published.screenspot_v2),
        ("androidcontrol", published.android_sample),
    ):
        make(tmp_path / name)
        with pytest.raises(StarKVError, match=r"single questions, .* leave out --sessions"):
            run(tmp_path / name, tmp_path / "out", name=name, model="no-such", family="ui-tars")
    with pytest.raises(OptionError, match=r"--sessions with level low.*give --level high"):
        GuiOptions(
            dataset="androidcontrol",
            data=tmp_path,
            model="shipped",
            out=tmp_path,
            sessions=True,
            reading=Reading(level="low"),
        )
