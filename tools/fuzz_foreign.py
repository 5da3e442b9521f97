"""Random models of nobody's own, compiled in random ways and used in random steps.

    python tools/fuzz_foreign.py --minutes 10 --seed 0

Each case makes a small decoder in a random style, wraps it, compiles it and talks to it. After each
call its logits are compared with those of the plain model, whose attention sees only the tokens
that the cache stored before the call. A case fails if logits differ, if it raises where the plain
model does not, or if a prompt stays uncompressed without a warning. The last line counts the cases
by outcome; the exit code is 1 if one failed. `--case N` runs one case and prints it.
"""

from __future__ import annotations

import argparse
import collections
import copy
import random
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

sys.path.insert(0, str(Path(__file__).parents[1]))

import starkv_compile
from starkv_compile import CacheError, StarKVCache, StarKVError
from starkv_compile.frontend.attachment import attached
from starkv_compile.policies import POLICIES
from tests.foreign.core import filled, rotate

VOCABULARY, WIDTH, HEADS, DIM = 50, 32, 4, 8
STEPS = ("", "", "fork", "crop", "copy", "recompile", "undo", "state", "interrupt", "rows")


@dataclass(frozen=True)
class Case:
    """Every choice of one case, by name."""

    cache: str  # how the model keeps keys and values
    declared: bool
    attention: str
    mask: str
    reads: str  # what it reads of a layer's keys
    breaks: str  # where Dynamo's graph breaks
    layers: int
    odd: bool  # whether the last layer's attention is one that nobody knows
    groups: int
    wrapper: str
    way: str
    given: str  # the cache that the first call is given
    options: dict[str, Any]
    turns: tuple[int, ...]
    steps: tuple[str, ...]  # what is done between two calls
    rows: int


def draw(chance: random.Random) -> Case:
    pick = chance.choice
    policy = pick(sorted(POLICIES))
    options: dict[str, Any] = {"budget": pick((0.2, 0.3, 0.5, 0.9, 1.0)), "policy": policy}
    if chance.random() < 0.2:
        options = {"budget_tokens": pick((4, 9, 16)), "policy": policy}
    if chance.random() < 0.2 and not POLICIES[policy].uneven:
        options["decode_tokens"] = pick((1, 3, 8))
    return Case(
        cache=pick((*["library"] * 6, "list", "tuple")),
        declared=chance.random() < 0.85,
        attention=pick(("sdpa", "spelled", "masked_fill", "einsum", "in_place", "gqa")),
        mask=pick(("none", "none", "cache", "cache", "seen", "later", "later, cut")),
        reads=pick((*[""] * 6, "before", "after", "position")),
        breaks=pick((*[""] * 8, "before", "between", "after", "end")),
        layers=pick((1, 2, 3, 6)),
        odd=chance.random() < 0.1,
        groups=pick((1, 2, 4)),
        wrapper=pick(("", "", "module", "nested", "forward")),
        way=pick(("compile", "torch.compile", "model.compile", "function", "method", "compiled")),
        given=pick(("none", "none", "bare", "configured", "starkv")),
        options={**options, "inner": pick(("eager", "eager", "eager", "aot_eager"))},
        turns=tuple(chance.randint(2, 40) for _ in range(chance.randint(1, 3))),
        steps=tuple(pick(STEPS) for _ in range(3)),
        rows=pick((1, 1, 2)),
    )


class Block(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * DIM, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, groups * DIM, bias=False) for _ in range(2))
        self.o = nn.Linear(HEADS * DIM, WIDTH)

    def qkv(self, x: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
        x = F.layer_norm(x, (WIDTH,))
        parts = (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (-1, DIM)).transpose(1, 2) for part in parts)
        return [rotate(q, positions), rotate(k, positions), v]


