"""Tries one family: what the passes find, what they compress, and whether it is right."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from starkv_compile import (
    Report,
    StarKVCache,
    StarKVConfig,
    UnsupportedModel,
    compile,
    report,
    undo,
)
from starkv_compile.hf import pop_cache

from .prompts import FamilyInputs, make_prompt, said
from .tiny import tiny_model

BUDGET, REPLY = 0.3, 4


@dataclass(frozen=True)
class Row:
    """Holds a family's row of the table.

    failure: why the family could not be tried. fault: the error that the passes raised.
    images: "two" in the prompt, "separate" from the prompt's tokens, or "none". why_no_image: the
    reason for "none".
    found, rewritten: numbers of attentions in the prompt's graphs. skipped: for each reason, the
    number of attentions that were not rewritten.
    unchanged: whether a budget of 1.0 gives the output of the inner backend alone. A family that
    is not compressed has to give that output at every budget.
    seen: tokens of the prompt. kept: tokens that each compressed layer stores, or None if layers
    differ. expected: tokens that each should store.
    layout: source of the frames' rows and columns. right: whether they are those of the images.
    breaks: number of graph breaks.
    """

    family: str
    failure: str = ""
    images: str = "none"
    why_no_image: str = ""
    found: int = 0
    rewritten: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    fault: str = ""
    unchanged: bool = False
    seen: int = 0
    kept: int | None = None
    expected: int | None = None
    layout: str = ""
    right: bool = True
    breaks: int = 0

    @property
    def verdict(self) -> str:
        """ "compressed", "uncompressed", "not tried", or "WRONG"."""
        if self.failure:
            return "not tried"
        if self.fault or not self.unchanged or not self.right or self.kept != self.expected:
            return "WRONG"
        return "compressed" if self.rewritten else "uncompressed"


def probe(family: str) -> Row:
    """Runs a tiny model of `family` without starkv, at budget 1.0, and at `BUDGET`."""
    try:
        model = tiny_model(family)
        prompt = make_prompt(family, model)
        plain = _plain(model, prompt)
    except Exception as error:  # a family may raise anything on this configuration
        return Row(family, failure=said(error))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says the same
        try:
            return _probe(family, model, prompt, plain)
        except UnsupportedModel as error:
            return Row(family, failure=str(error))
        except Exception as error:  # a fault of starkv: the family just ran without it
            return Row(family, fault=said(error))


def _probe(family: str, model: Any, prompt: FamilyInputs, plain: Any) -> Row:
    whole, _ = _compiled(model, prompt, 1.0)
    torch._dynamo.utils.counters.clear()
    output, told = _compiled(model, prompt, BUDGET)
    rewritten = sum(graph.rewritten for graph in told.graphs)
    unchanged = _same(whole, plain) and (rewritten > 0 or _same(output, plain))
    reasons = [site.reason for graph in told.graphs for site in graph.sites if site.reason]
    row = Row(
        family,
        images="separate" if prompt.aside else "two" if prompt.tokens else "none",
        why_no_image=prompt.why_no_image,
        found=sum(graph.found for graph in told.graphs),
        rewritten=rewritten,
        skipped=dict(Counter(reasons)),
        refused=tuple(told.refusals),
        fault=next((graph.failure for graph in told.graphs if graph.failure), ""),
        unchanged=unchanged,
        layout=told.layout,
        breaks=sum(torch._dynamo.utils.counters["graph_break"].values()),
    )
    if not rewritten:
        return row
    cache = pop_cache(dict(output))
    seen, kept, expected = _stored(cache, rewritten)
    right = _layout_is_right(cache, prompt)
    return replace(row, seen=seen, kept=kept, expected=expected, right=right)


def _generate(model: Any, prompt: FamilyInputs) -> Any:
    with torch.no_grad():
        return model.generate(
            **prompt.arguments,
            max_new_tokens=REPLY,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )


def _plain(model: Any, prompt: FamilyInputs) -> Any:
    """Runs the model on the inner backend alone. A budget of 1.0 has to give the same output."""
    torch._dynamo.reset()
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not isinstance(decoder, torch.nn.Module):
        return _generate(model, prompt)  # `compile` will say that the decoder is missing
    decoder.compile(backend="eager", dynamic=True)
    try:
        return _generate(model, prompt)
    finally:
        decoder._compiled_call_impl = None


def _compiled(model: Any, prompt: FamilyInputs, budget: float) -> tuple[Any, Report]:
    torch._dynamo.reset()
    compile(model, budget=budget, inner="eager")
    try:
        return _generate(model, prompt), report(model)
    finally:
        undo(model)


def _same(left: Any, right: Any) -> bool:
    return torch.equal(left.sequences, right.sequences) and all(
        torch.equal(a, b) for a, b in zip(left.logits, right.logits, strict=True)
    )


def _stored(cache: StarKVCache, rewritten: int) -> tuple[int, int | None, int]:
    """Returns the prompt's tokens, and those that each layer stores and should store."""
    kept = [layer.kept.shape[1] for layer in cache.compressed_layers if layer.kept is not None]
    seen = cache.get_seq_length() - (REPLY - 1)
    expected = StarKVConfig(budget=BUDGET).capacity(seen)
    return seen, expected if kept.count(expected) == rewritten else None, expected


def _layout_is_right(cache: StarKVCache, prompt: FamilyInputs) -> bool:
    """Whether the cache's layout has the images' frames, tokens and true grids."""
    layout = cache.shared.layout
    if layout is None:
        return not prompt.tokens
    frame, row, column = layout.frame[0], layout.row[0], layout.column[0]
    if int(frame.max()) + 1 != len(prompt.tokens):
        return False
    if [int((frame == i).sum()) for i in range(len(prompt.tokens))] != list(prompt.tokens):
        return False
    for i, (rows, columns) in enumerate(prompt.grids):
        place = torch.arange(rows * columns)
        here = frame == i
        if not torch.equal(row[here], place // columns):
            return False
        if not torch.equal(column[here], place % columns):
            return False
    return True
