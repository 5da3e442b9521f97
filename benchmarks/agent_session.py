"""Runs a trajectory of an agent in four ways: `python -m benchmarks.agent_session`.

Agents today rebuild the prompt at each step from the last screenshots, and prefill all of them
again. A session keeps one cache, and prefills one screenshot and one line of text. Both see the
same screens and get the same questions. All questions ask about the last `--history` screenshots,
because the rebuilt prompt holds nothing else.

    rebuilt              prefills the last turns into a full cache, as agents do today
    rebuilt, compressed  prefills the last turns and keeps at most `--tokens`
    session, full        keeps one cache, from which only old turns are removed
    session, compressed  keeps one cache with at most `--tokens` at each step: the same bytes

With `--keep-text` the sessions keep the text of old turns. A rebuilt prompt never has it.

The accuracy is that of the demo agent. So small a model spends most of its time in Python. With
`--wide` the times are those of random weights in eight layers that are 1,024 wide.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from starkv_lab.agent.checkpoints import load_agent
from starkv_lab.demo.turns import Turn, trajectory_turns
from starkv_lab.demo.ways import MAX_REPLY

import starkv_compile
from starkv_compile import AgentSession
from starkv_compile.cache.size import cache_bytes


@dataclass
class Run:
    """Holds what one way cost and answered, by step."""

    seconds: list[float] = field(default_factory=list)
    prefilled: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)


class Rebuilt:
    """Prefills a prompt of the last `history` turns at each step."""

    def __init__(self, model: Any, processor: Any, history: int) -> None:
        self.model, self.processor, self.history = model, processor, history
        self.messages: list[dict[str, Any]] = []

    def step(self, content: list[dict[str, Any]], **options: Any) -> tuple[str, Any]:
        """Returns the reply, and the cache after it."""
        self.messages.append({"role": "user", "content": content})
        shown = self.messages[-(2 * self.history - 1) :]
        text = self.processor.apply_chat_template(shown, add_generation_prompt=True)
        images = [p["image"] for m in shown for p in m["content"] if p["type"] == "image"]
        new = self.processor(text=[text], images=images, return_tensors="pt")
        output = self.model.generate(**new, **options, return_dict_in_generate=True)
        said = output.sequences[:, new["input_ids"].shape[1] :]
        reply = self.processor.batch_decode(said, skip_special_tokens=True)[0].strip()
        answer = [{"type": "text", "text": reply}]
        self.messages.append({"role": "assistant", "content": answer})
        return reply, output.past_key_values


class Session:
    """Runs the same agent on one cache with the same turns."""

    keep_text = False

    def __init__(self, model: Any, processor: Any, history: int) -> None:
        self.session = AgentSession(model, processor, history, self.keep_text)

    def step(self, content: list[dict[str, Any]], **options: Any) -> tuple[str, Any]:
        return self.session.step(content, **options), self.session.cache


WAYS: dict[str, tuple[type[Rebuilt | Session], bool]] = {
    "rebuilt": (Rebuilt, False),
    "rebuilt, compressed": (Rebuilt, True),
    "session, full": (Session, False),
    "session, compressed": (Session, True),
}


def run(model: Any, agent: Rebuilt | Session, turns: list[Turn]) -> Run:
    """Runs one trajectory. Seconds cover the whole step: tokens, prefill and reply."""
    result, lengths = Run(), []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for turn in turns:
        assert turn.question is not None
        lengths.clear()
        start = time.perf_counter()
        reply, cache = agent.step(turn.content, max_new_tokens=MAX_REPLY, do_sample=False)
        result.seconds.append(time.perf_counter() - start)
        result.prefilled.append(sum(length for length in lengths if length > 1))
        result.nbytes.append(cache_bytes(cache))
        result.right.append(turn.question.is_right(reply))
    hook.remove()
    return result


def wide_model(agent: Any) -> Any:
    """Builds the agent's architecture with random weights in eight layers that are 1,024 wide."""
    values = agent.config.to_dict()
    values["text_config"].pop(
        "layer_types", None
    )  # the configuration makes them again for eight layers
    values["text_config"].update(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8)
    values["vision_config"].update(out_hidden_size=1024)
    torch.manual_seed(0)
    return type(agent)(type(agent.config).from_dict(values)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30, help="steps of a trajectory")
    parser.add_argument("--history", type=int, default=5, help="screenshots that the agent keeps")
    parser.add_argument(
        "--tokens", type=int, default=160, help="most tokens that the compressed ways keep"
    )
    parser.add_argument("--trajectories", type=int, default=8, help="number of trajectories")
    parser.add_argument("--wide", action="store_true", help="measure times with random weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--keep-text", action="store_true", help="keep the text of all turns in sessions"
    )
    args = parser.parse_args()
    Session.keep_text = args.keep_text
    torch.set_num_threads(args.threads)
    model, processor = load_agent()
    if args.wide:
        model = wide_model(model)
    runs: dict[str, list[Run]] = {name: [] for name in WAYS}
    for seed in track(range(args.trajectories), "trajectories"):
        turns = trajectory_turns(args.steps, args.history, seed)
        for name in random.Random(seed).sample(list(WAYS), len(WAYS)):
            kind, compressed = WAYS[name]
            budget = {"budget_tokens": args.tokens} if compressed else {"budget": 1.0}
            starkv_compile.compile(model, inner="eager", **budget)
            runs[name].append(run(model, kind(model, processor, args.history), turns))
            starkv_compile.undo(model)
    Console().print(table(runs, args.history, weights_mean_something=not args.wide))


def table(runs: dict[str, list[Run]], history: int, *, weights_mean_something: bool) -> Table:
    """Makes the table of medians over the steps after the history is full.

    The first trajectory compiles, so its times do not count if there are others.
    """
    out = Table("way", "tokens prefilled", "ms per step", "x rebuilt", "KiB of cache", "right")
    baseline = _median([r.seconds[history:] for r in (runs["rebuilt"][1:] or runs["rebuilt"])])
    for name, trajectories in runs.items():
        timed = trajectories[1:] or trajectories
        seconds = _median([r.seconds[history:] for r in timed])
        right = [is_right for r in trajectories for is_right in r.right]
        share = sum(right) / len(right)
        error = (share * (1 - share) / len(right)) ** 0.5
        out.add_row(
            name,
            f"{_median([r.prefilled[history:] for r in trajectories]):.0f}",
            f"{1000 * seconds:.0f}",
            f"{seconds / baseline:.2f}",
            f"{_median([r.nbytes[history:] for r in trajectories]) / 1024:.0f}",
            f"{share:.1%} +- {1.96 * error:.1%}" if weights_mean_something else "",
        )
    return out


def _median(trajectories: list[list[Any]]) -> float:
    return statistics.median(value for values in trajectories for value in values)


if __name__ == "__main__":
    main()
