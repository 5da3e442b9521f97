"""What has to be done in one step of an engine, from numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..kernels.reference.capacity import clip_window


@dataclass(frozen=True)
class Row:
    """One request in a step.

    Attributes:
        request: its id.
        number: its row in the batch.
        first: place of its first token among the tokens of the batch.
        computed: how many of its tokens were computed before this step.
        scheduled: how many are computed in this step.
        prompt: L, how many tokens its prompt has.
        skip: how many of these it loses.
    """

    request: str
    number: int
    first: int
    computed: int
    scheduled: int
    prompt: int
    skip: int

    @property
    def total(self) -> int:
        return self.computed + self.scheduled

    @property
    def end(self) -> int:
        """Place in the batch after the prompt's last token."""
        return self.first + self.prompt - self.computed

    def window(self, wanted: int) -> int:
        """How many of the last queries score. All of them stay, so a prefix hit ends before."""
        return clip_window(wanted, self.prompt - self.skip, self.prompt)

    @property
    def is_compacted(self) -> bool:
        return self.skip > 0 and self.computed >= self.prompt

    @property
    def ends_prompt(self) -> bool:
        """Whether this step computes the last token of the prompt."""
        return self.skip > 0 and self.computed < self.prompt <= self.total

    @property
    def repeats_outputs(self) -> bool:
        """Whether outputs come in the same step: a preempted request is computed again."""
        return self.ends_prompt and self.total > self.prompt


@dataclass(frozen=True)
class Saving:
    """Queries of a prompt's window that come before the step that ends the prompt.

    start, stop: their places in the batch. is_first: whether they are the first of the window. A
    preempted request starts again.
    """

    request: str
    start: int
    stop: int
    is_first: bool


@dataclass
class Plan:
    """A step's work in every layer.

    Attributes:
        compactions: requests whose prompt ends.
        savings: queries to remember.
        shifts: for each row of the batch, how many tokens have left its cache.
        done: how many compactions layers have reported.
    """

    compactions: list[Row] = field(default_factory=list)
    savings: list[Saving] = field(default_factory=list)
    shifts: list[int] = field(default_factory=list)
    done: int = 0

    @property
    def repeated(self) -> list[Row]:
        """Requests whose outputs see the compacted prompt in the step that compacts it."""
        return [row for row in self.compactions if row.repeats_outputs]


def plan_step(rows: Sequence[Row], window: int) -> Plan:
    """The plan of a step. window: how many of a prompt's last queries score."""
    return Plan(
        compactions=[row for row in rows if row.ends_prompt],
        savings=[saving for row in rows if (saving := _saving(row, window)) is not None],
        shifts=[row.skip if row.is_compacted else 0 for row in rows],
    )


def _saving(row: Row, window: int) -> Saving | None:
    edge = row.prompt - row.window(window)
    if not row.skip or row.total <= edge or row.total >= row.prompt:
        return None
    start = max(edge, row.computed)
    at = row.first - row.computed
    return Saving(row.request, at + start, at + row.total, row.computed <= edge)