def attend(kind: str, q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
    """Attention in one of the ways people write it. mask: [S, L] bool, True where seen, or None."""
    several = True if q.shape[2] > 1 else False  # noqa: SIM210 - a symbol is no bool
    if kind == "gqa":
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and several, enable_gqa=True
        )
    k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
    if kind == "sdpa":
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and several
        )
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    if kind == "einsum":
        logits = torch.einsum("bhsd,bhld->bhsl", q, k) / DIM**0.5
        logits = logits.masked_fill(~mask, float("-inf"))
        return torch.einsum("bhsl,bhld->bhsd", logits.softmax(-1), v)
    logits = q @ k.transpose(2, 3) * DIM**-0.5
    if kind == "odd":
        return logits.masked_fill(~mask, float("-inf")).softmax(-1).sqrt() @ v
    if kind == "spelled":
        logits = logits + torch.zeros(mask.shape).masked_fill(~mask, -1e9)
    elif kind == "masked_fill":
        logits = logits.masked_fill(~mask, float("-inf"))
    else:
        logits.masked_fill_(~mask, float("-inf"))
    return logits.softmax(-1) @ v


class Interrupted(Exception):
    """A call that stops before a layer."""


class Model(PreTrainedModel):
    fails_at: int | None = None
    config_class = PreTrainedConfig

    def __init__(self, case: Case) -> None:
        super().__init__(PreTrainedConfig(num_hidden_layers=case.layers))
        self.case = case
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(case.groups) for _ in range(case.layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def get_decoder(self) -> nn.Module:
        return self

    def _mask(self, cache: Any, seen: int, n: int) -> Any:
        if self.case.mask == "none":
            return None if seen == 0 or n == 1 else self._of_cache(cache, seen, n)
        if self.case.mask.startswith("later") and (seen == 0 or n == 1):
            return None
        if self.case.mask == "cache":
            return self._of_cache(cache, seen, n)
        return torch.ones(n, seen + n, dtype=torch.bool).tril(seen)

    def _of_cache(self, cache: Any, seen: int, n: int) -> torch.Tensor:
        if not isinstance(cache, Cache):
            return torch.ones(n, seen + n, dtype=torch.bool).tril(seen)
        columns, offset = cache.get_mask_sizes(n, 0)
        return torch.arange(offset, offset + columns) <= torch.arange(seen, seen + n)[:, None]

    def run(self, ids: Any, cache: Any) -> tuple[Any, Any]:
        breaks, n, new = self.case.breaks, ids.shape[1], []
        library, seen = isinstance(cache, Cache), 0
        if library:
            by_keys = self.case.reads == "position" and cache.layers
            keys = cache.layers[0].keys if by_keys else None
            seen = cache.get_seq_length() if keys is None else keys.shape[-2]
        elif cache is not None:
            seen = cache[0][0].shape[2]
        mask, x = self._mask(cache, seen, n), self.embed(ids)
        for i, layer in enumerate(self.layers):
            q, k, v = layer.qkv(x, torch.arange(seen, seen + n))
            if breaks == "before":
                torch._dynamo.graph_break()
            if self.fails_at == i:
                raise Interrupted
            if library:
                if self.case.reads == "before" and len(cache.layers) > i:
                    x = x + (0 if cache.layers[i].keys is None else cache.layers[i].keys.sum() * 0)
                k, v = cache.update(k, v, i)
                if self.case.reads == "after":
                    k, v = cache.layers[i].keys, cache.layers[i].values
            elif cache is not None:
                k, v = torch.cat([cache[i][0], k], 2), torch.cat([cache[i][1], v], 2)
            if breaks == "between":
                torch._dynamo.graph_break()
            cut = mask is not None and self.case.mask == "later, cut"
            kind = "odd" if self.case.odd and i == self.case.layers - 1 else self.case.attention
            y = attend(kind, q, k, v, mask[..., : k.shape[2]] if cut else mask)
            if breaks == "after":
                torch._dynamo.graph_break()
            x = x + layer.o(y.transpose(1, 2).flatten(2))
            new.append((k, v))
            if breaks == "end":
                torch._dynamo.graph_break()
        return self.head(x), cache if library else new


class Declared(Model):
    def forward(self, input_ids: Any = None, past_key_values: Cache | None = None) -> Any:
        if past_key_values is None and self.case.cache == "library":
            past_key_values = DynamicCache(config=self.config)
        logits, cache = self.run(input_ids, past_key_values)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


class Undeclared(Model):
    def forward(self, input_ids=None, past_key_values=None):
        if past_key_values is None and self.case.cache == "library":
            past_key_values = DynamicCache(config=self.config)
        logits, cache = self.run(input_ids, past_key_values)
        cache = tuple(cache) if self.case.cache == "tuple" else cache
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


class Wrapper(nn.Module):
    """A module around the model, which calls it or its `forward`."""

    def __init__(self, model: nn.Module, direct: bool) -> None:
        super().__init__()
        self.model, self.direct = model, direct

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.model.forward if self.direct else self.model)(*args, **kwargs)


