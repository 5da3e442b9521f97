"""Measures how often the agent is right: `python -m starkv_lab.training.evaluate`.

The command asks all kinds of questions with the full cache. With `--sessions N` it also runs N
sessions like the demo's, with a full cache and two compressed caches. Training never draws the
seeds of these episodes. With the full cache an answer counts as right if each of its tokens is the
model's first choice after the right tokens before it. Greedy decoding gives the answer in exactly
that case.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch

from starkv_compile import AgentSession, StarKVConfig, compile, undo
from starkv_compile.cli import share_of

from ..agent.batches import IGNORE, draw, sample_episodes, sample_plan, write
from ..agent.checkpoints import load_agent
from ..agent.questions import KINDS
from ..agent.vocabulary import TOKENS, VERBS
from ..demo.turns import episode_turns
from ..demo.ways import MAX_REPLY, ways
from .train import MAX_FRAMES

SESSION_FRAMES = 4

Score = dict[tuple[int, str], tuple[int, int]]


@torch.no_grad()
def evaluate(model: Any, episodes: int, questions: int = 10, seed: int = 0) -> Score:
    """Returns (right, asked) by number of frames and kind, on `episodes` episodes per number."""
    score: Score = {}
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
                    _count(score, frames, kind, is_right)
    return score


def _count(score: Score, frames: int, kind: str, is_right: bool) -> None:
    right, asked = score.get((frames, kind), (0, 0))
    score[frames, kind] = right + is_right, asked + 1


def _answers(ids: list[int], labels: list[int], right: list[bool]) -> list[tuple[str, bool]]:
    """Returns (kind, whether all tokens are right) for each answer of a row."""
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


def evaluate_sessions(model: Any, processor: Any, config: StarKVConfig, sessions: int) -> Score:
    """Returns (right, asked) by number of frames and kind of question, in sessions like the demo's.

    Each screenshot comes with a question. The last two questions of a session, "follow-up", ask
    about any frame after all frames were seen and compressed.
    """
    score: Score = {}
    compile(model, config)
    try:
        for seed in range(sessions):
            session, frames = AgentSession(model, processor), 0
            for turn in episode_turns(SESSION_FRAMES, 1000 + seed):
                frames += turn.image is not None
                reply = session.step(turn.content, max_new_tokens=MAX_REPLY, do_sample=False)
                assert turn.question is not None
                kind = turn.question.kind if turn.image is not None else "follow-up"
                _count(score, frames, kind, turn.question.is_right(reply))
    finally:
        undo(model)
    return score


def _print_sessions(model: Any, processor: Any, budget: float, sessions: int) -> None:
    print(f"\n{sessions} sessions of {SESSION_FRAMES} screenshots, budget {budget:.0%}")
    kinds = [*KINDS, "follow-up"]
    print(f"{'':18s}" + "".join(f"{kind:>11s}" for kind in kinds) + f"{'all':>11s}")
    for way in ways(budget, "eager"):
        score = evaluate_sessions(model, processor, way.config, sessions)
        parts = [[n for (_, k), n in score.items() if k == kind] for kind in kinds]
        parts.append(list(score.values()))
        shares = [sum(r for r, _ in part) / sum(n for _, n in part) for part in parts]
        print(f"{way.name:18s}" + "".join(f"{share:11.1%}" for share in shares), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measures how many held-out questions the agent answers."
    )
    parser.add_argument("--agent", type=Path, help="checkpoint folder (default: the demo agent)")
    parser.add_argument(
        "--episodes", type=int, default=40, help="episodes for each number of frames"
    )
    parser.add_argument("--sessions", type=int, default=0, help="number of sessions to run as well")
    parser.add_argument("--budget", default="0.2", help="budget of the sessions: 0.2 or 20%%")
    args = parser.parse_args()
    budget = share_of(args.budget)
    model, processor = load_agent(args.agent)
    score = evaluate(model, args.episodes)
    print("frames " + "".join(f"{kind:>9s}" for kind in VERBS) + "      all")
    for frames in range(1, MAX_FRAMES + 1):
        parts = [score.get((frames, kind), (0, 0)) for kind in VERBS]
        parts.append((sum(r for r, _ in parts), sum(n for _, n in parts)))
        print(f"{frames:6d} " + "".join(f"{right / max(1, n):9.1%}" for right, n in parts))
    total = sum(n for _, n in score.values())
    print(f"{sum(r for r, _ in score.values()) / total:.1%} of {total} questions right")
    if args.sessions:
        _print_sessions(model, processor, budget, args.sessions)


if __name__ == "__main__":
    main()
