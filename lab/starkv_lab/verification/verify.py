"""Checks on a user's own model that its compressed cache computes what it should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import starkv_compile
from starkv_compile import OptionError, Report, StarKVConfig, UnsupportedModel

from .checks import Check, Distances, kept_tokens, logits_checks
from .kept import Expected
from .oracle import Oracle
from .sessions import Content, Run, run_session


@dataclass(frozen=True)
class Verification:
    """Holds what `verify` found.

    replies: token ids of the compressed session's replies. report: the report on that session.
    """

    checks: tuple[Check, ...]
    replies: tuple[tuple[int, ...], ...]
    report: Report

    @property
    def right(self) -> bool:
        """Whether no check found a fault."""
        return all(check.verdict != "WRONG" for check in self.checks)


def verify(
    model: Any,
    processor: Any,
    turns: Sequence[Content],
    config: StarKVConfig | None = None,
    *,
    tokens: int = 16,
    say: Callable[[str], Any] = lambda text: None,
) -> Verification:
    """Runs one session with and without starkv, and compares the logits of all its tokens.

    The reference is the uncompiled model on a full cache, with an attention that does not see what
    the compressed cache has dropped. All runs get the replies of the compressed one. So they differ
    by rounding alone, unless something is wrong.

    Args:
        model: a Hugging Face model that is not compiled, in evaluation mode.
        processor: its processor.
        turns: the turns of the session, as `AgentSession.step` takes them.
        config: the configuration to check. None: `StarKVConfig(inner="eager")`.
        tokens: most tokens of each reply.
        say: called with a few words before each run.

    Raises:
        OptionError: `config` keeps everything or rounds what it keeps, there is no turn, `tokens`
            is less than 1, or the model is compiled with starkv already.
        UnsupportedModel: the model cannot be compressed, or the session kept everything.
        StarKVError: as of `AgentSession.step`.
    """
    config = config or StarKVConfig(inner="eager")
    _check_arguments(model, turns, config, tokens)
    expected: list[Expected] = []
    observer = None
    if config.inner == "eager":

        def observer(inputs: Any) -> None:
            expected.append(Expected.of(config.policy, inputs))

    say("running the session with a compressed cache")
    with starkv_compile.compiled(model, config, observer=observer):
        ours = run_session(model, processor, turns, tokens)
        report = starkv_compile.report(model)
    stored = [layer for call in ours.prompts for layer in ours.stored[call].values()]
    if not any(layer.dropped for layer in stored):
        raise UnsupportedModel(
            f"this session dropped no token, so there is nothing to check; give more screenshots "
            f"or a smaller budget, if the report names no other reason:\n{report}"
        )

    def again(after_call: Callable[[Run], Any] = lambda run: None) -> Run:
        return run_session(model, processor, turns, tokens, ours.replies, after_call)

    say("running it without starkv")
    full = again()
    say("running it with budget=1.0")
    with starkv_compile.compiled(model, StarKVConfig(budget=1.0, inner=config.inner)):
        whole = again()
    try:
        say("running it twice without starkv, with the dropped tokens hidden")
        hidden = [_hidden(model, ours, again, exact) for exact in (False, True)]
        why = ""
    except UnsupportedModel as error:
        hidden, why = [], str(error)
    distances = Distances.of(ours, full, whole, hidden, model.dtype, config.inner == "eager")
    unchanged, first, later = logits_checks(distances, len(ours.logits), why)
    kept = kept_tokens(expected, stored, config)
    replies = tuple(tuple(reply) for reply in ours.replies)
    return Verification((unchanged, kept, first, later), replies, report)


def _hidden(model: Any, ours: Run, again: Callable[..., Run], exact: bool) -> Run:
    oracle = Oracle(ours, exact)
    with oracle.inside(model):
        return again(oracle.next_call)


def _check_arguments(
    model: Any, turns: Sequence[Content], config: StarKVConfig, tokens: int
) -> None:
    if config.keeps_everything:
        raise OptionError("budget=1.0 keeps everything, so there is nothing to check; give less")
    if config.nbits != 16:
        raise OptionError(
            f"nbits={config.nbits}: the check compares with kept tokens that are not rounded; "
            "leave out nbits"
        )
    if not turns:
        raise OptionError("turns is empty: give at least one turn, with a screenshot and a text")
    if tokens < 1:
        raise OptionError(f"tokens={tokens}: expected at least 1 token of each reply")
    if model.training:
        raise OptionError("the model is in training mode, which compresses nothing: model.eval()")
    try:
        starkv_compile.report(model)
    except UnsupportedModel:
        return
    raise OptionError(
        "the model is compiled with starkv already, but the check also runs it without: call "
        "starkv_compile.undo(model) first"
    )
