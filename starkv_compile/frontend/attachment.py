"""What surrounds each call of a compiled model, outside any graph.

A graph sees tensors only. Around it, `Attachment` turns the cache `generate` made into one that
counts right after compaction, describes the prompt's tokens to it, and refuses what cannot be
right, once and by name. It keeps no state of a session: that is all in the cache.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.utils import counters

from ..cache.chunk import describe_chunk
from ..cache.size import layer_stats
from ..config import StarKVConfig
from ..errors import CacheError, OptionError
from ..hf.cache_argument import cache_argument, own_cache_argument, pop_cache
from ..hf.packed_rows import is_packed, known_as_unpacked
from ..policies import POLICIES
from ..reporting import LayerStats, Report
from ..vision.image_shapes import note_shapes
from .backend import current_cache, current_layers, current_report
from .inner import check_inner

if TYPE_CHECKING:
    from ..cache.cache import StarKVCache

GRAPHS = 64
"""Graphs a function may be compiled to for one attached model: prompt, later prompt, decoding, each
by how its cache stands. At its default of 8 Dynamo stops compiling, and compressing."""

SETTINGS = {
    # Qwen-VL checks and indexes by values; else each such line breaks the graph.
    "capture_scalar_outputs": True,
    "capture_dynamic_output_shape_ops": True,
    # Norm epsilons and scales are constants: as symbols they cost a second compilation.
    "specialize_float": True,
}
"""Dynamo's configuration while an attached model is called, and only then."""

MASKED_FORMS = ("sdpa", "eager", "flex_attention")
"""The library's attention functions that read a mask over all keys."""

Call = Callable[..., Any]

_attachments: weakref.WeakKeyDictionary[torch.nn.Module, Attachment] = weakref.WeakKeyDictionary()


