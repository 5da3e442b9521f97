"""Seconds of processor time until a model has answered first: `python -m benchmarks.cold_compile`.

Each row is a new process, with an empty cache folder of Inductor (first) or with the one that the
first process filled (second). The rival is `torch.compile` of the decoder without starkv; the
floor is the same reply without compilation. The model is a tiny Qwen2.5-VL with as many layers as
asked for: time to compile depends on the number of operations, and hardly on their size.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from typing import Any

WAYS = {
    "eager": "no compilation",
    "plain": "torch.compile of the decoder",
    "whole": "starkv, inductor, regional_compilation=False",
    "regional": "starkv, inductor",
    "aot_eager": "starkv, aot_eager",
    "ours_eager": "starkv, eager",
}
FAMILY, TOKENS = "qwen2_5_vl", 8


def spent() -> float:
    """Seconds of processor of this process and of those that it has started and that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def answer(layers: int, way: str) -> dict[str, Any]:
    """Compiles, answers once, and returns the seconds that this took, without the imports."""
    import torch

    import starkv_compile
    from starkv_compile.testing import generate, tiny_inputs, tiny_model

    model = tiny_model(FAMILY, num_hidden_layers=layers)
    inputs = tiny_inputs(FAMILY)
    before = spent()
    if way == "plain":
        model.model.language_model.compile()
    elif way != "eager":
        inner = {"whole": "inductor", "regional": "inductor", "ours_eager": "eager"}.get(way, way)
        regional = way != "whole"
        starkv_compile.compile(model, budget=0.2, inner=inner, regional_compilation=regional)
    out = generate(model, inputs, TOKENS)
    from torch._inductor.async_compile import shutdown_compile_workers

    shutdown_compile_workers()  # so that their seconds count
    stored = out.past_key_values.layers[-1].keys.shape[2]
    return {"seconds": spent() - before, "stored": stored, "torch": torch.__version__}


def measured(layers: int, way: str, folder: str) -> dict[str, Any]:
    """Runs `answer` in a new process."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.cold_compile", "--one", way, "--layers"]
    done = subprocess.run(
        [*command, str(layers)], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--layers", default="4,28,36", help="numbers of layers, separated by commas")
    add("--ways", default=",".join(WAYS), help="rows of the table")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(answer(int(args.layers), args.one)))
        return
    print("| layers | | first process, s | second, s | first, of torch.compile |")
    print("| --- | --- | --- | --- | --- |")
    for layers in map(int, args.layers.split(",")):
        rival = 0.0
        for way in args.ways.split(","):
            with tempfile.TemporaryDirectory() as folder:
                first, second = (measured(layers, way, folder)["seconds"] for _ in range(2))
            if way == "plain":
                rival = first
            ratio = f"{first / rival:.2f}" if rival else ""
            print(f"| {layers} | {WAYS[way]} | {first:.1f} | {second:.1f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
