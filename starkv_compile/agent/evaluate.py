"""How often the agent is right with the full cache: `python -m starkv_compile.agent.evaluate`.

Episodes are held out: their seeds are of a kind training never draws. An answer counts if every
token of it is the model's first choice after the right ones before it, which is when greedy
decoding gives it.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from .batches import IGNORE, draw, sample_episodes, sample_plan, write
from .checkpoints import load_agent
from .train import MAX_FRAMES
from .vocabulary import TOKENS, VERBS

Score = dict[tuple[int, str], tuple[int, int]]


@torch.no_grad()
def evaluate(model: Any, episodes: int, questions: int = 10, seed: int = 0) -> Score:
    """(right, asked) by number of frames and kind of question; `episodes` for each number."""
    counts: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0, 0])
    for frames in range(1, MAX_FRAMES + 1):
        for start in range(0, episodes, 8):
            rows = min(8, episodes - start)
            rng = random.Random(f"held-out-{seed}-{frames}-{start}")
            episodes_here = sample_episodes(rng, rows, frames)
            screens = draw(episodes_here)
            text = write(rng, episodes_here, sample_plan(rng, frames, questions))
            logits = model(
                input_ids=text.input_ids,
                pixel_values=screens.pixel_values,
                image_grid_thw=screens.grid_thw,
                mm_token_type_ids=text.is_image.int(),
                use_cache=False,
            ).logits
            right = (logits.argmax(-1) == text.labels) | (text.labels == IGNORE)
            for ids, labels, good in zip(text.input_ids, text.labels, right, strict=True):
                for kind, is_right in _answers(ids.tolist(), labels.tolist(), good.tolist()):
                    counts[frames, kind][0] += is_right
                    counts[frames, kind][1] += 1
    return {key: (right, asked) for key, (right, asked) in counts.items()}


def _answers(ids: list[int], labels: list[int], right: list[bool]) -> list[tuple[str, bool]]:
    """(kind, whether all of it is right) of each answer of a row."""
    found: list[tuple[str, bool]] = []
    kind, whole = "", True
    for i, label in enumerate(labels):
        word = TOKENS[ids[i]]
        if label == IGNORE:
            kind = word if word in VERBS else kind
            continue
        whole = whole and right[i]
        if i + 1 == len(labels) or labels[i + 1] == IGNORE:
            found.append((kind, whole))
            whole = True
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Share of held-out questions the agent answers.")
    parser.add_argument("--agent", type=Path, help="checkpoint folder (default: the shipped one)")
    parser.add_argument("--episodes", type=int, default=40, help="for each number of frames")
    args = parser.parse_args()
    model, _ = load_agent(args.agent)
    score = evaluate(model, args.episodes)
    print("frames " + "".join(f"{kind:>9s}" for kind in VERBS) + "      all")
    for frames in range(1, MAX_FRAMES + 1):
        parts = [score.get((frames, kind), (0, 0)) for kind in VERBS]
        parts.append((sum(r for r, _ in parts), sum(n for _, n in parts)))
        print(f"{frames:6d} " + "".join(f"{right / max(1, n):9.1%}" for right, n in parts))
    total = sum(n for _, n in score.values())
    print(f"{sum(r for r, _ in score.values()) / total:.1%} of {total} questions right")


if __name__ == "__main__":
    main()
