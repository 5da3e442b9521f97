"""Models whose attention depends on the places of stored tokens, not on the tokens alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.foreign.core import DIM, PROMPT, rotate
from tests.foreign.styles import LibraryCache, MaskFromCache
from tests.foreign.test_reading import WHOLE, made, talked
from tests.support.crossing import first_only

DEPENDS = "computed from what is stored and from the places"


class RotatesStoredKeys(LibraryCache):
    """Keys get their rotary positions after the cache, as in StreamingLLM."""

    def attend(self, q, k, v, mask):
        return super().attend(q, rotate(k, torch.arange(k.shape[2])), v, mask)


class LearnedPlaces(LibraryCache):
    """Stored keys get a learned vector for each place."""

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(256, DIM)

    def attend(self, q, k, v, mask):
        return super().attend(q, k + self.table(torch.arange(k.shape[2])), v, mask)


class NeighboursValues(LibraryCache):
    """A stored value gets a part of the value before it."""

    def attend(self, q, k, v, mask):
        return super().attend(q, k, v + 0.5 * F.pad(v, (0, 0, 1, 0))[:, :, :-1], mask)


class RolledValues(LibraryCache):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v + 0.5 * v.roll(1, 2), mask)


class CentredKeys(LibraryCache):
    """The mean of all stored keys is taken from each."""

    def attend(self, q, k, v, mask):
        return super().attend(q, k - k.mean(2, keepdim=True), v, mask)


@pytest.mark.parametrize(
    "kind",
    first_only(
        [RotatesStoredKeys, LearnedPlaces, NeighboursValues, RolledValues, CentredKeys], ci=True
    ),
)
def test_keys_that_depend_on_places_stay_uncompressed(kind):
    talk, (said,) = talked(kind)
    assert DEPENDS in said
    assert [key.shape[2] for key, _ in talk.stored] == [WHOLE] * 2
    model = made(kind, None)
    with torch.no_grad():
        plain = kind.talk(model, model)
    assert torch.equal(talk.logits, plain.logits)


class NormsStoredKeys(LibraryCache):
    """What is done to each stored vector by itself does no harm."""

    def attend(self, q, k, v, mask):
        return super().attend(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, mask)


def test_keys_that_are_changed_token_by_token_are_compressed():
    talk, said = talked(NormsStoredKeys)
    assert not said
    assert all(key.shape[2] < WHOLE for key, _ in talk.stored)


class SkipsForLast(MaskFromCache):
    """The last queries of the prompt do not see some of its tokens; decoded tokens do."""

    def mask(self, cache, seen, n):
        plain = super().mask(cache, seen, n)
        if seen:
            return plain
        place = torch.arange(n)
        return plain & ~((place[:, None] >= n - 10) & (place > 4) & (place < 21))


class BestEight(MaskFromCache):
    """Each query reads its eight best keys."""

    def attend(self, q, k, v, mask):
        logits = (q @ k.mT * DIM**-0.5).masked_fill(~mask, -1e9)
        least = logits.topk(min(8, logits.shape[-1]), -1).values[..., -1:]
        return logits.masked_fill(logits < least, -1e9).softmax(-1) @ v


@pytest.mark.parametrize("kind", first_only([SkipsForLast, BestEight], ci=True))
def test_real_tokens_that_the_last_query_does_not_see_keep_their_keys(kind):
    model = made(kind, 0.8)
    with torch.no_grad():
        cache = model(PROMPT).past_key_values
    for layer in cache.layers:
        assert layer.stored == WHOLE * 8 // 10
        assert bool((layer.keys.abs().amax((0, 1, 3)) > 0).all())
        assert bool((layer.values.abs().amax((0, 1, 3)) > 0).all())
