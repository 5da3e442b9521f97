"""Compares forms of rounding keys and values to a few bits: `python -m benchmarks.low_bits`.

    python -m benchmarks.low_bits planted
    python -m benchmarks.low_bits agent --questions 512
    python -m benchmarks.low_bits text --model smollm2 --prompts 18

It chose the form of `nbits`. The rounding is only simulated: keys and values of the tokens that a
prompt leaves are replaced by the nearest values of the form, the newest `window` tokens excepted. A
token is rounded once, after the prompt that it belongs to. A form may use ranges of channels over
the tokens that are rounded together, or ranges of each token.

`planted` measures the output of attention on made-up tensors whose keys have a few channels far
from zero, as Qwen2.5-VL's have, which norms no keys. `agent` counts right answers of the shipped
agent, `peer` those with all tokens in 4 bits by optimum-quanto (which must be installed). `text`
counts door codes found by a small language model, and nats a token.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import starkv_compile
from starkv_compile import StarKVCache, StarKVConfig
from starkv_compile.kernels.reference.quantization import turn

Tensor = torch.Tensor
Rounding = Callable[[Tensor, int], Tensor]


def by_token(x: Tensor, bits: int) -> Tensor:
    """Rounds [..., L, D] with a range for each token."""
    return _rounded(x, bits, -1)


def by_channel(x: Tensor, bits: int) -> Tensor:
    """Rounds [..., L, D] with a range for each channel, over all L tokens."""
    return _rounded(x, bits, -2)


def rotated(x: Tensor, bits: int) -> Tensor:
    """Rounds [..., L, D] by token, after a rotation that spreads each channel over all others."""
    return turn(by_token(turn(x), bits))


def centred(x: Tensor, bits: int) -> Tensor:
    """Rounds [..., L, D] as `rotated`, around the mean of all L tokens."""
    mean = x.mean(-2, keepdim=True)
    return mean + rotated(x - mean, bits)


def _rounded(x: Tensor, bits: int, dim: int) -> Tensor:
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    return low + ((x - low) / step).round() * step


@dataclass(frozen=True)
class Form:
    """Rounds keys and values. bits: of keys and of values."""

    keys: Rounding
    values: Rounding
    bits: tuple[int, int]

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip((self.keys, self.values), (keys, values), self.bits, strict=True)
        key, value = (rounding(x.float(), bits).to(x.dtype) for rounding, x, bits in pairs)
        return key, value


def forms(bits: int) -> dict[str, Form]:
    """The forms that are compared, by name."""
    found = {
        "by token": Form(by_token, by_token, (bits, bits)),
        "keys by channel": Form(by_channel, by_token, (bits, bits)),
        "keys rotated": Form(rotated, by_token, (bits, bits)),
        "both rotated": Form(rotated, rotated, (bits, bits)),
        "keys centred, both rotated": Form(centred, rotated, (bits, bits)),
        "both centred and rotated": Form(centred, centred, (bits, bits)),
    }
    if bits == 4:
        found["keys of 8 bits, by token"] = Form(by_token, by_token, (8, bits))
        found["keys of 8 bits, both rotated"] = Form(rotated, rotated, (8, bits))
    return found


def round_cache(
    cache: StarKVCache, form: Form, window: int, known: dict[int, Tensor] | None = None
) -> None:
    """Rounds what a prompt left in the cache, but for the newest `window` tokens.

    known: places of the tokens that were rounded before, by layer; the function adds the new ones.
    Such a cache has one row. None: nothing was rounded before.
    """
    for number, layer in enumerate(cache.compressed_layers):
        end = layer.stored - window
        keys, values = layer.keys.clone(), layer.values.clone()
        todo = torch.ones(end, dtype=torch.bool)
        if known is not None:
            places = layer.places()[0, :end]
            todo = ~torch.isin(places, known.get(number, places[:0]))
            known[number] = places
        new = todo.nonzero()[:, 0]
        keys[:, :, new], values[:, :, new] = form(keys[:, :, new], values[:, :, new])
        layer.hold(keys, values)


def planted(seed: int = 0) -> None:
    """Prints the error of attention's output, relative to the output's size, for each form.

    Keys have four far channels: in none, in every key alike, or before rotary positions 0 to 511
    were applied, which turn a channel's distance into a wave.
    """
    print("| head dim | bits | form | usual keys | far channels | far before positions |")
    print("| --- | --- | --- | --- | --- | --- |")
    for dim in (64, 96, 128, 256):
        generator = torch.Generator().manual_seed(seed)
        query, key, value = (torch.randn(8, 512, dim, generator=generator) for _ in range(3))
        # A query meets a few keys that it resembles.
        key[:, ::16] += 0.3 * query[:, ::16]
        far = torch.zeros(512, dim).index_fill(1, torch.arange(3, dim, dim // 4), 25.0)
        for bits in (8, 4):
            for name, form in forms(bits).items():
                kinds = (key, key + far, key + _at_positions(far))
                cells = [f"{_error(query, one, value, form):.4f}" for one in kinds]
                print(f"| {dim} | {bits} | {name} | {' | '.join(cells)} |")


def _at_positions(x: Tensor) -> Tensor:
    """Turns [L, D] by rotary positions with base 1,000,000."""
    length, dim = x.shape
    frequency = 1e6 ** -(torch.arange(0, dim, 2) / dim)
    angle = (torch.arange(length)[:, None] * frequency).repeat(1, 2)
    left, right = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-right, left], -1) * angle.sin()


def _error(query: Tensor, key: Tensor, value: Tensor, form: Form) -> float:
    attend = torch.nn.functional.scaled_dot_product_attention
    exact, found = attend(query, key, value), attend(query, *form(key, value))
    return float((found - exact).norm() / exact.norm())


def agent(questions: int, budget: float) -> None:
    """Prints the right answers of the demo agent for each form."""
    show = _agent_rows(questions)
    show(1, 16, "full cache", None)
    show(budget, 16, "not rounded", None)
    for bits in (8, 4, 3, 2):
        for name, form in forms(bits).items():
            show(budget, bits, name, form)


def peer(questions: int) -> None:
    """Prints the agent's right answers with all tokens in 4 bits, as transformers' `QuantizedCache`
    stores them by optimum-quanto, and with all tokens in ours."""
    print(f"quanto stores a number in {_quanto_bits(torch.randn(1, 4, 256, 32)):.2f} bits")
    show = _agent_rows(questions)
    show(1, 16, "full cache", None)
    show(1, 4, "all tokens, quanto", Form(quanto, quanto, (4, 4)))
    show(1, 4, "all tokens, ours", Form(centred, centred, (4, 4)))


def quanto(x: Tensor, bits: int) -> Tensor:
    """Rounds [B, G, L, D] as `QuantizedCache(backend="quanto")` does with its default options."""
    stored = _quanto(x, bits)
    return stored.dequantize()


def _quanto(x: Tensor, bits: int) -> Any:
    from transformers.cache_utils import QuantoQuantizedLayer

    layer = QuantoQuantizedLayer(nbits=bits)
    return layer._quantize(x.contiguous(), layer.axis_key)


def _quanto_bits(x: Tensor) -> float:
    """Bits that quanto stores for each number, scales and shifts included."""

    def nbytes(tensor: Any) -> int:
        if type(tensor) is Tensor:
            return tensor.nbytes
        return sum(nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])

    return 8 * nbytes(_quanto(x, 4)) / x.numel()


def _agent_rows(questions: int) -> Callable[[float, int, str, Form | None], None]:
    """Returns what measures one form on the demo agent and prints its row of a table."""
    from starkv_lab.quality.design import Design
    from starkv_lab.quality.measure import Bench
    from starkv_lab.quality.tables import Comparison
    from starkv_lab.quality.variants import FULL, VARIANTS

    class RoundingBench(Bench):
        form: Form | None = None

        def changed(self, cache: StarKVCache) -> StarKVCache:
            if self.form is not None:
                round_cache(cache, self.form, StarKVConfig().window)
            return cache

    design = Design.of(questions, 0)
    bench = RoundingBench(design)
    print("| tokens | bits | form | right answers | nats from the full cache |")
    print("| --- | --- | --- | --- | --- |")

    def show(tokens: float, bits: int, name: str, form: Form | None) -> None:
        bench.form = form
        cell = bench.measure(FULL if tokens == 1 else VARIANTS["default"], tokens)
        right, kl = Comparison(design, [cell]).accuracy(cell), statistics.fmean(cell.kl.values())
        share = f"{right.value:.1%} ({right.low:.1%} to {right.high:.1%})"
        print(f"| {tokens:.0%} | {bits} | {name} | {share} | {kl:.4f} |", flush=True)

    return show


def text(model_name: str, prompts: int, passages: int, budget: float) -> None:
    """Prints codes found and nats a token of a small language model for each form."""
    from .text_models import load_text_model
    from .text_tasks import Needles, continuation_loss, converse, follow_up_ids, prompt_ids, read
    from .text_tasks import passages as texts
    from .text_weights import CONTEXT, REST

    model, tokenizer = load_text_model(model_name)
    asked = [Needles.of(seed) for seed in range(prompts)]
    ids = [(prompt_ids(tokenizer, one), follow_up_ids(tokenizer, one)) for one in asked]
    ready = [read(model, prompt) for prompt, _ in ids]
    pieces = [
        tokenizer(one, return_tensors="pt").input_ids[:, : CONTEXT + REST]
        for one in texts()[:passages]
    ]
    read_pieces = [read(model, piece[:, :CONTEXT]) for piece in pieces]
    print("| tokens | bits | form | codes found | follow-up | nats a token |")
    print("| --- | --- | --- | --- | --- | --- |")
    window = StarKVConfig().window
    cases: list[tuple[float, int, str, Form | None]] = [
        (1.0, 16, "full cache", None),
        (budget, 16, "not rounded", None),
        *((budget, bits, name, form) for bits in (8, 4) for name, form in forms(bits).items()),
    ]
    for tokens, bits, name, form in cases:
        torch._dynamo.reset()
        starkv_compile.compile(model, budget=tokens, inner="eager")
        found = [0, 0]
        for one, (prompt, follow_up), past in zip(asked, ids, ready, strict=True):
            after = _after_prompts(form, window)
            said = converse(model, tokenizer, prompt, follow_up, past, after_prompt=after)
            for number in (0, 1):
                found[number] += one.code(number) in (said.replies[number] or "")
        losses = [
            continuation_loss(
                model, piece, past, CONTEXT, after_prompt=_after_prompts(form, window)
            )
            for piece, past in zip(pieces, read_pieces, strict=True)
        ]
        starkv_compile.undo(model)
        loss = f"{statistics.fmean(losses):.3f}" if losses else ""
        print(
            f"| {tokens:.0%} | {bits} | {name} | {found[0]} of {prompts} | {found[1]} | {loss} |",
            flush=True,
        )


def _after_prompts(form: Form | None, window: int) -> Callable[[StarKVCache], Any]:
    """Returns what rounds a session's cache after each of its prompts."""
    known: dict[int, Tensor] = {}
    return lambda cache: None if form is None else round_cache(cache, form, window, known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("planted", "agent", "peer", "text"))
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--model", default="smollm2", help="smollm2 or gemma3")
    parser.add_argument("--prompts", type=int, default=18)
    parser.add_argument("--passages", type=int, default=6)
    parser.add_argument("--budget", type=float, help="share of the tokens [agent 0.2, text 0.5]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "planted":
        planted()
    elif args.what == "peer":
        peer(args.questions)
    elif args.what == "agent":
        agent(args.questions, args.budget or 0.2)
    else:
        text(args.model, args.prompts, args.passages, args.budget or 0.5)


if __name__ == "__main__":
    main()
