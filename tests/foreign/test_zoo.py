"""Models in the styles of code that nobody here wrote, compiled in every way.

Each pair is compressed and answers as the oracle does whose cache was cut by hand. Or it is left
uncompressed, to the bit, with a warning.
"""

import ast
import functools
import warnings

import pytest
import torch
from transformers import DynamicCache

from starkv_compile import UnsupportedModel
from tests.foreign.core import LAYERS, PROMPT, REPLY, Core, oracle, places_of
from tests.foreign.outcomes import OUTCOMES, REFUSED, UNCOMPRESSED, table
from tests.foreign.styles import STYLES
from tests.foreign.ways import WAYS, enter
from tests.support.crossing import slow
from tests.support.docs import DOCS, code_blocks, defined_by

KEPT = PROMPT.shape[1] * 3 // 10
PAIRS = [(style, way) for style, ways in OUTCOMES.items() for way in ways]
FAST = ("torch.compile(model)", "starkv_compile.compile(model)")
PARAMETERS = [
    (style, way)
    if style == "Cache of transformers" and way in FAST
    else slow(style, way, ci=style == "Cache of transformers" or way == "model.compile()")
    for style, way in PAIRS
]


def talked(name, way, budget):
    """The talk with a compiled model of the style, and the texts of starkv's warnings."""
    torch._dynamo.reset()
    style = STYLES[name]
    model = style.make()
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        talk = style.talk(enter(way, model, style, budget=budget, inner="eager"), model)
    return talk, [str(warning.message) for warning in caught if "starkv" in str(warning.message)]


@functools.cache
def uncompiled(name):
    model = STYLES[name].make()
    with torch.no_grad():
        return STYLES[name].talk(model, model)


def assert_same(talk, other):
    assert talk.tokens == other.tokens
    assert torch.equal(talk.logits, other.logits)
    for ours, theirs in zip(talk.stored, other.stored, strict=True):
        assert all(map(torch.equal, ours, theirs))


def assert_as_cut_by_hand(talk, model):
    if isinstance(model, Core):
        tokens, logits = oracle(model, PROMPT, places_of(model, PROMPT, talk.stored))
    else:
        tokens, logits = library_oracle(model, talk.stored)
    assert talk.tokens == tokens
    torch.testing.assert_close(talk.logits, logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def library_oracle(model, stored):
    """As `core.oracle`, for a model of the library that sits somewhere in `model`."""
    inside = [m for m in model.modules() if hasattr(m, "lm_head")]
    plain = inside[-1]
    torch._dynamo.reset()
    cache = DynamicCache(config=plain.config)
    logits = type(plain).forward(plain, input_ids=PROMPT, cache=cache).logits
    for layer, (key, _) in zip(cache.layers, stored, strict=True):
        distance = (key[0, 0][:, None] - layer.keys[0, 0][None]).abs().amax(-1)
        assert float(distance.amin(1).max()) < 1e-4, "a stored key is no key of the prompt"
        kept = distance.argmin(1)
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    tokens, every = [], []
    for place in range(PROMPT.shape[1], PROMPT.shape[1] + REPLY):
        every.append(logits[:, -1])
        tokens.append(int(logits[0, -1].argmax()))
        ids, places = torch.tensor([tokens[-1:]]), torch.tensor([[place]])
        logits = type(plain).forward(plain, input_ids=ids, cache=cache, position_ids=places).logits
    return tokens, torch.cat(every)


@pytest.mark.parametrize(("style", "way"), PARAMETERS)
def test_compressed_and_right_or_left_with_a_warning(style, way):
    expected = OUTCOMES[style][way]
    if expected == REFUSED:
        with pytest.raises(UnsupportedModel, match="holds no language model"):
            talked(style, way, 0.3)
        return
    whole, said = talked(style, way, 1.0)
    assert_same(whole, uncompiled(style))
    assert not said
    talk, said = talked(style, way, 0.3)
    if expected == UNCOMPRESSED:
        assert_same(talk, uncompiled(style))
        assert len(set(said)) == 1
    else:
        assert [key.shape[2] for key, _ in talk.stored] == [KEPT] * LAYERS
        assert not said
        assert_as_cut_by_hand(talk, STYLES[style].make())


@pytest.mark.slow(ci=True)
def test_the_page_shows_these_outcomes_and_its_model_is_compressed(capsys):
    page = "guides/own-models.md"
    assert table() in (DOCS / page).read_text()
    model, call = code_blocks(page)
    module = defined_by(model, "own_model")
    assert capsys.readouterr().out == "[20, 20] of 80\n"
    assert "shorten_outputs" in call
    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, **_arguments_of(call))(torch.ones(1))
    assert module.model.config.num_hidden_layers == 2


def _arguments_of(call):
    """The keyword arguments of `step = torch.compile(model, ...)`."""
    tree = ast.parse(call).body[0].value
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in tree.keywords}


def test_every_pair_has_its_outcome():
    for name, style in STYLES.items():
        ways = {way for way in WAYS if style.blocks or way != "each block.compile()"}
        assert OUTCOMES[name].keys() == ways
    assert OUTCOMES.keys() == STYLES.keys()
