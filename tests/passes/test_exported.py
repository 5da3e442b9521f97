"""`passes.apply` on an exported program: a new program for every batch size and length."""

import io

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import OutputKind
from torch.nn import functional as F

import starkv_compile
from starkv_compile import StarKVConfig
from starkv_compile.errors import PolicyError
from starkv_compile.passes import apply
from starkv_compile.policies import Policy
from tests.support.crossing import slow
from tests.support.one_layer import CONFIG, Attention, D, G, H, S, X, capture

E, HEADS, GROUPS, SIZE = 32, 4, 2, 8
SHORT = StarKVConfig(budget=0.25)
B, L = Dim("B", min=1, max=64), Dim("L", min=2, max=4096)
SIZES = [(2, 64), (1, 40), (5, 333), (3, 2), (1, 9), (1, 8), (7, 1000)]


class Net(nn.Module):
    """Two layers with grouped heads. It returns its output, keys and values."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(100, E), nn.Embedding(4096, E)
        sizes = {"q": E, "k": GROUPS * SIZE, "v": GROUPS * SIZE, "o": E}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(E, size) for name, size in sizes.items()})
            for _ in range(2)
        )

    def forward(self, ids, mask=None):
        length, stored = ids.shape[1], []
        hidden = self.tokens(ids) + self.places(torch.arange(length))
        seen = None
        if mask is not None:
            seen = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, None].bool()
        for layer in self.layers:
            query, key, value = (
                layer[name](hidden).unflatten(-1, (-1, SIZE)).transpose(1, 2) for name in "qkv"
            )
            answer = F.scaled_dot_product_attention(
                query, key, value, seen, is_causal=seen is None, enable_gqa=True
            )
            hidden = hidden + layer["o"](answer.transpose(1, 2).flatten(2))
            stored += [key, value]
        return hidden, *stored


def exported(masked=False, **options):
    ids = torch.randint(100, (2, 64))
    inputs = (ids, torch.ones_like(ids)) if masked else (ids,)
    shapes = ({0: B, 1: L},) * len(inputs)
    return export(Net().eval(), inputs, dynamic_shapes=shapes, **options)


def reloaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def kept_places(key, whole):
    """[B, C]: which token of `whole` each kept key is."""
    apart = (key[:, 0, :, None] - whole[:, 0, None]).abs().amax(-1)
    assert apart.amin(-1).max() < 1e-6, "a kept key is none of the originals"
    return apart.argmin(-1)


@pytest.mark.parametrize(
    ("strict", "policy"), [(False, "starkv"), *(slow(s, "screen_novelty") for s in (False, True))]
)
def test_one_program_serves_every_batch_size_and_length(strict, policy):
    program = exported(strict=strict)
    graph = str(program.graph)
    new, report = apply(program, StarKVConfig(budget=0.25, policy=policy))
    assert report.rewritten == 2
    assert str(program.graph) == graph, "the given program stays as it is"
    assert new.range_constraints == program.range_constraints
    assert [s.kind for s in new.graph_signature.output_specs] == [OutputKind.USER_OUTPUT] * 5
    forms = [p.module() for p in (new, reloaded(new))]
    for batch, length in SIZES:
        ids = torch.randint(100, (batch, length))
        answer, *whole = Net().eval()(ids)
        for form in forms:
            got, *stored = form(ids)
            assert torch.allclose(got, answer, atol=1e-5)
            assert {t.shape[2] for t in stored} == {max(2, length // 4)}
            for key, value, all_keys, all_values in zip(
                stored[::2], stored[1::2], whole[::2], whole[1::2], strict=True
            ):
                places = kept_places(key, all_keys)
                assert bool((places.diff() > 0).all())
                assert bool((places[:, -1] == length - 1).all())
                rows = places[:, None, :, None].expand_as(value)
                assert torch.allclose(value, all_values.gather(2, rows), atol=1e-6)


def test_a_program_keeps_what_its_graph_keeps():
    program, ids = exported(), torch.randint(100, (3, 120))
    graph = program.module()
    apply(graph, SHORT)
    new, _ = apply(program, SHORT)
    for left, right in zip(new.module()(ids), graph(ids), strict=True):
        assert torch.allclose(left, right, atol=1e-6)


@pytest.mark.parametrize(("loaded", "shortest"), [slow(False, 3, ci=True), slow(True, 2)])
def test_decompositions_keep_every_length(loaded, shortest):
    """Of a program that was not loaded, torch itself asks for two tokens before the window."""
    new, _ = apply(exported(), SHORT)
    form = (reloaded(new) if loaded else new).run_decompositions().module()
    for batch, length in [(1, shortest), (1, 9), (3, 100)]:
        ids = torch.randint(100, (batch, length))
        got, key, *_ = form(ids)
        assert torch.allclose(got, Net().eval()(ids)[0], atol=1e-5)
        assert key.shape[2] == max(2, length // 4)


def test_padding_leaves_first():
    program = exported(masked=True)
    new, report = apply(program, SHORT)
    assert report.rewritten == 2
    ids, mask = torch.randint(100, (3, 120)), torch.ones(3, 120, dtype=torch.long)
    mask[1, :70], mask[2, :110] = 0, 0
    answer, *whole = Net().eval()(ids, mask)
    for form in (new, reloaded(new)):
        got, *stored = form.module()(ids, mask)
        assert torch.allclose(got[mask.bool()], answer[mask.bool()], atol=1e-5)
        assert bool((kept_places(stored[0][1:2], whole[0][1:2]) >= 70).all())


@pytest.mark.slow(ci=True)
def test_a_program_that_was_decomposed_saved_and_loaded_is_rewritten():
    program = reloaded(exported().run_decompositions())
    new, report = apply(program, SHORT)
    assert report.rewritten == 2
    ids = torch.randint(100, (2, 200))
    answer, key, *_ = new.module()(ids)
    assert torch.allclose(answer, Net().eval()(ids)[0], atol=1e-5)
    assert key.shape[2] == 50


def test_a_program_of_one_length_is_rewritten():
    program = export(Attention(), (X,))
    new, report = apply(program, CONFIG)
    assert report.rewritten == 1
    graph = capture(Attention(), X, how="export")
    apply(graph, CONFIG)
    for left, right in zip(new.module()(X), graph(X), strict=True):
        assert torch.allclose(left, right, atol=1e-6)


def test_a_short_example_sets_no_window_for_longer_prompts():
    """A window of 8 tokens does not fit the 4 tokens of the example."""
    ids = torch.randint(100, (2, 4))
    program = export(Net().eval(), (ids,), dynamic_shapes=({0: B, 1: L},))
    new, _ = apply(program, SHORT)
    usual, _ = apply(exported(), SHORT)
    ids = torch.randint(100, (2, 100))
    assert torch.equal(new.module()(ids)[1], usual.module()(ids)[1])


def test_keys_that_come_in_and_a_buffer_that_is_changed():
    class Step(nn.Module):
        """Counts its calls, keeps the last keys in a buffer, and returns the keys it was given."""

        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))
            self.register_buffer("last", torch.zeros(1, G, S, D))

        def forward(self, query, key, value):
            self.calls.add_(1)
            self.last.copy_(key)
            answer = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )
            return answer, key, value

    tensors = tuple(torch.randn(1, heads, S, D) for heads in (H, G, G))
    for program in (export(Step(), tensors), export(Step(), tensors).run_decompositions()):
        new, report = apply(program, CONFIG)
        assert report.rewritten == 1
        kinds = [spec.kind for spec in new.graph_signature.output_specs]
        assert kinds == [spec.kind for spec in program.graph_signature.output_specs]
        module = new.module()
        for _ in range(2):
            answer, key, value = module(*tensors)
        assert key.shape == value.shape == (1, G, S // 2, D)
        whole = F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
        assert torch.allclose(answer, whole, atol=1e-6)
        assert float(module.calls) == 2
        assert torch.equal(module.last, tensors[1]), "the buffer keeps its length"


def test_rewriting_a_new_program_changes_nothing_more():
    new, _ = apply(exported(), SHORT)
    again, report = apply(new, SHORT)
    assert report.rewritten == 0
    assert str(again.graph) == str(new.graph)


def test_budget_one_returns_the_same_graph():
    program = exported()
    new, _ = apply(program, StarKVConfig(budget=1.0))
    assert isinstance(new, ExportedProgram)
    assert str(new.graph) == str(program.graph)


@pytest.mark.parametrize("given", [Net(), "net", None], ids=repr)
def test_anything_else_is_refused_with_what_to_pass(given):
    with pytest.raises(TypeError, match=f"apply got {type(given).__name__}: expected a torch.fx"):
        apply(given, SHORT)


def test_the_way_out_of_that_refusal():
    _, report = starkv_compile.passes.apply(export(Net(), (torch.randint(100, (2, 64)),)), SHORT)
    assert report.rewritten == 2


class Failing(Policy):
    """Fails at the second layer."""

    def score(self, inputs):
        if inputs.layer:
            raise ValueError("no score")
        return starkv_compile.policies.Scored(inputs.window_attention().mean(1), inputs.state)


@pytest.mark.parametrize("form", ["graph", "program"])
def test_a_policy_that_fails_changes_nothing(form):
    program = exported()
    given = program if form == "program" else program.module()
    before = str(given.graph)
    with pytest.raises(PolicyError, match="on layer 1: ValueError: no score"):
        apply(given, StarKVConfig(budget=0.25, policy=Failing()))
    assert str(given.graph) == before
    ids = torch.randint(100, (2, 64))
    got = program.module()(ids) if form == "program" else given(ids)
    assert torch.equal(got[1], Net().eval()(ids)[1])
