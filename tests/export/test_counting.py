"""Mutual information without float64 and adding scatters: the reference's, bit for bit."""

import math

import pytest
import torch

from starkv_compile.export.capture.counting import RANKS, information_by_table
from starkv_compile.kernels.reference.spatial import information, rank_histogram

LONGEST = 16384


@pytest.fixture(scope="module")
def by_table():
    return information_by_table(LONGEST)


@pytest.mark.parametrize("form", RANKS)
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 90, 400])
def test_pairs_are_counted_as_by_adding(form, tokens):
    torch.manual_seed(tokens)
    scores = torch.rand(2, 3, tokens)
    scores[:, :, tokens // 2 :] = scores[:, :, : tokens - tokens // 2].clone()  # ties
    valid = torch.arange(tokens) < torch.tensor([[tokens], [tokens // 2]])
    place = torch.randint(0, 144, (2, tokens))
    assert torch.equal(RANKS[form](scores, place, valid), rank_histogram(scores, place, valid))


def frames(tokens):
    """Scores [2, 8, N] of several kinds, place [2, N], valid [2, N]."""
    spread = torch.randint(0, 144, (2, tokens))
    ordered = (torch.arange(tokens) * 144 // tokens).expand(2, -1)
    noise = torch.rand(2, 8, tokens)
    valid = torch.arange(tokens) < torch.tensor([[tokens], [max(1, tokens // 3)]])
    yield noise, spread, valid
    yield torch.softmax(8 * noise, -1), spread, valid
    yield noise + ordered[:, None] / 40, ordered, valid
    yield (5 * noise).floor(), ordered, valid


@pytest.mark.parametrize("tokens", [1, 2, 3, 19, 144, 777, 2500, LONGEST])
def test_information_is_the_one_in_float64(tokens, by_table):
    torch.manual_seed(tokens)
    for scores, place, valid in frames(tokens):
        joint, count = rank_histogram(scores, place, valid), valid.sum(-1)
        assert torch.equal(by_table(joint, count), information(joint, count))


def test_frames_without_tokens_tell_nothing(by_table):
    nothing = torch.zeros(2, 3, 16, 144, dtype=torch.int32)
    assert torch.equal(by_table(nothing, torch.zeros(2, dtype=torch.int64)), torch.zeros(2, 3))


def test_sums_of_the_longest_sessions_fit_into_63_bits():
    """All tokens in one place: the two largest sums there can be."""
    longest = 1 << 20
    joint = torch.zeros(1, 1, 16, 144, dtype=torch.int32)
    joint[..., 0] = longest // 16
    found = information_by_table(longest)(joint, torch.tensor([longest]))
    assert found.item() == 0
    joint = torch.zeros(1, 1, 16, 144, dtype=torch.int32)
    joint[0, 0, torch.arange(16), torch.arange(16)] = longest // 16
    found = information_by_table(longest)(joint, torch.tensor([longest]))
    assert found.item() == pytest.approx(math.log(16), abs=1e-7)
