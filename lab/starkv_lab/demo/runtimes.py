"""Runs the demo's agent in PyTorch, compiled, or in ONNX Runtime, exported."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from starkv_compile import StarKVConfig, compile, undo

from ..agent.checkpoints import agent_folder, load_agent, weights_digest


@contextlib.contextmanager
def in_torch(config: StarKVConfig, checkpoint: Path | None) -> Iterator[tuple[Any, Any]]:
    """Yields (model, processor). The model stays compiled with `config` inside the `with` block."""
    model, processor = load_agent(checkpoint)
    compile(model, config)
    try:
        yield model, processor
    finally:
        undo(model)


def in_onnx(folder: Path) -> tuple[Any, Any]:
    """Returns (model, processor) from a folder that `export_agent` wrote."""
    from starkv_compile.export import load_model

    from ..agent.processor import AgentProcessor

    return load_model(folder), AgentProcessor.from_pretrained(folder, local_files_only=True)


AGENT = "agent.digest"
"""A file beside the graphs: the id of the weights that they were made of."""


def export_agent(
    config: StarKVConfig, checkpoint: Path | None, folder: Path, say: Callable[[str], Any]
) -> None:
    """Exports the agent to `folder`, unless the folder holds this agent with the same options.

    A full cache is exported as a budget of as many tokens as the model has positions.

    Raises:
        StarKVError: a package is missing, or the folder holds something else.
    """
    from transformers import AutoConfig

    from starkv_compile.export import ExportOptions, Manifest, export_checkpoint

    source = agent_folder(checkpoint)
    described = AutoConfig.from_pretrained(source, local_files_only=True)
    most = described.get_text_config(decoder=True).max_position_embeddings
    if config.keeps_everything:
        config = dataclasses.replace(config, budget=StarKVConfig.budget, budget_tokens=most)
    agent = weights_digest(source)
    whose = folder / AGENT
    if (
        Manifest.is_in(folder)
        and Manifest.read(folder).config == config
        and whose.is_file()
        and whose.read_text() == agent
    ):
        return
    options = ExportOptions(
        checkpoint=source, out=folder, config=config, max_seq=most, select="topk"
    )
    export_checkpoint(options, say)
    whose.write_text(agent)
