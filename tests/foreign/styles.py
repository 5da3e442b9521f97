"""Small models in the styles of code that nobody here wrote.

A style is a class. `make` gives the model; `talk(entry, model)` uses it as its users do, through
`entry`, what compiling it returned. It returns a `Talk`.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    Cache,
    DynamicCache,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.foreign.core import (
    DIM,
    HEADS,
    LAYERS,
    PROMPT,
    REPLY,
    VOCABULARY,
    WIDTH,
    Core,
    Layer,
    filled,
    rotate,
)


class Talk(NamedTuple):
    """tokens: the greedy reply. logits: [REPLY, V]. stored: (key, value) of each layer after the
    prompt, [B, H, n, D]."""

    tokens: list[int]
    logits: torch.Tensor
    stored: Any


class Told(NamedTuple):
    """What `greedy` needs of a model's step: logits [B, S, V], and its cache."""

    logits: torch.Tensor
    cache: Any


def greedy(step, stored=lambda cache: cache):
    """Runs `step(ids, cache, place)` over the prompt and a reply."""
    told, tokens, every, first = step(PROMPT, None, 0), [], [], None
    for place in range(PROMPT.shape[1], PROMPT.shape[1] + REPLY):
        if first is None:
            first = [(k.clone(), v.clone()) for k, v in stored(told.cache)]
        every.append(told.logits[:, -1])
        tokens.append(int(told.logits[0, -1].argmax()))
        told = step(torch.tensor([tokens[-1:]]), told.cache, place)
    return Talk(tokens, torch.cat(every), first)


def of_library(cache):
    return [(layer.keys, layer.values) for layer in cache.layers]


# --- caches of the model's own


class OwnListByLength(Core):
    """A list of (key, value). The next position is the cache's length, as in GPT-2."""

    def forward(self, ids, kv_cache=None):
        start = 0 if kv_cache is None else kv_cache[0][0].shape[2]
        return _with_list(self, ids, kv_cache, torch.arange(start, start + ids.shape[1]))

    @staticmethod
    def talk(entry, model):
        return greedy(lambda ids, cache, place: Told(*entry(ids, cache)))


class OwnListByCaller(Core):
    """A list of (key, value). The caller counts positions, as nanoVLM's language model has it."""

    def forward(self, ids, kv_cache=None, start=0):
        return _with_list(self, ids, kv_cache, torch.arange(start, start + ids.shape[1]))

    @staticmethod
    def talk(entry, model):
        return greedy(lambda ids, cache, place: Told(*entry(ids, cache, place)))


class OwnListHeadsLast(Core):
    """As before, but with keys and values [B, S, H, D]."""

    def forward(self, ids, kv_cache=None, start=0):
        x, longer = self.embed(ids), []
        positions = torch.arange(start, start + ids.shape[1])
        for i, layer in enumerate(self.layers):
            q, k, v = layer.heads(x)
            q, k = rotate(q, positions[:, None]), rotate(k, positions[:, None])
            if kv_cache is not None:
                k, v = torch.cat([kv_cache[i][0], k], 1), torch.cat([kv_cache[i][1], v], 1)
            q, keys, values = (t.transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, keys, values, is_causal=kv_cache is None)
            x = layer.rest(x, y)
            longer.append((k, v))
        return self.head(x), longer

    @staticmethod
    def talk(entry, model):
        def heads_first(cache):
            return [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in cache]

        return greedy(lambda ids, cache, place: Told(*entry(ids, cache, place)), heads_first)


class OwnGenerate(OwnListByCaller):
    """`generate` calls `self.forward`, as minimind's does."""

    @torch.no_grad()
    def generate(self):
        return greedy(lambda ids, cache, place: Told(*self.forward(ids, cache, place)))

    @staticmethod
    def talk(entry, model):
        return entry.generate()


class Nested(nn.Module):
    """A vision-language model whose `generate` calls its decoder, as nanoVLM's does."""

    def __init__(self):
        super().__init__()
        self.decoder = OwnListByCaller()

    def forward(self, ids):
        return self.decoder(ids)[0]

    @torch.no_grad()
    def generate(self):
        return greedy(lambda ids, cache, place: Told(*self.decoder(ids, cache, place)))

    @staticmethod
    def talk(entry, model):
        return entry.generate()


