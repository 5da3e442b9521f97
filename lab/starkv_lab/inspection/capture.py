"""One prompt through the compiled passes, and what scoring reads in each layer handed out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from starkv_compile.cache.cache import StarKVCache
from starkv_compile.config import StarKVConfig
from starkv_compile.frontend.attachment import attach_compiled, attached, detach
from starkv_compile.frontend.backend import rewrite
from starkv_compile.hf.cache_argument import with_cache
from starkv_compile.passes import Pipeline
from starkv_compile.passes.insert_scores import InsertScores
from starkv_compile.policies import Policy, Scored, ScoreInputs
from starkv_compile.reporting import Report

Note = Callable[[ScoreInputs], None]


class NoteInputs(InsertScores):
    """The same, and `note(inputs)` is called as a layer is scored, on the values of that run."""

    def __init__(self, config: StarKVConfig, note: Note) -> None:
        super().__init__(config)
        self.note = note

    def score(self, policy: Policy, inputs: ScoreInputs) -> Scored:
        inputs.key.tracer.create_proxy("call_function", self.note, (inputs,), {})
        return super().score(policy, inputs)


def capture(
    model: Any, inputs: Mapping[str, torch.Tensor], config: StarKVConfig, note: Note
) -> tuple[StarKVCache, Report]:
    """Compress one prompt as `starkv_compile.compile` does; `note` is called as layers are scored.

    Args:
        model: not compiled; it is left as it was.
        inputs: of `model.generate`, one row.
        config: with inner="eager".
        note: a function.

    Returns:
        The compacted cache, and what was found in the model.
    """

    def backend(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        pipeline = Pipeline(config)
        pipeline.passes = [
            NoteInputs(config, note) if isinstance(step, InsertScores) else step
            for step in pipeline.passes
        ]
        return rewrite(module, pipeline).forward

    def compiler(call: Any) -> Any:
        return torch.compile(call, backend=backend, dynamic=True)

    cache = StarKVCache(model.config)
    model._compiled_call_impl = attach_compiled(model, config, model._call_impl, compiler)
    try:
        model.generate(**inputs, **with_cache(cache), max_new_tokens=1, do_sample=False)
        attachment = attached(model)
        assert attachment is not None
        report = attachment.report
    finally:
        detach(model)
    return cache, report
