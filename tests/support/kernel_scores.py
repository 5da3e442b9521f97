"""Scores that selection finds hard."""

import torch


def scores_of(kind, batch, past, generator):
    scores = torch.randn(batch, past, generator=generator)
    if kind == "ties":
        return (scores * 2).round()
    if kind == "equal":
        return torch.zeros(batch, past)
    if kind == "signed zeros":
        return torch.where(scores > 0, 0.0, -0.0)
    if kind == "not finite":
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-42])
        return torch.where(scores > 0.5, special[(scores.abs() * 100).long() % 6], scores)
    if kind == "heavy tail":
        return scores.exp() ** 8
    return scores


KINDS = ("random", "ties", "equal", "signed zeros", "not finite", "heavy tail")
