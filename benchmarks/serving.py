"""Measures the plugin inside vLLM for CPUs (`make serving` makes the environment).

    .venv-serving/bin/python -m benchmarks.serving answers
    .venv-serving/bin/python -m benchmarks.serving pool
    .venv-serving/bin/python -m benchmarks.serving stops

`answers` asks the demo agent questions about four screenshots, through vLLM and through the
compiled model at the same numbers of kept tokens. `pool` counts what fits into few blocks. `stops`
also compacts prompts while they are read (`prefill_chunk_size`): what that costs in answers, and
how many blocks prompts need. Results are in docs/results/serving.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from starkv_lab.quality.markdown import table

from benchmarks.engines import BLOCK, conversations, engine, pictures, prompts, write_checkpoint
from starkv_compile.serving.rule import Rule

REPLY = 12


def answers(folder: Path, count: int, policies: list[str]) -> None:
    """Right answers and replies, through vLLM and through the compiled model."""
    made, questions = prompts(count)
    budgets = (1.0, 0.5, 0.2)
    rows = []
    for policy in policies:
        with engine(folder, {"budget": 0.2, "policy": policy}) as served:
            replies, told = {}, []
            for budget in budgets:
                found = served.ask(made, budget, tokens=REPLY, ignore_eos=False)
                replies[budget] = [one.outputs[0].text for one in found]
                told = [list(one.prompt_token_ids) for one in found]
        for budget in budgets:
            theirs = compiled_replies(told, count, policy, budget)
            right = [
                sum(
                    question.is_right(reply)
                    for question, reply in zip(questions, said, strict=True)
                )
                for said in (replies[budget], theirs)
            ]
            same = sum(a.split() == b.split() for a, b in zip(replies[budget], theirs, strict=True))
            rows.append(
                [policy, f"{budget:.0%}", f"{right[0]} of {count}", str(right[1]), str(same)]
            )
    print(table(["policy", "budget", "right: vLLM", "compiled model", "same replies"], rows))


def compiled_replies(
    told: Sequence[Sequence[int]], count: int, policy: str, budget: float
) -> list[str]:
    """Replies of the compiled model that keeps as many tokens of each prompt as vLLM does."""
    import torch
    from starkv_lab.agent.checkpoints import load_agent

    import starkv_compile

    model, processor = load_agent()
    rule = Rule.of({"budget": budget, "policy": policy})
    by_kept = defaultdict(list)
    for number, ids in enumerate(told):
        by_kept[len(ids) - rule.skip(len(ids), BLOCK)].append(number)
    replies = [""] * count
    asked = [messages for messages, _ in conversations(count)]
    for kept, numbers in by_kept.items():
        if budget < 1:
            starkv_compile.compile(model, budget_tokens=kept, policy=policy, inner="eager")
        for number in numbers:
            text = processor.apply_chat_template(
                asked[number], tokenize=False, add_generation_prompt=True
            )
            inputs = processor(text=[text], images=pictures(asked[number]), return_tensors="pt")
            assert inputs["input_ids"][0].tolist() == list(told[number]), "the same prompt"
            with torch.no_grad():
                found = model.generate(**inputs, max_new_tokens=REPLY, do_sample=False)
            said = found[0, len(told[number]) :]
            replies[number] = processor.tokenizer.decode(said, skip_special_tokens=True)
        starkv_compile.undo(model)
    return replies


def pool(folder: Path, count: int) -> None:
    """Requests that run at once, steps and preemptions in a pool of few blocks."""
    made, _ = prompts(count)
    rows = []
    for blocks in (50, 100):
        for caching in (False, True):
            options = {"num_gpu_blocks_override": blocks, "enable_prefix_caching": caching}
            # Room for all features: see docs/guides/vllm.md on a fault of vLLM 0.32.
            options |= {"max_num_batched_tokens": 8192, "max_num_seqs": 64}
            for title, budget, chunk in (
                ("100%", 1.0, None),
                ("20%", 0.2, None),
                ("20%, each 192 tokens", 0.2, 192),
                ("20%, each 96 tokens", 0.2, 96),
            ):
                starkv = {"budget": 0.2} | ({} if chunk is None else {"prefill_chunk_size": chunk})
                with engine(folder, starkv, **options) as served:
                    served.tokens(made, budget, tokens=40)
                    counted = Counter(served.running)
                    usual = counted.most_common(1)[0][0]
                    cells = (
                        blocks,
                        "yes" if caching else "no",
                        title,
                        max(served.running),
                        usual,
                        len(served.running),
                        served.preempted,
                        max(served.used),
                    )
                    rows.append([*map(str, cells)])
    head = ["blocks", "prefix caching", "budget", "most running at once", "usually", "steps"]
    print(table([*head, "preemptions", "most blocks in use"], rows))


def stops(folder: Path, count: int, chunks: list[int | None]) -> None:
    """Right answers, and blocks of prompts, if prompts are compacted each `chunk` tokens."""
    made, questions = prompts(count)
    rows = []
    for chunk in chunks:
        few = {"num_gpu_blocks_override": 50, "max_num_seqs": 64}
        few |= {"max_num_batched_tokens": 8192, "long_prefill_token_threshold": 64}
        starkv = {"budget": 0.2} if chunk is None else {"budget": 0.2, "prefill_chunk_size": chunk}
        rule = Rule.of(starkv)
        for budget in (0.2, 0.1):
            with engine(folder, starkv) as served:
                found = served.ask(made, budget, tokens=REPLY, ignore_eos=False)
            right = sum(
                question.is_right(one.outputs[0].text)
                for question, one in zip(questions, found, strict=True)
            )
            lengths = [len(one.prompt_token_ids) for one in found]
            share = Fraction(str(budget))
            blocks = [rule.most_blocks(n, n, BLOCK, share, 0) for n in lengths]
            with engine(folder, starkv, **few) as served:
                served.tokens(made[:24], budget, tokens=40)
                cells = (
                    "the end only" if chunk is None else f"each {chunk} tokens, the end",
                    f"{budget:.0%}",
                    f"{right} of {count}",
                    f"{sum(blocks) / count:.1f}",
                    max(blocks),
                    f"{sum(served.running) / len(served.running):.1f}",
                    len(served.running),
                    served.preempted,
                )
            rows.append([*map(str, cells)])
            print(table(STOPS, rows), flush=True)


STOPS = [
    *("compacted at", "budget", "right", "blocks of a prompt, mean", "most"),
    *("running at once in 50 blocks, mean", "steps", "preemptions"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("answers", "pool", "stops"))
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--policies", default="screen_novelty,snapkv_mean")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name) / "agent")
        if args.what == "answers":
            answers(folder, args.prompts, args.policies.split(","))
        elif args.what == "stops":
            stops(folder, args.prompts, [None, 192, 128, 96, 64])
        else:
            pool(folder, min(args.prompts, 12))


if __name__ == "__main__":
    main()
