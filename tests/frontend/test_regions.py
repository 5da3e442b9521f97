"""Equal layers are compiled once, others apart, and the result is that of the whole graph."""

import pytest
import torch
from torch import nn

import starkv_compile
from starkv_compile import OptionError
from starkv_compile.frontend import inner, regions
from starkv_compile.frontend.regions import compile_by_region
from starkv_compile.testing import generate, tiny_inputs, tiny_model

WIDTH = 8


class Layer(nn.Module):
    def __init__(self, slope=0.1):
        super().__init__()
        self.up, self.slope = nn.Linear(WIDTH, WIDTH), slope

    def forward(self, x):
        return x + nn.functional.leaky_relu(self.up(x), self.slope)


class Stack(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        x = x * 2
        for layer in self.layers:
            x = layer(x)
        return x.sum(-1)


class Counting:
    """A backend that compiles by region, and remembers the pieces."""

    def __init__(self, compile_one=lambda piece, examples: piece.forward):
        self.pieces, self.compile_one = [], compile_one

    def __call__(self, module, inputs):
        def compile_one(piece, examples):
            self.pieces.append(piece)
            return self.compile_one(piece, examples)

        return compile_by_region(module, inputs, compile_one)


def run(model, *inputs, backend=None, **options):
    """The number of pieces that were compiled; the results are compared."""
    torch._dynamo.reset()
    backend = backend or Counting()
    with torch.no_grad():
        result = torch.compile(model, backend=backend, fullgraph=True, **options)(*inputs)
        torch.testing.assert_close(result, model(*inputs))
    return len(backend.pieces)


@pytest.mark.parametrize("layers", [3, 9])
def test_equal_layers_are_compiled_once(layers):
    model = Stack([Layer() for _ in range(layers)])
    assert run(model, torch.randn(5, WIDTH)) == 3, "what is before, a layer, what is after"
    assert run(model, torch.randn(5, WIDTH), dynamic=True) == 3


def test_a_layer_with_another_constant_or_dtype_is_compiled_apart():
    model = Stack([*(Layer() for _ in range(6)), Layer(0.2)])
    assert run(model, torch.randn(5, WIDTH)) == 4

    class Wide(Layer):
        def forward(self, x):
            return super().forward(x.double()).to(x.dtype)

    model = Stack([Layer(), Wide(), *(Layer() for _ in range(6))])
    model.layers[1].double()
    assert run(model, torch.randn(5, WIDTH)) == 4


def test_layers_whose_parts_are_called_from_outside():
    class Parts(Stack):
        def forward(self, x):
            for layer in self.layers:
                x = x + layer.up(x) * layer.slope
            return x.sum(-1)

    assert run(Parts([Layer() for _ in range(6)]), torch.randn(5, WIDTH)) in (2, 3)


def test_layers_of_different_shape_are_one_piece_each_and_a_graph_without_equals_stays_whole():
    class Grow(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.up = nn.Linear(width, width + 1)

        def forward(self, x):
            return self.up(x)

    assert run(Stack([Grow(WIDTH + i) for i in range(3)]), torch.randn(5, WIDTH)) == 1
    assert run(Layer(), torch.randn(5, WIDTH)) == 1


class PerLayer(nn.Module):
    """Each layer reads an input of its own, whose length has a symbol of its own."""

    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList(Averaging() for _ in range(count))

    def forward(self, x, others):
        for layer, other in zip(self.layers, others, strict=True):
            x = layer(x, other)
        return x + 1


class Averaging(nn.Module):
    def forward(self, x, other):
        return x + other.sum(0)


def lengths(*sizes):
    """Inputs of different lengths. Torch gives each length a symbol."""
    others = [torch.randn(size, WIDTH) for size in sizes]
    for other in others:
        torch._dynamo.mark_dynamic(other, 0)
    return torch.randn(WIDTH), others


def test_layers_with_other_symbols_share_a_piece():
    assert run(PerLayer(4), *lengths(5, 6, 7, 8)) == 2


def test_a_condition_of_the_compiler_is_asked_of_the_other_symbols():
    """The compiler here specialises on length > 6, as an inner backend may."""

    def specialising(piece, examples):
        sizes = [size for size in examples if isinstance(size, torch.SymInt)]
        large = [bool(size > 6) for size in sizes]

        def call(*values):
            given = [value for value in values if type(value) is int]
            assert [value > 6 for value in given] == large, "compiled for others"
            return piece(*values)

        return call

    backend = Counting(specialising)
    inputs = lengths(5, 7, 6, 8)
    assert run(PerLayer(4), *inputs, backend=backend) == 3, "small, large, what is after"


def test_symbols_that_are_equal_in_one_layer_only_are_told_apart():
    class Two(nn.Module):
        def forward(self, x, pair):
            return x + pair[0].sum(0) * pair[1].sum(0)

    model = PerLayer(3)
    model.layers = nn.ModuleList(Two() for _ in range(3))
    x, others = lengths(5, 5, 6, 7, 8, 8)
    pairs = [(others[0], others[1]), (others[2], others[3]), (others[4], others[5])]
    assert run(model, x, pairs) in (2, 3), "right results, whether or not torch joins the symbols"


@pytest.mark.parametrize(
    "what", ["in place", "data-dependent", "a size", "two views of one tensor"]
)
def test_values_that_pieces_cannot_hand_over_keep_the_graph_whole(what):
    class Odd(Layer):
        def forward(self, x):
            x = super().forward(x)
            if what == "in place":
                x = x.clone().transpose_(0, 1).contiguous().transpose(0, 1)
            return x

    class Sized(Stack):
        def forward(self, x):
            if what == "data-dependent":
                x = x[x.sum(-1) > 0]
            if what == "a size":
                return super().forward(x).view(x.shape[:-1])
            if what == "two views of one tensor":
                x, other = x.clone().chunk(2)
                for layer in self.layers:
                    x = layer(x)
                return x + other
            return super().forward(x)

    model = Sized([Odd() for _ in range(4)])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        pieces = run(model, torch.randn(6, WIDTH), dynamic=True)
    assert pieces == (3 if what == "a size" else 1)


def test_what_a_layer_changes_in_place_is_seen_by_the_next():
    class Adding(nn.Module):
        def forward(self, x, seen):
            seen.add_(x.sum())
            view = x[1:]
            view.mul_(2)
            return x + seen

    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Adding() for _ in range(4))

        def forward(self, x, seen):
            x, seen = x.clone(), seen.clone()
            for layer in self.layers:
                x = layer(x, seen)
            return x, seen

    inputs = torch.randn(5, WIDTH), torch.zeros(WIDTH)
    assert run(Changing(), *inputs, backend=Counting(aot)) < 6


def aot(piece, examples):
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(piece, examples)


def test_layers_whose_inputs_share_memory_are_told_apart():
    class Pair(nn.Module):
        def forward(self, x, other):
            x.add_(1)
            return x * 1.5 + other

    class Shared(PerLayer):
        def forward(self, x, others):
            x = x.clone()
            for layer, other in zip(self.layers, others, strict=True):
                layer(x, x if other is None else other)
            return x * 2

    model = Shared(4)
    model.layers = nn.ModuleList(Pair() for _ in range(4))
    other = torch.randn(WIDTH)
    assert run(model, torch.randn(WIDTH), [other, None, other, other], backend=Counting(aot)) <= 4


def test_modes_of_torch_are_as_before():
    class Quiet(Stack):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    model = Quiet([Layer() for _ in range(4)])
    torch._dynamo.reset()
    backend = Counting(aot)
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(5, WIDTH))
    assert torch.is_grad_enabled()
    assert len(backend.pieces) == 1


