"""Measures, prints ratios, and writes JSON, CSV and a plot: `python -m benchmarks`."""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from rich.progress import Progress
from starkv_lab.environment import environment

from starkv_compile.cli import share_of
from starkv_compile.kernels.compiling import in_process

from .contenders import CONTENDERS, Work, pipeline
from .layers import LAYERS, SCREENS, Inputs, Size, make_inputs
from .results import Result, table, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layer", nargs="+", choices=LAYERS, default=["qwen2.5-vl-7b"])
    parser.add_argument("--screen", nargs="+", choices=SCREENS, default=["1080p"])
    parser.add_argument("--frames", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--window", nargs="+", type=int, default=[8])
    parser.add_argument("--budget", nargs="+", default=["0.2"], help="shares: 0.2 or 20%%")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--only", nargs="+", choices=CONTENDERS, help="measure only these contenders and `ours`"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [
        Size(LAYERS[layer], screen, frames, window, budget, getattr(torch, dtype))
        for layer in args.layer
        for screen in args.screen
        for frames in args.frames
        for window in args.window
        for budget in map(share_of, args.budget)
        for dtype in args.dtype
    ]
    names = [name for name in CONTENDERS if name == "ours" or name in (args.only or CONTENDERS)]
    results: list[Result] = []
    with Progress() as progress, torch.no_grad(), in_process():
        steps = progress.add_task("", total=len(sizes) * len(names) * (args.rounds + 1))
        for size in sizes:
            torch._dynamo.reset()  # only here, because contenders share their code objects
            inputs = make_inputs(size, device)
            works: dict[str, Work] = {}
            for name in names:
                progress.update(steps, description=f"{size}: preparing {name}")
                work = CONTENDERS[name].make(size, inputs)
                if work is None:
                    progress.advance(steps, args.rounds + 1)
                    continue
                check(name, work, size, inputs)
                works[name] = work
                progress.advance(steps)
            seconds: dict[str, list[float]] = {name: [] for name in works}
            for turn in range(args.rounds):
                for name in random.Random(turn).sample(list(works), len(works)):
                    progress.update(steps, description=f"{size}: {name}")
                    seconds[name].append(time_once(works[name], device))
                    progress.advance(steps)
            results += [
                Result.of(size, name, CONTENDERS[name].role, seconds[name], seconds["ours"])
                for name in works
            ]
            del works
    print(table(results))
    write(results, environment(device), args.out)
    print(f"written to {args.out}/")


def time_once(work: Work, device: str) -> float:
    """Returns the seconds of one run. A contender in another process measures them itself."""
    start = time.perf_counter()
    told = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return told if isinstance(told, float) else time.perf_counter() - start


def check(name: str, work: Work, size: Size, inputs: Inputs) -> None:
    """Runs a contender once, which compiles it, and compares its tokens with the reference's.

    The release scores in the model's dtype. Half precision leaves a few hundred distinct scores,
    and chance decides between equal scores at the cut. We saw 96 % of the tokens in common.

    Raises:
        SystemExit: the contender keeps other tokens than the reference.
    """
    kept = work()
    if not isinstance(kept, torch.Tensor):
        return
    contender = CONTENDERS[name]
    run = pipeline(size, contender.method)
    expected = run(inputs.query, inputs.key, inputs.value, inputs.hidden, None, *inputs.layout)[0]
    common = len(set(kept[0].tolist()) & set(expected[0].tolist())) / expected.shape[1]
    least = 0.999 if contender.role == "ours" or inputs.key.dtype == torch.float32 else 0.93
    if common < least:
        raise SystemExit(
            f"{name} at {size}: keeps {common:.2%} of the reference's tokens, expected {least:.1%}"
        )


if __name__ == "__main__":
    main()
