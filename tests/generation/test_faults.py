"""Bad inputs and faults in the middle: an error by name or a right result, and the next call right.

What a layer does with values that are not finite, budgets and lengths at the edge: `test_config`,
`test_models` and `kernels/test_selection`.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch

import starkv_compile
from starkv_compile import CacheError, NonFiniteScores, StarKVCache
from starkv_compile.frontend.call import Attachment
from starkv_compile.testing import TinyPrompt, generate, tiny_inputs, tiny_model
from tests.support.crossing import first_in_ci, slow
from tests.support.planted import planted_fault

FAMILY = "llava"


@pytest.fixture(name="model")
def _model():
    return starkv_compile.compile(tiny_model(FAMILY), budget=0.3, inner="eager")


def assert_same(left, right):
    assert torch.equal(left.sequences, right.sequences)
    for a, b in zip(left.past_key_values.layers, right.past_key_values.layers, strict=True):
        assert torch.equal(a.kept, b.kept)
        assert torch.equal(a.keys, b.keys)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ([0] * 42, r"hides all tokens of rows \[1\]"),
        slow([1] * 10 + [0] * 5 + [1] * 27, "zeros after ones", ci=True),
        slow([0] * 3 + [1] * 10 + [0] * 5 + [1] * 24, "zeros after ones", ci=True),
    ],
    ids=["all padding", "between tokens", "on the left and between"],
)
def test_padding_that_no_cache_could_account_for_is_refused(model, row, match):
    inputs = tiny_inputs(FAMILY, TinyPrompt((), 40), TinyPrompt((), 40, seed=1))
    expected = generate(model, inputs)
    inputs["attention_mask"][1] = torch.tensor(row)
    with pytest.raises(CacheError, match=match):
        generate(model, inputs)
    inputs["attention_mask"][1] = 1
    assert_same(generate(model, inputs), expected)


@pytest.mark.parametrize("value", first_in_ci([torch.nan, torch.inf]))
def test_a_key_that_is_not_finite_is_kept_and_harms_no_other_row(value):
    """The model's answer is lost in that row, as without starkv; the count and order are not."""
    model = tiny_model(FAMILY)
    inputs = tiny_inputs(FAMILY, TinyPrompt((), 40), TinyPrompt((), 40, seed=1))
    starkv_compile.compile(model, budget=0.3, inner="eager")
    expected = generate(model, inputs)

    def spoil(module, args, output):
        if output.shape[1] > 20:
            output = output.clone()
            output[0, 17, :8] = value  # one head's
        return output

    hook = model.get_decoder().layers[0].self_attn.k_proj.register_forward_hook(spoil)
    torch._dynamo.reset()
    out = generate(model, inputs)
    hook.remove()
    for ours, theirs in zip(
        out.past_key_values.layers, expected.past_key_values.layers, strict=True
    ):
        assert ours.kept.shape == theirs.kept.shape
        assert (ours.kept[:, 1:] > ours.kept[:, :-1]).all()
        assert ours.kept.min() >= 0
        assert ours.kept.max() < 42 + 4
        assert torch.equal(ours.kept[1], theirs.kept[1])
        assert torch.equal(ours.keys[1], theirs.keys[1])
    assert torch.equal(out.sequences[1], expected.sequences[1])


def test_in_debug_mode_it_is_an_error_that_names_the_layer():
    model = tiny_model(FAMILY)
    model.get_decoder().layers[1].self_attn.k_proj.weight.data[3] = torch.nan
    starkv_compile.compile(model, budget=0.3, inner="eager", debug=True)
    with pytest.raises(NonFiniteScores, match="1"):
        generate(model, tiny_inputs(FAMILY))


