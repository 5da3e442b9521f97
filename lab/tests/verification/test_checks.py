"""Verdicts from made-up measurements."""

import pytest
import torch
from starkv_lab.verification.checks import Distances, kept_tokens, logits_checks
from starkv_lab.verification.kept import Expected, agreement
from starkv_lab.verification.sessions import Run, Stored

from starkv_compile import StarKVConfig

EAGER = StarKVConfig(inner="eager")


def expected(scores, selected):
    rows = torch.tensor(scores, dtype=torch.float64)
    places = torch.arange(rows.shape[1] + 2).expand(len(rows), -1)
    return Expected(rows, places, selected)


def stored(*rows):
    return Stored(torch.tensor([rows]), later=6)


def test_the_same_tokens():
    scores = [[5.0, 1.0, 4.0, 2.0], [1.0, 2.0, 3.0, 4.0]]
    found = agreement([expected(scores, 2)], [stored([0, 2, 4, 5], [2, 3, 4, 5])])
    assert (found.compared, found.same, found.gap) == (4, 4, 0.0)


def test_a_token_near_the_threshold_may_be_another():
    near = expected([[5.0, 1.0, 4.0, 4.0 - 1e-6]], 2)
    check = kept_tokens([near], [stored([0, 3, 4, 5])], EAGER)
    assert check.verdict == "right"
    assert "1 of 2" in check.detail
    far = expected([[5.0, 1.0, 4.0, 3.0]], 2)
    assert kept_tokens([far], [stored([0, 3, 4, 5])], EAGER).verdict == "WRONG"


def test_layers_that_kept_everything_are_not_compared():
    one = expected([[5.0, 1.0]], 1)
    check = kept_tokens([one], [Stored(None, 0), stored([0, 2, 3])], EAGER)
    assert check.verdict == "not checked"
    assert "the others kept everything" in check.detail


def run(*logits):
    return Run(logits=[torch.tensor(each) for each in logits])


def distances(ours, full=None, whole=None, hidden=(), dtype=torch.float32, eager=True):
    full = full or run([1.0, -1.0], [2.0, -2.0])
    return Distances.of(ours, full, whole or full, hidden, dtype, eager)


def judged(found, calls=2):
    return [check.verdict for check in logits_checks(found, calls, "no reference")]


def test_later_tokens_are_judged_by_what_rounding_explains():
    ours = run([1.0, -1.0], [3.0, -2.0])
    near, same = run([1.0, -1.0], [3.00001, -2.0]), run([1.0, -1.0], [3.0, -2.0])
    assert judged(distances(ours, hidden=(near, same))) == ["right", "right", "right"]
    far = run([1.0, -1.0], [3.01, -2.0])
    assert judged(distances(ours, hidden=(far, far))) == ["right", "right", "WRONG"]
    assert judged(distances(ours)) == ["right", "right", "not checked"]


def test_a_first_token_of_its_own_is_wrong():
    ours = run([1.0, -1.1], [3.0, -2.0])
    assert judged(distances(ours, hidden=(ours, ours))) == ["right", "WRONG", "right"]


def test_rounding_that_hides_the_dropped_tokens_proves_nothing():
    ours = run([1.0, -1.0], [2.001, -2.0])
    rounded = run([1.0, -1.0], [2.002, -2.0])
    found = distances(ours, hidden=(ours, rounded), dtype=torch.bfloat16)
    checks = logits_checks(found, 2, "")
    assert checks[2].verdict == "not checked"
    assert "float32" in checks[2].detail


@pytest.mark.parametrize(("eager", "verdict"), [(True, "WRONG"), (False, "right")])
def test_a_backend_may_round_each_operation(eager, verdict):
    ours = run([1.0, -1.0], [3.0, -2.0])
    near = run([1.0, -1.0], [3.00001, -2.0])
    whole = run([1.00004, -1.0], [2.0, -2.0])
    found = distances(ours, whole=whole, hidden=(near, ours), eager=eager)
    assert judged(found)[0] == verdict
