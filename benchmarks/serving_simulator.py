"""Simulates an engine with and without compaction: what fits, and how long requests wait.

    python -m benchmarks.serving_simulator check     # against counts of vLLM itself
    python -m benchmarks.serving_simulator gpus      # GPUs and models that nobody here has run
    python -m benchmarks.serving_simulator curves FILE.png
    python -m benchmarks.serving_simulator trace FILE --model qwen3-vl-8b --gpu h100

A trace is a JSON file with a list of sessions. A session is a list of requests, one after the
other: `prompt` and `reply` in tokens, `shared`, how many of the prompt's first tokens were in the
request before, and `pause`, the seconds between the end of that one and the arrival of this one.

The scheduler is vLLM's, in short: in each step every running request gets its next tokens, the
oldest first. Without a free block, the newest request is preempted, and reads its prompt again
later. A waiting request starts if its whole prompt fits. Freed blocks keep their tokens for a later
prefix hit, until they are needed; a compacted prompt keeps only what was not written again. A step
takes as long as the slower of two: its multiplications at `FLOPS` of the GPU's peak, and reading
the weights and all stored tokens at `BANDWIDTH` of its peak. Images are encoded in no time here.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import sys
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from starkv_compile.serving.rule import Rule

FLOPS, BANDWIDTH = 0.5, 0.7
"""Shares of a GPU's peaks that an engine reaches. They are assumptions."""

MEMORY = 0.9
"""The share of a GPU's memory that an engine takes, as vLLM does by default."""

ACTIVATIONS = 4 * 2**30
"""Bytes that an engine keeps for activations and the vision tower. An assumption."""


