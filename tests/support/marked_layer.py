"""One attention layer that stores a prompt as a `StarKVCache` does, with two frames in it."""

import torch
from torch import nn

from starkv_compile.kernels.marker import WriteArguments, Written
from starkv_compile.kernels.ops import STARKV
from starkv_compile.kernels.reference.star import Layout, State
from tests.support.one_layer import Attention, G, S
from tests.support.policy_cases import frames

LAYOUT = Layout(*(t.expand(2, -1).clone() for t in frames(S, (3, 12), (14, 23), columns=3)))


class MarkedLayer(nn.Module):
    """Returns the attention's output and what the marker returns, by names.

    given: the marker's tensors by their names, but for the key and the value.
    """

    def __init__(self, form="sdpa"):
        super().__init__()
        self.attention = Attention(form, cached=True)

    def forward(self, x, given, mask=None):
        y, key, value = self.attention(x, mask)
        facts = {"seen": S, "has_layout": True, "mask_fits": True}
        arguments = WriteArguments(key=key, value=value, **given, **facts)
        return y, Written(*STARKV.cache_write(**arguments._asdict()))


def places_of(*rows):
    return torch.arange(S).expand(*rows, -1).clone()


def marked_inputs(place=None):
    """`MarkedLayer`'s `given` in a session's first prompt. place: [2, S] unless given."""
    place = places_of(2) if place is None else place
    visual = (LAYOUT.frame >= 0).sum(1)
    zero = torch.zeros(2, dtype=torch.int64)
    state = State(torch.zeros(2, G), zero, torch.zeros(2, G, 9), zero.clone())
    return {
        "place": place,
        "novelty": torch.ones(place.shape),
        **LAYOUT._asdict(),
        "counts": torch.stack([S - visual, visual], dim=1),
        **state._asdict(),
        "turn_start": torch.zeros(1, dtype=torch.int64),
    }
