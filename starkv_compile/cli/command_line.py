"""The command line: finds the command, runs it, and prints an error as one sentence."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points

from ..errors import MissingPackage, OptionError, StarKVError, did_you_mean
from .doctor import add_doctor, installed
from .export import add_export

Commands = argparse._SubParsersAction  # of what `add_subparsers` returns
AddCommand = Callable[["Commands[argparse.ArgumentParser]"], None]

GROUP = "starkv.commands"
"""Entry points of this group name a function that adds one command to argparse's subparsers."""

OWN: dict[str, AddCommand] = {"export": add_export, "doctor": add_doctor}
"""The commands of this package, in the order of the help."""

OF_THE_LAB = ("demo", "memory", "inspect", "models", "bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    A `StarKVError`, or a file that cannot be written, becomes one sentence on stderr and exit code
    2; Ctrl-C one with exit code 130.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    installed = {point.name: point for point in entry_points(group=GROUP)}
    try:
        if argv and argv[0] in OF_THE_LAB and argv[0] not in installed:
            raise MissingPackage(
                f"{argv[0]!r} is a command of starkv-lab; in a clone of starkv-compile: "
                "pip install ./lab"
            )
        known = list(dict.fromkeys([*OF_THE_LAB, *OWN, *installed]))
        if argv and not argv[0].startswith("-") and argv[0] not in known:
            raise OptionError(
                f"there is no command {argv[0]!r}: {did_you_mean(argv[0], known)}"
                f"commands are {', '.join(known)}"
            )
        args = _parser(installed, argv[0] if argv else "").parse_args(argv)
        return args.run(args)
    except StarKVError as error:
        print(f"starkv: {error}", file=sys.stderr)
        return 2
    except (ImportError, RuntimeError) as error:
        if "torchvision" not in _causes(error):
            raise
        print(
            "starkv: torch and torchvision do not fit each other; `starkv doctor` says what to "
            "install",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # whoever read the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"starkv: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("starkv: interrupted", file=sys.stderr)
        return 130


def _parser(installed: dict[str, EntryPoint], asked: str) -> argparse.ArgumentParser:
    """The parser with every command that can be loaded.

    Args:
        installed: entry points by the name of their command.
        asked: the command to run. If it cannot be loaded, that is an error; else a line of help.
    """
    missing = [name for name in OF_THE_LAB if name not in installed]
    notes = [f"Install starkv-lab for the commands {', '.join(missing)}."] if missing else []
    parser = argparse.ArgumentParser(
        prog="starkv", description="KV-cache compression for vision-language models."
    )
    parser.add_argument("--version", action="version", version=_versions())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in sorted(installed, key=_lab_first):
        fault = _add(installed[name], commands)
        if fault and name == asked and name not in OWN:
            raise StarKVError(fault)
        notes += [f"Note: {fault}."] if fault else []
    for add_command in OWN.values():
        add_command(commands)
    parser.epilog = " ".join(notes) or None
    return parser


def _causes(error: BaseException | None) -> str:
    """The messages of an error and of those that it comes from."""
    messages: list[str] = []
    while error is not None and len(messages) < 20:
        messages.append(str(error))
        error = error.__cause__ or error.__context__
    return " ".join(messages)


def _versions() -> str:
    """The installed distributions of this project, with their versions."""
    names = ("starkv-compile", "starkv-lab")
    return ", ".join(f"{name} {installed(name)}" for name in names if installed(name))


def _lab_first(name: str) -> tuple[int, str]:
    return (OF_THE_LAB.index(name) if name in OF_THE_LAB else len(OF_THE_LAB), name)


def _add(point: EntryPoint, commands: Commands) -> str:
    """Adds the command of an entry point; returns why that is impossible, or ""."""
    package = point.dist.name if point.dist else point.value
    if point.name in OWN:
        return f"{package} adds a command {point.name!r}, which starkv has already"
    try:
        add_command: AddCommand = point.load()
        add_command(commands)
    except Exception as error:
        return (
            f"the command {point.name!r} of {package} cannot be loaded ({error}); "
            f"update or uninstall {package}"
        )
    return ""
