"""Attention of one decoded token over codes and newer tokens, in the forms that models write."""

import operator

import pytest
import torch
from torch.nn import functional as F

from starkv_compile import StarKVConfig
from starkv_compile.kernels.ops import STARKV
from starkv_compile.kernels.reference.quantization import centre_of, quantize
from starkv_compile.passes import Pipeline

H, G, D, C, N = 6, 2, 16, 9, 3
SDPA = torch._C._nn.scaled_dot_product_attention


def sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def sdpa_repeated(q, k, v, mask):
    k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)


def eager(q, k, v, mask):
    k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
    logits = q @ k.transpose(2, 3) * 0.3
    logits = logits if mask is None else logits.masked_fill(~mask, -1e30)
    return F.dropout(logits.softmax(-1, dtype=torch.float32), 0.1, False) @ v


def eager_in_place(q, k, v, mask):
    k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
    logits = q @ k.mT
    logits *= 0.3
    logits = logits if mask is None else logits.masked_fill_(~mask, -1e30)
    return logits.softmax(-1) @ v


def tokens_first(q, k, v, mask):
    """[B, S, H, D] by products."""
    return eager(q, k, v, mask).transpose(1, 2)


def dropping(q, k, v, mask):
    k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
    return F.dropout((q @ k.mT * 0.3).softmax(-1), 0.5, True) @ v


def dropping_sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, enable_gqa=True)


def reads_weights(q, k, v, mask):
    k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
    weights = (q @ k.mT * 0.3).softmax(-1)
    return torch.cat([weights @ v, weights[..., :1]], -1)


