"""Stores the trained vision tower's output for episodes, so that later steps need no pixels.

Drawing a screen and running the tower takes about 10 ms, which is most of a training step.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..agent.batches import draw
from ..agent.world import GRIDS, Cell, Episode, sample_episode

CHUNK = 10  # episodes that the tower sees at once


@dataclass(frozen=True)
class SeenEpisodes:
    """Holds E episodes of F frames each, on one grid of n cells.

    features: [E, F, n, hidden] float16, the visual embeddings. deepstack: [E, F, n, hidden]
    float16, what the model adds after its first language layer. has_element: [E, F, n] bool.
    """

    grid: Cell
    episodes: list[Episode]
    features: torch.Tensor
    deepstack: torch.Tensor
    has_element: torch.Tensor

    def sample(self, rng: random.Random, rows: int, frames: int) -> SeenEpisodes:
        """Draws `rows` of the episodes, each cut to `frames` consecutive frames."""
        cuts = []
        for i in rng.sample(range(len(self.episodes)), rows):
            start = rng.randint(0, len(self.episodes[i].frames) - frames)
            cuts.append((i, slice(start, start + frames)))
        return SeenEpisodes(
            self.grid,
            [replace(e := self.episodes[i], frames=e.frames[cut]) for i, cut in cuts],
            torch.stack([self.features[i, cut] for i, cut in cuts]),
            torch.stack([self.deepstack[i, cut] for i, cut in cuts]),
            torch.stack([self.has_element[i, cut] for i, cut in cuts]),
        )


def see_episodes(visual: Any, seed: int, episodes: int, frames: int) -> Iterator[SeenEpisodes]:
    """Yields `episodes` new episodes (a multiple of CHUNK) of `frames` frames for each grid."""
    for grid in GRIDS:
        made: list[Episode] = []
        parts = []
        for start in range(0, episodes, CHUNK):
            rng = random.Random(f"pool-{seed}-{grid}-{start}")
            chunk = [sample_episode(rng, frames, grid) for _ in range(CHUNK)]
            parts.append(_see(visual, chunk))
            made += chunk
        yield SeenEpisodes(grid, made, *(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.no_grad()
def _see(visual: Any, episodes: list[Episode]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    screens = draw(episodes)
    seen = visual(screens.pixel_values, grid_thw=screens.grid_thw)
    (deepstack,) = seen.deepstack_features
    shape = (len(episodes), len(episodes[0].frames), -1)
    return (
        seen.pooler_output.half().view(*shape, deepstack.shape[-1]),
        deepstack.half().view(*shape, deepstack.shape[-1]),
        (screens.cells[:, 0] > 0).view(shape),
    )
