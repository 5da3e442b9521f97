"""Trajectories on one cache: what is asked, what is measured, what is reported."""

import io

import numpy as np
import pytest
from rich.console import Console
from starkv_lab.agent.questions import KINDS
from starkv_lab.quality.cells import Cell
from starkv_lab.quality.command import TrajectoryOptions, run_trajectories
from starkv_lab.quality.design import Design, Trajectories
from starkv_lab.quality.markdown import markdown
from starkv_lab.quality.tables import Comparison
from starkv_lab.quality.trajectories import TrajectoryBench
from starkv_lab.quality.variants import FULL, VARIANTS

from lab.tests.support.hand_made import cell
from starkv_compile import OptionError
from starkv_compile.cli import main

DESIGN = Trajectories(prompts=2, steps=6, history=2)


@pytest.fixture(name="bench", scope="module")
def _bench():
    return TrajectoryBench(DESIGN)


def test_questions_are_about_what_is_remembered():
    turns = DESIGN.turns(0)
    assert [turn.question.kind for turn in turns] == [*KINDS, *KINDS[:2]]
    steps = [turn.step for turn in turns]
    for i, turn in enumerate(turns):
        assert turn.question.step in steps[max(0, i - 1) : i + 1]
    assert [t.text for t in DESIGN.turns(0)] == [t.text for t in turns]
    assert [t.text for t in DESIGN.turns(1)] != [t.text for t in turns]


def test_parts_of_a_trajectory():
    slices = DESIGN.slices()
    assert set(slices) == {"all", *KINDS, "first 5 steps", "last 5 steps"}
    assert slices["what"][0].tolist() == [0, 0, 1, 0, 0, 0]
    assert slices["last 5 steps"].tolist() == [[0, 1, 1, 1, 1, 1]] * 2


@pytest.mark.slow
def test_a_policy_on_the_shipped_agent(bench):
    full = bench.measure(FULL, 1.0)
    assert full.same.all()
    assert full.right.shape == (2, 6)
    assert full.right.mean() > 0.8
    assert full.nbytes == full.full_nbytes
    poor = bench.measure(VARIANTS["random"], 0.1)
    assert poor.right.sum() < full.right.sum()
    assert 0.05 < poor.nbytes / poor.full_nbytes < 0.35, "replies are kept"
    back = Cell.from_line(poor.to_line())
    assert back.to_line() == poor.to_line()
    assert np.array_equal(back.right, poor.right)
    tables = markdown(
        Comparison(Design.of(1), [cell(Design.of(1))]), Comparison(DESIGN, [full, poor])
    )
    assert "## Trajectories of 6 steps, 10% of the session's tokens" in tables
    assert "| random |" in tables


def test_policies_of_one_prompt_have_no_trajectory(tmp_path, capsys):
    console = Console(file=io.StringIO())
    for name in ("pyramidkv", "oracle"):
        with pytest.raises(OptionError, match=f"'{name}' ends at one prompt, so it has no"):
            run_trajectories(TrajectoryOptions(policies=[name], out=tmp_path), console)
    with pytest.raises(OptionError, match="trajectories read a prompt at once"):
        run_trajectories(TrajectoryOptions(policies=["chunks"], out=tmp_path), console)
    arguments = ["bench", "trajectories", "--out", str(tmp_path), "--steps", "0"]
    assert main(arguments) == 2
    assert "steps=0: expected at least 1" in capsys.readouterr().err
    with pytest.raises(OptionError, match="steps=41: the agent can count to 40"):
        Trajectories(steps=41)
    assert not list(tmp_path.iterdir())
