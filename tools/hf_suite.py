"""Runs every `generate` of a test suite through starkv, for transformers' own tests.

Before any test, `transformers.testing_utils` imports the module that TRANSFORMERS_TEST_BACKEND
names. The import of this one wraps `generate` of every model. Nothing else imports it.

    TRANSFORMERS_TEST_BACKEND=tools.hf_suite pytest tests/models/llama

    STARKV_TEST_BUDGET   share of the tokens that stays; the default 1.0 changes no result
    STARKV_TEST_INNER    inner backend; with the default "eager" a suite takes minutes
    STARKV_TEST_SUMMARY  file for a summary of the calls, as JSON; it is printed in any case

A model is compiled during a call and restored after it, so a test can change its model between two
calls. A call that cannot be wrapped runs as it is, and is counted with the reason.
`tools/run_hf_suite.py` fetches the suite and runs it.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.generation import GenerationMixin

from starkv_compile.config import INNER_BACKENDS, StarKVConfig
from starkv_compile.errors import OptionError, StarKVError
from starkv_compile.frontend import api, backend
from starkv_compile.frontend.attachment import attached

MODELS = 8
"""Dynamo drops its graphs after this many models: models of a class share a limit of graphs."""


class Tally:
    """Counts what happened in each call of `generate`.

    Attributes:
        calls: calls of `generate`.
        compiled: calls in which a graph of starkv ran.
        graph_runs: how often such graphs ran.
        compressed: calls whose last prompt was stored shorter.
        not_compiled: calls that were not compiled, for each reason.
        left_whole: compiled calls that stayed uncompressed, for each reason.
    """

    def __init__(self) -> None:
        self.calls = self.compiled = self.compressed = self.graph_runs = 0
        self.not_compiled: Counter[str] = Counter()
        self.left_whole: Counter[str] = Counter()

    def as_dict(self, config: StarKVConfig) -> dict[str, Any]:
        return {
            "budget": config.budget,
            "inner": config.inner,
            "calls": self.calls,
            "compiled": self.compiled,
            "compressed": self.compressed,
            "graph_runs": self.graph_runs,
            "not_compiled": dict(self.not_compiled.most_common()),
            "left_whole": dict(self.left_whole.most_common()),
        }

    def __str__(self) -> str:
        lines = [
            f"starkv: {self.calls} calls of generate, {self.compiled} compiled, "
            f"{self.compressed} compressed"
        ]
        for what in ("not_compiled", "left_whole"):
            for reason, count in getattr(self, what).most_common():
                lines.append(f"  {what.replace('_', ' ')}, {count} x: {reason}")
        return "\n".join(lines)


def config_from(environment: Mapping[str, str]) -> StarKVConfig:
    """Returns the configuration that the environment's variables ask for.

    Raises:
        OptionError: a value is impossible. The message names its variable.
    """
    budget = environment.get("STARKV_TEST_BUDGET", "1.0")
    inner = environment.get("STARKV_TEST_INNER", "eager")
    if inner not in INNER_BACKENDS:
        known = ", ".join(INNER_BACKENDS)
        raise OptionError(f"STARKV_TEST_INNER={inner!r}: expected one of {known}")
    try:
        return StarKVConfig(budget=float(budget), inner=inner)
    except ValueError as error:
        raise OptionError(f"STARKV_TEST_BUDGET={budget!r}: {error}") from None


def why_left(model: Any, generation_config: Any, options: Mapping[str, Any]) -> str | None:
    """Returns why a call of `generate` with these keywords is not wrapped, or None."""
    if attached(model) is not None:
        return "compiled with starkv already"
    if getattr(model.config, "is_encoder_decoder", False):
        return "an encoder-decoder model: its cache has two kinds of entries"
    settings = (model.generation_config, generation_config)
    asked = [options.get("compile_config"), *(getattr(s, "compile_config", None) for s in settings)]
    if any(asked):
        return "the test compiles the model with a compile_config"
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return "the test compiled the model itself"
    return None


def wrap(original: Callable[..., Any], config: StarKVConfig, tally: Tally) -> Callable[..., Any]:
    """Returns `original`, a `generate`, with the model compiled during each call."""
    known: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    fresh = 0  # models since Dynamo last forgot; most of them are gone by now
    running: list[Any] = []  # an assistant's generate runs within its main model's

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal fresh
        tally.calls += 1
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        reason = why_left(self, given, kwargs)
        if reason is None:
            fresh += self not in known
            known.add(self)
            if fresh > MODELS and not running:
                torch._dynamo.reset()
                fresh = 1
            try:
                api.compile(self, config)
            except StarKVError as error:
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            tally.not_compiled[reason] += 1
            return original(self, *args, **kwargs)
        before, raised = tally.graph_runs, "no forward of it was captured"
        running.append(self)
        try:
            return original(self, *args, **kwargs)
        except Exception as error:
            raised = f"{type(error).__name__} before any graph ran"
            raise
        finally:
            running.pop()
            report = api.report(self)
            api.undo(self)
            if tally.graph_runs == before:
                tally.not_compiled[raised] += 1
            else:
                tally.compiled += 1
                tally.compressed += any(layer.stored < layer.seen for layer in report.layers)
                tally.left_whole.update(report.refusals)

    return generate


def count_graph_runs(
    compile_inner: Callable[..., Callable[..., Any]], tally: Tally
) -> Callable[..., Callable[..., Any]]:
    """Returns `compile_inner` of the backend; its results then count how often they run.

    A report lists compilations only, but a graph that was compiled for one model runs for others.
    """

    @functools.wraps(compile_inner)
    def compiling(*args: Any) -> Callable[..., Any]:
        compiled = compile_inner(*args)

        @functools.wraps(compiled)
        def run(*inputs: Any) -> Any:
            tally.graph_runs += 1
            return compiled(*inputs)

        return run

    return compiling


def say(tally: Tally, config: StarKVConfig, file: str | None) -> None:
    """Prints the tally, and writes it to `file` if there is one."""
    print(tally, file=sys.stderr)
    if file:
        Path(file).write_text(json.dumps(tally.as_dict(config), indent=1) + "\n")


def install(environment: Mapping[str, str]) -> Tally:
    """Wraps `generate` of every model in this process. Returns the tally of its calls."""
    config, tally = config_from(environment), Tally()
    GenerationMixin.generate = wrap(GenerationMixin.generate, config, tally)
    backend.compile_inner = count_graph_runs(backend.compile_inner, tally)
    atexit.register(say, tally, config, environment.get("STARKV_TEST_SUMMARY"))
    return tally


if os.environ.get("TRANSFORMERS_TEST_BACKEND") == __name__:
    install(os.environ)
