"""Compares the exported agent with the agent in PyTorch on the demo's episodes.

    python tools/exported_agent.py FOLDER [--episodes N]

The command exports the agent to FOLDER for each of the demo's three caches, unless FOLDER has it
already, and prints a table. The exit code is 1 if a reply or a kept token differs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from starkv_lab.demo.runtimes import export_agent, in_onnx, in_torch
from starkv_lab.demo.turns import Turn, episode_turns
from starkv_lab.demo.ways import MAX_REPLY, Clock, Way, ways

from starkv_compile.cli import add_nbits, share_of
from starkv_compile.session import AgentSession

FRAMES = 4
HEADER = (
    "way",
    "same replies",
    "right",
    "same kept tokens",
    "cache, kB",
    "ms per turn: torch",
    "ONNX",
    "ms per token: torch",
    "ONNX",
)


@dataclass
class Episodes:
    """Holds the replies, kept places and times of one runtime, after every turn."""

    replies: list[str] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)

    def play(self, agent: tuple[Any, Any], turns: Sequence[Turn]) -> None:
        session = AgentSession(*agent)
        for turn in turns:
            clock = Clock()
            reply = session.step(
                turn.content, max_new_tokens=MAX_REPLY, do_sample=False, streamer=clock
            )
            self.replies.append(reply)
            self.kept += [layer.places()[0] for layer in session.cache.compressed_layers]
            self.first.append(clock.first)
            self.later += clock.later
        self.nbytes.append(session.cache.nbytes)


def row(way: Way, episodes: Sequence[Sequence[Turn]], folder: Path) -> tuple[list[str], bool]:
    """Returns a line of the table, and whether both runtimes agree."""
    export_agent(way.config, None, folder, lambda stage: None)
    torchs, onnxs = Episodes(), Episodes()
    with in_torch(way.config, None) as compiled:
        exported = in_onnx(folder)
        for runtime, agent in ((Episodes(), compiled), (Episodes(), exported)):
            runtime.play(agent, episodes[0])  # the first run compiles
        for turns in episodes:
            torchs.play(compiled, turns)
            onnxs.play(exported, turns)
    asked = [turn.question for turns in episodes for turn in turns]
    right = sum(q.is_right(r) for q, r in zip(asked, onnxs.replies, strict=True) if q)
    alike = sum(a == b for a, b in zip(torchs.replies, onnxs.replies, strict=True))
    pairs = list(zip(torchs.kept, onnxs.kept, strict=True))
    tokens = sum(len(a) for a, _ in pairs)
    kept = sum(len(a) for a, b in pairs if torch.equal(a, b))
    cells = [
        way.title,
        f"{alike} of {len(asked)}",
        str(right),
        f"{kept:,} of {tokens:,}",
        f"{statistics.mean(onnxs.nbytes) / 1e3:.0f}",
        *(f"{1e3 * statistics.mean(run.first):.0f}" for run in (torchs, onnxs)),
        *(f"{1e3 * statistics.mean(run.later):.1f}" for run in (torchs, onnxs)),
    ]
    return cells, (alike, kept) == (len(asked), tokens) and torchs.nbytes == onnxs.nbytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--budget", default="0.2", help="share of the tokens: 0.2 or 20%%")
    add_nbits(parser)
    parser.add_argument("--inner", default="eager")
    args = parser.parse_args()
    episodes = [episode_turns(FRAMES, seed) for seed in range(args.episodes)]
    print("|", " | ".join(HEADER), "|")
    print("|", " | ".join("---" for _ in HEADER), "|", flush=True)
    same = True
    for way in ways(share_of(args.budget), args.inner, args.nbits):
        cells, alike = row(way, episodes, args.folder / way.name)
        print("|", " | ".join(cells), "|", flush=True)
        same = same and alike
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
