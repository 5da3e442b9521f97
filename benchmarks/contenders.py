"""Lists what is measured, in `CONTENDERS`: our paths, the rivals, and the floors.

A contender is made once for each size from the size's inputs, and this time does not count. Calling
the made function does the work once. It may return the kept indices, which are checked before the
measurement.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from starkv_compile import StarKVConfig
from starkv_compile.cache.quantized import quantize_tokens
from starkv_compile.kernels.ops import STARKV
from starkv_compile.kernels.reference.star import fresh_state
from starkv_compile.policies import ScoreInputs

from . import kvpress_peer, released
from .layers import Inputs, Size

Work = Callable[[], "torch.Tensor | float | None"]


@dataclass(frozen=True)
class Contender:
    """Describes one thing to measure.

    role: "ours", "rival" or "floor". make: returns the work, or None if the contender cannot run.
    method: the name in `METHODS` of the method that chooses its tokens.
    """

    role: str
    make: Callable[[Size, Inputs], Work | None]
    method: str = "default"


METHODS: dict[str, Callable[..., StarKVConfig]] = {
    "default": StarKVConfig,
    "starkv": functools.partial(StarKVConfig, policy="starkv"),
    "paper": StarKVConfig.paper,
}


def config_of(size: Size, method: str = "default") -> StarKVConfig:
    return METHODS[method](budget=size.budget, window=size.window)


def pipeline(
    size: Size, method: str
) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Returns what the pass inserts into the graph of one layer: score, select, gather.

    Without compilation it runs the reference.
    """
    config = config_of(size, method)
    policy, capacity = config.policy, config.capacity(size.length)

    def run(query, key, value, hidden, total, *layout):  # type: ignore[no-untyped-def]
        scored = policy.score(
            ScoreInputs(
                query=query,
                key=key,
                value=value,
                mask=None,
                scale=size.layer.dim**-0.5,
                log_sum_exp=total,
                hidden=hidden,
                real=None,
                layout=layout,
                counts=None,
                state=tuple(fresh_state(key, layout[3])),
                index=None,
                novelty=None,
                layer=0,
                window=size.window,
                capacity=capacity,
            )
        )
        kept = STARKV.select_tokens(scored.scores, None, size.length, size.window, capacity)
        return kept, *STARKV.gather_kv(key, value, kept, None)

    return run


def _ours(
    *, compiled: bool, shared: bool, method: str = "default", nbits: int = 16
) -> Callable[[Size, Inputs], Work]:
    def make(size: Size, inputs: Inputs) -> Work:
        run = pipeline(size, method)
        if compiled:
            run = torch.compile(run, fullgraph=True, dynamic=False)
        total = log_sum_exp(inputs) if shared else None
        arguments = (inputs.query, inputs.key, inputs.value, inputs.hidden, total, *inputs.layout)
        if nbits == 16:
            return lambda: run(*arguments)[0]

        def work() -> torch.Tensor:
            kept, key, value = run(*arguments)
            coded = slice(kept.shape[-1] - size.window)
            rows = (t[:, :, coded] for t in (key, value))
            quantize_tokens(*rows, kept[..., coded].contiguous(), nbits, None)
            return kept

        return work

    return make


def log_sum_exp(inputs: Inputs) -> torch.Tensor:
    """Returns [1, H, L] for the prompt's causal attention, computed for the window's rows only."""
    rows = 64
    query, key = inputs.query[:, :, -rows:].float(), inputs.key.float()
    repeats, length = query.shape[1] // key.shape[1], key.shape[2]
    logits = query @ key.repeat_interleave(repeats, 1).mT * key.shape[-1] ** -0.5
    place = torch.arange(length, device=key.device)
    hidden = place > place[-rows:, None]
    total = logits.masked_fill(hidden, -torch.inf).logsumexp(-1)
    return F.pad(total, (length - rows, 0))


def _released(size: Size, inputs: Inputs) -> Work:
    capacity = config_of(size, "paper").capacity(size.length)
    arguments = (inputs.query, inputs.key, inputs.value, inputs.hidden, size.spans)
    return lambda: released.compress(*arguments, size.window, capacity)[2][None]


def _kvpress(size: Size, inputs: Inputs) -> Work | None:
    peer = kvpress_peer.start(size)
    return None if peer is None else peer.seconds


def _prefill_attention(size: Size, inputs: Inputs) -> Work | None:
    query, key, value = inputs.query, inputs.key, inputs.value
    if not key.is_cuda and size.length > 20_000:
        return None  # minutes on a CPU
    return lambda: _nothing(
        F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    )


def _copy(size: Size, inputs: Inputs) -> Work:
    """Reads all keys, and copies the kept keys and values: the time that memory needs."""
    kept = config_of(size).capacity(size.length)
    out = torch.empty_like(inputs.key)
    small = [torch.empty_like(t[:, :, :kept]) for t in (inputs.key, inputs.value)]

    def work() -> None:
        out.copy_(inputs.key)
        small[0].copy_(inputs.key[:, :, -kept:])
        small[1].copy_(inputs.value[:, :, -kept:])

    return work


def _product(size: Size, inputs: Inputs) -> Work:
    """Computes QK^T of the window once, in float32 on a CPU and in the model's dtype on a GPU."""
    layer = size.layer
    rows = inputs.query[:, :, -size.window :].reshape(1, layer.groups, -1, layer.dim).mT
    key = inputs.key
    if not key.is_cuda:
        rows, key = rows.float(), key.float()
    return lambda: _nothing(torch.matmul(key, rows))


def _nothing(_: torch.Tensor) -> None:
    return None


CONTENDERS: dict[str, Contender] = {
    "ours": Contender("ours", _ours(compiled=True, shared=True)),
    "ours, log-sum-exp not shared": Contender("ours", _ours(compiled=True, shared=False)),
    **{
        f"ours, {nbits} bits": Contender("ours", _ours(compiled=True, shared=True, nbits=nbits))
        for nbits in (8, 4)
    },
    "ours, not compiled": Contender("ours", _ours(compiled=False, shared=True)),
    "ours, STaR-KV": Contender(
        "ours", _ours(compiled=True, shared=True, method="starkv"), "starkv"
    ),
    "ours, paper's configuration": Contender(
        "ours", _ours(compiled=True, shared=True, method="paper"), "paper"
    ),
    "release, restated": Contender("rival", _released, "paper"),
    "kvpress SnapKV": Contender("rival", _kvpress),
    "prefill attention": Contender("rival", _prefill_attention),
    "memory floor": Contender("floor", _copy),
    "product floor": Contender("floor", _product),
}
