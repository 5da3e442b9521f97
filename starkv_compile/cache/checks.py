"""Checks of what somebody else stored, before any of it is taken over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import CacheError
from ..kernels.reference.quantization import BITS, RANGE_DTYPES, Quantized, coded_width
from ..kernels.reference.star import State
from ..vision.layout import GRIDS, VisionLayout

LAYER_FACTS = ("seen", "retired", "kept", "novelty", "state")
"""What a layer of the cache knows about its tokens, as its attributes."""

LAYER_STATE = ("keys", "values", "codes", *LAYER_FACTS)
"""What is stored of a layer. codes: of its oldest tokens, which are not in keys and values."""

LAYOUT_STATE = tuple(name for name in VisionLayout.__dataclass_fields__ if name != "earlier")
"""What is stored of a layout. `earlier` is of the last chunk only."""


def expect(holds: bool, what: str) -> None:
    """Raises `CacheError` unless it holds. what: the value, and what was expected."""
    if not holds:
        raise CacheError(f"{what}. Load what was saved, unchanged, or begin a new session")


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_integers(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32)


def check_state(state: Any, layers: int) -> None:
    """Raises `CacheError` unless a cache can go on with `state`.

    Args:
        state: what `StarKVCache.state_dict` returned, or so the caller says.
        layers: layers of the cache at hand; 0: it makes them as they come.
    """
    _check_names("the state", state, ("layers", "layout", "padding"))
    stored, layout = state["layers"], state["layout"]
    expect(isinstance(stored, list), f"layers={stored!r:.40}; expected a list")
    expect(layers in (0, len(stored)), f"{len(stored)} layers; expected the {layers} of this model")
    for number, layer in enumerate(stored):
        name = f"layer {number}"
        _check_names(name, layer, LAYER_STATE)
        _check_layer(name, layer)
    full = [layer for layer in stored if layer["keys"] is not None]
    rows = {len(layer["keys"]) for layer in full}
    expect(len(rows) <= 1, f"layers of {sorted(rows)} batch rows; expected as many in all")
    if layout is not None:
        _check_names("the layout", layout, LAYOUT_STATE)
        _check_layout(layout, rows)
    _check_padding(state["padding"], full)
    for number, layer in enumerate(full):
        _check_seen(f"layer {number}", layer, None if layout is None else layout["frame"].shape[1])


def _check_names(what: str, given: Any, names: Sequence[str]) -> None:
    found = list(given) if isinstance(given, dict) else [type(given).__name__]
    expect(
        isinstance(given, dict) and set(found) == set(names),
        f"{what} holds {', '.join(map(str, found)):.90}; expected {', '.join(names)}",
    )


def _check_layer(name: str, layer: dict[str, Any]) -> None:
    keys, values, kept, novelty = (layer[key] for key in ("keys", "values", "kept", "novelty"))
    seen, retired = layer["seen"], layer["retired"]
    expect(
        is_count(seen) and is_count(retired) and retired <= seen,
        f"{name} has seen {seen!r:.40} tokens, of which {retired!r:.40} left; expected whole "
        "numbers, the second not above the first",
    )
    if keys is None:
        others = ("values", "codes", "kept", "state")
        nothing = seen == 0 and all(layer[key] is None for key in others)
        expect(
            nothing and novelty is None, f"{name} has no keys, but other contents; expected none"
        )
        return
    both = isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)
    expect(
        both
        and keys.dim() == values.dim() == 4
        and keys.shape[:3] == values.shape[:3]
        and keys.is_floating_point()
        and values.is_floating_point(),
        f"{name} has keys {_form(keys)} and values {_form(values)}; expected floating-point "
        "numbers of shape [rows, KV heads, tokens, dimension]",
    )
    rows, groups = keys.shape[:2]
    _check_codes(name, layer)
    stored = _stored(layer)
    expect(seen >= stored, f"{name} stores {stored} tokens, but has seen {seen}; expected more")
    if kept is not None:
        sets = _is(kept, torch.int64, (rows, None)) or _is(kept, torch.int64, (rows, groups, None))
        expect(
            sets and kept.shape[-1] <= stored,
            f"{name} has kept tokens {_form(kept)}; expected int64 of shape [{rows}, tokens] or "
            f"[{rows}, {groups}, tokens], at most the {stored} stored",
        )
    expect(
        novelty is None or (kept is not None and _is(novelty, None, tuple(kept.shape))),
        f"{name} has novelties {_form(novelty)}; expected one for each kept token, {_form(kept)}",
    )
    _check_scoring(name, layer["state"], rows)


def _check_codes(name: str, layer: dict[str, Any]) -> None:
    """Tokens in few bits: codes, ranges and centre of keys and of values, as in `Quantized`.

    Under autocast keys and values differ in dtype, and a wider dtype widens tokens, not codes.
    """
    codes, kept = layer["codes"], layer["kept"]
    if codes is None:
        return
    _check_names(f"{name}, its codes,", codes, ("nbits", "key", "value"))
    nbits = codes["nbits"]
    expect(
        is_count(nbits) and nbits in BITS,
        f"{name} has codes of nbits={nbits!r:.40}; expected 8 or 4",
    )
    counts = set()
    for side in ("keys", "values"):
        full, given = layer[side], codes[side.removesuffix("s")]
        expect(
            isinstance(given, (list, tuple)) and len(given) == len(Quantized._fields),
            f"{name} has codes of {side} {_form(given)}; expected {', '.join(Quantized._fields)}",
        )
        rows, groups, _, dim = full.shape
        expect(
            _is(given[0], torch.uint8, (rows, groups, None, coded_width(dim, nbits)))
            and _is(given[1], None, (rows, groups, given[0].shape[2], 2))
            and given[1].dtype in RANGE_DTYPES
            and _is(given[2], torch.float32, (rows, groups, 1, dim)),
            f"{name} has codes of {side} {', '.join(map(_form, given)):.120}; expected those of "
            f"{rows} rows, {groups} KV heads and dimension {dim}, in {nbits} bits",
        )
        counts.add(given[0].shape[2])
    known = kept.shape[-1] if isinstance(kept, torch.Tensor) and kept.dim() > 1 else 0
    expect(
        len(counts) == 1 and max(counts) <= known,
        f"{name} has codes of {sorted(counts)} keys and values, and {known} kept tokens; expected "
        "as many of both, and not more than are kept",
    )


def _stored(layer: dict[str, Any]) -> int:
    """Number of tokens that a layer stores, in codes or in the model's precision."""
    coded = 0 if layer["codes"] is None else layer["codes"]["key"][0].shape[2]
    return layer["keys"].shape[2] + coded


