"""Builds both wheels, installs each into a bare environment, and uses it there.

    python tools/check_wheels.py

The compiler alone must compress a tiny model, and must say what `starkv demo` needs. With the
laboratory the demo must run. The command prints both sizes. The compiler's size has a limit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Keeps the laboratory and its data out.
LIMIT = 400 * 1024
COMPRESS = """
import importlib.util
import starkv_compile
from starkv_compile.testing import generate, tiny_inputs, tiny_model

for name in ("PIL", "starkv_lab"):  # rich comes with transformers
    assert importlib.util.find_spec(name) is None, name
model = tiny_model("qwen2_vl")
starkv_compile.compile(model, budget=0.2, inner="eager")
model.generate(**tiny_inputs("qwen2_vl"), max_new_tokens=4)
report = starkv_compile.report(model)
print(report)
assert all(layer.stored == layer.seen // 5 for layer in report.layers)
"""


def build(folder: Path) -> tuple[Path, Path]:
    """Builds the compiler's wheel and the laboratory's."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder)]
    for source in (".", "./lab"):
        # An old one would put modules into the wheel that no longer exist.
        shutil.rmtree(ROOT / source / "build", ignore_errors=True)
        subprocess.run([*command, source], cwd=ROOT, check=True)
    return next(folder.glob("starkv_compile-*.whl")), next(folder.glob("starkv_lab-*.whl"))


class Bare:
    """Makes a new environment for a wheel and its dependencies."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True)
        self.folder, self.bin = folder, folder / "bin"

    def install(self, *what: str) -> None:
        pins = str(ROOT / "constraints.txt")
        self.run("python", "-m", "pip", "install", "--quiet", "-c", pins, *what)

    def run(self, *command: str, expect: int = 0) -> str:
        """Runs a command of the environment outside the checkout, and returns what it prints."""
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH",)}
        done = subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == expect, (command, done.returncode, done.stdout, done.stderr)
        return done.stdout + done.stderr


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        compiler, laboratory = build(Path(temporary))
        for wheel in (compiler, laboratory):
            print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB")
        assert compiler.stat().st_size < LIMIT, f"the compiler's wheel is over {LIMIT // 1024} KiB"
        bare = Bare(Path(temporary) / "venv")
        bare.install("torch")  # first, so that the pinned build is installed
        bare.install(str(compiler))
        print(bare.run("python", "-c", COMPRESS))
        print(bare.run("starkv", "demo", expect=2))
        bare.install(str(laboratory))
        print(bare.run("starkv", "demo", "--frames", "2"))


if __name__ == "__main__":
    main()
