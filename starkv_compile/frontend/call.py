"""What happens around one call of a compiled model, outside any graph.

A graph sees tensors only. Around it, `Attachment` turns the cache that `generate` made into one
that counts right after compaction, describes the prompt's tokens to it, and warns once why a
prompt stays uncompressed. All state of a session is in the cache.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch._dynamo.utils import counters

from ..cache.cache import StarKVCache, is_stock, ready_cache
from ..cache.chunk import begin_chunk, describe_chunk
from ..cache.interruption import whole_call
from ..cache.layer import ONE_PROMPT, StarKVLayer
from ..cache.padding import check_later_call
from ..cache.reading import READS_KEYS, WAY_OUT, watched
from ..cache.size import layer_stats
from ..config import StarKVConfig
from ..errors import CacheError, OptionError, StarKVError
from ..hf.attention import attention_implementation, counts_in_tensors, of_library, takes_any_mask
from ..hf.packed_rows import known_as_unpacked
from ..kernels.compiling import in_process
from ..reporting import LayerStats, Report
from ..vision.describe import tokens_of
from .later_masks import check_failure, check_prompt, is_short
from .owner import OwnerCalls
from .refusals import PromptCall, drafted_prompt, first_refusal
from .scope import CompileScope, current_scope, entered

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

NO_CACHE = "no module that takes a Hugging Face cache calls it, so nobody counts its tokens"
"""Why an attention stays as it is in a module without a language model."""


class Prepared(NamedTuple):
    """A call that is ready to run.

    cache: what `Attachment.finish` needs, or None. held: the cache that the call runs with.
    left_alone: whether the call stays uncompressed; why: the reason. seen: tokens that `cache` has
    seen before the call; was_short: whether it had dropped some.
    """

    args: Any
    kwargs: dict[str, Any]
    cache: StarKVCache | None = None
    held: Any = None
    left_alone: bool = False
    why: str = ""
    seen: int = 0
    was_short: bool = False


class Attachment:
    """One model compiled with one configuration, and its report."""

    made = 0  # in this process

    def __init__(self, config: StarKVConfig) -> None:
        Attachment.made += 1
        self.config = config
        self.report = Report(config.budget_bytes)
        self.undo: list[Callable[[], Any]] = []

    def is_running(self) -> bool:
        """Whether a call of this model is in progress, in this thread."""
        return current_scope().report is self.report

    def call_plain(self, compiled: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`compiled(*args, **kwargs)` of a module without a language model, its graphs reported."""
        scope = CompileScope(self.report, unmarked=NO_CACHE)
        with entered(scope), torch._dynamo.config.patch(_limits()):
            return compiled(*args, **kwargs)

    def call(self, owner: OwnerCalls, compiled: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`compiled(*args, **kwargs)` of a module that takes the cache, which is made ready."""
        if current_scope().covers(self.report, owner.cache_in(args, kwargs)):
            return compiled(*args, **kwargs)
        with whole_call(args, kwargs):
            call = self.prepare(owner, args, kwargs)
            finished = False
            try:
                # A model of the library may look at the keys; it never counts by their length.
                with self.reporting(call, watch=not of_library(owner.module)):
                    output = compiled(*call.args, **call.kwargs)
                finished = True
            except RuntimeError as error:
                own = getattr(error, "inner_exception", None)  # Dynamo wraps what a backend raises
                if isinstance(own, StarKVError):
                    raise own from None
                check_failure(call.held, error)
                raise
            finally:
                self.finish(call, finished)
        return output

    @contextlib.contextmanager
    def reporting(self, call: Prepared, watch: bool = True) -> Iterator[None]:
        """Graphs compiled inside are reported here, and traced with Dynamo's settings for VLMs.

        watch: whether the layers of the cache notice who reads them.
        """
        scope = CompileScope(
            report=self.report,
            cache="marked",
            layers=0 if call.cache is None else len(call.cache.compressed_layers),
            unmarked=_why_unmarked(call),
            held=call.held,
            left_alone=call.left_alone,
        )
        settings = torch._dynamo.config.patch({**SETTINGS, **_limits()})
        watches = watch and isinstance(call.held, StarKVCache)
        watching = watched(call.held) if watches else contextlib.nullcontext()
        with entered(scope), settings, watching, known_as_unpacked(call.cache is not None):
            yield

    def finish(self, call: Prepared, finished: bool) -> None:
        """After a call: takes a prompt's numbers from the cache, and warns if it stayed full.

        finished: whether the call returned. If not, it raised.
        """
        cache = call.cache
        if cache is None:
            return
        if cache.shared.stepping:
            cache.end_step(finished)
            return
        new = cache.get_seq_length() - call.seen
        if not finished or new == 1:
            return
        check_prompt(cache, call.was_short, self.report)
        if not cache.shared.is_read:
            with in_process() if self.config.inner == "inductor" else contextlib.nullcontext():
                cache.quantize(self.config.nbits, self.config.scoring_window)
        self._read_cache(cache)
        if self.config.budget_bytes is not None:
            self._check_bytes(self.config.budget_bytes)
        if cache.shared.is_read:
            self.refuse(f"{READS_KEYS}; {WAY_OUT}")
            return
        if not self.report.layers:
            self.refuse(_why_nothing_is_stored(cache))
        whole = [i for i, layer in enumerate(self.report.layers) if self._is_too_long(layer)]
        if whole and not any(graph.failure for graph in self.report.graphs):
            reasons = {s.reason for g in self.report.graphs for s in g.sites if s.reason}
            why = "; ".join(sorted(reasons)) or _why_uncompiled(self.report)
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
            over = sum(x.stored - max(2, self.config.capacity(x.in_session)) for x in layers) > 0
            return over and layer.stored == layer.seen
        return layer.stored > max(2, self.config.capacity(layer.in_session))

    def _check_bytes(self, budget: int) -> None:
        """Raises `OptionError` for a budget without room for 2 tokens."""
        room = self.config.decode_tokens or 0
        needed = (2 + room) * self.report.token_bytes
        if self.report.layers and budget < needed:
            slots = f" and {room} slots for decoding" if room else ""
            raise OptionError(
                f"budget_bytes={budget}: a token takes {self.report.token_bytes} bytes in all "
                f"layers and rows, and a cache needs 2 tokens{slots}; give at least {needed}"
            )

    def prepare(self, owner: OwnerCalls, args: Any, kwargs: Any) -> Prepared:
        """Returns the call with the arguments that it runs with."""
        model = owner.module
        if model is None or self.config.leaves_cache:
            return Prepared(args, kwargs, left_alone=True)
        named = owner.named(args, kwargs)
        given = named["past_key_values"]
        tokens = tokens_of(named)
        was_short = is_short(given)
        if tokens is not None and was_short:
            check_later_call(given, named, tokens)
        if tokens is not None and isinstance(given, StarKVCache) and tokens.shape[1] > 1:
            given.check_bits(self.config.nbits)
        if tokens is not None and isinstance(given, StarKVCache) and given.is_uneven:
            return _with_uneven_layers(owner, given, tokens, args, kwargs)
        # The first call is a prompt: a model may put an image of many tokens beside one of text.
        if tokens is not None and tokens.shape[1] == 1 and not _is_first(given):
            if isinstance(given, StarKVCache):
                given.begin_turn()
            return Prepared(args, kwargs, self._begin_step(model, named), given)
        if given is None and not owner.declared and not owner.innermost:
            return Prepared(args, kwargs)  # an owner inside may be declared
        prompt = PromptCall(
            model=model,
            named=named,
            cache=given,
            uneven=self.config.is_uneven,
            declared=owner.declared,
            argument=owner.name,
            takes_mask=owner.takes("attention_mask"),
        )
        refused = first_refusal(prompt)
        if refused is not None:
            refusal, reason = refused
            self.refuse(reason)
            if refusal is not drafted_prompt:
                _append(model, named)
                return Prepared(args, kwargs, held=given, left_alone=True, why=reason)
        by_caller = isinstance(given, StarKVCache)
        cache = ready_cache(getattr(model, "config", None), given)
        assert cache is not None, "every other kind of cache was refused"
        seen = cache.get_seq_length()
        drafts = begin_chunk(cache, model, named)
        cache.shared.mask_fits &= by_caller  # who passes such a cache knows how long masks must be
        if given is None:
            args, kwargs = owner.handing(cache, args, kwargs)
        finishes = None if drafts else cache
        return Prepared(args, kwargs, finishes, cache, seen=seen, was_short=was_short)

    def _begin_step(self, model: Any, named: dict[str, Any]) -> StarKVCache | None:
        """Returns the cache if the next token goes into buffers, else None."""
        room, cache = self.config.decode_tokens, named.get("past_key_values")
        if room is None or not isinstance(cache, StarKVCache):
            return None
        if not any(layer.stored for layer in cache.compressed_layers):
            return None
        if torch.is_grad_enabled():
            return None  # what is written in place cannot be differentiated
        if not counts_in_tensors(model):
            self._grow(
                f"{type(model).__name__} does not say that it runs on a static cache, whose length "
                "is a tensor. If it does, set _can_compile_fullgraph = True on its class"
            )
            return None
        form = attention_implementation(model)
        if form not in MASKED_FORMS:
            self._grow(
                f"{form} does not read the mask that hides a buffer's free slots. Load the model "
                'with attn_implementation="sdpa"'
            )
            return None
        mask = named.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            return None  # the caller's own, with a column per stored token
        try:
            moved = cache.begin_step(room)
        except CacheError as error:
            self._grow(str(error))
            return None
        if moved:
            self._read_cache(cache)
        return cache

    def refuse(self, reason: str) -> None:
        """Notes why this use of the model stays uncompressed. Warns the first time."""
        if reason not in self.report.refusals:
            self.report.refusals.append(reason)
            warnings.warn(f"starkv left this call uncompressed: {reason}", stacklevel=4)

    def _grow(self, reason: str) -> None:
        """Notes why the cache grows in place of filling buffers. Warns the first time."""
        if reason not in self.report.without_buffers:
            self.report.without_buffers.append(reason)
            warnings.warn(
                "starkv decodes without buffers, and the compressed cache grows: "
                f"decode_tokens={self.config.decode_tokens}: {reason}",
                stacklevel=5,
            )


def _is_first(cache: Any) -> bool:
    """Whether a call with this cache is the first, as far as starkv knows such a cache."""
    if cache is None:
        return True
    known = isinstance(cache, StarKVCache) or is_stock(cache)
    return known and cache.get_seq_length() == 0


def _append(model: Any, named: dict[str, Any]) -> None:
    """Makes a cache that compresses store the coming tokens as they are."""
    cache = named["past_key_values"]
    if isinstance(cache, StarKVCache):
        cache.shared.appending = True
        describe_chunk(cache, model, named)


def _with_uneven_layers(
    owner: OwnerCalls, cache: StarKVCache, tokens: torch.Tensor, args: Any, kwargs: Any
) -> Prepared:
    """The call with a mask that fits layers of any length: the one new token sees everything.

    A model that takes no such mask runs as it is, if it makes none.

    Raises:
        CacheError: there are several tokens, which see different parts of each other, or padding.
    """
    model, mask = owner.module, owner.named(args, kwargs).get("attention_mask")
    padded = isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask.all())
    if tokens.shape[1] > 1 or padded:
        raise CacheError(ONE_PROMPT)
    cache.shared.uneven = not owner.takes("attention_mask") or not takes_any_mask(model)
    if not cache.shared.uneven:
        dtype = next(model.parameters()).dtype  # type: ignore[union-attr]
        mask = torch.zeros(len(tokens), 1, 1, 1, dtype=dtype, device=tokens.device)
        args, kwargs = owner.replacing("attention_mask", mask, args, kwargs)
    return Prepared(args, kwargs, held=cache)


def _limits() -> dict[str, int]:
    """Dynamo's limits on recompilations: it counts the graphs of all models of a class together."""
    config, limit = torch._dynamo.config, GRAPHS * Attachment.made
    return {
        "recompile_limit": max(limit, config.recompile_limit),
        "accumulated_recompile_limit": max(4 * limit, config.accumulated_recompile_limit),
    }


def _other_layers(cache: Any) -> str:
    """The kinds of the layers of a cache that starkv does not shorten."""
    layers = getattr(cache, "layers", [])
    kinds = {type(layer).__name__ for layer in layers if not isinstance(layer, StarKVLayer)}
    return " and ".join(sorted(kinds))


def _why_unmarked(call: Prepared) -> str:
    """Why an attention of this call reads keys and values that no marker stores."""
    if call.left_alone:
        return call.why
    kinds = _other_layers(call.held)
    if kinds:
        return f"its keys and values are stored in a {kinds}, which stays as it is"
    return (
        "the cache of this call does not store its keys and values in the form in which the "
        "attention reads them, [batch, KV heads, tokens, head dimension], or the model reads what "
        "is stored itself"
    )


def _why_nothing_is_stored(cache: StarKVCache) -> str:
    kinds = _other_layers(cache)
    if kinds:
        return f"all layers of this cache are of kind {kinds}, which starkv does not shorten"
    return (
        "the model stored nothing in the cache that it was called with; its forward must call "
        "cache.update(key, value, layer) in each layer"
    )


def _why_uncompiled(report: Report) -> str:
    """Why a prompt met no graph with a cache write, as far as Dynamo reports."""
    if any("recompile limit" in message for message in counters["unimplemented"]):
        return (
            "Dynamo reached its limit of recompilations and stopped compiling this model; call "
            "torch._dynamo.reset() to start again"
        )
    breaks = list(counters["graph_break"])
    if breaks:
        why = breaks[-1].strip().split("\n")[0]
        return (
            f"Dynamo broke the model's graph, and no graph contains both their attention and their "
            f"cache write ({why}); TORCH_LOGS=graph_breaks shows the line to change"
        )
    if report.graphs and not any(graph.found for graph in report.graphs):
        return (
            "no attention was found in the compiled graphs; starkv knows "
            "scaled_dot_product_attention and its kernels, flex_attention, and a softmax between "
            "two matrix products, but no sigmoid and no softmax with a number added below"
        )
    return "no compiled graph contains their cache write; please open an issue with the report"
