"""Asks a language model for codes hidden in a text, and for the continuation of a real text.

A text is read once, into a full `StarKVCache`. Each configuration then gets a copy of it, and the
last tokens as a separate turn. The compaction of a turn includes everything stored, so it keeps the
same tokens as the compaction of one prompt (`tests/optional/weights` compares them), in a fraction
of the time.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pydoc_data.topics import topics
from typing import Any

import torch

from starkv_compile import StarKVCache
from starkv_compile.hf.cache_argument import with_cache

ROOMS = ("library", "kitchen", "garage", "office", "cellar", "attic")
FILLER = (
    "The morning was bright and the street was quiet.",
    "A cat slept on the warm stones by the wall.",
    "People walked past the shop without looking in.",
    "The train arrived a little later than usual.",
    "Somebody had left an umbrella on the bench.",
    "Rain was expected, but the sky stayed clear.",
    "Two children were drawing circles in the sand.",
    "The baker put fresh bread into the window.",
)
TURN = 24
"""Tokens of a prompt after the part that is read once: more than any scoring window here."""

_MARK = "\u241f"  # marks a reply while the chat template is rendered


@dataclass(frozen=True)
class Needles:
    """Holds a text of filler with a door code in each sixth of it, and two questions.

    seed: the seed of the text. rooms: in the order of the text. codes: the code of each room.
    asked: the indices in `rooms` of the question and of the follow-up.
    """

    seed: int
    text: str
    rooms: tuple[str, ...]
    codes: dict[str, str]
    asked: tuple[int, int]

    @classmethod
    def of(cls, seed: int, sentences: int = 80) -> Needles:
        rng = random.Random(f"needles-{seed}")
        rooms = tuple(rng.sample(ROOMS, len(ROOMS)))
        codes = {room: str(rng.randint(10_000, 99_999)) for room in rooms}
        lines = [rng.choice(FILLER) for _ in range(sentences)]
        part = sentences // len(rooms)
        for i in reversed(range(len(rooms))):
            place = rng.randrange(i * part, (i + 1) * part)
            lines.insert(place, f"The door code of the {rooms[i]} is {codes[rooms[i]]}.")
        first = seed % len(rooms)
        second = (first + rng.randrange(1, len(rooms))) % len(rooms)
        return cls(seed, " ".join(lines), rooms, codes, (first, second))

    def question(self, turn: int) -> str:
        return f"What is the door code of the {self.rooms[self.asked[turn]]}?"

    def opening(self, turn: int) -> str:
        """Returns the beginning of the answer, which puts the scoring window on the asked room."""
        return f"The door code of the {self.rooms[self.asked[turn]]} is"

    def code(self, turn: int) -> str:
        return self.codes[self.rooms[self.asked[turn]]]


def prompt_ids(tokenizer: Any, needles: Needles, opened: bool = True) -> torch.Tensor:
    """Returns text and question [1, P], in the model's chat template if it has one.

    opened: whether the beginning of the answer follows. Without it the last tokens, and so the
    scoring window, are the tokens with which a chat template opens a reply.
    """
    asked = f"{needles.text}\n\n{needles.question(0)}"
    if tokenizer.chat_template is None:
        prompt = f"{asked}\n"
    else:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
        )
    prompt += needles.opening(0) if opened else ""
    return tokenizer(prompt, return_tensors="pt").input_ids


def follow_up_ids(tokenizer: Any, needles: Needles, opened: bool = True) -> torch.Tensor:
    """Returns the second question [1, Q], as it follows a reply."""
    if tokenizer.chat_template is None:
        turn = f"\n\n{needles.question(1)}\n"
    else:
        talk = (("user", ""), ("assistant", _MARK), ("user", needles.question(1)))
        messages = [{"role": role, "content": content} for role, content in talk]
        turn = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        ).split(_MARK)[1]
    turn += needles.opening(1) if opened else ""
    return tokenizer(turn, return_tensors="pt", add_special_tokens=False).input_ids


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, chunk: int | None = None) -> StarKVCache:
    """Returns a cache of all but the last `TURN` tokens.

    chunk: None to read them at once; `model` is not compiled, and the cache is full. A number to
    read as many tokens at a time; the compiled `model` compacts the cache after each.
    """
    cache, end = StarKVCache(model.config), ids.shape[1] - TURN
    mask = torch.ones_like(ids)
    for start in range(0, end, chunk or end):
        upto = min(start + (chunk or end), end)
        model(
            input_ids=ids[:, start:upto],
            attention_mask=mask[:, :upto],
            **with_cache(cache),
            logits_to_keep=1,
        )
    return cache


@dataclass(frozen=True)
class Conversation:
    """Holds two replies, and the cache's bytes after the first.

    The second reply is None where the cache ends at one prompt.
    """

    replies: tuple[str, str | None]
    nbytes: int


def converse(
    model: Any,
    tokenizer: Any,
    ids: torch.Tensor,
    follow_up: torch.Tensor,
    past: StarKVCache,
    tokens: int = 7,
    after_prompt: Callable[[StarKVCache], Any] | None = None,
) -> Conversation:
    """Answers a prompt whose beginning is in `past`, then a follow-up. `past` does not change.

    tokens: most tokens of each reply. after_prompt: what is done with the cache after each prompt,
    before the second token of its reply.
    """
    cache = copy.deepcopy(past)
    output = _generate(model, ids, cache, tokens, after_prompt)
    first, nbytes = _decode(tokenizer, output, ids), cache.nbytes
    if cache.is_uneven:
        return Conversation((first, None), nbytes)
    if int(output[0, -1]) == model.generation_config.eos_token_id:
        output = output[:, :-1]  # the template closes the reply
    ids = torch.cat([output, follow_up], dim=1)
    output = _generate(model, ids, cache, tokens, after_prompt)
    return Conversation((first, _decode(tokenizer, output, ids)), nbytes)


@torch.no_grad()
def _generate(
    model: Any,
    ids: torch.Tensor,
    cache: StarKVCache,
    tokens: int,
    after_prompt: Callable[[StarKVCache], Any] | None,
) -> torch.Tensor:
    def once(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Is asked after each token whether to stop."""
        if after_prompt is not None and input_ids.shape[1] == ids.shape[1] + 1:
            after_prompt(cache)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    output: torch.Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **with_cache(cache),
        max_new_tokens=tokens,
        do_sample=False,
        stopping_criteria=[once],
    )
    return output


