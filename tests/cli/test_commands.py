"""`starkv` with and without the packages that add commands to it."""

import subprocess
import sys
from pathlib import Path

import pytest

import starkv_compile
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
        f"starkv: {name!r} is a command of starkv-lab; in a clone of starkv-compile: "
        "pip install ./lab\n"
    )


def failing(error):
    def load():
        def run(args):
            raise error

        return lambda commands: commands.add_parser("fails").set_defaults(run=run)

    return Point("fails", load)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "starkv: interrupted\n"),
        (OSError(28, "No space left on device", "a.html"), 2, "a.html: No space left on device\n"),
        (OSError("a disk that fails"), 2, "starkv: a disk that fails\n"),
        (
            RuntimeError("operator torchvision::nms does not exist"),
            2,
            "do not fit each other; `starkv doctor` says what to install\n",
        ),
    ],
)
def test_what_ends_a_command_is_one_sentence(installed, capsys, error, code, said):
    installed(failing(error))
    assert main(["fails"]) == code
    shown = capsys.readouterr()
    assert shown.err.endswith(said)
    assert (shown.err.count("\n"), shown.out) == (1, "")


def test_other_faults_are_not_hidden(installed):
    installed(failing(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["fails"])


def test_a_reader_that_has_seen_enough():
    command = [sys.executable, "-c", READER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


READER = """
import sys
from starkv_compile.cli import command_line

def add(commands):
    def run(args):
        for number in range(100000):
            print(number)
    commands.add_parser("counts").set_defaults(run=run)

class Point:
    dist, name, value, load = None, "counts", "", staticmethod(lambda: add)

command_line.entry_points = lambda group: [Point]
sys.exit(command_line.main(["counts"]))
"""


def test_versions(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"starkv-compile {starkv_compile.__version__}")
    citation = Path(__file__).parents[2] / "CITATION.cff"
    assert f"version: {starkv_compile.__version__}\n" in citation.read_text()


def test_help_names_what_the_laboratory_would_add(installed, capsys):
    installed()
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Install starkv-lab for the commands demo, memory, inspect, models, bench." in shown
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


def test_a_command_that_does_not_exist(capsys):
    assert main(["dmeo"]) == 2
    assert "there is no command 'dmeo': did you mean 'demo'?" in capsys.readouterr().err
