"""One attention layer in every way people write it, and its graph in every way it is captured."""

import torch
from torch import nn
from torch.nn import functional as F

from starkv_compile import StarKVConfig

H, G, D, E, S = 4, 2, 16, 64, 40
CONFIG = StarKVConfig(budget=0.5, policy="starkv")
X = torch.randn(2, S, E, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """One layer that returns its output and what is to be cached."""

    def __init__(self, form="sdpa", cached=True, rope=True):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(E, H * D), nn.Linear(E, G * D), nn.Linear(E, G * D)
        self.form, self.cached, self.rope = form, cached, rope

    def forward(self, x, mask=None):
        def heads(t):
            return t.view(t.shape[0], t.shape[1], -1, D).transpose(1, 2)

        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        if self.rope:
            k = k * 0.5 + torch.cat([-k[..., D // 2 :], k[..., : D // 2]], -1)
        y = getattr(self, self.form)(q, k, v, mask)
        return (y, k, v) if self.cached else y

    def sdpa(self, q, k, v, mask):
        causal = mask is None
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)

    def interleave(self, q, k, v, mask):
        k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)

    def repeat_kv(self, q, k, v, mask):
        k, v = (repeat_kv(t) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)

    def eager(self, q, k, v, mask):
        k, v = (repeat_kv(t) for t in (k, v))
        weights = torch.matmul(q, k.transpose(2, 3)) * D**-0.5
        causal = torch.full((q.shape[2], k.shape[2]), torch.finfo(q.dtype).min).triu(1)
        weights = weights + causal[None, None]
        weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(F.dropout(weights, 0.0, self.training), v)

    def filled(self, q, k, v, mask):
        k, v = (repeat_kv(t) for t in (k, v))
        weights = (q @ k.transpose(-1, -2)) / D**0.5
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        return weights.masked_fill(later, float("-inf")).softmax(-1) @ v

    def chosen(self, q, k, v, mask):
        k, v = (repeat_kv(t) for t in (k, v))
        weights = (q * D**-0.25) @ (D**-0.25 * k).mT
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        weights = torch.where(seen, weights, torch.full([], float("-inf")))
        return nn.Softmax(-1)(weights) @ v

    def folded(self, q, k, v, mask):
        q, k, v = (t.reshape(-1, t.shape[2], D) for t in (q, repeat_kv(k), repeat_kv(v)))
        weights = torch.bmm(q, k.permute(0, 2, 1)).view(-1, H, q.shape[1], k.shape[1]) * D**-0.5
        later = torch.full((q.shape[1], k.shape[1]), float("-inf")).triu(1)
        weights = (later + weights).softmax(-1)
        return torch.bmm(weights.view(-1, q.shape[1], k.shape[1]), v).view(-1, H, q.shape[1], D)

    def bidirectional(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def repeat_kv(t):
    batch, groups, length, dim = t.shape
    t = t.unsqueeze(2).expand(batch, groups, H // G, length, dim)
    return t.reshape(batch, H, length, dim)


def capture(module, *inputs, how="dynamo", dynamic=False):
    """The module's graph: what Dynamo sees, what `torch.export` does, or decompositions of that.

    "core": ATen's core operators; "steps": its softmax in steps as well; "kernel": the kernel that
    SDPA runs on the CPU left whole. dynamic: batch and length of the first input are symbols.
    """
    if how == "dynamo":
        return _seen_by_dynamo(module, inputs)
    shapes = None
    if dynamic:
        any_size = torch.export.Dim.AUTO
        shapes = ({0: any_size, 1: any_size}, *[None] * (len(inputs) - 1))
    program = torch.export.export(module.eval(), inputs, dynamic_shapes=shapes)
    if how != "export":
        program = program.run_decompositions(_decompositions(how))
    return program.module()


def _decompositions(how):
    aten = torch.ops.aten
    table = torch.export.default_decompositions()
    if how == "steps":
        table.update(torch._decomp.get_decompositions([aten._softmax]))
    if how == "kernel":
        table.pop(aten._scaled_dot_product_flash_attention_for_cpu.default)
    return table


def _seen_by_dynamo(module, inputs):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(module.eval(), backend=keep, fullgraph=True)(*inputs)
    return graphs[0]