def _check_scoring(name: str, state: Any, rows: int) -> None:
    """The state that policies carry from prompt to prompt, as in `State`."""
    if state is None:
        return
    expect(
        isinstance(state, (list, tuple)) and len(state) == len(State._fields),
        f"{name} has a scoring state of {_form(state)}; expected {', '.join(State._fields)}",
    )
    mi, steps, pattern, count = state
    groups = mi.shape[-1] if isinstance(mi, torch.Tensor) and mi.dim() == 2 else None
    expect(
        _is(mi, None, (rows, None))
        and _is(pattern, None, (rows, groups, None))
        and _is(steps, torch.int64, (rows,))
        and _is(count, torch.int64, (rows,)),
        f"{name} has a scoring state of {', '.join(map(_form, state)):.120}; expected that of "
        f"{rows} rows",
    )


def _check_layout(layout: dict[str, Any], rows: set[int]) -> None:
    frame, counted, current = layout["frame"], layout["counted"], layout["current"]
    whole = _is(frame, torch.int64, (None, None)) and (not rows or len(frame) in rows)
    for part, dtype in (("row", torch.int64), ("column", torch.int64), ("counted", torch.bool)):
        whole = whole and _is(layout[part], dtype, tuple(frame.shape))
    expect(
        whole,
        f"the layout has frames {_form(frame)} and counted tokens {_form(counted)}; expected "
        "frame, row, column and counted of one shape, [rows, tokens]",
    )
    seen = frame.shape[1]
    places = _is(current, torch.int64, (len(frame), None)) and current.shape[1] > 0
    expect(places, f"the layout has the current frame {_form(current)}; expected int64 [rows, n]")
    for part in ("frame", "row", "column", "current"):
        numbers = layout[part]
        least, most = (
            (int(f()) for f in (numbers.min, numbers.max)) if numbers.numel() else (-1, -1)
        )
        limit = max(seen, current.shape[1])
        expect(
            least >= -1 and most < max(limit, 1),
            f"the layout's {part} runs from {least} to {most}; expected -1 to {limit - 1}",
        )
    grid = layout["grid"]
    expect(grid in GRIDS, f"the layout has grid={grid!r:.40}; expected one of {', '.join(GRIDS)}")


def _check_padding(padding: Any, full: list[dict[str, Any]]) -> None:
    """How many tokens the last mask hid in each row."""
    if padding is None:
        return
    rows, seen = (len(full[0]["keys"]), full[0]["seen"]) if full else (None, 0)
    hidden = _is(padding, torch.int64, (rows,))
    expect(
        hidden and bool(((padding >= 0) & (padding <= seen)).all()),
        f"the padding is {_form(padding)}; expected int64 of shape [{rows}], from 0 to {seen}",
    )


def _check_seen(name: str, layer: dict[str, Any], described: int | None) -> None:
    """The kept tokens ascend, and the later ones follow them without gaps.

    described: tokens of the layout. With it, the newest kept tokens may have left the session.
    """
    kept, stored, seen = layer["kept"], _stored(layer), layer["seen"]
    first = seen - stored + (0 if kept is None else kept.shape[-1])
    if kept is None or not kept.shape[-1]:
        expect(
            first == 0 or (kept is not None and first <= (described or 0)),
            f"{name} has seen {seen} tokens and stores {stored}, but does not say which; expected "
            "their places",
        )
        return
    ordered = bool((kept[..., 1:] > kept[..., :-1]).all()) and int(kept.min()) >= 0
    last, most = int(kept[..., -1].min()), int(kept[..., -1].max())
    follows = last == most == first - 1 or most < first <= (described or 0)
    expect(
        ordered and follows,
        f"{name} has seen {seen} tokens, stores {stored}, and kept places {int(kept.min())} to "
        f"{most} of its prompts; expected ascending places, with the others after them",
    )


def _is(value: Any, dtype: torch.dtype | None, shape: tuple[int | None, ...]) -> bool:
    """Whether it is a tensor of a dtype (None: floating-point) and shape (None: any length)."""
    if not isinstance(value, torch.Tensor) or value.dim() != len(shape):
        return False
    right = value.is_floating_point() if dtype is None else value.dtype == dtype
    return right and all(n in (None, given) for n, given in zip(shape, value.shape, strict=True))


def _form(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
