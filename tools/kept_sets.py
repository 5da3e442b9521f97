"""Prints digests of the tokens that each policy keeps, and of the replies.

    python tools/kept_sets.py > before.txt     # then change the code
    python tools/kept_sets.py > after.txt && diff before.txt after.txt

The prompts are three generated sessions of the demo agent (seeds 0 to 2, four screenshots, six
turns), and a batch of two prompts, one padded, on a random Qwen3-VL. The command runs every policy
and the paper's configuration at 20 % and 10 %. All runs on one machine print the same lines.
Another processor may round differently.
"""

from __future__ import annotations

import hashlib

import torch
from starkv_lab.agent import load_agent
from starkv_lab.demo.turns import episode_turns

import starkv_compile
from starkv_compile import AgentSession, CacheError, StarKVCache, StarKVConfig
from starkv_compile.hf.cache_argument import with_cache
from starkv_compile.policies import POLICIES
from starkv_compile.testing import TinyPrompt, tiny_inputs, tiny_model

BUDGETS = (0.2, 0.1)
SEEDS = (0, 1, 2)
FRAMES = 4


def agent_session(options: dict[str, object], seed: int) -> list[object]:
    """Returns the replies of one session, and after each turn the places that every layer keeps."""
    model, processor = load_agent()
    starkv_compile.compile(model, StarKVConfig.from_options(options))
    session, found = AgentSession(model, processor), []
    for turn in episode_turns(FRAMES, seed):
        try:
            found.append(session.step(turn.content, max_new_tokens=12, do_sample=False))
        except CacheError:  # a cache with budgets by layer takes one prompt
            break
        found.append(_places(session.cache))
    return found


def padded_batch(options: dict[str, object]) -> list[object]:
    """Returns the same for a batch of two prompts with different lengths."""
    model = tiny_model("qwen3_vl")
    starkv_compile.compile(model, StarKVConfig.from_options(options))
    prompts = (TinyPrompt(((4, 6), (4, 6))), TinyPrompt(((4, 6), (4, 6)), text=21, seed=1))
    cache = StarKVCache(model.config)
    ids = model.generate(
        **tiny_inputs("qwen3_vl", *prompts), **with_cache(cache), max_new_tokens=6, do_sample=False
    )
    return [ids.tolist(), _places(cache)]


def _places(cache: StarKVCache) -> list[object]:
    return [layer.places().tolist() for layer in cache.compressed_layers]


def digest(found: object) -> str:
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def main() -> None:
    torch.set_num_threads(1)
    ways = [{"policy": name} for name in POLICIES]
    ways.append({"policy": "starkv", "entropy": "global", "grid": "square"})  # the paper's
    for way in ways:
        for budget in BUDGETS:
            options = {**way, "budget": budget, "inner": "eager"}
            torch._dynamo.reset()
            sessions = digest([agent_session(options, seed) for seed in SEEDS])
            even = options["policy"] != "pyramidkv"  # budgets by layer allow no padded batch
            batch = digest(padded_batch(options)) if even else "-"
            name = "paper" if "grid" in way else way["policy"]
            print(f"{name:20s} {budget:4.0%}  agent {sessions}  batch {batch}", flush=True)


if __name__ == "__main__":
    main()
