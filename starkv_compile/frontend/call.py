"""What happens around one call of a compiled model, outside any graph.

A graph sees tensors only. Around it, `Attachment` turns the cache that `generate` made into one
that counts right after compaction, describes the prompt's tokens to it, and warns once why a
prompt stays uncompressed. All state of a session is in the cache.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dynamo.utils import counters

from ..cache.cache import StarKVCache, ready_cache
from ..cache.chunk import begin_chunk, describe_chunk
from ..cache.layer import ONE_PROMPT
from ..cache.size import layer_stats
from ..config import StarKVConfig
from ..errors import CacheError, OptionError
from ..hf.cache_argument import cache_argument, own_cache_argument, pop_cache
from ..hf.packed_rows import known_as_unpacked
from ..reporting import LayerStats, Report
from ..vision.image_shapes import note_shapes
from .refusals import PromptCall, drafted_prompt, first_refusal
from .scope import CompileScope, entered

GRAPHS = 64
"""How many graphs Dynamo may compile of one function for one attached model. Prompts, later prompts
and decoding need several each, by the state of the cache. At its default of 8, Dynamo would stop to
compile, and nothing more would be compressed."""

SETTINGS = {
    # Qwen-VL checks and indexes by values; else each such line breaks the graph.
    "capture_scalar_outputs": True,
    "capture_dynamic_output_shape_ops": True,
    # Norm epsilons and scales are constants: as symbols they cost a second compilation.
    "specialize_float": True,
}
"""Dynamo's configuration during calls of an attached model."""

MASKED_FORMS = ("sdpa", "eager", "flex_attention")
"""The library's attention functions that read a mask over all keys."""


