"""Rewrites the exported graph of your own decoder, without Hugging Face.

    python examples/own_module.py --budget 0.25

The graph returns keys and values next to its output. After `starkv_compile.passes.apply` the same
graph returns fewer keys and values, and computes the same output for the prompt. This model does
not say which tokens are visual, so all tokens are scored as text, and the report notes it.

You have to keep the uncompressed length yourself. The next token's position is that length, which
is larger than the number of stored rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from starkv_compile import StarKVConfig
from starkv_compile.cli import share_of
from starkv_compile.passes import apply

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD = 100, 64, 4, 2, 16


class Decoder(torch.nn.Module):
    """Has one attention layer with grouped KV heads: tokens [B, S] -> logits [B, S, V], k, v."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.query = torch.nn.Linear(WIDTH, HEADS * HEAD)
        self.key = torch.nn.Linear(WIDTH, KV_HEADS * HEAD)
        self.value = torch.nn.Linear(WIDTH, KV_HEADS * HEAD)
        self.output = torch.nn.Linear(HEADS * HEAD, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = self.embed(tokens)
        q, k, v = (
            project(hidden).unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.output(mixed.transpose(1, 2).flatten(2)), k, v


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=("Rewrites the exported graph of a plain nn.Module.")
    )
    parser.add_argument("--budget", default="0.25", help="share of the tokens: 0.2 or 20%%")
    parser.add_argument("--tokens", type=int, default=64, help="length of the prompt")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    prompt = torch.randint(VOCABULARY, (1, args.tokens))
    length = {1: torch.export.Dim("length", min=2)}
    program = torch.export.export(Decoder().eval(), (prompt,), dynamic_shapes={"tokens": length})
    graph = program.module()

    logits, key, value = graph(prompt)
    report = apply(graph, StarKVConfig(budget=share_of(args.budget)))
    same_logits, short_key, short_value = graph(prompt)

    print(f"attentions rewritten: {report.rewritten} of {report.found}")
    for line in (*report.sites, *report.notes):
        print(f"  {line}")
    print(f"keys    {list(key.shape)} -> {list(short_key.shape)}")
    print(f"values  {list(value.shape)} -> {list(short_value.shape)}")
    print(f"logits unchanged: {torch.equal(logits, same_logits)}")


if __name__ == "__main__":
    main()