class Outer(PreTrainedModel):
    """A model of the library's kind around the model, which hands its cache on."""

    config_class = PreTrainedConfig

    def __init__(self, model: Model) -> None:
        super().__init__(model.config)
        self.language_model = model

    def forward(self, input_ids=None, past_key_values=None):
        return self.language_model(input_ids=input_ids, past_key_values=past_key_values)


def build(case: Case) -> tuple[Any, Model]:
    """What is compiled, and the model inside."""
    kind = Declared if case.declared and case.cache == "library" else Undeclared
    model = filled(kind(case))
    if case.wrapper == "nested":
        return Outer(model).eval(), model
    if case.wrapper:
        return Wrapper(model, case.wrapper == "forward").eval(), model
    return model, model


def enter(case: Case, module: Any) -> Any:
    """Compiles `module`. Returns what its user calls."""
    how = {"backend": "starkv", "options": case.options}
    if case.way == "torch.compile":
        return torch.compile(module, **how)
    if case.way == "function":
        return torch.compile(lambda **named: module(**named), **how)
    if case.way == "method":
        return torch.compile(module.forward, **how)
    if case.way == "model.compile":
        module.compile(**how)
    else:
        starkv_compile.compile(module, **case.options)
    return module


def places(cache: Any) -> list[Any]:
    """For each layer the places in the stream that the cache stores, [B, (G,) n]; None: all."""
    if not isinstance(cache, StarKVCache):
        return []
    return [layer.places().clone() if layer.stored else None for layer in cache.compressed_layers]