class StaticBuffers(Core):
    """Buffers of a fixed length, written in place at `input_pos`, as in gpt-fast."""

    ROOM = 64

    def __init__(self):
        super().__init__()
        for i in range(LAYERS):
            self.register_buffer(f"k{i}", torch.zeros(1, HEADS, self.ROOM, DIM))
            self.register_buffer(f"v{i}", torch.zeros(1, HEADS, self.ROOM, DIM))

    def forward(self, ids, input_pos):
        x = self.embed(ids)
        mask = torch.arange(self.ROOM)[None] <= input_pos[:, None]
        for i, layer in enumerate(self.layers):
            q, k, v = layer.rotated(x, input_pos)
            keys, values = getattr(self, f"k{i}"), getattr(self, f"v{i}")
            keys[:, :, input_pos] = k
            values[:, :, input_pos] = v
            x = layer.rest(x, F.scaled_dot_product_attention(q, keys, values, attn_mask=mask))
        return self.head(x)

    @staticmethod
    def talk(entry, model):
        def step(ids, cache, place):
            positions = torch.arange(place, place + ids.shape[1])
            return Told(entry(ids, positions), None)

        def buffers(_):
            both = [(getattr(model, f"k{i}"), getattr(model, f"v{i}")) for i in range(LAYERS)]
            return [(k[:, :, : PROMPT.shape[1]], v[:, :, : PROMPT.shape[1]]) for k, v in both]

        return greedy(step, buffers)


class RemoteTuples(PreTrainedModel, Core):
    """`past_key_values` is a tuple of tuples, as in code of the hub from before 2024."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        core = Core()
        self.embed, self.layers, self.head = core.embed, core.layers, core.head

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        start = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        positions = torch.arange(start, start + input_ids.shape[1])
        logits, cache = _with_list(self, input_ids, past_key_values, positions)
        return logits, tuple(cache)

    def get_decoder(self):
        return self

    @staticmethod
    def talk(entry, model):
        return greedy(lambda ids, cache, place: Told(*entry(ids, past_key_values=cache)))


def _with_list(core, ids, cache, positions):
    """Written apart from `core.step`: what is tested shares no code with the oracle."""
    x, longer = core.embed(ids), []
    for i, layer in enumerate(core.layers):
        q, k, v = layer.rotated(x, positions)
        if cache is not None:
            k, v = torch.cat([cache[i][0], k], 2), torch.cat([cache[i][1], v], 2)
        x = layer.rest(x, F.scaled_dot_product_attention(q, k, v, is_causal=cache is None))
        longer.append((k, v))
    return core.head(x), longer


class BlockOfItsOwn(Layer):
    """A block that is compiled by itself: its keys and values leave it for the next one."""

    def forward(self, x, positions, past, shared):
        q, k, v = self.rotated(x, positions)
        if shared is not None:  # the second block reads those of the first
            k, v = shared
        elif past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.rest(x, y), (k, v)


class Blocks(Core):
    """Blocks compiled one by one, as in diffusers. The second reads the first one's keys."""

    def __init__(self):
        super().__init__(BlockOfItsOwn)

    def forward(self, ids, past=None, start=0):
        x, shared = self.embed(ids), None
        for block in self.layers:
            x, shared = block(x, torch.arange(start, start + ids.shape[1]), past, shared)
        return self.head(x), shared

    @staticmethod
    def talk(entry, model):
        return greedy(
            lambda ids, cache, place: Told(*entry(ids, cache, place)), lambda one: [one] * LAYERS
        )


# --- the cache of transformers


class LibraryCache(PreTrainedModel, GenerationMixin, Core):
    """A model of one's own that stores its keys and values in a `Cache` of transformers."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        core = Core()
        self.embed, self.layers, self.head = core.embed, core.layers, core.head

    def get_decoder(self):
        return self

    def start(self, cache):
        """The position of the next token."""
        return cache.get_seq_length()

    def mask(self, cache, seen, n):
        """None: queries see what is at most as new as they are."""

    def store(self, cache, k, v, i):
        """Keys and values of all tokens, with the new ones."""
        return cache.update(k, v, i)

    def attend(self, q, k, v, mask):
        causal = mask is None and (True if q.shape[2] > 1 else False)  # noqa: SIM210
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

    def forward(self, input_ids=None, past_key_values: Cache | None = None, use_cache=True):
        if past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen, n, x = self.start(past_key_values), input_ids.shape[1], self.embed(input_ids)
        mask = self.mask(past_key_values, seen, n)
        for i, layer in enumerate(self.layers):
            q, k, v = layer.rotated(x, seen + torch.arange(n))
            k, v = self.store(past_key_values, k, v, i)
            x = layer.rest(x, self.attend(q, k, v, mask))
        return CausalLMOutputWithPast(logits=self.head(x), past_key_values=past_key_values)

    @staticmethod
    def talk(entry, model):
        def step(ids, cache, place):
            output = entry(input_ids=ids, past_key_values=cache)
            return Told(output.logits, output.past_key_values)

        return greedy(step, of_library)


class OwnMask(LibraryCache):
    """Its mask has a column for each token seen, as Phi-3-Vision's has."""

    def mask(self, cache, seen, n):
        return torch.full((n, seen + n), -1e9).triu(seen + 1)[None, None]


class MaskFromCache(LibraryCache):
    """Its mask has a column for each token that the cache stores."""

    def mask(self, cache, seen, n):
        columns, offset = cache.get_mask_sizes(n, 0)
        places = torch.arange(offset, offset + columns)
        return places[None] <= (seen + torch.arange(n))[:, None]


