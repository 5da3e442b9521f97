"""vLLM's OpenAI server in a process of its own, and prompts of the demo agent for its client."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.engines import BLOCK

PATIENCE = 300
"""Seconds until a server that has not answered is given up."""


@contextlib.contextmanager
def server(
    folder: Path, starkv: dict[str, Any] | None, *options: str, **environment: str
) -> Iterator[str]:
    """Yields the address of a server of the checkpoint in `folder`, and stops it afterwards."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--served-model-name", "agent", "--dtype", "float32"]
    command += ["--max-model-len", "1024", "--enforce-eager", "--block-size", str(BLOCK)]
    command += ["--limit-mm-per-prompt", '{"image": 8}', "--host", "127.0.0.1", "--port", str(port)]
    if starkv is not None:
        command += ["--additional-config", json.dumps({"starkv": starkv})]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment}
    log = folder.parent / f"server-{port}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(process, address, log)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server stopped: {log.read_text()[-2000:]}")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{address}/health", timeout=5).read()
            return
        time.sleep(0.5)
    raise RuntimeError(f"the server has not answered: {log.read_text()[-2000:]}")


def metrics(address: str) -> dict[str, float]:
    """The server's Prometheus metrics, summed over labels, by name."""
    found: dict[str, float] = {}
    text = urllib.request.urlopen(f"{address}/metrics", timeout=30).read().decode()
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def messages_for_client(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of the demo with their pictures as OpenAI's client sends them."""
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [_part(part) for part in message["content"]]}
        for message in messages
    ]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    held = io.BytesIO()
    part["image"].save(held, "PNG")
    data = base64.b64encode(held.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
