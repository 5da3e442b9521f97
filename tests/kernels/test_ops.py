"""Registered ops: schema and fake right, the same under every compiler, on aliased inputs too."""

import pytest
import torch

from starkv_compile.kernels.marker import WriteArguments
from starkv_compile.kernels.ops import STARKV
from starkv_compile.kernels.reference.star import Layout, fresh_state
from starkv_compile.policies import StarKV
from tests.support.crossing import slow

B, H, G, S, L, D, E = 2, 4, 2, 40, 40, 16, 32


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, H, S, D, generator=generator)
    key = torch.randn(B, G, L, D, generator=generator)
    value = torch.randn(B, G, L, D, generator=generator)
    hidden = torch.randn(B, S, E, generator=generator)
    frame = torch.full((B, L), -1)
    frame[:, 4:13], frame[:, 16:25] = 0, 1
    row = torch.zeros(B, L, dtype=torch.int64)
    column = torch.zeros(B, L, dtype=torch.int64)
    for start in (4, 16):
        row[:, start : start + 9] = torch.arange(9) // 3
        column[:, start : start + 9] = torch.arange(9) % 3
    current = torch.arange(16, 25).expand(B, -1).clone()
    return query, key, value, hidden, (frame, row, column, current)


def star_arguments(seed=0):
    query, key, _, hidden, layout = tensors(seed)
    attention = STARKV.window_attention(query, key, None, D**-0.5, 8, 16)
    state = fresh_state(key, layout[3])
    return (attention, hidden, None, *layout, *state, *StarKV().scalars())


def cases():
    query, key, value, _, layout = tensors()
    real = torch.arange(L)[None].expand(B, -1) >= torch.tensor([[0], [5]])
    mask = real[:, None, None] & torch.ones(S, L, dtype=torch.bool).tril()
    scores = torch.randn(B, L - 8)
    kept = torch.arange(0, L, 2).expand(B, -1).clone()
    place = torch.arange(L).expand(B, -1).clone()
    positions = torch.arange(L).expand(3, B, -1).clone()
    return {
        "window_attention": (query, key, None, 0.25, 8, 16),
        "window_attention_mask": (query, key, mask, 0.25, 8, 16),
        "window_attention_cpu": (query, key, None, 0.25, 8, 16),
        "star_scores": star_arguments(),
        "select_tokens": (scores, None, L, 8, 16),
        "rank_histogram_cpu": (
            torch.randn(B, G, 9),
            layout[1][:, 4:13],
            torch.ones(B, 9, dtype=torch.bool),
        ),
        "select_tokens_cpu": (scores, real, L, 8, 16),
        "select_tokens_real": (scores, real, L, 8, 16),
        "gather_kv": (key, value, kept, None),
        "gather_kv_real": (key, value, kept, real),
        "cache_write": WriteArguments(
            key=key,
            value=value,
            place=place,
            novelty=torch.rand(place.shape),
            **Layout(*layout)._asdict(),
            counts=torch.tensor([[30, 20]]).expand(B, -1).clone(),
            **fresh_state(key, layout[3])._asdict(),
            turn_start=torch.zeros(1, dtype=torch.int64),
            seen=L,
            has_layout=True,
            mask_fits=True,
        ),
        "layout_from_positions": (positions,),
        "layout_from_image_mask": (layout[0] >= 0,),
        "layout_all_text": (key,),
        "fresh_state": (key, layout[3]),
    }


def op_of(name):
    for suffix in ("_mask", "_real"):
        if name != "layout_from_image_mask":
            name = name.removesuffix(suffix)
    return getattr(STARKV, name).default


@pytest.mark.parametrize("name", cases())
def test_opcheck(name):
    torch.library.opcheck(op_of(name), cases()[name])


def aliased(key, value, scores):
    """Inputs that share storage with each other and with what is returned."""
    key, value = key.clone()[:, :, 1:], value.clone().transpose(0, 1).transpose(0, 1)[:, :, 1:]
    kept = STARKV.select_tokens(scores, None, key.shape[2], 8, 16)
    new_key, new_value = STARKV.gather_kv(key, value, kept, None)
    both = STARKV.gather_kv(key, key, kept, None)
    return new_key + 1, new_value, both[0], both[1], key, kept


@pytest.mark.parametrize("backend", ["aot_eager", slow("inductor", ci=True)])
def test_same_under_every_compiler(backend):
    _, key, value, _, _ = tensors()
    scores = torch.randn(B, L - 1 - 8)
    expected = aliased(key, value, scores)
    torch._dynamo.reset()
    compiled = torch.compile(aliased, backend=backend, fullgraph=True)(key, value, scores)
    for ours, theirs in zip(compiled, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["aot_eager", slow("inductor", ci=True)])
def test_scores_same_under_every_compiler(backend):
    def score(*arguments):
        final, *state = STARKV.star_scores(*arguments)
        return (STARKV.select_tokens(final, None, L, 8, 16), final, *state)

    arguments = star_arguments()
    expected = score(*arguments)
    compiled = torch.compile(score, backend=backend, fullgraph=True)(*arguments)
    assert torch.equal(compiled[0], expected[0])
    for ours, theirs in zip(compiled[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_row_of_a_batch_is_scored_as_alone():
    padding = 6
    query, key, _, hidden, layout = tensors()
    mask = torch.ones(B, 1, S, L, dtype=torch.bool).tril()
    mask[1, :, :, :padding] = False
    real = mask[:, 0, -1]
    frame, row, column, current = (t.clone() for t in layout)
    frame[1, :padding] = -1
    current = current[:, :]

    def run(rows, start):
        part = (frame[rows, start:], row[rows, start:], column[rows, start:], current[rows] - start)
        keys = key[rows, :, start:]
        attention = STARKV.window_attention(
            query[rows, :, start:], keys, mask[rows, :, start:, start:], 0.25, 8, 16
        )
        scored = STARKV.star_scores(
            attention,
            hidden[rows, start:],
            real[rows, start:],
            *part,
            *fresh_state(keys, part[3]),
            *StarKV().scalars(),
        )
        length = L - start
        return scored, STARKV.select_tokens(scored[0], real[rows, start:], length, 8, 16) + start

    both, kept = run(slice(0, 2), 0)
    alone, kept_alone = run(slice(1, 2), padding)
    torch.testing.assert_close(both[0][1:, padding:], alone[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(kept[1:], kept_alone)


def test_one_bad_key_loses_only_its_own_place():
    query, key, _, _, _ = tensors()
    clean = STARKV.window_attention(query, key, None, 0.25, 8, 16)
    key[:, :, 7] = float("nan")
    dirty = STARKV.window_attention(query, key, None, 0.25, 8, 16)
    assert dirty.isfinite().all()
    assert (dirty[..., 7] == 0).all()
    others = [i for i in range(L - 8) if i != 7]
    assert (dirty[..., others] >= clean[..., others] - 1e-6).all()