class InPlaceMask(MaskFromCache):
    """Attention written out, its mask put in in place."""

    def attend(self, q, k, v, mask):
        logits = q @ k.transpose(2, 3) / DIM**0.5
        logits.masked_fill_(~mask, float("-inf"))
        return logits.softmax(-1) @ v


class OwnGenerateWithCache(LibraryCache):
    """`generate` calls `self.forward`, on a `Cache` of transformers."""

    @torch.no_grad()
    def generate(self):
        def step(ids, cache, place):
            output = self.forward(input_ids=ids, past_key_values=cache)
            return Told(output.logits, output.past_key_values)

        return greedy(step, of_library)

    @staticmethod
    def talk(entry, model):
        return entry.generate()


LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "eos_token_id": None,
    "pad_token_id": 0,
}


class NestedLlama(PreTrainedModel):
    """A vision-language model around one of the library, whose `generate` it calls, as Janus."""

    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.language_model = LlamaForCausalLM(config)

    def forward(self, input_ids=None, past_key_values=None, **others):
        return self.language_model(input_ids=input_ids, past_key_values=past_key_values, **others)

    def generate(self, ids, **others):
        embeds = self.language_model.get_input_embeddings()(ids)
        return self.language_model.generate(inputs_embeds=embeds, **others)

    @staticmethod
    def talk(entry, model):
        return _generated(entry.generate)


class Wrapped(nn.Module):
    """A module around a model of the library, as reward models and Lightning hold one."""

    def __init__(self):
        super().__init__()
        self.model = filled(LlamaForCausalLM(LlamaConfig(**LLAMA)))

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    @staticmethod
    def talk(entry, model):
        def step(ids, cache, place):
            output = entry(input_ids=ids, past_key_values=cache, use_cache=True)
            return Told(output.logits, output.past_key_values)

        return greedy(step, of_library)


class Adapted(nn.Module):
    """A model of the library with a LoRA adapter, in the wrapper of PEFT."""

    def __new__(cls):
        from peft import LoraConfig, get_peft_model

        model = filled(LlamaForCausalLM(LlamaConfig(**LLAMA)))
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        return get_peft_model(model, config).eval()

    @staticmethod
    def talk(entry, model):
        return _generated(lambda ids, **others: entry.generate(input_ids=ids, **others))


def _generated(generate):
    output = generate(
        PROMPT,
        max_new_tokens=REPLY,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    after = REPLY - 1  # tokens of the reply that were stored as well
    stored = [(k[:, :, :-after], v[:, :, :-after]) for k, v in of_library(output.past_key_values)]
    return Talk(output.sequences[0, -REPLY:].tolist(), torch.cat(output.logits), stored)


def _own(kind):
    return lambda: filled(kind())


def _configured(kind, config=None):
    return lambda: filled(kind(config or PreTrainedConfig(num_hidden_layers=LAYERS)))


class Style(NamedTuple):
    """One style: what it is, in a few words, and how its model is made and used.

    generates: whether its users call `generate`. blocks: whether they compile each block.
    """

    words: str
    make: Any
    talk: Any
    generates: bool = False
    blocks: bool = False


STYLES = {
    "own list, positions from its length": Style(
        "GPT-2-like code", _own(OwnListByLength), OwnListByLength.talk
    ),
    "own list, positions from the caller": Style(
        "the language model of nanoVLM", _own(OwnListByCaller), OwnListByCaller.talk
    ),
    "own list, [B, S, H, D]": Style(
        "code for FlashAttention", _own(OwnListHeadsLast), OwnListHeadsLast.talk
    ),
    "own generate, own list": Style("minimind", _own(OwnGenerate), OwnGenerate.talk, True),
    "own generate of a decoder": Style("nanoVLM", _own(Nested), Nested.talk, True),
    "static buffers": Style("gpt-fast", _own(StaticBuffers), StaticBuffers.talk),
    "tuple cache of remote code": Style(
        "InternLM2, CogVLM, Qwen-VL 1", _configured(RemoteTuples), RemoteTuples.talk
    ),
    "blocks compiled one by one": Style("diffusers", _own(Blocks), Blocks.talk, blocks=True),
    "Cache of transformers": Style("own model", _configured(LibraryCache), LibraryCache.talk),
    "mask of all tokens seen": Style("Phi-3-Vision", _configured(OwnMask), OwnMask.talk),
    "mask of the cache's size": Style("own model", _configured(MaskFromCache), MaskFromCache.talk),
    "mask put in in place": Style("own model", _configured(InPlaceMask), InPlaceMask.talk),
    "own generate, Cache of transformers": Style(
        "minimind", _configured(OwnGenerateWithCache), OwnGenerateWithCache.talk, True
    ),
    "nested model of transformers": Style(
        "Janus, DeepSeek-VL, InternVL",
        _configured(NestedLlama, LlamaConfig(**LLAMA)),
        NestedLlama.talk,
        True,
    ),
    "module around a model": Style("reward models, Lightning", Wrapped, Wrapped.talk),
    "PEFT": Style("LoRA", Adapted, Adapted.talk, True),
}