@dataclass(frozen=True)
class Model:
    """parameters: of the language model. tower: of the vision tower, which only takes memory."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    parameters: float
    tower: float

    @property
    def token_bytes(self) -> int:
        """Bytes of a stored token, in 16 bits."""
        return self.layers * self.kv_heads * self.head_dim * 4

    @property
    def weight_bytes(self) -> float:
        return 2 * self.parameters


@dataclass(frozen=True)
class Gpu:
    """memory in bytes, bandwidth in bytes a second, flops of dense 16-bit products a second."""

    name: str
    memory: float
    bandwidth: float
    flops: float


MODELS = {
    model.name: model
    for model in (
        Model("ui-tars-1.5-7b", 28, 4, 128, 7.6e9, 0.7e9),
        Model("qwen3-vl-8b", 36, 8, 128, 8.2e9, 0.6e9),
        Model("qwen3-vl-32b", 64, 8, 128, 32.8e9, 0.6e9),
    )
}
GPUS = {"h100": Gpu("H100 SXM", 80e9, 3.35e12, 989e12)}


@dataclass(frozen=True)
class Request:
    """Tokens of one request; how many it shares with the one before; seconds that it waits for."""

    prompt: int
    reply: int
    shared: int = 0
    pause: float = 0.0


Session = Sequence[Request]


@dataclass(eq=False)
class State:
    """A request in the engine.

    Attributes:
        shared: how many of its prompt's first tokens later requests can find; None: all.
        arrival: seconds.
        computed: how many of its tokens are computed.
        gone: how many of these have left its cache.
        said: how many it has said.
        blocks: how many it holds.
        first: when it said its first token.
    """

    session: int
    request: Request
    shared: int | None
    arrival: float
    computed: int = 0
    gone: int = 0
    said: int = 0
    blocks: int = 0
    first: float | None = None

    @property
    def wanted(self) -> int:
        return self.request.prompt + self.said


@dataclass
class Report:
    """What a run counted. Times are in seconds."""

    steps: int = 0
    preemptions: int = 0
    seconds: float = 0.0
    computed: int = 0
    requests: int = 0
    said: int = 0
    running: list[int] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


@dataclass
class Engine:
    """An engine with a pool of `blocks` blocks of `block` tokens.

    rule: how prompts are compacted; None: not at all. model, gpu: for the time of a step; without
    them it is a second.
    """

    blocks: int
    block: int = 16
    rule: Rule | None = None
    caching: bool = True
    most_requests: int = 1024
    most_tokens: int = 8192
    model: Model | None = None
    gpu: Gpu | None = None
    gpus: int = 1

    def run(self, sessions: Sequence[Session], until: float = math.inf) -> Report:
        """Serves all sessions, or stops after `until` seconds."""
        report, now = Report(), 0.0
        self.free, self.kept = self.blocks, OrderedDict[int, int]()
        left = [deque(session) for session in sessions]
        order = itertools.count()
        coming = [(s[0].pause, next(order), i) for i, s in enumerate(left)]
        heapq.heapify(coming)
        waiting: deque[State] = deque()
        running: list[State] = []
        while (coming or waiting or running) and now < until:
            if not waiting and not running:
                now = max(now, coming[0][0])
            while coming and coming[0][0] <= now:
                arrival, _, i = heapq.heappop(coming)
                request = left[i].popleft()
                waiting.append(State(i, request, self.shared(request), arrival))
            work = self.schedule(waiting, running, report)
            step = self.seconds(work, running)
            now += step
            report.steps += 1
            report.running.append(len(running))
            for state, tokens in work:
                state.computed += tokens
                report.computed += tokens
                if state.computed < state.wanted:
                    continue
                state.said += 1
                report.said += 1
                if state.first is None:
                    state.first = now
                    report.first.append(now - state.arrival)
                if state.said < state.request.reply:
                    continue
                running.remove(state)
                self.give(state, state.blocks, 0 if state.gone else state.computed)
                report.requests += 1
                report.whole.append(now - state.arrival)
                if left[state.session]:
                    pause = left[state.session][0].pause
                    heapq.heappush(coming, (now + pause, next(order), state.session))
        report.seconds = now
        return report

    def schedule(
        self, waiting: deque[State], running: list[State], report: Report
    ) -> list[tuple[State, int]]:
        """The tokens of each request in a step."""
        room, work, preempted = self.most_tokens, [], False
        for state in list(running):
            if state not in running or not room:
                continue
            gone = self.gone(state)
            if gone > state.gone:
                first_time, left = not state.gone, (gone - state.gone) // self.block
                state.gone = gone
                self.give(state, left, state.shared or 0 if first_time else 0)
            tokens = min(room, self.ahead(state))
            need = self.covers(state.computed + tokens) - state.gone // self.block - state.blocks
            while need > self.free and running[-1] is not state:
                self.preempt(running, waiting, report)
                preempted = True
            if need > self.free:
                self.preempt(running, waiting, report)
                preempted = True
                continue
            self.take(state, max(0, need))
            room -= tokens
            work.append((state, tokens))
        work = [(state, tokens) for state, tokens in work if state in running]
        while waiting and room and not preempted and len(running) < self.most_requests:
            state = waiting[0]
            hit = self.found(state)
            if self.most_blocks(state) > self.free:
                break
            waiting.popleft()
            if hit:  # these blocks are free, too, until they are taken
                self.kept[state.session] -= hit // self.block
            state.computed = hit
            tokens = min(room, self.ahead(state))
            self.take(state, self.covers(hit + tokens))
            room -= tokens
            running.append(state)
            work.append((state, tokens))
        if not work:
            raise ValueError("a prompt does not fit into the pool")
        return work

    def shared(self, request: Request) -> int | None:
        return None if self.rule is None else self.rule.shared(request.prompt, self.block)

    def gone(self, state: State) -> int:
        """How many tokens have left a request's cache by now."""
        length = state.request.prompt
        return 0 if self.rule is None else self.rule.gone(state.computed, length, self.block)

    def ahead(self, state: State) -> int:
        """How many tokens a step may compute of a request: up to where it is compacted next."""
        computed, length = state.computed, state.request.prompt
        stop = length if self.rule is None else self.rule.next_stop(computed, length)
        return (state.wanted if stop == length else stop) - computed

    def most_blocks(self, state: State) -> int:
        """How many blocks must be free for a request to start."""
        length, total = state.request.prompt, state.wanted
        if self.rule is None:
            return self.covers(total)
        return self.rule.most_blocks(length, total, self.block, None, 0)

    def covers(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block)

    def take(self, state: State, blocks: int) -> None:
        """Gives a request blocks. Those that nobody asked for longest lose their tokens first."""
        state.blocks += blocks
        self.free -= blocks
        over = sum(self.kept.values()) - self.free
        while over > 0:
            session, held = next(iter(self.kept.items()))
            if held <= over:
                del self.kept[session]
            else:
                self.kept[session] = held - over
            over -= held

    def give(self, state: State, blocks: int, tokens: int) -> None:
        """Takes blocks back. The session's first `tokens` tokens can be found in free blocks."""
        state.blocks -= blocks
        self.free += blocks
        if self.caching and tokens:
            self.kept[state.session] = min(tokens // self.block, self.free)
            self.kept.move_to_end(state.session)

    def preempt(self, running: list[State], waiting: deque[State], report: Report) -> None:
        """Takes the newest request out. It reads its prompt and its reply again."""
        state = running.pop()
        report.preemptions += 1
        found = state.computed if state.shared is None else min(state.computed, state.shared)
        self.give(state, state.blocks, 0 if state.gone else found)
        state.computed = state.gone = 0
        waiting.appendleft(state)

    def found(self, state: State) -> int:
        """Tokens of a prefix hit, in whole blocks. It ends before what is written again."""
        again = state.said > 0 or state.first is not None
        shared = state.wanted if again else state.request.shared
        most = min(shared, state.wanted - 1)
        most = most if state.shared is None else min(most, state.shared)
        return min(most // self.block, self.kept.get(state.session, 0)) * self.block

    def seconds(self, work: Sequence[tuple[State, int]], running: Sequence[State]) -> float:
        if self.model is None or self.gpu is None:
            return 1.0
        tokens = sum(tokens for _, tokens in work)
        stored = sum(state.computed - state.gone for state in running)
        read = self.model.weight_bytes + self.model.token_bytes * stored
        products = 2 * self.model.parameters * tokens
        slower = max(products / (FLOPS * self.gpu.flops), read / (BANDWIDTH * self.gpu.bandwidth))
        return slower / self.gpus


def pool_of(model: Model, gpu: Gpu, gpus: int, block: int) -> int:
    """Blocks that fit beside the weights, over `gpus` GPUs that share one model."""
    room = gpus * (MEMORY * gpu.memory - ACTIVATIONS) - 2 * (model.parameters + model.tower)
    return int(room // (model.token_bytes * block))


MEASURED = {
    (49, 1.0, None): (164, 3, 1),
    (49, 0.2, None): (82, 9, 1),
    (49, 0.2, 192): (84, 10, 3),
    (49, 0.2, 96): (88, 12, 7),
    (99, 1.0, None): (84, 6, 1),
    (99, 0.2, None): (42, 12, 0),
    (99, 0.2, 192): (42, 12, 0),
    (99, 0.2, 96): (44, 12, 0),
}
"""(blocks, budget, prefill_chunk_size): steps, most running requests and preemptions of vLLM, from
docs/results/serving.md."""

PROMPTS = (460, 477, 477, 460, 477, 477, 448, 465, 465, 448, 465, 465)


def check() -> bool:
    """The pool of `python -m benchmarks.serving pool`, without prefix caching."""
    counts = (part for name in ("steps", "most running", "preemptions") for part in (name, "here"))
    row("blocks", "budget", "prefill_chunk_size", *counts)
    row(*["---"] * 9)
    same = True
    for (blocks, budget, chunk), counted in MEASURED.items():
        options = {"budget": budget} | ({} if chunk is None else {"prefill_chunk_size": chunk})
        rule = None if budget == 1.0 else Rule.of(options)
        engine = Engine(blocks, 32, rule, caching=False, most_requests=64)
        made = engine.run([[Request(length, 40)] for length in PROMPTS])
        found = (made.steps, max(made.running), made.preemptions)
        same = same and found == counted
        pairs = (n for pair in zip(counted, found, strict=True) for n in pair)
        row(blocks, f"{budget:.0%}", chunk or "", *pairs)
    return same


def agent(screenshots: int, per_screenshot: int, reply: int, most: int | None = None) -> Session:
    """A session of an agent: each request has one screenshot more, and the replies before.

    most: how many screenshots a prompt holds, the newest ones. None: all of them. Once the oldest
    one leaves, nothing but the instructions is shared with the request before.
    """
    start, turn, pause = 1_000, per_screenshot + 40, 2.0
    session, before = [], 0
    for step in range(1, screenshots + 1):
        shown = step if most is None else min(step, most)
        prompt = start + shown * turn + (step - 1) * reply
        shared = before if most is None or step <= most else start
        session.append(Request(prompt, reply, min(shared, prompt), pause if step > 1 else 0.0))
        before = prompt + reply
    return session


PER_SCREENSHOT = {"ui-tars-1.5-7b": 2_691, "qwen3-vl-8b": 2_040, "qwen3-vl-32b": 2_040}
"""Tokens of a screenshot of 1920 x 1080: one for 28 x 28 pixels, or for 32 x 32."""

PATIENT = {80: 10.0, 1_500: 90.0}
"""Seconds within which 95 % of the replies must end, for a number of sessions to count, by tokens
of a reply: an action, or a thought and an action."""


def gpus() -> None:
    """How many sessions one replica serves, at full cache and at 20 %."""
    gpu = GPUS["h100"]
    row(
        "model",
        "GPUs",
        "history",
        "reply",
        "budget",
        "sessions",
        "replies a minute",
        "first token, s: p50, p95",
        "running: mean",
        "preemptions",
        "tokens computed for one said",
    )
    row(*["---"] * 11)
    for name, number in (("ui-tars-1.5-7b", 1), ("qwen3-vl-8b", 1), ("qwen3-vl-32b", 2)):
        model = MODELS[name]
        blocks = pool_of(model, gpu, number, 16)
        for title, most in (("5 screenshots", 5), ("all of 15", None)):
            for reply in PATIENT:
                session = agent(15, PER_SCREENSHOT[name], reply, most)
                for budget in (1.0, 0.2):
                    rule = None if budget == 1.0 else Rule.of({"budget": budget})
                    engine = Engine(blocks, 16, rule, model=model, gpu=gpu, gpus=number)
                    sessions, report = most_sessions(engine, session, PATIENT[reply])
                    row(
                        name,
                        number,
                        title,
                        reply,
                        f"{budget:.0%}",
                        sessions,
                        f"{60 * report.requests / report.seconds:.0f}",
                        f"{quantile(report.first, 0.5):.1f}, {quantile(report.first, 0.95):.1f}",
                        f"{sum(report.running) / len(report.running):.0f}",
                        report.preemptions,
                        f"{report.computed / report.said:.1f}",
                    )


def served(engine: Engine, session: Session, count: int) -> Report:
    """Sessions that begin one after the other, and again when they end, for ten minutes."""
    starts = [15 * i / count for i in range(count)]
    lines = [
        [replace(session[0], pause=start), *session[1:], *(list(session) * 20)] for start in starts
    ]
    return engine.run(lines, until=600.0)


def most_sessions(engine: Engine, session: Session, patient: float) -> tuple[int, Report]:
    """The largest number of sessions whose replies end in `patient` seconds, by halves."""
    low, high, best = 0, 2, None
    while True:
        report = served(engine, session, high)
        if quantile(report.whole, 0.95) > patient:
            break
        low, best, high = high, report, high * 2
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        report = served(engine, session, middle)
        if quantile(report.whole, 0.95) > patient:
            high = middle
        else:
            low, best = middle, report
    return low, best or served(engine, session, 1)


CURVES = {
    "full cache": None,
    "20 %": {"budget": 0.2},
    "20 %, also compacted while prompts are read": {"budget": 0.2, "prefill_chunk_size": 4096},
}


def curves(file: Path, model: Model, gpu: Gpu) -> None:
    """Draws replies a minute and the slowest replies against the number of sessions."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure, axes = plt.subplots(2, len(PATIENT), figsize=(11, 7), sharex=True)
    counts = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96]
    for column, (reply, patient) in enumerate(PATIENT.items()):
        session = agent(15, PER_SCREENSHOT[model.name], reply, 5)
        above, below = axes[:, column]
        for title, options in CURVES.items():
            rule = None if options is None else Rule.of(options)
            blocks = pool_of(model, gpu, 1, 16)
            engine = Engine(blocks, 16, rule, model=model, gpu=gpu)
            reports = [served(engine, session, count) for count in counts]
            rates = [60 * report.requests / report.seconds for report in reports]
            above.plot(counts, rates, marker="o", ms=3, label=title)
            late = [quantile(report.whole, 0.95) for report in reports]
            below.plot(counts, late, marker="o", ms=3, label=title)
            row(title, reply, *(f"{rate:.0f}" for rate in rates))
        above.set_title(f"replies of {reply:,} tokens")
        below.axhline(patient, color="tab:gray", lw=1, ls=":")
        below.set(xlabel="sessions at once", yscale="log")
        below.set_yticks([1, 2, 5, 10, 20, 50, 100, 200])
        below.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        below.yaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].set_ylabel("replies a minute")
    axes[1, 0].set_ylabel("seconds, 95 % of the replies take less")
    axes[0, 0].legend(frameon=False)
    figure.suptitle(f"{model.name} on one {gpu.name}, five screenshots in a prompt, simulated")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def trace(file: Path, model: Model, gpu: Gpu, budget: float) -> None:
    """Serves the sessions of a trace, at full cache and at a budget."""
    sessions = [[Request(**one) for one in session] for session in json.loads(file.read_text())]
    row("budget", "replies a minute", "first token, s: p50, p95", "reply, s: p95", "preemptions")
    row(*["---"] * 5)
    for share in (1.0, budget):
        rule = None if share == 1.0 else Rule.of({"budget": share})
        engine = Engine(pool_of(model, gpu, 1, 16), 16, rule, model=model, gpu=gpu)
        report = engine.run(sessions)
        row(
            f"{share:.0%}",
            f"{60 * report.requests / report.seconds:.0f}",
            f"{quantile(report.first, 0.5):.1f}, {quantile(report.first, 0.95):.1f}",
            f"{quantile(report.whole, 0.95):.1f}",
            report.preemptions,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("check", "gpus", "curves", "trace"))
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--model", choices=MODELS, default="qwen3-vl-8b")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--budget", type=float, default=0.2)
    args = parser.parse_args()
    if args.what == "check":
        return 0 if check() else 1
    if args.what == "gpus":
        gpus()
    elif args.file is None:
        parser.error(f"{args.what} needs a file")
    elif args.what == "curves":
        curves(args.file, MODELS[args.model], GPUS[args.gpu])
    else:
        trace(args.file, MODELS[args.model], GPUS[args.gpu], args.budget)
    return 0


if __name__ == "__main__":
    sys.exit(main())