class Attachment:
    """One model compiled with one configuration, and its report."""

    made = 0  # in this process

    def __init__(self, model: torch.nn.Module, config: StarKVConfig) -> None:
        Attachment.made += 1
        self._model = weakref.ref(model)
        self.config = config
        self.report = Report(config.budget_bytes)
        self._policy = POLICIES[config.policy](config)
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
        token = current_report.set(self.report)
        cache_token = current_cache.set("stock" if self._takes_cache is None else "marked")
        layers_token = current_layers.set(0 if cache is None else len(cache.compressed_layers))
        try:
            settings = torch._dynamo.config.patch({**SETTINGS, **_limits()})
            with settings, known_as_unpacked(cache is not None):
                yield
        finally:
            current_report.reset(token)
            current_cache.reset(cache_token)
            current_layers.reset(layers_token)

    def finish(self, cache: StarKVCache | None, finished: bool) -> None:
        """After a call: read a prompt's numbers off the cache, and say if it was not compressed.

        finished: whether the call returned; else it raised.
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
        self.report.layers = layer_stats(cache)
        layout = cache.shared.layout
        self.report.layout = "none" if layout is None else layout.grid

    def _is_too_long(self, layer: LayerStats) -> bool:
        if self.config.budget_bytes is not None:
            over = self.report.nbytes > self.config.budget_bytes
            return over and layer.stored == layer.seen
        if self._policy.is_uneven():
            layers = self.report.layers
            over = sum(x.stored - max(2, self.config.capacity(x.seen)) for x in layers) > 0
            return over and layer.stored == layer.seen
        return layer.stored > max(2, self.config.capacity(layer.seen))

    def _check_bytes(self, budget: int) -> None:
        """Raise `OptionError` for a budget with no room for two tokens; say if it is exceeded."""
        room = self.config.decode_tokens or 0
        needed = (2 + room) * self.report.token_bytes
        if self.report.layers and budget < needed:
            slots = f" and {room} slots to decode into" if room else ""
            raise OptionError(
                f"budget_bytes={budget}: a token takes {self.report.token_bytes} bytes in all "
                f"layers and rows, and 2 tokens{slots} are the least: give at least {needed}"
            )
        short = sum(layer.nbytes for layer in self.report.layers if layer.stored < layer.seen)
        if short > budget:
            self.refuse(
                f"budget_bytes={budget}: {short} bytes are stored, as the layers are in several "
                "graphs, which do not know each other's size; begin the session with "
                f"{own_cache_argument()}, or use budget_tokens"
            )

    def prepare(self, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any], Any]:
        """Arguments to call the model with, and its cache if `finish` is to look after it."""
        model = self._model()
        if model is None or self._takes_cache is None or self.config.leaves_cache:
            return args, kwargs, None
        bound = self._signature.bind_partial(model, *args, **kwargs).arguments
        extra = bound.pop("kwargs", {})
        named = {**{k: v for k, v in bound.items() if k != "self"}, **extra}
        given = named["past_key_values"] = pop_cache(named)
        tokens = named.get("input_ids")
        tokens = named.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return args, kwargs, None
        uneven = self._policy.is_uneven()
        if uneven and getattr(given, "is_uneven", False):
            return args, self._mask_for_one(model, kwargs, tokens), None
        if tokens.shape[1] == 1:
            return args, kwargs, self._begin_step(model, named)
        reason = _why_whole(model, named) or (_why_even(model, named) if uneven else None)
        if reason is not None:
            self.refuse(reason)
            self._append(model, named)
            return args, kwargs, None
        cache = self._ready_cache(model, given)
        if cache is None:
            return args, kwargs, None
        drafts = _drafted_tokens(named)
        if drafts:
            self._check_drafts(cache, named)
        cache.shared.appending = drafts > 0
        describe_chunk(cache, model, named)
        if given is None:
            kwargs = {**kwargs, self._takes_cache: cache}
        return args, kwargs, None if drafts else cache

    def _mask_for_one(
        self, model: Any, kwargs: dict[str, Any], tokens: torch.Tensor
    ) -> dict[str, Any]:
        """Keyword arguments with a mask that fits layers of any length: one token sees everything.

        Raises:
            CacheError: there are several tokens, which see different parts of each other.
        """
        from ..cache.layer import ONE_PROMPT

        if tokens.shape[1] > 1:
            raise CacheError(ONE_PROMPT)
        everything = torch.zeros(len(tokens), 1, 1, 1, dtype=model.dtype, device=tokens.device)
        return {**kwargs, "attention_mask": everything}

    def _append(self, model: Any, named: dict[str, Any]) -> None:
        """Have a cache that compresses store the coming tokens as they are."""
        from ..cache.cache import StarKVCache

        cache = named.get("past_key_values")
        if isinstance(cache, StarKVCache):
            cache.shared.appending = True
            describe_chunk(cache, model, named)

    def _begin_step(self, model: Any, named: dict[str, Any]) -> StarKVCache | None:
        """The cache, if the coming token is decoded into buffers."""
        from ..cache.cache import StarKVCache

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

    def _check_drafts(self, cache: StarKVCache, named: dict[str, Any]) -> None:
        if cache.get_seq_length() == 0:
            self.refuse(
                "the prompt comes with drafted tokens (assisted or prompt-lookup decoding: "
                "logits_to_keep is more than 1), which may be rolled back; without an "
                "assistant_model or prompt_lookup_num_tokens it is compressed"
            )
            return
        positions = named.get("position_ids")
        if isinstance(positions, torch.Tensor) and int(positions.flatten()[0]) == 0:
            raise CacheError(
                f"assisted decoding passes the prompt again from its first token, though the cache "
                f"has seen {cache.get_seq_length()} tokens: generate does so with any cache that "
                "is not empty. Leave out the cache, assistant_model and "
                "prompt_lookup_num_tokens, or only the last two"
            )

    def _ready_cache(self, model: Any, cache: Any) -> Any:
        """A `StarKVCache` in the place of `cache`, or None with a refusal."""
        from transformers.cache_utils import DynamicCache

        from ..cache.cache import StarKVCache, adopt

        if isinstance(cache, StarKVCache):
            return cache
        if cache is None:
            return StarKVCache(model.config)
        name = type(cache).__name__
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            kind = f"{name} with offloading" if type(cache) is DynamicCache else name
            self.refuse(
                f"the cache is a {kind}, which cannot be shortened rightly; use the default "
                f"cache, or pass {own_cache_argument()}"
            )
            return None
        if cache.get_seq_length() > 0:
            self.refuse(
                f"the {name} passed in already holds tokens stored without starkv; begin the "
                f"session with {own_cache_argument()}"
            )
            return None
        return adopt(cache)

    def refuse(self, reason: str) -> None:
        """Leave this use of the model uncompressed, and say so the first time."""
        if reason not in self.report.refusals:
            self.report.refusals.append(reason)
            warnings.warn(f"starkv left this call uncompressed: {reason}", stacklevel=4)


def _limits() -> dict[str, int]:
    """Dynamo's limits on recompilations: it counts the graphs of all models of a class together."""
    config, limit = torch._dynamo.config, GRAPHS * Attachment.made
    return {
        "recompile_limit": max(limit, config.recompile_limit),
        "accumulated_recompile_limit": max(4 * limit, config.accumulated_recompile_limit),
    }