class Plain:
    """The plain model, whose attention sees only what the compressed one stored."""

    def __init__(self, model: Model) -> None:
        self.model, self.past = model, None

    def call(self, ids: torch.Tensor, stored: list[Any]) -> torch.Tensor:
        model, past = self.model, self.past
        seen = 0 if past is None else past[0][0].shape[2]
        n, x, new = ids.shape[1], model.embed(ids), []
        for i, layer in enumerate(model.layers):
            q, k, v = layer.qkv(x, torch.arange(seen, seen + n))
            if past is not None:
                k, v = torch.cat([past[i][0], k], 2), torch.cat([past[i][1], v], 2)
            visible = torch.ones(n, seen + n, dtype=torch.bool).tril(seen)
            visible = visible.expand(len(ids), k.shape[1], n, seen + n).clone()
            if i < len(stored) and stored[i] is not None:
                there = torch.zeros(len(ids), k.shape[1], seen + n, dtype=torch.bool)
                kept = stored[i] if stored[i].dim() == 3 else stored[i][:, None]
                there.scatter_(2, kept.expand(-1, k.shape[1], -1), True)
                there[..., seen:] = True
                visible &= there[:, :, None]
            visible = visible.repeat_interleave(HEADS // k.shape[1], 1)
            keys, values = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
            odd = model.case.odd and i == model.case.layers - 1
            y = attend("odd" if odd else "sdpa", q, keys, values, visible)
            x = x + layer.o(y.transpose(1, 2).flatten(2))
            new.append((k, v))
        self.past = new
        return model.head(x)

    def select(self, rows: torch.Tensor) -> None:
        self.past = [(k[rows], v[rows]) for k, v in self.past]

    def crop(self, tokens: int) -> None:
        self.past = [(k[:, :, :-tokens], v[:, :, :-tokens]) for k, v in self.past]


def given_cache(case: Case, config: Any) -> Any:
    if case.cache != "library":
        return None
    kinds = {
        "none": lambda: None,
        "bare": DynamicCache,
        "configured": lambda: DynamicCache(config=config),
        "starkv": lambda: StarKVCache(config),
    }
    return kinds[case.given]()


def run(case: Case, seed: int) -> str:
    """What became of the case, in a few words; what is wrong begins with "WRONG"."""
    torch._dynamo.reset()
    torch.manual_seed(seed)
    module, model = build(case)
    plain = Plain(copy.deepcopy(model))
    said: list[str] = []
    try:
        entry = _quietly(said, enter, case, module)
        return _talk(case, module, model, entry, plain, said)
    except StarKVError as error:
        return f"refused: {type(error).__name__}"


def _quietly(said: list[str], function: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        result = function(*args, **kwargs)
    said += [str(w.message) for w in caught if "starkv" in str(w.message)]
    return result


def _talk(case: Case, module: Any, model: Model, entry: Any, plain: Plain, said: list[str]) -> str:
    cache, shortened, budget = given_cache(case, model.config), False, case.options.get("budget")
    for turn, length in enumerate(case.turns):
        for n in (length, 1, 1, 1):
            ids = torch.randint(VOCABULARY, (case.rows, n))
            before = places(cache)
            output = _quietly(said, entry, input_ids=ids, past_key_values=cache)
            cache = output.past_key_values
            with torch.no_grad():
                expected = plain.call(ids, before)
            if not torch.allclose(output.logits, expected, atol=1e-4, rtol=1e-3):
                error = float((output.logits - expected).abs().max())
                return f"WRONG: logits off by {error:.2g} at turn {turn}, {n} tokens"
            if isinstance(cache, StarKVCache):
                layers = cache.compressed_layers
                shortened |= any(layer.stored < layer.seen for layer in layers)
        step = case.steps[turn]
        if step == "fork" and isinstance(cache, StarKVCache):
            cache = cache.fork()
        elif step == "crop" and isinstance(cache, Cache):
            try:
                cache.crop(-2)
            except CacheError:
                continue
            plain.crop(2)
        elif step == "state" and isinstance(cache, StarKVCache):
            state, cache = cache.state_dict(), StarKVCache(model.config)
            cache.load_state_dict(state)
        elif step == "rows" and isinstance(cache, Cache):
            rows = torch.arange(case.rows).flip(0)
            cache.batch_select_indices(rows)
            plain.select(rows)
        elif step == "interrupt" and attached(model) and isinstance(cache, StarKVCache):
            _interrupt(said, entry, model, case, cache)
        elif step == "recompile":
            entry = _quietly(said, enter, case, module)
        elif step == "copy" and case.way in ("compile", "model.compile"):
            entry = module = copy.deepcopy(module)
            entry = _quietly(said, enter, case, module)
        elif step == "undo":
            starkv_compile.undo(module)
            entry = module
    if any("open an issue" in text for text in said):
        return f"WRONG: {next(text for text in said if 'open an issue' in text)}"
    if shortened:
        return "compressed"
    capacity = case.options.get("budget_tokens") or max(2, budget * case.turns[0])
    if not said and budget != 1.0 and capacity < case.turns[0]:
        return "WRONG: uncompressed without a warning"
    return "uncompressed, with a warning" if said else "nothing to drop"


def _interrupt(said: list[str], entry: Any, model: Model, case: Case, cache: Any) -> None:
    """A call that raises. It leaves the cache as it was, or the next call refuses the cache."""
    model.fails_at, ids = case.layers - 1, torch.randint(VOCABULARY, (case.rows, 3))
    try:
        _quietly(said, entry, input_ids=ids, past_key_values=cache)
    except Interrupted:
        pass
    finally:
        model.fails_at = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case is not None:
        case = draw(random.Random(arguments.case))
        print(case)
        print(run(case, arguments.case))
        return 0
    end, number = time.monotonic() + 60 * arguments.minutes, arguments.seed
    outcomes: collections.Counter[str] = collections.Counter()
    while time.monotonic() < end:
        case = draw(random.Random(number))
        try:
            outcome = run(case, number)
        except Exception as error:  # a fault, whatever it is
            outcome = f"WRONG: {type(error).__name__}: {str(error).strip().splitlines()[0]:.150}"
        outcomes[outcome.split(":")[0] if outcome.startswith("WRONG") else outcome] += 1
        if outcome.startswith("WRONG"):
            print(number, outcome, case, flush=True)
        number += 1
    print(f"{number - arguments.seed} cases from {arguments.seed}:", dict(outcomes))
    return int(outcomes["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main())