class Attachment:
    """One model compiled with one configuration, and its report."""

    made = 0  # in this process

    def __init__(self, model: torch.nn.Module, config: StarKVConfig) -> None:
        Attachment.made += 1
        self._model = weakref.ref(model)
        self.config = config
        self.report = Report(config.budget_bytes)
        self.undo: list[Callable[[], Any]] = [note_shapes(model)]
        self._signature = inspect.signature(type(model).forward)
        self._takes_cache = cache_argument(type(model).forward)

    def call(self, compiled: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`compiled(*args, **kwargs)`, with the cache made ready and the report kept."""
        args, kwargs, cache = self.prepare(args, kwargs)
        finished = False
        try:
            with self.reporting(cache):
                output = compiled(*args, **kwargs)
            finished = True
        finally:
            self.finish(cache, finished)
        return output

    @contextlib.contextmanager
    def reporting(self, cache: StarKVCache | None) -> Iterator[None]:
        """Graphs compiled inside are reported here, and traced with Dynamo's settings for VLMs.

        cache: what `prepare` gave for the call.
        """
        scope = CompileScope(
            report=self.report,
            cache="stock" if self._takes_cache is None else "marked",
            layers=0 if cache is None else len(cache.compressed_layers),
        )
        settings = torch._dynamo.config.patch({**SETTINGS, **_limits()})
        with entered(scope), settings, known_as_unpacked(cache is not None):
            yield

    def finish(self, cache: StarKVCache | None, finished: bool) -> None:
        """After a call: takes a prompt's numbers from the cache, and warns if it stayed full.

        finished: whether the call returned. If not, it raised.
        """
        if cache is None:
            return
        if cache.shared.stepping:
            cache.end_step(finished)
            return
        if not finished:
            return
        self._read_cache(cache)
        if self.config.budget_bytes is not None:
            self._check_bytes(self.config.budget_bytes)
        whole = [i for i, layer in enumerate(self.report.layers) if self._is_too_long(layer)]
        if whole and not any(graph.failure for graph in self.report.graphs):
            reasons = {s.reason for g in self.report.graphs for s in g.sites if s.reason}
            why = "; ".join(sorted(reasons)) or _why_uncompiled()
            self.refuse(f"layers {whole} keep every token: {why}")

    def _read_cache(self, cache: StarKVCache) -> None:
        """Take the numbers of `cache` into the report."""
        self.report.layers = layer_stats(cache.compressed_layers)
        layout = cache.shared.layout
        self.report.layout = "none" if layout is None else layout.grid

    def _is_too_long(self, layer: LayerStats) -> bool:
        if self.config.budget_bytes is not None:
            over = self.report.nbytes > self.config.budget_bytes
            return over and layer.stored == layer.seen
        if self.config.is_uneven:
            layers = self.report.layers
            over = sum(x.stored - max(2, self.config.capacity(x.seen)) for x in layers) > 0
            return over and layer.stored == layer.seen
        return layer.stored > max(2, self.config.capacity(layer.seen))

    def _check_bytes(self, budget: int) -> None:
        """Raises `OptionError` for a budget without room for 2 tokens; warns if it is exceeded."""
        room = self.config.decode_tokens or 0
        needed = (2 + room) * self.report.token_bytes
        if self.report.layers and budget < needed:
            slots = f" and {room} slots for decoding" if room else ""
            raise OptionError(
                f"budget_bytes={budget}: a token takes {self.report.token_bytes} bytes in all "
                f"layers and rows, and a cache needs 2 tokens{slots}; give at least {needed}"
            )
        short = sum(layer.nbytes for layer in self.report.layers if layer.stored < layer.seen)
        if short > budget:
            self.refuse(
                f"budget_bytes={budget}: {short} bytes are stored, because the layers are in "
                "several graphs, and no graph knows the size of the others; begin the session with "
                f"{own_cache_argument()}, or use budget_tokens"
            )

    def prepare(self, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any], Any]:
        """Returns arguments to call the model with, and its cache if `finish` needs it."""
        model = self._model()
        if model is None or self._takes_cache is None or self.config.leaves_cache:
            return args, kwargs, None
        named = self._named(model, args, kwargs)
        given = named["past_key_values"] = pop_cache(named)
        tokens = named.get("input_ids")
        tokens = named.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return args, kwargs, None
        if self.config.is_uneven and getattr(given, "is_uneven", False):
            return args, {**kwargs, "attention_mask": _mask_for_one(model, tokens)}, None
        if tokens.shape[1] == 1:
            return args, kwargs, self._begin_step(model, named)
        refused = first_refusal(PromptCall(model, named, given, self.config.is_uneven))
        if refused is not None:
            refusal, reason = refused
            self.refuse(reason)
            if refusal is not drafted_prompt:
                _append(model, named)
                return args, kwargs, None
        cache = ready_cache(model.config, given)
        assert cache is not None, "every other kind of cache was refused"
        drafts = begin_chunk(cache, model, named)
        if given is None:
            kwargs = {**kwargs, self._takes_cache: cache}
        return args, kwargs, None if drafts else cache

    def _named(self, model: torch.nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
        """All arguments of a call, with their names as keys."""
        bound = self._signature.bind_partial(model, *args, **kwargs).arguments
        extra = bound.pop("kwargs", {})
        return {**{k: v for k, v in bound.items() if k != "self"}, **extra}

    def _begin_step(self, model: Any, named: dict[str, Any]) -> StarKVCache | None:
        """Returns the cache if the next token goes into buffers, else None."""
        room, cache = self.config.decode_tokens, named.get("past_key_values")
        if room is None or not isinstance(cache, StarKVCache):
            return None
        if not any(layer.stored for layer in cache.compressed_layers):
            return None
        if torch.is_grad_enabled():
            return None  # what is written in place cannot be differentiated
        form = model.config.get_text_config(decoder=True)._attn_implementation
        if form not in MASKED_FORMS:
            self.refuse(
                f"decode_tokens={room}: {form} does not read the mask that hides a buffer's free "
                'slots; the cache grows instead. Load the model with attn_implementation="sdpa"'
            )
            return None
        mask = named.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            return None  # the caller's own, with a column per stored token
        try:
            moved = cache.begin_step(room)
        except CacheError as error:
            self.refuse(f"decode_tokens={room}: {error}; the cache grows instead")
            return None
        if moved:
            self._read_cache(cache)
        return cache

    def refuse(self, reason: str) -> None:
        """Notes why this use of the model stays uncompressed. Warns the first time."""
        if reason not in self.report.refusals:
            self.report.refusals.append(reason)
            warnings.warn(f"starkv left this call uncompressed: {reason}", stacklevel=4)


def _append(model: Any, named: dict[str, Any]) -> None:
    """Makes a cache that compresses store the coming tokens as they are."""
    cache = named["past_key_values"]
    if isinstance(cache, StarKVCache):
        cache.shared.appending = True
        describe_chunk(cache, model, named)


def _mask_for_one(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """A mask that fits layers of any length, as the one new token sees everything.

    Raises:
        CacheError: there are several tokens, which see different parts of each other.
    """
    if tokens.shape[1] > 1:
        raise CacheError(ONE_PROMPT)
    return torch.zeros(len(tokens), 1, 1, 1, dtype=model.dtype, device=tokens.device)


def _limits() -> dict[str, int]:
    """Dynamo's limits on recompilations: it counts the graphs of all models of a class together."""
    config, limit = torch._dynamo.config, GRAPHS * Attachment.made
    return {
        "recompile_limit": max(limit, config.recompile_limit),
        "accumulated_recompile_limit": max(4 * limit, config.accumulated_recompile_limit),
    }


def _why_uncompiled() -> str:
    """Why a prompt met no graph with a cache write, as far as Dynamo reports."""
    if any("recompile limit" in message for message in counters["unimplemented"]):
        return (
            "Dynamo reached its limit of recompilations and stopped compiling this model; call "
            "torch._dynamo.reset() to start again"
        )
    return "no compiled graph contains their cache write; please open an issue with the report"
