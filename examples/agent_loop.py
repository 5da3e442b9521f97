"""Runs an agent's steps on one cache. Each step prefills only its new screenshot and text.

    python examples/agent_loop.py
    python examples/agent_loop.py --model ByteDance-Seed/UI-TARS-1.5-7B --budget 0.2

Without --model the example runs the demo agent of starkv-lab on generated screens. Each step
prints how many tokens the session has seen and how many the cache stores. The tokens of the last
answer stay uncompressed until the next step.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any

import torch
from starkv_lab.agent.questions import ask
from starkv_lab.agent.render import screenshot
from starkv_lab.agent.world import sample_episode

import starkv_compile
from starkv_compile.cli import share_of


def load(name: str | None) -> tuple[Any, Any]:
    """Returns (model, processor) of a checkpoint, or of the demo agent."""
    if name is None:
        from starkv_lab.agent import load_agent

        return load_agent()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto").eval().to(device)
    return model, AutoProcessor.from_pretrained(name)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=("Runs several agent steps on one compressed cache.")
    )
    parser.add_argument("--model", help="a checkpoint (default: the demo agent)")
    parser.add_argument("--steps", type=int, default=4, help="number of steps")
    parser.add_argument("--budget", default="0.3", help="share of the tokens: 0.2 or 20%%")
    parser.add_argument("--tokens", type=int, default=16, help="most tokens of a reply")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inner", default="inductor", help='"eager" needs no C++ compiler')
    args = parser.parse_args(argv)

    model, processor = load(args.model)
    starkv_compile.compile(model, budget=share_of(args.budget), inner=args.inner)
    session = starkv_compile.AgentSession(model, processor)

    rng = random.Random(args.seed)
    episode = sample_episode(rng, frames=args.steps)
    for i, frame in enumerate(episode.frames):
        question = ask(rng, episode, "click", shown=i + 1)
        content = [
            {"type": "text", "text": f"step {frame.step}"},
            {"type": "image", "image": screenshot(episode, i)},
            {"type": "text", "text": question.text},
        ]
        reply = session.step(content, max_new_tokens=args.tokens, do_sample=False)
        layer = session.cache.compressed_layers[0]
        print(f"step {frame.step}: {layer.stored} of {layer.seen} tokens stored")
        print(f"  asked    {question.text}\n  replied  {reply}\n  expected {question.answer}")
    print(starkv_compile.report(model))


if __name__ == "__main__":
    main()
