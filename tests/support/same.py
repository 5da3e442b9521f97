"""Whether two sessions hold the same."""

import torch


def assert_same_cache(left, right, layers):
    """Kept tokens equal, keys, values and state close; one may be in buffers."""
    pairs = list(zip(left.compressed_layers, right.compressed_layers, strict=True))
    assert len(pairs) == layers
    for a, b in pairs:
        assert (a.seen, a.stored) == (b.seen, b.stored)
        assert torch.equal(a.places(), b.places())
        for mine, theirs in ((a.keys, b.keys), (a.values, b.values)):
            pair = mine[:, :, : a.stored], theirs[:, :, : b.stored]
            torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)
        states = ((*a.state, a.novelties()), (*b.state, b.novelties()))
        for mine, theirs in zip(*states, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
