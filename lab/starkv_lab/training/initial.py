"""Sets the agent's first weights. With random weights its attention learns nothing in an hour.

Attention answers a question in three steps: it gathers the question's words at its end, finds the
screen cell that they describe, and copies what is there. Each step starts here in a rough form, and
training then takes minutes. The query-key and value-output products near the identity are the
"mimetic initialization" of Trockman and Kolter (arXiv 2305.09828).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..agent.vocabulary import ATTRIBUTES, BIN_CENTERS, NOUNS, TOKEN_ID

LOOK_BACK = (1, 2, 3, 5)  # tokens back from a question's end: its noun, attribute, step and verb
STEP_TO_SCREEN = 2  # "step 7 <|vision_start|> <|image_pad|>": from a screen back to its step
SHARPNESS = 2.0  # norm weights of queries and of keys in the first layer, 1.4 after it
# Weights of a positional head's fastest rotations. The slower rotations separate the distances at
# which the fastest one has completed a turn.
ROTATION_SHARES = (0.5, 0.125, 0.125, 0.125, 0.125)


@torch.no_grad()
def start_positions(table: nn.Embedding) -> None:
    """Sets sinusoids over rows and columns. Learning places from noise takes ten times longer."""
    side, quarter = math.isqrt(table.num_embeddings), table.embedding_dim // 4
    place = torch.arange(side) / (side - 1)
    angle = place[:, None] * torch.logspace(0, math.log10(side / 2), quarter) * math.pi
    waves = torch.cat([angle.sin(), angle.cos()], dim=-1)
    rows, columns = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
    table.weight.copy_(torch.cat([rows, columns], dim=-1))


@torch.no_grad()
def start_attention(text_model: Any) -> None:
    """Sets heads that copy, heads that compare, and in the first layer heads that look back.

    text_model: a Qwen3-VL text model with attention biases. Its KV heads together have to be as
    wide as its hidden states, so that together they can copy a whole hidden state.
    """
    text = text_model.config
    width, group = text.head_dim, text.num_attention_heads // text.num_key_value_heads
    for index, layer in enumerate(text_model.layers):
        attention = layer.self_attn
        copied, compared = _orthogonal(text.hidden_size), _orthogonal(text.hidden_size)
        compared *= _still_rotations(text_model).repeat(text.num_key_value_heads)[:, None]
        attention.v_proj.weight.copy_(copied)
        attention.o_proj.weight *= 0.3
        for head in range(text.num_attention_heads):
            own, shared = _rows(head, width), _rows(head // group, width)
            attention.o_proj.weight[:, own] += copied[shared].T
            if index > 0 and head % group == 0:  # the other heads of a group stay random
                attention.q_proj.weight[own] *= 0.05
                attention.q_proj.weight[own] += compared[shared]
                attention.k_proj.weight[shared] *= 0.01
                attention.k_proj.weight[shared] += compared[shared]
        sharpness = SHARPNESS if index == 0 else 1.4
        attention.q_norm.weight.fill_(sharpness)
        attention.k_norm.weight.fill_(sharpness)
    for head, distance in enumerate(LOOK_BACK):
        _look_back(text_model, head, distance)
    # All tokens of a screen share their place in time. Two places before it is the screen's step.
    _look_back(text_model, len(LOOK_BACK), STEP_TO_SCREEN, axis="time")


def _orthogonal(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size))[0]


def _rows(head: int, width: int) -> slice:
    return slice(head * width, (head + 1) * width)


def _frequencies(text_model: Any) -> torch.Tensor:
    """Returns [head_dim / 2]: radians per position of each pair of a head's dimensions."""
    return text_model.rotary_emb.inv_freq.float()


def _still_rotations(text_model: Any) -> torch.Tensor:
    """Returns [head_dim]: 1 where the rotation hardly changes from a question to its screen."""
    still = (_frequencies(text_model) < 0.03).float()
    return torch.cat([still, still])


def _look_back(text_model: Any, head: int, distance: int, axis: str = "all") -> None:
    """Sets biases with which `head` of the first layer attends `distance` positions back.

    Key and query are the same constant, and the query is rotated by `distance` positions. So their
    product is largest at that distance. axis: "all" three axes of M-RoPE, or "time" only, which is
    every third rotation of the interleaved layout.
    """
    text, attention = text_model.config, text_model.layers[0].self_attn
    angle = -distance * _frequencies(text_model)
    shares = torch.zeros_like(angle)
    shares[:: 3 if axis == "time" else 1][: len(ROTATION_SHARES)] = torch.tensor(ROTATION_SHARES)
    size = (shares * text.head_dim).sqrt()
    own = _rows(head, text.head_dim)
    shared = _rows(head * text.num_key_value_heads // text.num_attention_heads, text.head_dim)
    for projection, rows, bias in (
        (attention.q_proj, own, torch.cat([size * angle.cos(), size * angle.sin()])),
        (attention.k_proj, shared, torch.cat([size, torch.zeros_like(size)])),
    ):
        projection.weight[rows] *= 0.1
        projection.bias[rows] = bias


@torch.no_grad()
def start_features(visual: Any, probe_heads: nn.ModuleList, seen: Any) -> None:
    """Scales visual embeddings, `seen` on some screens, to the norm of words, about 1.

    The probe drives them to a norm near 90. There no layer of the language model can change them,
    so they could not learn, for example, which frame they belong to.
    """
    found = [(visual.merger, seen.pooler_output)]
    found += zip(visual.deepstack_merger_list, seen.deepstack_features, strict=True)
    for merger, features in found:
        norm = features.norm(dim=-1).mean()
        merger.linear_fc2.weight /= norm
        merger.linear_fc2.bias /= norm
    for head in probe_heads:
        head.weight *= seen.pooler_output.norm(dim=-1).mean()


@torch.no_grad()
def start_words(table: torch.Tensor, probe_heads: nn.ModuleList) -> None:
    """Sets each word, in `table` [vocabulary, hidden], to the direction of the probe's meaning.

    Then "red" points in the direction of red cells, and a dot product almost compares a question
    with the screen from the first step on.
    """
    words = [
        [*ATTRIBUTES],
        [*NOUNS],
        [f"x={c}" for c in BIN_CENTERS],
        [f"y={c}" for c in BIN_CENTERS],
    ]
    for head, names in zip(probe_heads, words, strict=True):
        weight: torch.Tensor = head.weight  # type: ignore[assignment]
        rows = F.normalize(weight[-len(names) :], dim=-1)  # row 0 may be "no element"
        for name, row in zip(names, rows, strict=True):
            table[TOKEN_ID[name]] = row