@pytest.mark.parametrize(
    "mode", ["no_grad", *(slow(mode, ci=True) for mode in ("inference_mode", "autocast"))]
)
def test_under_torchs_modes(model, mode):
    inputs = tiny_inputs(FAMILY, TinyPrompt((), 40))
    plain = tiny_model(FAMILY)
    context = {
        "inference_mode": torch.inference_mode,
        "no_grad": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }[mode]
    with context():
        first = generate(plain, inputs, tokens=1)
        out = generate(model, inputs)
    assert torch.equal(out.logits[0], first.logits[0])
    for layer, full in zip(out.past_key_values.layers, first.past_key_values.layers, strict=True):
        assert layer.stored < layer.seen
        assert layer.keys.dtype == full.keys.dtype
        kept = layer.kept.shape[1]
        assert torch.equal(layer.keys[0][:, :kept], full.keys[0][:, layer.kept[0]])


@pytest.mark.parametrize("fault", [RuntimeError, slow(KeyboardInterrupt, ci=True)])
@pytest.mark.parametrize("call", [1, 3], ids=["in the prompt", "while decoding"])
def test_after_a_fault_in_the_middle_the_next_call_is_right(model, fault, call):
    inputs = tiny_inputs(FAMILY, TinyPrompt((), 40))
    expected = generate(model, inputs)
    settings = torch._dynamo.config.recompile_limit
    with planted_fault(model.lm_head, fault, call):
        generate(model, inputs)
    assert torch._dynamo.config.recompile_limit == settings
    assert_same(generate(model, inputs), expected)
    assert torch._dynamo.config.recompile_limit == settings


@pytest.mark.slow
def test_dynamo_may_forget_everything_in_the_middle_of_a_session(model):
    def session(forget):
        cache, ids = StarKVCache(model.config), tiny_inputs(FAMILY, TinyPrompt((), 40))["input_ids"]
        for turn in range(2):
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            out = generate(model, inputs, past_key_values=cache)
            ids = torch.cat([out.sequences, torch.arange(20 + turn, 32)[None]], dim=1)
            forget()
        return out

    assert_same(session(torch._dynamo.reset), session(lambda: None))


def test_a_copy_of_a_compiled_model_is_the_model_itself(model):
    """Not compiled: its cache is whole till it is compiled, and the original stays as it was."""
    inputs = tiny_inputs(FAMILY, TinyPrompt((), 40))
    expected = generate(tiny_model(FAMILY), inputs)
    ours = generate(model, inputs)
    twin = copy.deepcopy(model)
    out = generate(twin, inputs)
    assert torch.equal(out.sequences, expected.sequences)
    assert not isinstance(out.past_key_values, StarKVCache)
    assert_same(generate(starkv_compile.compile(twin, budget=0.3, inner="eager"), inputs), ours)
    assert_same(generate(model, inputs), ours)


def test_a_compiled_model_is_pickled_as_the_model_it_is(model):
    inputs = tiny_inputs(FAMILY, TinyPrompt((), 40))
    expected = generate(tiny_model(FAMILY), inputs)
    loaded = pickle.loads(pickle.dumps(model))
    out = generate(loaded, inputs)
    assert torch.equal(out.sequences, expected.sequences)
    assert not starkv_compile.undo(loaded)


@pytest.mark.parametrize("way", first_in_ci(["starkv_compile.compile", "model.compile"]))
def test_a_model_that_nobody_holds_is_gone(way):
    model = tiny_model(FAMILY)
    if way == "model.compile":
        model.compile(backend="starkv", options={"budget": 0.3, "inner": "eager"})
    else:
        starkv_compile.compile(model, budget=0.3, inner="eager")
    ours = weakref.ref(model)
    del model
    gc.collect()
    assert ours() is None


@pytest.mark.slow
def test_a_cache_is_pickled_with_its_session(model):
    inputs = tiny_inputs(FAMILY)
    out = generate(model, inputs, tokens=2)
    ids = torch.cat([out.sequences, torch.arange(20, 32)[None]], dim=1)
    again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    cache = pickle.loads(pickle.dumps(out.past_key_values))
    straight = generate(model, again, past_key_values=out.past_key_values)
    assert_same(generate(model, again, past_key_values=cache), straight)


