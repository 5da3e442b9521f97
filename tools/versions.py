"""Runs a part of the tests with other versions of torch and transformers, and writes a table.

    python tools/versions.py [--torch 2.11.0,2.15.0] [--transformers 5.17.0,5.24.0]

Each torch gets an environment under `--environments`, which takes gigabytes: from PyPI come CUDA
builds, and they run on CPUs. The results go to docs/results/versions.json, and from there into
docs/results/versions.md. Versions that are not named keep their results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "versions.md"
RESULTS = PAGE.with_suffix(".json")
TORCH = ("2.11.0", "2.13.0", "2.14.1", "2.15.0")
TRANSFORMERS = ("5.17.0", "5.24.0")
SUITE = ("tests/passes", "tests/frontend", "tests/generation", "tests/cache", "tests/session")
NEEDED = ("pytest", "pytest-xdist", "hypothesis", "peft", "accelerate", "pillow")
NOT_PINNED = re.compile(r"(torch|transformers|triton)==")
HEADER = """# Results: versions of torch and transformers

`python tools/versions.py` makes this table. It runs the tests of passes, calls, generation, caches
and sessions that take under five seconds each ({suite}), on {python} and {machine} without a GPU.
The tests of the kernels, of export and of the commands are not among them. Versions other than the
pinned ones are CUDA builds from PyPI.

| torch | {columns} |
| --- | {rules} |
"""


def install(folder: Path, torch: str, transformers: str) -> Path:
    """Returns the Python of an environment with these versions and this checkout."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pins = folder / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins.write_text("\n".join(line for line in lines if not NOT_PINNED.match(line)))
    wanted = [f"torch=={torch}", f"transformers=={transformers}", *NEEDED]
    pip = [python, "-m", "pip", "install", "--quiet", "-c", pins]
    subprocess.run([*pip, *wanted, "-e", ROOT, "-e", ROOT / "lab"], check=True)
    return python


def run(python: Path, jobs: int) -> dict[str, Any]:
    """Runs the suite and returns its counts and the names of the tests that fail."""
    flags = (
        "-q",
        "-m",
        "not slow",
        "-n",
        str(jobs),
        "--dist",
        "loadfile",
        "-p",
        "no:cacheprovider",
    )
    done = subprocess.run(
        [python, "-m", "pytest", *flags, *SUITE],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-400:]
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    if "passed" not in counts:
        raise SystemExit(f"the tests did not run: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    return {**counts, "failures": failed, "end": last}


def page(results: dict[str, dict[str, Any]]) -> str:
    """The page as Markdown, with a row for each torch and a column for each transformers."""
    columns = sorted({name for row in results.values() for name in row}, key=_number)
    head = HEADER.format(
        suite=", ".join(f"`{part}`" for part in SUITE),
        python=f"Python {platform.python_version()}",
        machine=platform.machine(),
        columns=" | ".join(f"transformers {name}" for name in columns),
        rules=" | ".join("---" for _ in columns),
    )
    rows, failures = [], []
    for torch in sorted(results, key=_number):
        cells = [_cell(results[torch].get(name)) for name in columns]
        rows.append(f"| {torch} | {' | '.join(cells)} |\n")
        for name in columns:
            failed = results[torch].get(name, {}).get("failures", [])
            failures += [f"* torch {torch}, transformers {name}: `{test}`\n" for test in failed]
    return head + "".join(rows) + ("\n## What fails\n\n" + "".join(failures) if failures else "")


def _cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "not run"
    failed = len(result["failures"])
    return f"{result['passed']:,} passed" + (f", **{failed} failed**" if failed else "")


def _number(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--torch", default=",".join(TORCH), help="versions, separated by commas")
    add("--transformers", default=",".join(TRANSFORMERS), help="versions, separated by commas")
    add("--environments", type=Path, default=ROOT / ".venv" / "versions", help="their folder")
    add("--jobs", type=int, default=2, help="processes that share the tests")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for torch in args.torch.split(","):
        for transformers in args.transformers.split(","):
            python = install(args.environments / f"torch-{torch}", torch, transformers)
            found = run(python, args.jobs)
            print(f"torch {torch}, transformers {transformers}: {found['end']}", flush=True)
            for test in found["failures"]:
                print(f"  {test}", flush=True)
            results.setdefault(torch, {})[transformers] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
