"""What has to be done in one step of an engine, from numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import StarKVError
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
        gone: how many of these have left its cache before this step.
        stop: how many are there when it is compacted next: L, or fewer.
        left: how many have left its cache then.
    """

    request: str
    number: int
    first: int
    computed: int
    scheduled: int
    prompt: int
    gone: int
    stop: int
    left: int

    @property
    def total(self) -> int:
        return self.computed + self.scheduled

    @property
    def end(self) -> int:
        """Place in the batch after the last token before the stop."""
        return self.first + self.stop - self.computed

    def window(self, wanted: int) -> int:
        """How many of the last queries score. All of them stay, so a prefix hit ends before."""
        return clip_window(wanted, self.stop - self.left, self.stop - self.gone)

    @property
    def drops(self) -> bool:
        """Whether tokens leave at the stop."""
        return self.left > self.gone

    @property
    def is_compacted(self) -> bool:
        """Whether this step reaches the stop, and tokens leave there."""
        return self.drops and self.computed < self.stop <= self.total

    @property
    def repeats_outputs(self) -> bool:
        """Whether outputs come in the same step: a preempted request is computed again."""
        return self.is_compacted and self.total > self.stop == self.prompt


@dataclass(frozen=True)
class Saving:
    """Queries of a window that come before the step that compacts the prompt.

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
        compactions: requests that are compacted.
        savings: queries to remember.
        ended: requests whose prompt ends, and which had lost tokens before.
        shifts: for each row of the batch, how many tokens have left its cache.
        done: how many compactions layers have reported.
    """

    compactions: list[Row] = field(default_factory=list)
    savings: list[Saving] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    shifts: list[int] = field(default_factory=list)
    done: int = 0

    @property
    def repeated(self) -> list[Row]:
        """Requests whose outputs see the compacted prompt in the step that compacts it."""
        return [row for row in self.compactions if row.repeats_outputs]


def plan_step(rows: Sequence[Row], window: int) -> Plan:
    """The plan of a step. window: how many of the last queries before a stop score.

    Raises:
        StarKVError: a step goes on after a stop inside of a prompt.
    """
    for row in rows:
        if row.drops and row.computed < row.stop < min(row.total, row.prompt):
            raise StarKVError(
                f"{row} goes on after {row.stop} tokens, where it should have been compacted; "
                "leave out prefill_chunk_size, and report this"
            )
    return Plan(
        compactions=[row for row in rows if row.is_compacted],
        savings=[saving for row in rows if (saving := _saving(row, window)) is not None],
        ended=[row.request for row in rows if row.gone and row.computed < row.prompt <= row.total],
        shifts=[row.gone for row in rows],
    )


def _saving(row: Row, window: int) -> Saving | None:
    edge = row.stop - row.window(window)
    if not row.drops or row.total <= edge or row.total >= row.stop:
        return None
    start = max(edge, row.computed)
    at = row.first - row.computed
    return Saving(row.request, at + start, at + row.total, row.computed <= edge)