@pytest.mark.parametrize("inner", ["eager", slow("aot_eager")])
def test_a_call_that_records_gradients(inner):
    """The answer is as differentiable as without starkv, and the cache is compressed."""
    inputs, gradients, out = tiny_inputs(FAMILY, TinyPrompt((), 40)), [], None
    for compiled in (False, True):
        model = tiny_model(FAMILY)
        if compiled:
            starkv_compile.compile(model, budget=0.3, inner=inner)
        out = model(**inputs)
        out.logits.square().mean().backward()
        gradients.append(model.get_output_embeddings().weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert [layer.stored for layer in out.past_key_values.layers] == [12, 12]
    assert not out.past_key_values.layers[0].keys.requires_grad


@pytest.mark.parametrize("case", ["training", "use_cache"])
def test_what_is_left_uncompressed_is_so_in_a_cache_of_ours_too(model, case):
    cache, inputs = StarKVCache(model.config), tiny_inputs(FAMILY)
    length = inputs["input_ids"].shape[1]
    more = {"use_cache": False} if case == "use_cache" else {}
    model.train(case == "training")
    with torch.no_grad(), pytest.warns(UserWarning, match="left this call uncompressed"):
        model(**inputs, past_key_values=cache, **more)
    assert {layer.stored for layer in cache.compressed_layers} <= {0, length}
    assert cache.shared.layout.frame.max() == 1, "where its images are, is known all the same"


@pytest.mark.slow(ci=True)
def test_a_model_that_is_its_own_decoder_is_gone_when_nobody_holds_it():
    model = tiny_model(FAMILY).get_decoder()
    starkv_compile.compile(model, budget=0.3, inner="eager")
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None


@pytest.mark.slow(ci=True)
def test_buffers_made_in_inference_mode_are_written_outside():
    model = tiny_model(FAMILY)
    starkv_compile.compile(model, budget=0.3, inner="eager", decode_tokens=8)
    cache, inputs = StarKVCache(model.config), tiny_inputs(FAMILY, TinyPrompt((), 40))
    with torch.inference_mode():
        first = generate(model, inputs, past_key_values=cache).sequences
    longer = torch.nn.functional.pad(first, (0, 20), value=7)
    again = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    assert generate(model, again, past_key_values=cache).sequences.shape[1] > longer.shape[1]


@pytest.mark.slow
def test_models_of_one_class_do_not_use_up_each_others_recompilations(monkeypatch):
    """Dynamo counts the graphs of a function together, whatever model and policy they are of."""
    monkeypatch.setattr("starkv_compile.frontend.call.GRAPHS", 3)
    monkeypatch.setattr(Attachment, "made", 0)
    torch._dynamo.reset()
    for policy in ("snapkv", "tova", "starkv", "random"):
        model = tiny_model(FAMILY)
        starkv_compile.compile(model, policy=policy, budget=0.3, inner="eager")
        with torch._dynamo.config.patch(recompile_limit=3):
            generate(model, tiny_inputs(FAMILY, TinyPrompt((), 40)))
        assert starkv_compile.report(model).refusals == []
        assert all(layer.stored < layer.seen for layer in starkv_compile.report(model).layers)


@pytest.mark.slow
def test_a_prompt_past_dynamos_limit_is_left_whole_with_the_way_out(monkeypatch):
    monkeypatch.setattr("starkv_compile.frontend.call.GRAPHS", 1)
    torch._dynamo.reset()
    inputs, policies = tiny_inputs(FAMILY, TinyPrompt((), 40)), ("tova", "snapkv")
    expected = generate(tiny_model(FAMILY), inputs)

    def compiled(policy):
        monkeypatch.setattr(Attachment, "made", 0)
        return starkv_compile.compile(tiny_model(FAMILY), policy=policy, inner="eager")

    with torch._dynamo.config.patch(recompile_limit=1):
        generate(compiled(policies[0]), inputs)
        model = compiled(policies[1])
        with pytest.warns(UserWarning, match=r"limit of recompilations .*torch._dynamo.reset\(\)"):
            out = generate(model, inputs)
        assert torch.equal(out.sequences, expected.sequences)
        torch._dynamo.reset()
        generate(model, inputs)
    layers = starkv_compile.report(model).layers
    assert all(layer.stored < layer.seen for layer in layers)