def _decode(tokenizer: Any, output: torch.Tensor, ids: torch.Tensor) -> str:
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


@lru_cache
def passages(characters: int = 4_500) -> tuple[str, ...]:
    """Returns pieces of real prose, from the reference manual that comes with Python."""
    return tuple(
        text[start : start + characters]
        for _, text in sorted(topics.items())
        for start in range(0, len(text) - characters + 1, characters)
    )


@torch.no_grad()
def continuation_loss(
    model: Any,
    ids: torch.Tensor,
    past: StarKVCache,
    context: int,
    after_prompt: Callable[[StarKVCache], Any] | None = None,
) -> float:
    """Returns the loss in nats per token of the text after the first `context` tokens.

    past: the cache from `read` of ids[:, :context]. It does not change. after_prompt: what is done
    with the cache after these tokens.
    """
    cache, mask = copy.deepcopy(past), torch.ones_like(ids)  # a mask, for the graphs of `generate`
    seen, last = past.get_seq_length(), ids.shape[1] - 1
    model(
        input_ids=ids[:, seen:context],
        attention_mask=mask[:, :context],
        **with_cache(cache),
        logits_to_keep=1,
    )
    if after_prompt is not None:
        after_prompt(cache)
    # The loss needs every logit, so the cache appends the chunk and does not compress it. Layers
    # of different lengths take only one token at a time.
    step = 1 if cache.is_uneven else last - context
    logits = [
        model(
            input_ids=ids[:, start : start + step],
            attention_mask=mask[:, : start + step],
            **with_cache(cache),
            logits_to_keep=step,
        ).logits
        for start in range(context, last, step)
    ]
    losses = -torch.cat(logits, 1).log_softmax(-1).gather(2, ids[:, context + 1 :, None])
    return float(losses.mean())
