"""Loads vLLM's server with clients in a closed loop, with the full cache and at a budget.

    .venv-serving/bin/python -m benchmarks.serving_load --clients 1,8,32 --seconds 300

Each client asks the demo agent a question about four screenshots, reads the reply of 64 tokens as
it comes, and asks the next one. Both servers have the same pool of blocks. Sessions of one episode
share their screenshots. Results are in docs/results/serving.md.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starkv_lab.quality.markdown import table

from benchmarks.engines import conversations, write_checkpoint
from benchmarks.servers import messages_for_client, metrics, server
from benchmarks.serving_simulator import quantile

REPLY = 64
END = "<|end|>"
SAMPLED = 1.0
"""Seconds between two looks at the server's metrics."""


@dataclass
class Run:
    """What clients and the server's metrics saw in one cell."""

    right: int = 0
    asked: int = 0
    tokens: int = 0
    failed: int = 0
    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    running: list[float] = field(default_factory=list)
    used: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    preemptions: float = 0.0


async def ask(client: Any, messages: Any, question: Any, run: Run) -> None:
    """One request, read as it comes."""
    begun = time.perf_counter()
    text, first, last = "", 0.0, 0.0
    try:
        stream = await client.chat.completions.create(
            model="agent",
            messages=messages,
            max_tokens=REPLY,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "skip_special_tokens": False},
        )
        async for part in stream:
            if not part.choices or not part.choices[0].delta.content:
                continue
            last = time.perf_counter()
            first = first or last
            text += part.choices[0].delta.content
    except Exception as error:  # of any kind: it is counted, and shown
        run.failed += 1
        print(type(error).__name__, str(error)[:200])
        return
    run.first.append(first - begun)
    run.later.append((last - first) / (REPLY - 1))  # several tokens may come in one part
    run.asked += 1
    run.tokens += REPLY
    run.right += question.is_right(text.partition(END)[0])


async def loop(address: str, clients: int, seconds: float, items: list[Any]) -> Run:
    """Clients in a closed loop for `seconds`."""
    from openai import AsyncOpenAI

    run, before = Run(), metrics(address)
    end = time.perf_counter() + seconds

    async def one(client: AsyncOpenAI, number: int) -> None:
        turn = number
        while time.perf_counter() < end:
            messages, question = items[turn % len(items)]
            await ask(client, messages, question, run)
            turn += clients

    async def watch() -> None:
        while time.perf_counter() < end:
            found = await asyncio.to_thread(metrics, address)
            run.running.append(found["vllm:num_requests_running"])
            run.used.append(found["vllm:kv_cache_usage_perc"])
            run.resident.append(found.get("process_resident_memory_bytes", 0.0))
            await asyncio.sleep(SAMPLED)

    async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
        await asyncio.gather(watch(), *(one(client, number) for number in range(clients)))
    name = "vllm:num_preemptions_total"
    run.preemptions = metrics(address)[name] - before[name]
    return run


def row(budget: float, clients: int, seconds: float, run: Run) -> list[str]:
    later = [1e3 * value for value in run.later]
    return [
        str(clients),
        f"{budget:.0%}",
        f"{run.right} of {run.asked}",
        str(run.failed),
        f"{statistics.mean(run.running):.1f}, {max(run.running):.0f}",
        f"{run.preemptions:.0f}",
        f"{run.tokens / seconds:.0f}",
        f"{quantile(run.first, 0.5):.2f}, {quantile(run.first, 0.95):.2f}",
        f"{quantile(later, 0.5):.0f}, {quantile(later, 0.95):.0f}",
        f"{statistics.mean(run.used):.0%}",
        f"{run.resident[0] / 2**20:.0f}, {run.resident[-1] / 2**20:.0f}",
    ]


HEADER = (
    "clients",
    "budget",
    "right",
    "failed",
    "running: mean, most",
    "preemptions",
    "tokens a second",
    "first token, s: p50, p95",
    "further token, ms: p50, p95",
    "pool in use",
    "API server, MiB: begin, end",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--blocks", type=int, default=150)
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--sessions", type=int, default=96)
    args = parser.parse_args()
    items = [
        (messages_for_client(messages), question)
        for messages, question in conversations(args.sessions)
    ]
    rows = {}
    options = ("--num-gpu-blocks-override", str(args.blocks), "--max-num-seqs", "64")
    # Room for the features of all screenshots: see docs/guides/vllm.md on a fault of vLLM 0.32.
    options += ("--max-num-batched-tokens", "8192", "--long-prefill-token-threshold", "256")
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name) / "agent")
        for budget in (1.0, args.budget):
            with server(folder, {"budget": budget}, *options) as address:
                asyncio.run(loop(address, 2, 10, items))  # the first requests compile kernels
                for clients in map(int, args.clients.split(",")):
                    run = asyncio.run(loop(address, clients, args.seconds, items))
                    rows[clients, budget] = row(budget, clients, args.seconds, run)
                    print("|", " | ".join(rows[clients, budget]), "|", flush=True)
    order = sorted(rows, key=lambda pair: (pair[0], -pair[1]))
    print(table(list(HEADER), [rows[key] for key in order]))


if __name__ == "__main__":
    main()
