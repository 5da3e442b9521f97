"""One family, tried: what is found, what is compressed, and whether it is right."""

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
    """A family's row of the table.

    failure: why nothing could be tried. fault: what the passes broke on.
    images: "two", "beside" the prompt's tokens, or "none", then why not.
    found, rewritten: attentions of the prompt. skipped: reasons, and how many attentions each.
    unchanged: whether a budget of 1.0 gives the output that the inner backend alone gives; of a
    family that is not compressed, every budget.
    seen, kept: the prompt's tokens, and how many each compressed layer stores; None if the layers
    differ. expected: how many it should.
    layout: where the frames' rows and columns come from. right: whether they are the images'.
    breaks: graph breaks.
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
    """Run a tiny model of `family` as it is, at budget 1.0, and at `BUDGET`."""
    try:
        model = tiny_model(family)
        prompt = make_prompt(family, model)
        plain = _plain(model, prompt)
    except Exception as error:  # whatever a family raises on a configuration not its own
        return Row(family, failure=said(error))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it says is in the report
        try:
            return _probe(family, model, prompt, plain)
        except UnsupportedModel as error:
            return Row(family, failure=str(error))
        except Exception as error:  # ours, as the family just ran without starkv
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
        images="beside" if prompt.aside else "two" if prompt.tokens else "none",
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
    """Compiled by the same inner backend, without starkv: what a budget of 1.0 must equal."""
    torch._dynamo.reset()
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not isinstance(decoder, torch.nn.Module):
        return _generate(model, prompt)  # `compile` will say that there is none
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
    """The prompt's tokens, those stored by each of the `rewritten` layers, and C."""
    kept = [layer.kept.shape[1] for layer in cache.compressed_layers if layer.kept is not None]
    seen = cache.get_seq_length() - (REPLY - 1)
    expected = StarKVConfig(budget=BUDGET).capacity(seen)
    return seen, expected if kept.count(expected) == rewritten else None, expected


def _layout_is_right(cache: StarKVCache, prompt: FamilyInputs) -> bool:
    """Whether the cache knows the images: as many frames and tokens, and their true grids."""
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
