"""`starkv` with and without the packages that add commands to it."""

import pytest

from starkv_compile.cli import main
from starkv_compile.cli.command_line import GROUP, OF_THE_LAB


class Point:
    dist = None

    def __init__(self, name, load):
        self.name, self.value, self.load = name, f"somewhere:{name}", load


@pytest.fixture
def installed(monkeypatch):
    """Pretend that exactly these commands are installed."""

    def pretend(*points):
        monkeypatch.setattr("starkv_compile.cli.command_line.entry_points", lambda group: points)

    return pretend


@pytest.mark.parametrize("name", OF_THE_LAB)
def test_without_the_laboratory_one_sentence_says_what_to_install(name, installed, capsys):
    installed()
    assert main([name, "--whatever", "3"]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"starkv: {name!r} is a command of the laboratory: pip install starkv-lab (from a clone "
        "of starkv-compile: pip install ./lab)\n"
    )


def test_help_names_what_the_laboratory_would_add(installed, capsys):
    installed()
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Install starkv-lab for the commands demo, inspect, models, bench." in shown
    assert "export" in shown


def test_a_command_of_another_package(installed, capsys):
    def load():
        def add(commands):
            parser = commands.add_parser("greet")
            parser.add_argument("name")
            parser.set_defaults(run=lambda args: print(f"hello {args.name}") or 0)

        return add

    installed(Point("greet", load))
    assert main(["greet", "you"]) == 0
    assert capsys.readouterr().out == "hello you\n"


def test_a_command_that_cannot_be_loaded(installed, capsys):
    def load():
        raise ImportError("no module named 'gone'")

    installed(Point("broken", load))
    assert main(["broken"]) == 2
    assert "the command 'broken' of somewhere:broken cannot be loaded (no module" in (
        capsys.readouterr().err
    )


def test_a_broken_command_does_not_stop_the_others(installed, capsys):
    def load():
        raise ImportError("no module named 'gone'")

    installed(Point("broken", load), Point("export", load))
    with pytest.raises(SystemExit) as end:
        main(["export", "--help"])
    assert end.value.code == 0
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Note: the command 'broken' of somewhere:broken cannot be loaded" in shown
    assert "somewhere:export adds a command 'export', which starkv has already" in shown


def test_the_laboratory_registers_all_its_commands():
    from importlib.metadata import entry_points

    assert {point.name for point in entry_points(group=GROUP)} >= set(OF_THE_LAB)
