"""`torch.ops.starkv`: scoring and compaction as registered ops, and the cache-write marker.

Each op runs `kernels.reference` on the CPU and `kernels.triton` on a GPU. All are functional and
traceable: Inductor and `torch.export` see through them. On the CPU Inductor compiles them to C++
with the rest of the graph. On a GPU their launches stay in the graph. Some ops have C++ code as
well (`kernels.cpp`); graphs that are compiled for this process call it. An op that mutated a cloned
tensor would be silently wrong under Inductor (pytorch #198031).
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any, get_type_hints

import torch
from torch._guards import detect_fake_mode

from ..errors import NonFiniteScores
from . import cpp, reference, shapes
from .compiling import no_new_guards, record_source, runs_cpp
from .marker import Written
from .reference import layout, quantization
from .reference import quantized_attention as quantized_reference
from .reference import star as star_reference
from .reference.capacity import every_length, split_capacity
from .reference.spatial import Counting

Tensor = torch.Tensor


BODIES: dict[str, Callable[..., Any]] = {}
"""The function that each op below runs, with the op's name as key. An exporter calls it instead."""


def op(
    function: Callable[..., Any] | None = None, *, shape: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Decorator: registers a function on tensors as `torch.ops.starkv.NAME`, with its own name.

    Its parameters need annotations that `torch.library.infer_schema` knows. Compiled code depends
    on its source, so a changed body is compiled again.

    shape: takes the same arguments and returns empty tensors like the results. None: the function
    itself tells the shapes, which takes longer.
    """
    if function is None:
        return functools.partial(op, shape=shape)
    BODIES[function.__name__] = function
    record_source(function.__name__, function)
    log = logging.getLogger("torch._library.triton")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns where Triton is missing, which is no fault here
    try:
        name = f"starkv::{function.__name__}"
        registered = torch.library.triton_op(name, mutates_args={})(function)
    finally:
        log.setLevel(level)
    registered.register_fake(_for_shapes(shape or function))
    return registered


def _for_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` for a graph in which the op stays whole, which only asks for the results' shapes.

    Such a graph may be exported and serve all lengths. So minima stay in the shape, and what the
    body decides about strides on its way is no condition on the lengths.
    """

    @functools.wraps(function)
    def fake(*args: Any, **kwargs: Any) -> Any:
        mode = detect_fake_mode(args)
        with every_length(), no_new_guards(None if mode is None else mode.shape_env):
            return function(*args, **kwargs)

    return fake


def _kernels(tensor: Tensor) -> Any:
    """The module of kernels for `tensor`'s device. On a GPU there is no fallback."""
    if not tensor.is_cuda:  # true on AMD's GPUs as well
        return cpp if tensor.device.type == "cpu" and runs_cpp() else reference
    from . import triton

    return triton


def _exactly(tensor: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off, which would round what codes are made of and multiplied with."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


@op(shape=shapes.window_attention)
def window_attention(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    window: int,
    capacity: int,
    per_head: bool = False,
    log_sum_exp: Tensor | None = None,
) -> Tensor:
    """See `reference.attention.window_attention`."""
    return _kernels(query).window_attention(
        query, key, mask, scale, window, capacity, per_head, log_sum_exp
    )


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(*tensors, *options)` with a parameter for each field of `StarOptions`.

    torch reads the schema of an op from its parameters. The options are listed in one place only.
    """
    signature = inspect.signature(function, eval_str=True)
    tensors = [p for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL]
    types = get_type_hints(star_reference.StarOptions)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    options = [
        inspect.Parameter(field.name, kind, annotation=types[field.name])
        for field in fields(star_reference.StarOptions)
    ]
    function.__signature__ = signature.replace(parameters=[*tensors, *options])  # type: ignore[attr-defined]
    return function


@op
@_with_options
def star_scores(
    attention: Tensor,
    hidden: Tensor | None,
    real: Tensor | None,
    frame: Tensor,
    row: Tensor,
    column: Tensor,
    current: Tensor,
    mi: Tensor,
    mi_steps: Tensor,
    pattern: Tensor,
    pattern_count: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.star.star_scores`. Returns the final scores [B, P] and the four states.

    `options` are the fields of `reference.star.StarOptions`, in their order.
    """
    return scores_counting_by(  # type: ignore[return-value]
        Counting(_kernels(attention).rank_histogram),
        attention,
        hidden,
        real,
        frame,
        row,
        column,
        current,
        mi,
        mi_steps,
        pattern,
        pattern_count,
        *options,
    )


def scores_counting_by(counting: Counting, *arguments: Any) -> tuple[Tensor, ...]:
    """`star_scores` of its `arguments`, with the given implementations of its counting."""
    scores = score_after_each_axis(counting, *arguments)
    return scores.final, *scores.state


def score_after_each_axis(counting: Counting, *arguments: Any) -> star_reference.Scores:
    """`reference.star.star_scores` of the op's flat `arguments`."""
    attention, hidden, real, *rest = arguments
    return star_reference.star_scores(
        attention,
        hidden,
        real,
        star_reference.Layout(*rest[:4]),
        star_reference.State(*rest[4:8]),
        star_reference.StarOptions.of_scalars(rest[8:]),
        counting,
    )


@op(shape=shapes.novelty)
def spatial_novelty(
    key: Tensor, frame: Tensor, row: Tensor, column: Tensor, earlier: Tensor
) -> Tensor:
    """See `reference.novelty.spatial_novelty`."""
    return _kernels(key).spatial_novelty(key, frame, row, column, earlier)


@op(shape=shapes.novelty)
def temporal_novelty(
    key: Tensor, frame: Tensor, row: Tensor, column: Tensor, current: Tensor, stored: int
) -> Tensor:
    """See `reference.novelty.temporal_novelty`."""
    return _kernels(key).temporal_novelty(key, frame, row, column, current, stored)


@op(shape=shapes.novelty)
def key_novelty(key: Tensor, among: Tensor) -> Tensor:
    """See `reference.novelty.key_novelty`."""
    return _kernels(key).key_novelty(key, among)


@op(shape=shapes.select_tokens)
def select_tokens(
    scores: Tensor, real: Tensor | None, length: int, window: int, capacity: int
) -> Tensor:
    """See `reference.selection.select_tokens`. Scores of all L tokens are read up to the window.

    Scores [B, G, P] or [B, G, L] give a set for each head. The kernels see heads as rows.
    """
    if scores.shape[-1] == length:
        scores = scores[..., : length - split_capacity(length, window, capacity)[1]]
    if scores.dim() == 2:
        return _kernels(scores).select_tokens(scores, real, length, window, capacity)
    heads = scores.shape[1]
    real = None if real is None else real.repeat_interleave(heads, 0)
    rows = _kernels(scores).select_tokens(scores.flatten(0, 1), real, length, window, capacity)
    return rows.unflatten(0, (-1, heads))


@op(shape=shapes.gather_kv)
def gather_kv(
    key: Tensor, value: Tensor, kept: Tensor, real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `reference.selection.gather_kv`. kept: [B, C], or [B, G, C] with a set for each head."""
    if kept.dim() == 2:
        return _kernels(key).gather_kv(key, value, kept, real)
    heads = kept.shape[1]
    real = None if real is None else real.repeat_interleave(heads, 0)
    rows = (t.flatten(0, 1)[:, None] for t in (key, value))
    pair = _kernels(key).gather_kv(*rows, kept.flatten(0, 1), real)
    # As in the reference, a cached tensor must not be a view.
    shapes = ([*kept.shape, t.shape[-1]] for t in pair)
    return tuple(map(torch.ops.aten._unsafe_view, pair, shapes))


@op(shape=shapes.centre)
def centre(rows: Tensor) -> Tensor:
    """See `reference.quantization.centre_of`."""
    with _exactly(rows):
        return _kernels(rows).centre_of(rows)


@op(shape=shapes.quantize)
def quantize(rows: Tensor, centre: Tensor, nbits: int) -> tuple[Tensor, Tensor]:
    """See `reference.quantization.codes_and_ranges`."""
    with _exactly(rows):
        return _kernels(rows).codes_and_ranges(rows, centre, nbits)


@op(shape=shapes.dequantize)
def dequantize(codes: Tensor, ranges: Tensor, centre: Tensor, dtype: torch.dtype) -> Tensor:
    """See `reference.quantization.dequantize`."""
    with _exactly(codes):
        return quantization.dequantize(codes, ranges, centre, dtype)


@op(shape=shapes.quantized_attention)
def quantized_attention(
    query: Tensor,
    key_codes: Tensor,
    key_ranges: Tensor,
    key_centre: Tensor,
    value_codes: Tensor,
    value_ranges: Tensor,
    value_centre: Tensor,
    newer_key: Tensor,
    newer_value: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """See `reference.quantized_attention.quantized_attention`."""
    with _exactly(query):
        return quantized_reference.quantized_attention(
            query,
            quantization.Quantized(key_codes, key_ranges, key_centre),
            quantization.Quantized(value_codes, value_ranges, value_centre),
            newer_key,
            newer_value,
            mask,
            scale,
            _kernels(query).attend_codes,
        )


@torch.library.custom_op("starkv::after", mutates_args=("out",))
def after(out: Tensor, key: Tensor, value: Tensor) -> None:
    """Does nothing. To a compiler it writes `out`, so readers of `out` wait for key and value.

    If a compiler copies `out` for it, the copy has the same values, so the result stays right.
    """


@after.register_fake
def _(out: Tensor, key: Tensor, value: Tensor) -> None:
    return None


@op
def cache_write(
    key: Tensor,
    value: Tensor,
    place: Tensor,
    novelty: Tensor,
    frame: Tensor,
    row: Tensor,
    column: Tensor,
    current: Tensor,
    counts: Tensor,
    mi: Tensor,
    mi_steps: Tensor,
    pattern: Tensor,
    pattern_count: Tensor,
    turn_start: Tensor,
    seen: int,
    has_layout: bool,
    mask_fits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Marks where `StarKVCache` stores a prompt. A pass replaces it by a compaction.

    If it stays in the graph, it changes nothing: it returns copies. Arguments are as in
    `marker.WriteArguments`, results as in `marker.Written`.
    """
    return Written(
        key=key.clone(),
        value=value.clone(),
        place=place.clone(),
        novelty=novelty.clone(),
        mi=mi.clone(),
        mi_steps=mi_steps.clone(),
        pattern=pattern.clone(),
        pattern_count=pattern_count.clone(),
    )


@op
def layout_from_positions(positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.layout.layout_from_positions`."""
    return layout.layout_from_positions(positions)


@op
def layout_from_image_mask(is_image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.layout.layout_from_image_mask`."""
    return layout.layout_from_image_mask(is_image)


@op
def layout_all_text(key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.layout.layout_all_text`."""
    return layout.layout_all_text(key)


@op
def fresh_state(key: Tensor, current: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.star.fresh_state`."""
    return tuple(star_reference.fresh_state(key, current))  # type: ignore[return-value]


@torch.library.custom_op("starkv::check_finite", mutates_args=())
def check_finite(tensor: Tensor, name: str) -> Tensor:
    """Returns a copy of `tensor`.

    Raises:
        NonFiniteScores: it holds NaN or infinity. The message contains `name`.
    """
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise NonFiniteScores(
            f"{name}: {bad} of {tensor.numel()} values are NaN or infinite; expected finite "
            "numbers. Without debug=True such a key counts as not attended to, and is dropped first"
        )
    return tensor.clone()


@check_finite.register_fake
def _(tensor: Tensor, name: str) -> Tensor:
    return torch.empty_like(tensor)


STARKV = torch.ops.starkv
"""The registered ops. Import this name instead of `torch.ops.starkv`: the import registers them."""
