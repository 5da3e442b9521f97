"""The policies' own ops, and sets by head in those that all share: schema and fake are right."""

import pytest
import torch

from starkv_compile.kernels.ops import STARKV
from tests.support.policy_cases import frames

B, H, G, L, D, C = 2, 4, 2, 40, 16, 20


def cases():
    generator = torch.Generator().manual_seed(0)
    query, key, value, units, hidden, scores = (
        torch.randn(B, *shape, generator=generator)
        for shape in ((H, L, D), (G, L, D), (G, L, D), (L, G * D), (L, 24), (G, L))
    )
    frame, row, column, current = (
        t.expand(B, -1).clone() for t in frames(L, (3, 12), (14, 23), columns=3)
    )
    novelty = scores[..., : L - 8].exp(), units[..., 0].abs(), units[..., 1].abs()
    real = torch.arange(L) >= torch.tensor([[0], [5]])
    late = (torch.arange(L) >= 7).expand(B, -1).clone()
    by_head = frame[:, None].expand(-1, G, -1).clone()
    screens, counts = units[:, : L - 8, 0].abs(), torch.tensor([[70, 90]]).expand(B, -1).clone()
    kept = STARKV.select_tokens(scores, real, L, 8, C)
    places = real.cumsum(-1)
    return {
        "select_tokens": (scores, real, L, 8, C),
        "gather_kv": (key, value, kept, real),
        "current_frame_boost": (hidden, frame, current, L - 8, 3.5),
        "repeated_tokens": (key, by_head, current, C),
        "spatial_novelty": (key, frame, row, column, torch.ones(B, 7)),
        "temporal_novelty": (key, frame, row, column, current, 7),
        "key_novelty": (key, real),
        "novelty_scores": (*novelty, units[..., 2].abs(), real, frame, 5, 0.5, 1.0, None),
        "novelty_scores_fresh": (*novelty, units[..., 2].abs(), None, frame, 5, 0.5, 1.0, late),
        "share_out": (screens, real, frame, None, 8, C, 2.0),
        "share_out_counts": (screens, real, frame, counts, 8, C, 2.0),
        "repeats_current": (units, frame, current, C),
        "attention_expected": (query, key, value, places, 0.25),
        "post_vision_scores": (query, key, None, real, by_head, 0.25, 8, C, 5),
    }


def op_of(name):
    return getattr(STARKV, name.removesuffix("_counts").removesuffix("_fresh")).default


@pytest.mark.parametrize("name", cases())
def test_opcheck(name):
    torch.library.opcheck(op_of(name), cases()[name])


def test_each_head_is_selected_and_gathered_as_alone():
    (scores, real, *sizes), (key, value, kept, _) = (
        cases()[name] for name in ("select_tokens", "gather_kv")
    )
    new_key, new_value = STARKV.gather_kv(key, value, kept, real)
    assert new_key._base is None
    assert new_value._base is None, "what is cached is no view"
    for head in range(G):
        alone = STARKV.select_tokens(scores[:, head].contiguous(), real, *sizes)
        assert torch.equal(kept[:, head], alone)
        one = slice(head, head + 1)
        pair = STARKV.gather_kv(key[:, one], value[:, one], alone, real)
        assert torch.equal(new_key[:, one], pair[0])
        assert torch.equal(new_value[:, one], pair[1])