def test_a_fault_in_splitting_costs_nobody_the_model(monkeypatch):
    def faulty(module):
        raise KeyError("s0")

    monkeypatch.setattr(regions, "_split", faulty)
    with pytest.warns(UserWarning, match=r"failed to split a graph by layers.*KeyError: 's0'"):
        assert run(Stack([Layer() for _ in range(4)]), torch.randn(5, WIDTH)) == 1


@pytest.mark.slow
def test_a_model_whose_gradients_are_recorded():
    """Under Inductor, at a fixed length: the backward graph is compiled at its first use."""
    torch.manual_seed(0)
    model, x = Stack([Layer() for _ in range(4)]), torch.randn(5, WIDTH)
    model(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.compile(model, backend="starkv", dynamic=False)(x).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def compiled_pieces(monkeypatch, layers, **options):
    """(number of graphs that are compiled, what the model says, its logits and kept tokens)."""
    calls = []
    for name in ("_inductor", "_aot_eager"):
        compile_one = getattr(inner, name)

        def counting(*arguments, compile_one=compile_one):
            calls.append(arguments)
            return compile_one(*arguments)

        monkeypatch.setattr(inner, name, counting)
    torch._dynamo.reset()
    model = tiny_model("qwen2_5_vl", num_hidden_layers=layers)
    starkv_compile.compile(model, budget=0.3, **options)
    out = generate(model, tiny_inputs("qwen2_5_vl"), 3)
    kept = [layer.kept.tolist() for layer in out.past_key_values.layers]
    starkv_compile.undo(model)
    monkeypatch.undo()
    return len(calls), out.sequences.tolist(), torch.stack(out.logits), kept


@pytest.mark.slow
def test_a_model_by_region_and_as_a_whole(monkeypatch):
    regional, whole = (
        compiled_pieces(monkeypatch, 5, inner="aot_eager", regional_compilation=flag)
        for flag in (True, False)
    )
    # For a prompt: what is before the layers, a layer, what is after. For decoding: the same, and
    # the first layer apart, because all masks have its length.
    assert (regional[0], whole[0]) == (7, 2)
    assert (regional[1], regional[3]) == (whole[1], whole[3])
    assert torch.equal(regional[2], whole[2])


@pytest.mark.slow
def test_a_model_by_region_under_inductor(monkeypatch):
    by_inductor = compiled_pieces(monkeypatch, 5)
    plain = compiled_pieces(monkeypatch, 5, inner="eager")
    assert (by_inductor[0], plain[0]) == (7, 0)
    assert (by_inductor[1], by_inductor[3]) == (plain[1], plain[3])
    torch.testing.assert_close(by_inductor[2], plain[2])


def test_the_option_is_a_flag():
    with pytest.raises(OptionError, match="regional_compilation='yes'"):
        starkv_compile.StarKVConfig(regional_compilation="yes")
