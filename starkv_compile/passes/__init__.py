"""The graph passes: find attention and its cache write, insert scores and a compaction.

`apply` runs them on any FX graph. The prompt's attention computes the same as before. The keys and
values that the graph returns, or stores in a cache, are the compacted ones:

    k = rope(linear(h))                          k = rope(linear(h))
    y = sdpa(q, k, v)                            y = sdpa(q, k, v)
    return y, k, v                ->             scores = starkv.star_scores(...)
                                                 kept = starkv.select_tokens(scores, ...)
                                                 k', v' = starkv.gather_kv(k, v, kept)
                                                 return y, k', v'
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import overload

from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..config import StarKVConfig
from ..errors import OptionError
from ..reporting import GraphReport
from .base import Cache, Context, GraphPass, Observer
from .exported import rewrite_program
from .find_attention import FindAttention
from .find_cache_writes import FindCacheWrites
from .find_hidden import FindHidden
from .find_layout import FindLayout
from .insert_compaction import InsertCompaction, StripMarkers
from .insert_scores import InsertScores
from .read_codes import ReadCodes
from .share_log_sum_exp import ShareLogSumExp
from .summary import summarize

PIPELINE: tuple[type[GraphPass], ...] = (
    FindAttention,  # first: later passes read its sites and never match attention again
    FindCacheWrites,  # needs sites: a write is claimed only if an attention reads the same keys
    FindHidden,  # needs writes, so that refused sites cost no search
    FindLayout,  # emits nodes, hence after everything that only reads
    ShareLogSumExp,  # after the analyses, which hold on to the attention it replaces
    InsertScores,  # before compaction: scores are computed on the uncompacted keys
    InsertCompaction,  # then shapes recorded for the cache are stale
    StripMarkers,  # what is left belongs to sites that were refused
    ReadCodes,  # of graphs that decode; they have none of what the others look for
)
KEEP_ALL: tuple[type[GraphPass], ...] = (StripMarkers, ReadCodes)
"""The passes for a budget of 1.0. In 16 bits no op of ours remains."""

DUMP_VARIABLE = "STARKV_DUMP"
"""Environment variable with the name of a folder for the graph before and after each pass."""


class Pipeline:
    """The passes for one configuration, in order.

    Args:
        config: the configuration.
        observer: a function that a rewritten graph calls whenever it runs, with the
            `policies.ScoreInputs` of each layer that it scores, holding the values of that run.
            Only a graph that is not compiled further (inner="eager") can call one.
    """

    def __init__(self, config: StarKVConfig, observer: Observer | None = None) -> None:
        self.config, self.observer = config, observer
        steps = KEEP_ALL if config.keeps_everything else PIPELINE
        self.passes = [step(config) for step in steps]

    def run(
        self,
        module: GraphModule,
        *,
        cache: Cache,
        unmarked: str = "",
        layers: int = 0,
        every_length: bool = False,
    ) -> GraphReport:
        """Rewrites `module` in place and returns the report. Arguments are as in `base.Context`."""
        context = Context(module, self.config, cache, unmarked, layers, every_length, self.observer)
        folder = os.environ.get(DUMP_VARIABLE)
        for step in self.passes:
            step(context, dump=folder is not None)
        context.remove_unused()
        module.graph.lint()
        module.recompile()
        if folder is not None:
            self._dump(Path(folder), module)
        return summarize(context)

    def _dump(self, folder: Path, module: GraphModule) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        run = len(list(folder.glob("*-0-*-before.txt")))
        for i, step in enumerate(self.passes):
            (folder / f"graph{run}-{i}-{step.name}-before.txt").write_text(step.before or "")
            (folder / f"graph{run}-{i}-{step.name}-after.txt").write_text(step.after or "")


@overload
def apply(module: GraphModule, config: StarKVConfig | None = None) -> GraphReport: ...
@overload
def apply(
    module: ExportedProgram, config: StarKVConfig | None = None
) -> tuple[ExportedProgram, GraphReport]: ...
def apply(
    module: GraphModule | ExportedProgram, config: StarKVConfig | None = None
) -> GraphReport | tuple[ExportedProgram, GraphReport]:
    """Rewrites an FX graph in place, or returns the rewritten form of an exported program.

    If the graph returns the keys and values of an attention, it then returns only those that the
    budget keeps. The caller handles the shorter cache: positions continue from the uncompressed
    length, and a decode mask has one column for each stored token. Compile the result inside
    `kernels.compiling.in_process()`, so that an upgrade of this package compiles it again.

    Args:
        module: a graph, such as Dynamo's, an exported program's `module()`, or your own. Its nodes
            need example values in `meta` ("example_value" or "val"), as Dynamo and `torch.export`
            record them. Or an `ExportedProgram`, which stays as it is.
        config: the configuration. None: `StarKVConfig()`.

    Returns:
        The report of what was found, rewritten, and skipped with the reason. For a program: the new
        program, and the report. The new program has the inputs, the dynamic lengths and the
        parameters of the old one. It holds ops of starkv, so import `starkv_compile` before
        `torch.export.load`.

    Raises:
        TypeError: `module` is neither a graph nor a program.
        OptionError: the configuration asks for tokens in few bits.
        PolicyError: a policy of yours failed. The graph stays as it is.
    """
    config = config or StarKVConfig()
    if config.nbits != 16:
        raise OptionError(
            f"nbits={config.nbits} with apply(): your code stores the keys and values that the "
            "graph returns, in the model's precision; leave out nbits"
        )
    pipeline = Pipeline(config)
    if isinstance(module, ExportedProgram):
        return rewrite_program(
            module, lambda graph: pipeline.run(graph, cache="caller", every_length=True)
        )
    if not isinstance(module, GraphModule):
        raise TypeError(
            f"apply got {type(module).__name__}: expected a torch.fx.GraphModule or a "
            "torch.export.ExportedProgram; for a module, pass torch.export.export(module, "
            "example_inputs), and for a Hugging Face model call starkv_compile.compile(model)"
        )
    before = copy.deepcopy(module.graph)
    try:
        return pipeline.run(module, cache="caller")
    except Exception:
        module.graph = before
        raise


__all__ = ["KEEP_ALL", "PIPELINE", "Observer", "Pipeline", "apply"]
