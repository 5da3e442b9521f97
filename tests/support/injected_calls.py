"""A small suite to inject starkv into: run as a program by `test_hf_suite.py`.

It imports `transformers.testing_utils` as transformers' own tests do, calls `generate` in the ways
that they do, and saves what came out. It knows nothing of starkv.
"""

import sys

import torch
import transformers.testing_utils  # imports what TRANSFORMERS_TEST_BACKEND names
from transformers import T5Config, T5ForConditionalGeneration

from starkv_compile.testing import TinyPrompt, tiny_inputs, tiny_model


def call(model, inputs, **options):
    torch.manual_seed(7)
    return model.generate(
        **inputs,
        **{"max_new_tokens": 5, "do_sample": False, **options},
        return_dict_in_generate=True,
        output_logits=True,
    )


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "static cache": {"cache_implementation": "static"},
}


def outputs(prepare=lambda model: None):
    """Name and output of every call; `prepare` gets each model first."""
    model = tiny_model("qwen2_5_vl")
    prepare(model)
    yield "images", call(model, tiny_inputs("qwen2_5_vl"))
    model = tiny_model("llava")
    prepare(model)
    prompt = tiny_inputs("llava", TinyPrompt((), 40))
    prompt["input_ids"][:, 21:] = prompt["input_ids"][:, :21]  # something to look up
    for name, options in MODES.items():
        yield name, call(model, prompt, **options)
    batch = tiny_inputs("llava", TinyPrompt(), TinyPrompt(((4, 4),), 12, seed=3))
    yield "left-padded batch", call(model, batch)
    first = call(model, prompt)
    ids = torch.cat([first.sequences, first.sequences[:, :9]], dim=1)
    again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    yield "second turn", call(model, again, past_key_values=first.past_key_values)


def cannot_be_wrapped():
    """Calls that an injection has to leave alone."""
    config = T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).eval().generate(torch.arange(3, 9)[None], max_new_tokens=2)
    model = tiny_model("llava")
    model.compile(backend="eager")
    call(model, tiny_inputs("llava"))


if __name__ == "__main__":
    assert transformers.testing_utils.torch_device
    saved = {
        name: {
            "sequences": out.sequences,
            "logits": out.logits,
            "cache": type(out.past_key_values).__name__,
        }
        for name, out in outputs()
    }
    cannot_be_wrapped()
    torch.save(saved, sys.argv[1])
