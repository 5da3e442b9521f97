"""Runs transformers' own tests of caches and generation through starkv.

    python tools/run_hf_suite.py --budget 1.0 --summary summary.json

The command fetches only the `tests` folder of the installed version's tag, without history, and
runs the files of `SUITE` with `tools.hf_suite`. At budget 1.0 all tests have to
pass. Below it the caches are shorter and the answers differ, so the command runs only the tests of
the shape and the end of what `generate` returns. The exit code is 2 if the suite could not be
fetched, else pytest's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from starkv_compile.cli import share_of

SOURCE = "https://github.com/huggingface/transformers"
FAMILIES = ("llama", "mistral", "gemma3", "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
ROOT = Path(__file__).parents[1]

SUITE = (
    "tests/utils/test_cache_utils.py",
    *(f"tests/models/{family}/test_modeling_{family}.py" for family in FAMILIES),
)
ABOUT_GENERATION = (
    "generate or decoding or cache or past_key_values or left_padding or batching_equivalence "
    "or mismatching_num_image_tokens"
)
SHAPE_AND_END = (
    "(greedy_generate or sample_generate or beam_search_generate or beam_sample_generate) "
    "and not dict_outputs"
)
CANNOT_FETCH = 2


def fetch(source: str, version: str, folder: Path) -> str | None:
    """Clones the tests of a version into `folder`, unless it has them. Returns an error or None."""
    if (folder / "tests").is_dir():
        return None
    clone = [
        "clone",
        "-q",
        "--depth",
        "1",
        "--filter=blob:none",
        "--sparse",
        "--branch",
        f"v{version}",
        source,
        str(folder),
    ]
    for command in (clone, ["-C", str(folder), "sparse-checkout", "set", "tests"]):
        done = subprocess.run(
            ["git", "-c", "advice.detachedHead=false", *command],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
        )
        if done.returncode:
            return done.stderr.strip().splitlines()[-1]
    return None


def run_suite(
    folder: Path, budget: float, inner: str, summary: Path | None, more: list[str]
) -> int:
    """Runs the suite and returns pytest's exit code."""
    files = [file for file in SUITE if (folder / file).exists()]
    for file in SUITE:
        if file not in files:
            print(f"not in this version: {file}", file=sys.stderr)
    if not files:
        return CANNOT_FETCH
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "TRANSFORMERS_TEST_BACKEND": "tools.hf_suite",
        "TRANSFORMERS_TEST_DEVICE": os.environ.get("TRANSFORMERS_TEST_DEVICE", "cpu"),
        "STARKV_TEST_BUDGET": str(budget),
        "STARKV_TEST_INNER": inner,
    }
    if summary:
        environment["STARKV_TEST_SUMMARY"] = str(summary.resolve())
    chosen = ABOUT_GENERATION if budget == 1.0 else SHAPE_AND_END
    command = [sys.executable, "-m", "pytest", "-q", "-k", chosen, *more, *files]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", default="1.0", help="share of the tokens: 0.2 or 20%%")
    parser.add_argument("--inner", default="eager", help="backend that compiles the graphs")
    parser.add_argument(
        "--folder", type=Path, help="folder of the clone (default: a temporary one)"
    )
    parser.add_argument("--source", default=SOURCE, help="the repository, or its mirror")
    parser.add_argument("--summary", type=Path, help="file for what happened to the calls, as JSON")
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, after --")
    args = parser.parse_args()
    budget = share_of(args.budget)
    version = importlib.metadata.version("transformers")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "transformers"
        trouble = fetch(args.source, version, folder)
        if trouble:
            print(
                f"the tests of transformers {version} cannot be fetched from {args.source} "
                f"({trouble}); if you have a clone of that tag, give it as --folder",
                file=sys.stderr,
            )
            return CANNOT_FETCH
        return run_suite(folder, budget, args.inner, args.summary, args.pytest)


if __name__ == "__main__":
    sys.exit(main())
