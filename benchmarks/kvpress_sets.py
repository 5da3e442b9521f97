"""Compares the tokens that kvpress keeps with ours, on the same tensors.

    STARKV_KVPRESS_PYTHON=.../bin/python python -m benchmarks.kvpress_sets

The policies are SnapKV, TOVA, StreamingLLM and PyramidKV. kvpress runs in a separate environment
(see `kvpress_peer`). That process makes the layer, its queries, keys and values, and kvpress's
sets, and writes them to a file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

VARIABLE = "STARKV_KVPRESS_PYTHON"
HEADS, GROUPS, DIM, HIDDEN, LAYERS = 28, 4, 128, 512, 28
LENGTH, WINDOW, BUDGETS = 2000, 8, (0.2, 0.1, 0.05)
POLICIES = {"snapkv": "SnapKVPress", "tova": "TOVAPress", "streaming_llm": "StreamingLLMPress"}
PYRAMID_LAYERS = (0, 9, 18, 27)


def theirs(file: str) -> None:
    """Runs in the child: makes a Llama layer with random weights, and kvpress's kept sets."""
    import kvpress
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as llama

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=DIM,
        num_hidden_layers=LAYERS,
    )
    layer = llama.LlamaAttention(config, 0).eval()
    with torch.no_grad():  # logits as uneven as a trained layer's
        layer.q_proj.weight.mul_(8.0)
        layer.k_proj.weight.mul_(8.0)
        states = torch.randn(1, LENGTH, HIDDEN)
        positions = llama.LlamaRotaryEmbedding(config)(states, torch.arange(LENGTH)[None])

        def heads(project: Any) -> torch.Tensor:
            return project(states).view(1, LENGTH, -1, DIM).transpose(1, 2)

        projections = (layer.q_proj, layer.k_proj, layer.v_proj)
        query, key, value = map(heads, projections)
        query, key = llama.apply_rotary_pos_emb(query, key, *positions)

        def kept(press: Any) -> torch.Tensor:
            """Returns the kept places. Each value holds the number of its place."""
            numbers = torch.arange(LENGTH).float()[None, None, :, None].expand_as(value)
            more = {"position_embeddings": positions}
            pair = press.compress(layer, states, key, numbers.contiguous(), None, more)
            return pair[1][0, :, :, 0].long().sort(-1).values

        found: dict[tuple[Any, ...], torch.Tensor] = {}
        for budget in BUDGETS:
            for name, press in POLICIES.items():
                options = {"window_size": WINDOW} if name == "snapkv" else {}
                chosen = getattr(kvpress, press)(compression_ratio=1 - budget, **options)
                found[name, budget] = kept(chosen)
            pyramid = kvpress.PyramidKVPress(compression_ratio=1 - budget, window_size=WINDOW)
            for index in PYRAMID_LAYERS:
                layer.layer_idx = index
                found["pyramidkv", budget, index] = kept(pyramid)
    torch.save({"query": query, "key": key, "value": value, "found": found}, file)


def ours(policy: str, budget: float, tensors: dict[str, Any], capacity: int) -> torch.Tensor:
    """Returns the tokens that each KV head keeps, [G, C]."""
    from starkv_compile import StarKVConfig
    from starkv_compile.kernels.ops import STARKV
    from starkv_compile.kernels.reference.layout import layout_all_text
    from starkv_compile.kernels.reference.star import fresh_state
    from starkv_compile.policies import ScoreInputs

    config = StarKVConfig(policy=policy, budget=budget, window=WINDOW)
    layout, window = layout_all_text(tensors["key"]), config.scoring_window
    scored = config.policy.score(
        ScoreInputs(
            query=tensors["query"],
            key=tensors["key"],
            value=tensors["value"],
            mask=None,
            scale=DIM**-0.5,
            log_sum_exp=None,
            hidden=None,
            real=None,
            layout=layout,
            counts=None,
            state=tuple(fresh_state(tensors["key"], layout[3])),
            index=None,
            novelty=None,
            layer=0,
            window=window,
            capacity=capacity,
        )
    )
    return STARKV.select_tokens(scored.scores, None, LENGTH, window, capacity)[0].expand(GROUPS, -1)


def rows(tensors: dict[str, Any]) -> list[tuple[str, int, int, int]]:
    """Returns for each policy, budget and layer the tokens that kvpress keeps per head, that we
    keep per head, and that both keep in all heads.
    """
    from starkv_compile import StarKVConfig
    from starkv_compile.kernels.reference.capacity import layer_capacity

    lines = []
    for (policy, budget, *layer), peer in tensors["found"].items():
        mine = StarKVConfig(budget=budget).capacity(LENGTH)
        if layer:
            weights = StarKVConfig(policy=policy).layer_weights(LAYERS)
            mine = layer_capacity(LENGTH, WINDOW, mine, weights, layer[0])
        capacity = peer.shape[1]
        kept = ours(policy, budget, tensors, capacity)
        both = sum(len(set(a) & set(b)) for a, b in zip(kept.tolist(), peer.tolist(), strict=True))
        name = f"{policy} {budget:.0%}" + (f" layer {layer[0]}" if layer else "")
        lines.append((name, capacity, mine, both))
    return lines


def main() -> None:
    python = os.environ.get(VARIABLE)
    if not python:
        sys.exit(f"{VARIABLE} is not set: give the Python of an environment with kvpress")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tensors.pt"
        subprocess.run([python, __file__, str(file)], check=True)
        tensors = torch.load(file)
    print(
        "policy                   kvpress keeps   we keep   same tokens in all heads, with "
        "kvpress's number"
    )
    for name, capacity, mine, both in rows(tensors):
        print(f"{name:24} {capacity:14d} {mine:9d}   {both} of {GROUPS * capacity}")


if __name__ == "__main__":
    theirs(sys.argv[1]) if len(sys.argv) > 1 else main()
