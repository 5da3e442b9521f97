"""Computes the method as its release does, at its cost.

We wrote this code from the paper's description alone. It repeats keys and values for every query
head, makes whole attention probabilities [H, W, L], and computes mutual information in Python loops
over tokens, which read each number back to the host. It covers what takes time on a prompt, which
is the first step of a session.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

POOL, BOOST, BOOST_TEMPERATURE = 5, 2.0, 3.5
BINS, GRID, MI_TEMPERATURE = 16, 12, 1.0
DECAY, FLOOR, LOW, HIGH = 0.1, 0.0, 0.75, 1.25


def compress(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor,
    spans: list[tuple[int, int]],
    window: int,
    capacity: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns kept keys and values, repeated to [1, H, C, D], and kept indices [C]."""
    repeats = query.shape[1] // key.shape[1]
    groups = key.shape[1]
    key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    heads, length, dim = key.shape[1:]
    logits = query[:, :, -window:] @ key.transpose(2, 3) / math.sqrt(dim)
    corner = torch.full((window, window), torch.finfo(logits.dtype).min, device=key.device)
    logits[..., -window:] += corner.triu(1).to(logits.dtype)
    probabilities = F.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    scores = probabilities[..., :-window].sum(2)
    scores = F.avg_pool1d(scores, POOL, 1, POOL // 2)
    start, end = spans[-1]
    norm = hidden[:, start:end].norm(dim=-1)
    standard = (norm - norm.mean()) / (norm.std() + 1e-8)
    scores[:, :, start:end] += BOOST * torch.softmax(standard / BOOST_TEMPERATURE, -1)[:, None]
    mean = scores.mean(1)
    share = mean / mean.sum().clamp(min=1e-8)
    entropy = -(share * (share + 1e-8).log()).sum() / math.log(mean.shape[-1])
    temperature = LOW + (HIGH - LOW) * entropy.item()

    by_group = scores[0].view(groups, repeats, -1).mean(1)
    information = [_mutual_information(row[start:end]) for row in by_group]
    mi = torch.tensor(information, device=key.device)
    spread = (mi.max() - mi.min()).item()
    scaled = (mi - mi.min()) / spread if spread > 0 else torch.full_like(mi, 0.5)
    weights = torch.softmax(scaled / MI_TEMPERATURE, 0)
    strength = 0.0  # the first steps of a session compute the prior and do not use it
    winner = by_group.argmax(0)
    final = mean[0] * (1 - strength + strength * groups * weights[winner])
    if len(spans) > 1:
        age = torch.zeros_like(final)
        for i, (a, b) in enumerate(spans):
            age[a:b] = len(spans) - 1 - i
        final = final * (FLOOR + (1 - FLOOR) * torch.exp(-DECAY * age))
    final = final.clamp(min=0) ** (1.0 / temperature)
    kept = final.topk(capacity - window).indices.sort().values
    index = kept[None, None, :, None].expand(1, heads, -1, dim)
    small = [torch.cat([t.gather(2, index), t[:, :, -window:]], dim=2) for t in (key, value)]
    tail = torch.arange(length - window, length, device=key.device)
    return small[0], small[1], torch.cat([kept, tail])


def _mutual_information(scores: torch.Tensor) -> float:
    """Returns the mutual information of one group in nats, counted token by token."""
    if scores.sum().item() <= 1e-12:
        return 0.0
    values = scores.float().cpu().numpy()
    count = len(values)
    rank = np.empty(count, np.int64)
    rank[np.argsort(values, kind="stable")] = np.arange(count)
    height = round(math.sqrt(count))
    width = math.ceil(count / height)
    joint = np.zeros((BINS, GRID * GRID))
    for token in range(count):
        row, column = divmod(token, width)
        vertical = min(GRID - 1, int(GRID * (row + 0.5) / height))
        horizontal = min(GRID - 1, int(GRID * (column + 0.5) / width))
        joint[rank[token] * BINS // count, GRID * vertical + horizontal] += 1
    joint /= count
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    return max(0.0, float((joint * (np.log(joint + 1e-12) - np.log(product + 1e-12))).sum()))
