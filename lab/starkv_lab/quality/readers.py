"""Reads prompts into full or compressed caches, and continues from a cache."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from starkv_compile import StarKVCache, StarKVConfig, StarKVError, compile, report, undo
from starkv_compile.hf import with_cache
from starkv_compile.kernels import STARKV
from starkv_compile.kernels.reference import split_capacity

from .prompts import Continuation, Prompts
from .variants import SCREEN, Chunk, Variant


@dataclass(frozen=True)
class Seen:
    """Holds prompts with the vision tower's output for their screens.

    features: [visual tokens of all rows, 2 * hidden], the embeddings and what the model adds after
    its first language layer. shift: position of the token after the prompt, minus L.
    """

    prompts: Prompts
    features: torch.Tensor
    shift: int


class SeenBefore(nn.Module):
    """Replaces the vision tower: takes the tower's earlier output and returns it.

    The tower takes longer than the language model, and its output does not depend on the cache.
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.dtype, self.spatial_merge_size = tower.dtype, tower.spatial_merge_size

    def forward(self, features: torch.Tensor, **_: Any) -> Any:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import (
            BaseModelOutputWithDeepstackFeatures,
        )

        embeddings, added = features.chunk(2, dim=-1)
        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=embeddings, deepstack_features=[added]
        )


class Reader:
    """Holds two copies of a model with the agent's architecture.

    The reader compiles `compressing`, and never `plain`. It changes both, so the caller must not
    use them any more.
    """

    def __init__(self, plain: Any, compressing: Any) -> None:
        self.plain, self.compressing = plain, compressing
        self._tower = self.plain.model.visual
        for model in (self.plain, self.compressing):
            model.model.visual = SeenBefore(self._tower)

    @torch.no_grad()
    def see(self, prompts: Prompts) -> Seen:
        screens = prompts.screens
        seen = self._tower(screens.pixel_values, grid_thw=screens.grid_thw)
        (added,) = seen.deepstack_features
        _, shift = self.plain.model.get_rope_index(
            prompts.input_ids, prompts.is_image.int(), image_grid_thw=screens.grid_thw
        )
        return Seen(prompts, torch.cat([seen.pooler_output, added], -1), int(shift[0]))

    def read(self, seen: Seen) -> StarKVCache:
        """Returns the full cache of a batch of prompts."""
        return _read(self.plain, seen)

    def read_by_need(self, seen: Seen, config: StarKVConfig) -> StarKVCache:
        """Returns the cache of an oracle, which knows what the prompts' questions need.

        It keeps the window, then what the question needs, then the question itself, then what
        other questions may need, and then text. Newer tokens come first among equals.
        """
        cache, prompts = self.read(seen), seen.prompts
        length = prompts.input_ids.shape[1]
        _, window = split_capacity(length, config.window, config.capacity(length))
        is_question = ~prompts.is_image & (prompts.is_image.flip(1).cumsum(1).flip(1) == 0)
        worth = 1.0 * ~prompts.is_image
        for rank, flags in enumerate((prompts.is_element, is_question, prompts.is_asked), start=2):
            worth = worth.masked_fill(flags, rank)
        worth = worth + torch.arange(length) / length
        kept = STARKV.select_tokens(
            worth[:, : length - window], None, length, config.window, config.capacity(length)
        )
        for layer in cache.compressed_layers:
            layer.hold(*STARKV.gather_kv(layer.keys, layer.values, kept, None))
            layer.kept, layer.novelty = kept, None
        return cache

    @contextlib.contextmanager
    def reading(self, variant: Variant, budget: float, first: Seen) -> Iterator[Metered]:
        """Yields a reader into caches of `variant`, compiled for prompts shaped like `first`."""
        config = variant.config(budget)
        if variant.by_need:
            yield Metered(lambda seen: self.read_by_need(seen, config))
        else:
            with self.compiled(config, variant.chunk) as compressor:
                compressor.read(first)
                yield Metered(compressor.read)

    @contextlib.contextmanager
    def compiled(self, config: StarKVConfig, chunk: Chunk | None = None) -> Iterator[_Compressor]:
        """Yields an object whose `read` returns compacted caches, from the compiled model."""
        torch._dynamo.reset()  # lets go of the last configuration's graphs
        compile(self.compressing, config)
        try:
            yield _Compressor(self.compressing, config, chunk)
        finally:
            undo(self.compressing)

    def go_on(self, cache: StarKVCache, seen: Seen, what: Continuation) -> torch.Tensor:
        """Returns the logits [B, judged, vocabulary] that predict the judged tokens."""
        return self.put(cache, seen, what.ids)[:, -what.judged - 1 : -1]

    def put(self, cache: StarKVCache, seen: Seen, ids: torch.Tensor) -> torch.Tensor:
        """Returns the logits [B, S, vocabulary] after each of the tokens `ids` [B, S].

        The tokens go to a fork of the cache, which drops nothing.
        """
        fork = cache.fork()
        # No mask for several tokens fits layers that store different numbers of tokens.
        parts = ids.split(1, 1) if cache.is_uneven else (ids,)
        return torch.cat([self._put(fork, part, seen.shift).logits for part in parts], 1)

    def attended(self, cache: StarKVCache, seen: Seen, what: Continuation) -> torch.Tensor:
        """Returns the attention of those predictions, [B, layers, G, tokens stored and new].

        It is the mean over the predictions and over the query heads of each KV head.
        """
        decoder, groups = self.plain.get_decoder(), cache.compressed_layers[0].keys.shape[1]
        decoder.set_attn_implementation("eager")  # the other implementations do not return it
        output = self._put(cache.fork(), what.ids, seen.shift, output_attentions=True)
        decoder.set_attn_implementation("sdpa")
        predicting = slice(-what.judged - 1, -1)
        return torch.stack(
            [
                layer[:, :, predicting].unflatten(1, (groups, -1)).mean((2, 3))
                for layer in output.attentions
            ],
            1,
        )

    @torch.no_grad()
    def _put(self, cache: StarKVCache, ids: torch.Tensor, shift: int, **options: Any) -> Any:
        rows, new = ids.shape
        if new == 1:
            options["attention_mask"] = torch.zeros(rows, 1, 1, 1)  # everything is seen
        start = cache.get_seq_length() + shift
        positions = torch.arange(start, start + new).expand(3, rows, -1)
        return self.plain(input_ids=ids, position_ids=positions, **with_cache(cache), **options)


