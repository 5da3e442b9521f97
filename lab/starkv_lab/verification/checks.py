"""Judges what was measured: one line for each promise of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from starkv_compile import StarKVConfig

from .kept import Expected, agreement
from .sessions import Run, Stored

Verdict = Literal["right", "WRONG", "not checked"]

ROUNDINGS = 3.0
"""Logits are wrong beyond this many times what rounding explains."""
BACKEND = 10.0
"""The same for a model at budget=1.0 on a backend that rounds each operation otherwise."""
GAP = 1e-3
"""Standard deviations of the scores around the threshold, in which rounding may choose otherwise.
"""


@dataclass(frozen=True)
class Check:
    """Holds one line of the result. detail: what was measured, or why nothing was."""

    what: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True)
class Distances:
    """Holds root mean squares of differences of logits, over all calls of the model.

    rounding: what rounding explains. whole: of budget=1.0 from no starkv. first: of the first
    token of the compressed session from that of a full cache. later: of the compressed session
    from the reference that hides the dropped tokens; None if there is no such reference. effect:
    of the compressed session from the full cache.
    """

    rounding: float
    whole: float
    first: float
    later: float | None
    effect: float

    @classmethod
    def of(
        cls,
        ours: Run,
        full: Run,
        whole: Run,
        hidden: Sequence[Run],
        dtype: torch.dtype,
        eager: bool,
    ) -> Distances:
        """Compares runs of the same tokens.

        Args:
            hidden: the reference with the model's own attention, and with an exact one; or none.
                Their difference is what rounding explains, and not less than one rounding of each
                logit to `dtype`.
        """
        logits = torch.stack(full.logits)
        rounding = float(logits.square().mean().sqrt()) * torch.finfo(dtype).eps / 4
        later = None
        if hidden:
            own, exact = hidden
            rounding = max(rounding, _distance(own, exact))
            later = _distance(ours, exact)
        unchanged = _distance(whole, full)
        if not eager and unchanged < BACKEND * rounding:
            rounding = max(rounding, unchanged)
        first = float((ours.logits[0] - full.logits[0]).square().mean().sqrt())
        return cls(rounding, unchanged, first, later, _distance(ours, full))


def _distance(left: Run, right: Run) -> float:
    difference = torch.stack(left.logits) - torch.stack(right.logits)
    return float(difference.square().mean().sqrt())


def logits_checks(found: Distances, calls: int, why: str) -> tuple[Check, Check, Check]:
    """Judges budget=1.0, the first token and all later tokens.

    Args:
        calls: calls of the model; the first gives the first token.
        why: the reason why there is no reference for later tokens.
    """
    unchanged = _judged("budget=1.0 changes nothing", found.whole, found.rounding)
    first = _judged("the first token comes from the full cache", found.first, found.rounding)
    what = "later tokens see what was kept, and nothing else"
    if calls == 1:
        why = "the session has one token: give more turns or longer replies"
    if found.later is None or calls == 1:
        return unchanged, first, Check(what, "not checked", why)
    later = _judged(what, found.later, found.rounding)
    if later.verdict == "right" and found.later * 2 > found.effect:
        why = (
            f"rounding changes the logits by {found.later:.2g}, dropping tokens by "
            f"{found.effect:.2g}: too little to tell apart; load the model in float32"
        )
        return unchanged, first, Check(what, "not checked", why)
    detail = f"{later.detail}, and the dropped tokens by {found.effect:.2g}"
    return unchanged, first, Check(what, later.verdict, detail)


def _judged(what: str, distance: float, rounding: float) -> Check:
    if distance == 0.0:
        return Check(what, "right", "the same bits")
    verdict: Verdict = "right" if distance <= ROUNDINGS * rounding else "WRONG"
    return Check(
        what, verdict, f"logits differ by {distance:.2g}; rounding changes them by {rounding:.2g}"
    )


def kept_tokens(
    expected: Sequence[Expected], stored: Sequence[Stored], config: StarKVConfig
) -> Check:
    """Judges which tokens the device kept.

    Args:
        expected: of each compressed layer of each prompt.
        stored: the same layers after each prompt.
    """
    what = "the kept tokens are those of the reference on the CPU"
    if config.inner != "eager":
        why = f'inner={config.inner!r} hides the scores; check once more with inner="eager"'
        return Check(what, "not checked", why)
    if len(expected) != len(stored) or not all(layer.dropped for layer in stored):
        why = (
            f"{len(expected)} of {len(stored)} layers of prompts were scored; the others kept "
            "everything"
        )
        return Check(what, "not checked", why)
    found = agreement(expected, stored)
    detail = f"{found.same:,} of {found.compared:,}"
    if found.same < found.compared:
        detail += (
            f"; scores of the others lie within {found.gap:.2g} standard deviations of the "
            f"threshold (right up to {GAP:g})"
        )
    return Check(what, "right" if found.gap <= GAP else "WRONG", detail)
