"""A tiny decoder, as mathematics: the weights of all models here, and the oracle of what is right.

It shares no code with the package. Its cache is a list with one (key, value) for each layer, each
[B, H, tokens, D]. Positions come from the caller.
"""

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HEADS, DIM, LAYERS = 100, 64, 4, 16, 2
PROMPT = torch.randint(6, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(1))
REPLY = 6


def rotate(x, positions):
    """Rotary positions of [B, H, S, D], or of [B, S, H, D] with positions [S, 1]."""
    dim = x.shape[-1]
    rates = 1e4 ** (-torch.arange(0, dim, 2) / dim)
    angles = positions[..., None] * rates
    cos, sin = angles.cos(), angles.sin()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class Layer(nn.Module):
    """The parts of a layer that are the same in every style."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)

    def heads(self, x):
        """Queries, keys and values [B, S, H, D], not rotated."""
        x = F.layer_norm(x, (WIDTH,))
        return [part(x).unflatten(-1, (HEADS, DIM)) for part in (self.q, self.k, self.v)]

    def rotated(self, x, positions):
        """Queries, keys and values [B, H, S, D]."""
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        return rotate(q, positions), rotate(k, positions), v

    def rest(self, x, attended):
        """The layer's output from its input and its attention [B, H, S, D]."""
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (WIDTH,)))))


class Core(nn.Module):
    """Weights of the decoder. Every style inherits them, in this order."""

    def __init__(self, layer=Layer):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)


def filled(model, seed=0):
    """The model in eval mode, its weights those of every other model with the same shapes."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.2)
        else:
            nn.init.constant_(parameter, float("norm" in name))
    return model.eval()


def step(core, ids, positions, cache):
    """Logits [B, S, V], and the cache with the new tokens."""
    x, longer = core.embed(ids), []
    for i, layer in enumerate(core.layers):
        q, k, v = layer.rotated(x, positions)
        if cache is not None:
            k, v = torch.cat([cache[i][0], k], 2), torch.cat([cache[i][1], v], 2)
        x = layer.rest(x, F.scaled_dot_product_attention(q, k, v, is_causal=cache is None))
        longer.append((k, v))
    return core.head(x), longer


@torch.no_grad()
def oracle(core, ids, kept, reply=REPLY):
    """Tokens and logits of a greedy reply, after the cache was cut to `kept` by hand.

    kept: for each layer the places that stay. Positions go on from the whole prompt.
    """
    logits, cache = step(core, ids, torch.arange(ids.shape[1]), None)
    cache = [(k[:, :, i], v[:, :, i]) for (k, v), i in zip(cache, kept, strict=True)]
    tokens, every = [], []
    for place in range(ids.shape[1], ids.shape[1] + reply):
        every.append(logits[:, -1])
        tokens.append(int(logits[0, -1].argmax()))
        logits, cache = step(core, torch.tensor([tokens[-1:]]), torch.tensor([place]), cache)
    return tokens, torch.cat(every)


@torch.no_grad()
def places_of(core, ids, stored):
    """For each layer the places in the prompt of the keys that a model stored [B, H, n, D]."""
    _, full = step(core, ids, torch.arange(ids.shape[1]), None)
    found = []
    for (key, _), (whole, _) in zip(stored, full, strict=True):
        distance = (key[0, 0][:, None] - whole[0, 0][None]).abs().amax(-1)
        assert float(distance.amin(1).max()) < 1e-4, "a stored key is no key of the prompt"
        found.append(distance.argmin(1))
    return found
