"""What users do to a compiled model besides calling it: hooks, copies, patches, wrappers, undo."""

import copy
import pickle
import types
import warnings

import pytest
import torch
from torch import nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

import starkv_compile
from starkv_compile import StarKVCache, UnsupportedModel
from starkv_compile.hf.language_models import find_decoder, language_models
from tests.foreign.core import LAYERS, PROMPT, filled
from tests.foreign.styles import LLAMA, STYLES, LibraryCache, OwnGenerateWithCache
from tests.support.crossing import slow

CONFIG = PreTrainedConfig(num_hidden_layers=LAYERS)
WHOLE = PROMPT.shape[1]
SHORT, HALF = WHOLE * 3 // 10, WHOLE // 2


def compiled(model, budget=0.3, **options):
    return starkv_compile.compile(model, budget=budget, inner="eager", **options)


def llama():
    return filled(LlamaForCausalLM(LlamaConfig(**LLAMA)))


def own(kind=OwnGenerateWithCache):
    return filled(kind(CONFIG))


def stored(call, *args, **kwargs):
    """Tokens that the first layer stores of a prompt, without a warning of starkv."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        output = call(*args, **kwargs)
    assert not [str(w.message) for w in caught if "starkv" in str(w.message)]
    if hasattr(output, "stored"):  # of a generate
        return output.stored[0][0].shape[2]
    return cache_of(output).layers[0].keys.shape[2]


def cache_of(output):
    return output.past_key_values if "past_key_values" in output else output.cache


def hooked(model):
    """Puts a function around `forward`, as accelerate does. Returns the one before."""
    before = model.forward
    model.forward = lambda *args, **kwargs: before(*args, **kwargs)
    return before


def test_a_hook_put_on_before_compiling():
    model = own()
    hooked(model)
    hook = model.forward
    assert stored(compiled(model).generate) == SHORT
    assert stored(model, PROMPT) == SHORT
    starkv_compile.undo(model)
    assert model.forward is hook
    assert stored(model.generate) == WHOLE


@pytest.mark.slow(ci=True)
def test_a_hook_put_on_a_compiled_model_and_a_second_configuration():
    model = compiled(own())
    before = hooked(model)
    assert stored(model.generate) == SHORT
    compiled(model, 0.5)
    assert stored(model.generate) == HALF
    assert starkv_compile.report(model).graphs
    starkv_compile.undo(model)
    assert stored(model.generate) == WHOLE
    model.forward = before  # as accelerate takes its hook off
    compiled(model, 0.5)
    assert stored(model.generate) == HALF


@pytest.mark.parametrize("backend", ["eager", "starkv"])
def test_forward_inside_a_function_that_is_compiled_otherwise(backend):
    model = compiled(own())
    assert stored(torch.compile(lambda ids: model.forward(ids), backend=backend), PROMPT) == SHORT
    starkv_compile.undo(model)
    plain = torch.compile(lambda ids: model.forward(ids), backend="eager", fullgraph=True)
    assert stored(plain, PROMPT) == WHOLE


@pytest.mark.slow(ci=True)
def test_models_that_share_a_decoder_are_not_both_compiled():
    class Around(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def forward(self, ids):
            return self.inside(ids)

    first, second = Around(shared := own()), Around(shared)
    compiled(first)
    with pytest.warns(UserWarning, match=r"Around is no longer compiled.*give each its own copy"):
        compiled(second, 0.5)
    assert stored(second, PROMPT) == HALF
    third = Around(copy.deepcopy(shared))
    assert stored(compiled(third), PROMPT) == SHORT
    assert stored(second, PROMPT) == HALF


def test_a_pickled_model_is_not_compiled_and_can_be():
    twin = pickle.loads(pickle.dumps(compiled(llama())))
    assert stored(twin, PROMPT) == WHOLE
    assert stored(compiled(twin).forward, PROMPT) == SHORT


@pytest.mark.parametrize("called", [slow(False), slow(True, ci=True)])
def test_a_copy_that_is_compiled_itself(called):
    model = compiled(own())
    twin = copy.deepcopy(model)
    if called:
        with pytest.warns(UserWarning, match="copy of a compiled model"):
            twin(PROMPT)
    compiled(twin, 0.5)
    assert stored(twin, PROMPT) == stored(twin.generate) == HALF
    assert stored(model, PROMPT) == stored(model.generate) == SHORT


@pytest.mark.slow(ci=True)
def test_a_class_that_is_patched_afterwards():
    class Patched(LibraryCache):
        pass

    model = compiled(own(Patched))
    plain = Patched.forward
    expected = model(PROMPT).logits
    Patched.forward = lambda self, *args, **kwargs: plain(self, *args, **kwargs)["logits"]
    with torch.no_grad():
        assert torch.equal(model(PROMPT), expected)
        assert torch.equal(model.forward(PROMPT), expected)


@pytest.mark.slow(ci=True)
def test_a_wrapper_of_torch_compile_after_undo():
    model = llama()
    wrapper = torch.compile(model, backend="starkv", options={"budget": 0.3, "inner": "eager"})
    assert stored(wrapper, PROMPT) == SHORT
    starkv_compile.undo(model)
    assert stored(wrapper, PROMPT) == WHOLE
    compiled(model, 0.5)
    assert stored(wrapper, PROMPT) == HALF


def test_undo_of_a_module_that_holds_several_compiled_ones():
    holder = nn.ModuleList([compiled(llama()), compiled(llama())])
    assert starkv_compile.undo(holder)
    assert [stored(model, PROMPT) for model in holder] == [WHOLE, WHOLE]


def test_other_compilations_inside_are_kept():
    """Only what starkv takes over is set aside, and only for the block."""
    model, calls = STYLES["nested model of transformers"].make(), []

    def backend(module, inputs):
        calls.append(module)
        return module.forward

    class Tower(nn.Module):
        def forward(self, x):
            return x.sin()

    model.tower = Tower()
    model.tower.compile(backend=backend)
    with starkv_compile.compiled(model, budget=0.3, inner="eager"):
        model.tower(torch.ones(1, 4))
    assert calls


def test_a_method_of_ones_own_and_a_helper_of_the_library():
    model, options = llama(), {"budget": 0.3, "inner": "eager"}
    model.talk = types.MethodType(lambda self, ids: self(ids), model)
    assert stored(torch.compile(model.talk, backend="starkv", options=options), PROMPT) == SHORT
    starkv_compile.undo(model)
    helper = torch.compile(model.get_input_embeddings, backend="starkv", options=options)
    assert helper() is model.get_input_embeddings()
    assert not starkv_compile.undo(model), "it does not run the model"


def test_a_cache_class_of_ones_own_is_not_handed_over():
    class KVCache:
        pass

    class Own(LibraryCache):
        def forward(self, input_ids, cache: KVCache | None = None):
            assert cache is None
            return super().forward(input_ids)

    with pytest.warns(UserWarning, match="does not say that its cache is a Cache of transformers"):
        compiled(own(Own))(PROMPT)


def test_a_model_without_a_configuration():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = own(LibraryCache)
            self.inner.get_decoder = None

        def get_decoder(self):
            return self

        def forward(self, ids, past_key_values: Cache | None = None):
            return self.inner.forward(ids, past_key_values)

    model = compiled(Bare().eval())
    with pytest.warns(UserWarning, match=r"StarKVCache\(PreTrainedConfig\(num_hidden_layers=...\)"):
        model(PROMPT)
    assert stored(model, PROMPT, past_key_values=StarKVCache(CONFIG)) == SHORT


def test_a_dictionary_under_the_other_name():
    class Two(LibraryCache):
        def forward(self, input_ids, past_key_values: Cache | None = None, cache=None):
            assert cache == {"of": "features"}
            return super().forward(input_ids, past_key_values)

    assert stored(compiled(own(Two)), PROMPT, cache={"of": "features"}) == SHORT


def test_modules_that_cannot_be_asked():
    class Raises(nn.Module):
        def get_decoder(self):
            raise NotImplementedError

        def forward(self, x, past_key_values: Cache | None = None):
            return x

    class Circle(Raises):
        def get_decoder(self):
            return self.other

    with pytest.raises(UnsupportedModel, match="holds no language model"):
        compiled(Raises())
    one, two = Circle(), Circle()
    one.__dict__["other"], two.__dict__["other"] = two, one
    assert find_decoder(one) in (one, two)
    model = llama()
    model.extra = torch.jit.script(nn.Linear(2, 2))
    assert len(language_models(model)) == 1


def test_a_cache_of_its_own_inside_a_call_that_is_refused():
    class Outer(LibraryCache):
        def __init__(self, config):
            super().__init__(config)
            self.inside = own(LibraryCache)
            self.second = StarKVCache(config)

        def forward(self, input_ids, past_key_values: Cache | None = None, use_cache=True):
            self.inside(input_ids, past_key_values=self.second)
            return super().forward(input_ids, past_key_values)

        def get_decoder(self):
            return self.inside

    model = compiled(own(Outer))
    with pytest.warns(UserWarning, match="use_cache=False"):
        model(PROMPT, use_cache=False)
    assert model.second.shared.layout is not None, "its call was prepared"
    assert [layer.stored for layer in model.second.layers] == [SHORT] * LAYERS


class Masked(LibraryCache):
    """Takes a mask and does not read it."""

    def forward(self, input_ids, past_key_values: Cache | None = None, attention_mask=None):
        return super().forward(input_ids, past_key_values)


def test_a_square_mask_is_no_padding():
    square = torch.ones(WHOLE, WHOLE, dtype=torch.bool).tril()
    assert stored(compiled(own(Masked)), PROMPT, attention_mask=square) == SHORT


def test_tokens_of_one_dimension():
    class Flat(LibraryCache):
        def forward(self, input_ids, past_key_values: Cache | None = None):
            return super().forward(input_ids[None], past_key_values)

    assert stored(compiled(own(Flat)), PROMPT[0]) == SHORT


@pytest.mark.slow(ci=True)
def test_layers_of_several_lengths_need_an_attention_mask():
    with pytest.warns(UserWarning, match="takes no attention_mask .* one budget for every layer"):
        compiled(own(LibraryCache), policy="pyramidkv")(PROMPT)
    model = compiled(llama(), policy="pyramidkv")
    with torch.no_grad():
        cache = cache_of(model(PROMPT, torch.ones_like(PROMPT)))
        by_place = model(PROMPT[:, :1], torch.ones(1, WHOLE + 1), None, cache)
    assert cache_of(by_place).get_seq_length() == WHOLE + 1


def test_outputs_that_cannot_be_shortened_are_said():
    model = STYLES["static buffers"].make()
    options = {"budget": 0.3, "inner": "eager", "shorten_outputs": True}
    model.compile(backend="starkv", fullgraph=True, options=options)
    with pytest.warns(UserWarning, match="in a buffer of a fixed size"), torch.no_grad():
        model(PROMPT, torch.arange(WHOLE))


@pytest.mark.slow(ci=True)
def test_a_mask_that_another_module_makes_of_the_tokens_seen():
    model = own(Masked)
    compiled(model)
    mask = torch.ones(1, 1, WHOLE, WHOLE, dtype=torch.bool).tril()
    assert stored(model, PROMPT, attention_mask=mask, past_key_values=StarKVCache(CONFIG)) == SHORT
    assert stored(model, PROMPT, past_key_values=DynamicCache()) == SHORT