class _Compressor:
    def __init__(self, model: Any, config: StarKVConfig, chunk: Chunk | None) -> None:
        self.model, self.config, self.chunk = model, config, chunk

    def read(self, seen: Seen) -> StarKVCache:
        """Returns the compacted cache of a batch of prompts.

        Raises:
            StarKVError: the cache was not compacted, or not to the budget.
        """
        cache = _read(self.model, seen, self.chunk)
        told = report(self.model)
        length, layers = cache.get_seq_length(), len(cache.compressed_layers)
        expected = sum(split_capacity(length, self.config.window, self.config.capacity(length)))
        stored = [layer.stored for layer in cache.compressed_layers]
        excess = abs(sum(stored) - layers * expected)
        if told.refusals or excess > (layers if cache.is_uneven else 0):
            raise StarKVError(
                f"{self.config}: layers store {stored} of {length} tokens, but {expected} each "
                f"were expected; {'; '.join(told.refusals) or 'the report refuses nothing'}"
            )
        return cache


@torch.no_grad()
def _read(model: Any, seen: Seen, chunk: Chunk | None = None) -> StarKVCache:
    prompts, cache = seen.prompts, StarKVCache(model.config)
    inputs = {
        "input_ids": prompts.input_ids,
        "mm_token_type_ids": prompts.is_image.int(),
        "pixel_values": seen.features,
        "image_grid_thw": prompts.screens.grid_thw,
        **with_cache(cache),
    }
    if chunk is None:
        model(**inputs, logits_to_keep=1)
    elif chunk == SCREEN:
        for part in _screen_by_screen(model, seen):
            model(**part, **with_cache(cache), logits_to_keep=1)
    else:  # the one token that is generated is not stored
        model.generate(**inputs, prefill_chunk_size=chunk, max_new_tokens=1, do_sample=False)
    return cache


def _screen_by_screen(model: Any, seen: Seen) -> Iterator[dict[str, Any]]:
    """Yields the inputs of a call for each screen, the last one with the question."""
    prompts, rows = seen.prompts, len(seen.prompts.input_ids)
    grids, is_image = prompts.screens.grid_thw, prompts.is_image
    positions, _ = model.model.get_rope_index(
        prompts.input_ids, is_image.int(), image_grid_thw=grids
    )
    last = is_image[0] & ~is_image[0].roll(-1)  # of each screen
    ends = (last.nonzero()[:, 0] + 1).tolist()
    ends[-1] = len(last)
    features = seen.features.unflatten(0, (rows, len(ends), -1))
    grids = grids.unflatten(0, (rows, len(ends)))
    for frame, (start, end) in enumerate(pairwise([0, *ends])):
        yield {
            "input_ids": prompts.input_ids[:, start:end],
            "attention_mask": torch.ones_like(prompts.input_ids[:, :end]),
            "position_ids": positions[:, :, start:end],
            "mm_token_type_ids": is_image[:, start:end].int(),
            "pixel_values": features[:, frame].flatten(0, 1),
            "image_grid_thw": grids[:, frame],
        }


@dataclass
class Metered:
    """Reads prompts into caches, and adds up the costs.

    nbytes, full_nbytes: bytes of all caches, kept and before compaction. seconds: processor time,
    which does not include other work on the machine.
    """

    _read: Callable[[Seen], StarKVCache]
    nbytes: int = 0
    full_nbytes: int = 0
    seconds: float = 0.0

    def read(self, seen: Seen) -> StarKVCache:
        start = time.process_time()
        cache = self._read(seen)
        self.seconds += time.process_time() - start
        self.nbytes += cache.nbytes
        self.full_nbytes += cache.full_nbytes
        return cache
