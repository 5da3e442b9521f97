"""What an attention of vLLM is told about a step: rows of compacted requests begin later."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import StarKVError
from ..kernels.reference.star import Layout
from .current import Batch, current_batch
from .images import beginning, layout_of
from .plan import Plan, Row, plan_step
from .refusals import is_compacted
from .rule import Rule

Tensor = torch.Tensor


@dataclass
class Step:
    """The plan of a step, and what layers need to carry it out.

    Attributes:
        plan: the plan.
        blocks: [rows, blocks], where the tokens of each row lie, of the whole prompts.
        block_size: tokens in one of these blocks.
        features: images and videos of a row.
        is_alive: whether a request is still in the engine.
        has_grids: see `current.Batch`.
        again: metadata of outputs whose attention is computed a second time; None: of none.
        again_places: their places in the batch.
    """

    plan: Plan
    blocks: Tensor
    block_size: int
    features: Callable[[int], Any]
    is_alive: Callable[[str], bool]
    has_grids: bool
    again: Any = None
    again_places: Tensor | None = None
    _layouts: dict[str, Layout] = field(default_factory=dict)

    def layout(self, row: Row, device: torch.device) -> Layout:
        """What a prompt's tokens before the stop show: made for the first layer, and kept for the
        others."""
        if row.request not in self._layouts:
            features = self.features(row.number)
            whole = layout_of(row.prompt, features, device, self.has_grids)
            self._layouts[row.request] = beginning(whole, row.stop)
        return self._layouts[row.request]


def rows_of(batch: Batch, rule: Rule, starts: Sequence[int], block: int) -> list[Row]:
    """The rows of a step. starts: where the tokens of each row begin in the batch, and the end."""
    rows = []
    for number, (first, last) in enumerate(itertools.pairwise(starts)):
        prompt, computed = int(batch.prompts[number]), int(batch.computed[number])
        stop = rule.next_stop(computed, prompt)
        gone = left = 0
        if last > first:
            budget = batch.budget(number)
            gone = rule.gone(computed, prompt, block, budget)
            left = rule.skip(stop, block, budget)
        rows.append(
            Row(
                request=batch.requests[number],
                number=number,
                first=first,
                computed=computed,
                scheduled=last - first,
                prompt=prompt,
                gone=gone,
                stop=stop,
                left=left,
            )
        )
    return rows


def shifted(common: Any, shifts: Sequence[int], block: int, longest: int) -> Any:
    """`common` without the first `shifts` tokens of each row, which are whole blocks.

    Slots and positions stay: those of later tokens do not depend on what is gone.
    """
    table = common.block_table_tensor
    on_host = torch.tensor(shifts)
    tokens = on_host.to(table.device, non_blocking=True)
    columns = torch.arange(table.shape[1], device=table.device)
    index = (columns + (tokens // block)[:, None]).clamp_(max=table.shape[1] - 1)
    upper = common.seq_lens_cpu_upper_bound
    return replace(
        common,
        block_table_tensor=table.gather(1, index),
        seq_lens=common.seq_lens - tokens.to(common.seq_lens.dtype),
        max_seq_len=longest,
        seq_lens_cpu_upper_bound=None if upper is None else upper - on_host.to(upper.dtype),
        _num_computed_tokens_cache=None,
    )


def outputs_again(common: Any, rows: Sequence[Row], block: int) -> tuple[Any, Tensor]:
    """Metadata of the outputs that come in the step that compacts their prompt, and their places.

    They see the compacted prompt, as they did when they were computed first.
    """
    device = common.block_table_tensor.device
    lengths = [row.total - row.prompt for row in rows]
    starts = torch.tensor([0, *itertools.accumulate(lengths)]).to(common.query_start_loc_cpu)
    places = torch.cat([torch.arange(row.end, row.first + row.scheduled) for row in rows]).to(
        device
    )
    numbers = torch.tensor([row.number for row in rows])
    totals = torch.tensor([row.total for row in rows])
    prefilling, positions = common.is_prefilling, common.positions
    part = replace(
        common,
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=totals.to(common.seq_lens),
        seq_lens_cpu_upper_bound=totals,
        num_reqs=len(rows),
        num_actual_tokens=len(places),
        max_query_len=max(lengths),
        block_table_tensor=common.block_table_tensor[numbers.to(device)],
        slot_mapping=common.slot_mapping[places],
        positions=None if positions is None else positions[..., places],
        is_prefilling=None if prefilling is None else prefilling[numbers],
        req_idx=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
    longest = max(row.total - row.left for row in rows)
    return shifted(part, [row.left for row in rows], block, longest), places


def compacting_builder(base: type) -> type:
    """A subclass of a backend's builder of metadata."""

    class CompactingBuilder(base):
        def __init__(
            self,
            kv_cache_spec: Any,
            layer_names: list[str],
            vllm_config: Any,
            device: torch.device,
            *args: Any,
            **kwargs: Any,
        ) -> None:
            given = (kv_cache_spec, layer_names, vllm_config, device)
            super().__init__(*given, *args, **kwargs)
            text = getattr(kv_cache_spec, "rule", "")
            self.rule = Rule.loads(text) if text else None
            self.for_outputs: Any = None
            self.make_second = lambda: base(*given, *args, **kwargs)
            self.last = Plan()
            self.fixed: tuple[Tensor, Tensor] | None = None
            mode = vllm_config.compilation_config.cudagraph_mode
            self.has_full_graphs = mode is not None and mode.has_full_cudagraphs()
            self.most_rows = vllm_config.scheduler_config.max_num_seqs
            if self.rule is not None:
                # Else another group's table would come in as it is, not shifted.
                self.supports_update_block_table = False

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
            """Full graphs of decoding alone: prompts are compacted outside of graphs."""
            from vllm.v1.attention.backend import AttentionCGSupport

            support = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            if not is_compacted(kv_cache_spec):
                return support
            return min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda kind: kind.value)

        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any
        ) -> Any:
            common, batch, step = common_attn_metadata, current_batch(), None
            if self.rule is not None and batch is not None:
                common, step = self.planned(common, batch)
            if self.rule is not None and self.has_full_graphs:
                common = self.at_fixed_addresses(common)
            metadata = super().build(common_prefix_len, common, *args, **kwargs)
            metadata.starkv = step
            return metadata

        def planned(self, common: Any, batch: Batch) -> tuple[Any, Step]:
            """The step of a batch, and its metadata with rows that begin later."""
            assert self.rule is not None
            self.check_last()
            block = self.kv_cache_spec.block_size
            count = min(len(batch.requests), common.num_reqs)
            starts = common.query_start_loc_cpu[: count + 1].tolist()
            rows = rows_of(batch, self.rule, starts, batch.block_size(self.layer_names[0]))
            plan = self.last = plan_step(rows, self.rule.config.scoring_window)
            step = Step(
                plan,
                common.block_table_tensor,
                block,
                batch.features,
                batch.is_alive,
                batch.has_grids,
            )
            if plan.repeated:
                part, step.again_places = outputs_again(common, plan.repeated, block)
                if self.for_outputs is None:
                    self.for_outputs = self.second()
                step.again = self.for_outputs.build(0, part)
            if any(plan.shifts):
                longest = max(
                    row.total - shift for row, shift in zip(rows, plan.shifts, strict=True)
                )
                padding = [0] * (common.num_reqs - count)
                common = shifted(common, [*plan.shifts, *padding], block, longest)
            return common, step

        def second(self) -> Any:
            """A builder for outputs whose attention is computed again, in the same workspace."""
            made, workspace = self.make_second(), getattr(self, "_get_workspace_buffer", None)
            if workspace is not None and hasattr(made, "set_workspace_buffer"):
                made.set_workspace_buffer(workspace())
            return made

        def check_last(self) -> None:
            """Raises if the last step left out a compaction: later tokens would be wrong."""
            expected = len(self.last.compactions) * len(self.layer_names)
            if self.last.done != expected:
                raise StarKVError(
                    f"{expected - self.last.done} of {expected} compactions did not run, because "
                    "attention ran inside a CUDA graph; start the engine with --enforce-eager, "
                    "and report this"
                )

        def at_fixed_addresses(self, common: Any) -> Any:
            """What a full CUDA graph reads, in the place where the graph has captured it."""
            table, lengths = common.block_table_tensor, common.seq_lens
            if self.fixed is None:
                most = max(self.most_rows, len(table))
                self.fixed = table.new_zeros(most, table.shape[1]), lengths.new_zeros(most)
            tables, all_lengths = self.fixed
            tables[: len(table)].copy_(table)
            all_lengths[: len(lengths)].copy_(lengths)
            return replace(
                common,
                block_table_tensor=tables[: len(table)],
                seq_lens=all_lengths[: len(lengths)],
            )

    CompactingBuilder.__name__ = f"Compacting{base.__name__}"
    CompactingBuilder.__qualname__ = CompactingBuilder.__name__
    return CompactingBuilder