def _why_uncompiled() -> str:
    """Why a prompt met no graph with a cache write, as far as Dynamo tells."""
    if any("recompile limit" in message for message in counters["unimplemented"]):
        return (
            "Dynamo compiles this model's code no more, as it reached its limit of "
            "recompilations; torch._dynamo.reset() lets it begin anew"
        )
    return "no compiled graph holds its cache write"


def _why_whole(model: Any, named: dict[str, Any]) -> str | None:
    """Why a prompt is left whole whatever its cache; None if it need not be."""
    if model.training:
        return "the model is in training mode; call model.eval() first"
    if named.get("use_cache", getattr(model.config, "use_cache", True)) is False:
        return "use_cache=False: there is no cache to compress"
    if is_packed(named.get("position_ids"), named.get("attention_mask")):
        return (
            "several sequences are packed into one row, as its position_ids start again; pass "
            "them as rows of a batch, padded on the left"
        )
    return None


def _why_even(model: Any, named: dict[str, Any]) -> str | None:
    """Why layers cannot be left with different numbers of tokens here; None if they can."""
    mask = named.get("attention_mask")
    plain = isinstance(mask, torch.Tensor) and mask.dim() == 2 and bool(mask.all())
    if mask is not None and not plain:
        return (
            "layers would store different numbers of tokens, and of padding, which one mask cannot "
            "hide in all of them; give each prompt a call of its own, or use a policy with one "
            "budget for every layer"
        )
    form = model.config.get_text_config(decoder=True)._attn_implementation
    if form not in ("sdpa", "eager"):
        return (
            f"layers would store different numbers of tokens, for which {form} takes no mask; load "
            'the model with attn_implementation="sdpa"'
        )
    return None


def _drafted_tokens(named: dict[str, Any]) -> int:
    """Tokens at the end whose own logits are wanted: drafts, which `generate` verifies so."""
    wanted = named.get("logits_to_keep")
    return wanted - 1 if isinstance(wanted, int) and wanted > 1 else 0


def attach(model: torch.nn.Module, config: StarKVConfig) -> Attachment:
    """Register `model`, replacing what was attached before."""
    detach(model)
    attachment = Attachment(model, config)
    _attachments[model] = attachment
    return attachment


def attach_compiled(
    model: torch.nn.Module, config: StarKVConfig, call: Call, compiler: Callable[[Call], Call]
) -> Call:
    """`call`, a bound method of `model`, compiled by `compiler` and with its cache looked after.

    What is compiled is the language model, where one is to be found in the model. The rest runs
    as it is: vision towers split their patches, and Qwen-VL counts its positions, by the values
    of tensors, at which Dynamo ends the graph or the program.

    Raises:
        MissingPackage: what `config.inner` names is not installed; nothing is changed.
    """
    check_inner(config.inner)
    attachment = attach(model, config)
    decoder = find_decoder(model)
    if decoder is None or decoder is model:
        inner = compiler(call)
    else:
        inner = call
        attachment.undo.append(_compile_inside(decoder, attachment, compiler))

    @functools.wraps(call)
    def attached_call(*args: Any, **kwargs: Any) -> Any:
        return attachment.call(inner, args, kwargs)

    return attached_call


def _compile_inside(
    decoder: torch.nn.Module, attachment: Attachment, compiler: Callable[[Call], Call]
) -> Callable[[], None]:
    """Have `decoder` run compiled within calls of the attached model alone; returns undo."""
    compiled, report = compiler(decoder._call_impl), attachment.report
    kept = weakref.ref(decoder)  # else the function it holds would keep it alive

    def call(*args: Any, **kwargs: Any) -> Any:
        if current_report.get() is report:
            return compiled(*args, **kwargs)
        return kept()._call_impl(*args, **kwargs)  # type: ignore[union-attr]

    decoder._compiled_call_impl = call

    def undo() -> None:
        kept()._compiled_call_impl = None  # type: ignore[union-attr]

    return undo


def find_decoder(model: torch.nn.Module) -> torch.nn.Module | None:
    """The language model that writes the cache, or None where nothing tells."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if find is not None else None
    return decoder if isinstance(decoder, torch.nn.Module) else None


def attached(model: torch.nn.Module) -> Attachment | None:
    """The attachment of `model` or of the module a `torch.compile` wrapper holds."""
    return _attachments.get(getattr(model, "_orig_mod", model))


def detach(model: torch.nn.Module) -> bool:
    """Give the model back as it was. Whether anything was attached."""
    model = getattr(model, "_orig_mod", model)
    attachment = _attachments.pop(model, None)
    if attachment is None:
        return False
    for step in reversed(attachment.undo):
        step()
    model._compiled_call_impl = None  # not one of the steps: those would keep the model alive
    return True


__all__ = ["Attachment", "attach", "attach_compiled", "attached", "detach", "find_decoder"]
