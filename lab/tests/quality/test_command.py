"""The command: goes on where it was interrupted, and refuses what it cannot do."""

import io

import pytest
from rich.console import Console
from starkv_lab.quality import command
from starkv_lab.quality.command import QualityOptions, chosen, run_quality
from starkv_lab.quality.variants import FULL, SCREEN, VARIANTS

from lab.tests.support.hand_made import cell
from starkv_compile import OptionError
from starkv_compile.cli import main


@pytest.fixture
def measured(monkeypatch):
    """Which cells were measured, none of them really; `measured.stop_at` interrupts."""

    class Measured(list):
        stop_at = None

    asked = Measured()

    class Bench:
        def __init__(self, design, checkpoint, advance):
            self.design = design

        def measure(self, variant, budget, advance):
            if len(asked) == asked.stop_at:
                raise KeyboardInterrupt
            asked.append((variant.name, budget))
            return cell(self.design, variant.name, budget)

    monkeypatch.setattr(command, "Bench", Bench)
    return asked


def run(tmp_path, **options):
    values = {"policies": ["paper", "random"], "budgets": [0.2, 0.1], "frames": (1,), **options}
    return run_quality(
        QualityOptions(**values, questions=1, out=tmp_path), Console(file=io.StringIO())
    )


def test_it_goes_on_where_it_was_interrupted(tmp_path, measured):
    measured.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert measured == [("full", 1.0), ("paper", 0.2), ("paper", 0.1)]
    measured.stop_at = None
    file = run(tmp_path)
    assert measured[3:] == [("random", 0.2), ("random", 0.1)]
    assert len(file.cells) == 5
    run(tmp_path)
    assert len(measured) == 5
    run(tmp_path, budgets=[0.05])
    assert measured[5:] == [("paper", 0.05), ("random", 0.05)]
    assert (tmp_path / "quality.csv").read_text().count("\nrandom,0.05,") == 8


def test_names_and_groups():
    assert FULL not in chosen(["policy"])
    assert {v.group for v in chosen(["policy", "ablation"])} == {"policy", "ablation"}
    assert {v.chunk for v in chosen(["chunks"])} == {50, 75, 150, SCREEN}
    assert not any(v.chunk for v in chosen(QualityOptions().policies))
    assert [v.name for v in chosen(["random", "paper"])] == ["paper", "random"]
    with pytest.raises(OptionError, match=r"'snapvk': did you mean 'snapkv'. expected one of"):
        chosen(["snapvk"])


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_every_variant_is_a_configuration(variant):
    assert variant.config(0.1).budget == 0.1
    assert variant.config(0.1).inner == "eager"


def test_from_the_command_line(tmp_path, measured, capsys):
    arguments = ["bench", "quality", "--out", str(tmp_path), "--frames", "1", "--questions", "1"]
    assert main([*arguments, "--policies", "paper", "--budgets", "0.2,3%"]) == 0
    assert measured == [("full", 1.0), ("paper", 0.2), ("paper", 0.03)]
    assert main([*arguments, "--policies", "screen_novelty", "--budgets", "0.2"]) == 0
    assert measured[-1] == ("default", 0.2)
    assert main([*arguments, "--policies", "papre"]) == 2
    assert "'papre'" in capsys.readouterr().err
    assert main([*arguments, "--budgets", "100%"]) == 2
    assert "full cache" in capsys.readouterr().err
    assert main([*arguments, "--budgets", "0.2,x"]) == 2
    assert "budget 'x': expected a share such as 0.2" in capsys.readouterr().err