def first_key_only(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def changed_codes(q, k, v, mask):
    return sdpa(q, k * 2, v + 1, mask)


class Decode(torch.nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, query, key, value, newer_key, newer_value, mask):
        keys, values = (
            torch.cat([STARKV.dequantize(*codes, torch.float32), newer], dim=-2)
            for codes, newer in ((key, newer_key), (value, newer_value))
        )
        return self.form(query + 0, keys, values, mask)


def inputs(rows=1, queries=1, heads=H, masked=True):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(rows, *shape, generator=generator)

    codes, newer = [], []
    for _ in range(2):
        older = tensor(G, C, D)
        codes.append(tuple(quantize(older, centre_of(older), 4)))
        newer.append(tensor(G, N, D))
    mask = torch.rand(rows, 1, 1, C + N, generator=generator) > 0.3
    return tensor(heads, queries, D), *codes, *newer, mask.expand(-1, -1, queries, -1)


def rewritten(form, given, budget=0.5, module=Decode, dynamic=False, before=lambda graph: None):
    """The graph of a decoded token after the passes, and what it returns.

    before: changes the graph that was captured.
    """
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        before(graph)
        Pipeline(StarKVConfig(budget=budget)).run(graph, cache="nobody")
        return graph.forward

    compiled = torch.compile(module(form), backend=backend, fullgraph=True, dynamic=dynamic)
    found = compiled(*given)
    return graphs[0], found


def count(graph, op):
    return sum(str(node.target) == f"starkv.{op}" for node in graph.graph.nodes)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("budget", [0.5, 1.0])
@pytest.mark.parametrize("form", [sdpa, sdpa_repeated, eager, eager_in_place, tokens_first])
def test_it_reads_codes_and_answers_the_same(form, rows, masked, budget):
    *given, mask = inputs(rows)
    given = (*given, mask if masked else None)
    graph, found = rewritten(form, given, budget)
    assert (count(graph, "quantized_attention"), count(graph, "dequantize")) == (1, 0)
    torch.testing.assert_close(found, Decode(form)(*given))


def test_lengths_and_head_sizes_of_any_number():
    """Without a scale in the call, it follows from the head size: one for each graph."""
    given = inputs()
    graph, found = rewritten(sdpa, given, dynamic=True)
    assert (count(graph, "quantized_attention"), count(graph, "dequantize")) == (1, 0)
    torch.testing.assert_close(found, Decode(sdpa)(*given))


@pytest.mark.parametrize("dim", [3, 2])
def test_a_size_of_the_values_that_is_read_later(dim):
    """As torch 2.11 reads the head size, for a result's shape."""

    def read_size(graph):
        (node,) = graph.graph.find_nodes(op="call_function", target=SDPA)
        (read,) = node.users
        with graph.graph.inserting_before(read):
            sizes = graph.graph.call_method("size", (node.args[2],))
            item = graph.graph.call_function(operator.getitem, (sizes, dim))
            times = graph.graph.call_function(operator.mul, (node, item))
        sizes.meta["example_value"] = node.args[2].meta["example_value"].size()
        item.meta["example_value"] = sizes.meta["example_value"][dim]
        times.meta["example_value"] = node.meta["example_value"] * 1
        read.replace_input_with(node, times)

    given = inputs()
    graph, found = rewritten(lambda *of: sdpa_repeated(*of) + 0, given, before=read_size)
    assert count(graph, "quantized_attention") == 1
    assert count(graph, "dequantize") == (0 if dim == 3 else 1), "the output has no such size"
    torch.testing.assert_close(found, Decode(sdpa_repeated)(*given) * (D if dim == 3 else C + N))


def dropping_before_values(q, k, v, mask):
    """The values are joined only after the weights."""
    k = k.repeat_interleave(H // G, 1)
    weights = F.dropout((q @ k.mT * 0.3).softmax(-1), 0.5, True)
    return weights @ (v * 1).repeat_interleave(H // G, 1)


def by_heads_last(q, k, v, mask):
    """With as many heads as numbers in a value, its shape is that of the usual order."""
    k, v = (t.repeat_interleave(D // G, 1) for t in (k, v))
    return torch.einsum("bhsl,bhld->bdsh", (q @ k.mT * 0.3).softmax(-1), v)


def one_mask_for_all_tokens(q, k, v, mask):
    return sdpa(q, k, v, mask[..., :1])


@pytest.mark.parametrize("form", [dropping_before_values, by_heads_last, one_mask_for_all_tokens])
def test_what_the_op_does_not_compute_stays(form):
    graph, _ = rewritten(form, inputs(heads=D if form is by_heads_last else H))
    assert count(graph, "quantized_attention") == 0


class WrittenLater(Decode):
    """The newer tokens are overwritten before attention, and after they were joined."""

    def forward(self, query, key, value, newer_key, newer_value, mask):
        newer_key = newer_key + 0
        keys = torch.cat([STARKV.dequantize(*key, torch.float32), newer_key], dim=2)
        values = torch.cat([STARKV.dequantize(*value, torch.float32), newer_value], dim=2)
        newer_key.zero_()
        return self.form(query + 0, keys, values, mask)


def test_tokens_that_were_overwritten_meanwhile():
    given = inputs()
    graph, found = rewritten(sdpa, given, module=WrittenLater)
    assert count(graph, "quantized_attention") == 0
    torch.testing.assert_close(found, WrittenLater(sdpa)(*given))


def test_a_scale_that_is_a_value_of_the_graph():
    def scaled(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, scale=1 / k.shape[2], enable_gqa=True)

    given = inputs()
    graph, found = rewritten(scaled, given, dynamic=True)
    assert count(graph, "quantized_attention") == 1
    torch.testing.assert_close(found, Decode(scaled)(*given))


@pytest.mark.parametrize(
    "form", [dropping, dropping_sdpa, first_key_only, changed_codes], ids=lambda f: f.__name__
)
def test_what_computes_something_else_stays(form):
    graph, _ = rewritten(form, inputs())
    assert (count(graph, "quantized_attention"), count(graph, "dequantize")) == (0, 2)


def test_weights_that_are_read_as_well_are_computed_as_before():
    given = inputs()
    graph, found = rewritten(reads_weights, given)
    assert count(graph, "quantized_attention") == 1
    assert count(graph, "dequantize") == 1  # the keys
    torch.testing.assert_close(found, Decode(reads_weights)(*given))


def test_several_queries_read_what_codes_stand_for():
    given = inputs(queries=2)
    graph, found = rewritten(sdpa, given)
    assert count(graph, "quantized_attention") == 0
    torch.testing.assert_close(found, Decode(sdpa)(*given))


def test_a_call_that_records_gradients_stays():
    query, *others = inputs()
    graph, _ = rewritten(sdpa, (query.requires_grad_(), *others))
    assert count(graph, "quantized_attention") == 0
