"""Ways of calling an exported model: as the stock one answers, or refused by name."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import StaticCache

from starkv_compile import StarKVCache, StarKVError
from starkv_compile.export.capture.ports import Shapes
from starkv_compile.export.runner import _check_call, load_model
from starkv_compile.export.runtime import Runtime
from starkv_compile.testing import VIDEO_TOKEN, TinyPrompt, generate, tiny_inputs, tiny_model

FAMILY = "qwen2_vl"


@pytest.fixture
def stock(exported):
    assert exported.family == FAMILY
    return tiny_model(FAMILY, num_hidden_layers=exported.layers)


@pytest.fixture
def onnx(exported):
    return load_model(exported.folder)


TEXT = torch.arange(10, 30)[None]


def as_video(inputs):
    ids = inputs["input_ids"]
    return {
        "input_ids": torch.where(inputs["mm_token_type_ids"] > 0, VIDEO_TOKEN, ids),
        "attention_mask": inputs["attention_mask"],
        "mm_token_type_ids": inputs["mm_token_type_ids"] * 2,
        "pixel_values_videos": inputs["pixel_values"] * 9,
        "video_grid_thw": inputs["image_grid_thw"],
    }


def test_videos(stock, onnx):
    inputs = as_video(tiny_inputs(FAMILY, TinyPrompt(((4, 4),))))
    mine, theirs = (generate(model, inputs, tokens=1).logits[0] for model in (onnx, stock))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    del inputs["pixel_values_videos"], inputs["video_grid_thw"]
    with pytest.raises(StarKVError, match="video tokens, but no pixel_values_videos"):
        generate(onnx, inputs)


@pytest.mark.parametrize("cache", [None, DynamicCache, StarKVCache])
def test_a_prompt_of_one_token(stock, onnx, cache):
    inputs = {"input_ids": torch.tensor([[11]])}
    if cache is not None:
        inputs["past_key_values"] = cache(config=onnx.config)
    mine, theirs = generate(onnx, inputs), generate(stock, {"input_ids": inputs["input_ids"]})
    assert torch.equal(mine.sequences, theirs.sequences)
    assert isinstance(mine.past_key_values, StarKVCache)
    assert mine.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()


@pytest.mark.filterwarnings("ignore:starkv left this call uncompressed")
def test_a_prompt_with_drafts(stock, onnx):
    inputs = {"input_ids": TEXT.repeat(1, 3)}
    mine = generate(onnx, inputs, tokens=8, prompt_lookup_num_tokens=3)
    assert torch.equal(mine.sequences, generate(stock, inputs, tokens=8).sequences)


def test_images_with_drafts_are_refused(onnx):
    inputs = tiny_inputs(FAMILY, TinyPrompt(((2, 2),)))
    with (
        pytest.warns(UserWarning, match="drafted tokens"),
        pytest.raises(StarKVError, match="leave out assistant_model"),
    ):
        onnx(**inputs, logits_to_keep=3)


def test_direct_calls_count_positions_as_the_model_does(stock, onnx):
    for inputs in (
        tiny_inputs(FAMILY),
        tiny_inputs(FAMILY, TinyPrompt(((4, 4),), text=9), TinyPrompt(((3, 4), (5, 5)), text=30)),
        as_video(tiny_inputs(FAMILY, TinyPrompt(((4, 4),)))),
    ):
        stock.model.rope_deltas = None
        with torch.no_grad():
            theirs = stock(**inputs, logits_to_keep=1).logits
        mine = onnx(**inputs, logits_to_keep=1)
        torch.testing.assert_close(mine.logits, theirs, atol=1e-4, rtol=1e-4)
        with pytest.raises(StarKVError, match="position_ids are missing"):
            onnx(input_ids=inputs["input_ids"][:, -1:], past_key_values=mine.past_key_values)
    del inputs["mm_token_type_ids"]
    with pytest.raises(StarKVError, match="position_ids are missing"):
        onnx(**inputs, logits_to_keep=1)


def test_arguments_by_place(stock, onnx):
    with torch.no_grad():
        theirs = stock(TEXT).logits[:, -1:]
    mine = onnx(TEXT, torch.ones_like(TEXT), logits_to_keep=1).logits
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 9, 64)}, "pass input_ids"),
        ({"inputs_embeds": torch.zeros(1, 20, 64)}, "leave them out"),
        ({"use_cache": False}, "use_cache=False"),
        ({"labels": TEXT}, "labels"),
        ({"output_hidden_states": True}, "output_hidden_states=True: .* pass output_hidden_states"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"position_ids": torch.arange(20)[None] % 10}, "as rows of a batch"),
        ({"attention_mask": torch.ones(1, 1, 20, 20)}, r"shape \[1, 1, 20, 20\]: pass one of"),
        ({"attention_mask": torch.ones(1, 19)}, r"\[1, 19\]: 1 rows .* need \[1, 20\]"),
        ({"logits_to_keep": 0}, "pass logits_to_keep=1"),
        ({"logits_to_keep": torch.tensor([3])}, "pass logits_to_keep=1"),
    ],
)
def test_what_the_graphs_cannot_do(onnx, arguments, said):
    with pytest.raises(StarKVError, match=said):
        onnx(**{"input_ids": TEXT, "logits_to_keep": 1, **arguments})


def test_types_of_tokens_that_the_model_reads_and_its_graphs_do_not():
    class Model(torch.nn.Module):
        config = None

        def forward(self, input_ids, token_type_ids=None):
            pass

    with pytest.raises(StarKVError, match=r"token_type_ids: the graphs.*leave them out"):
        _check_call(Model().eval(), {"input_ids": TEXT, "token_type_ids": TEXT * 0})


def test_settings_that_ask_for_more(onnx):
    onnx.config.output_hidden_states = True
    with pytest.raises(StarKVError, match="output_hidden_states=True"):
        onnx(TEXT, logits_to_keep=1)
    assert onnx(TEXT, logits_to_keep=1, output_hidden_states=False).hidden_states is None


def test_training_mode(onnx):
    with pytest.raises(StarKVError, match=r"call model\.eval"):
        onnx.train()(TEXT, logits_to_keep=1)


def test_a_tuple_instead_of_a_dictionary(onnx):
    logits, cache = onnx(TEXT, logits_to_keep=1, return_dict=False)
    assert torch.equal(logits, onnx(TEXT, logits_to_keep=1).logits)
    assert cache.get_seq_length() == TEXT.shape[1]


def test_images_for_a_model_of_text_alone():
    runtime = object.__new__(Runtime)
    runtime.shapes = Shapes(layers=(), hidden=4, vocabulary=9, dtype=torch.float32)
    assert runtime._features(None, TEXT, {}) == {}
    with pytest.raises(StarKVError, match="pixel_values: the model was exported as a text model"):
        runtime._features(None, TEXT, {"pixel_values": torch.zeros(4, 96)})


def test_caches_of_other_kinds(onnx):
    full = DynamicCache()
    full.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    static = StaticCache(onnx.config.get_text_config(), max_cache_len=64)
    for cache in (full, static):
        with pytest.raises(StarKVError, match=r"is a \w+Cache: pass a StarKVCache"):
            onnx(TEXT, past_key_values=cache, logits_to_keep=1)
