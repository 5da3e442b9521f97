"""The published rules, on cases worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starkv_lab.gui import agentnet_bench, android_control, screenspot_pro, screenspot_v2
from starkv_lab.gui.actions import Action
from starkv_lab.gui.agentnet_score import edits

SIZE = (1000, 500)


def click(x, y, kind="click"):
    return Action(kind, (x, y))


@pytest.mark.parametrize(
    ("actions", "score"),
    [
        ([click(10, 20)], 1),  # edges belong to the box
        ([click(30, 60)], 1),
        ([click(20, 40, "double_click")], 1),
        ([click(9.9, 40)], 0),
        ([click(20, 60.1)], 0),
        ([Action("scroll", (20, 40), direction="up")], 0),
        ([click(20, 40), click(20, 40)], 0),
        ([], 0),
    ],
)
def test_grounding(actions, score):
    assert screenspot_v2.score({"box": [10, 20, 30, 60]}, actions, SIZE) == score
    # As shares of the screen: a file half as large as the annotated one.
    target = {"box": [20, 40, 60, 120], "of": [2000, 1000]}
    assert screenspot_pro.score(target, actions, SIZE) == score


SAVE = {"box": [0, 0, 100, 50], "label": "save all"}
BACK = {"box": [0, 0, 20, 20], "label": "go back"}
CLOCK = {"box": [50, 50, 90, 90], "label": "clock"}


@pytest.mark.parametrize(
    ("target", "action", "score"),
    [
        ({"kind": "click", "point": [5, 5], "element": SAVE}, click(99, 49), 1),
        ({"kind": "click", "point": [5, 5], "element": SAVE}, click(101, 49), 0),
        ({"kind": "click", "point": [5, 5], "element": SAVE}, click(5, 5, "long_press"), 0),
        ({"kind": "click", "point": [5, 5], "element": None}, click(5, 5), 0),
        ({"kind": "click", "point": [5, 5], "element": BACK}, Action("back"), 1),
        ({"kind": "click", "point": [5, 5], "element": SAVE}, Action("back"), 0),
        ({"kind": "click", "point": [5, 5], "element": CLOCK}, Action("open_app", text="Clock"), 1),
        ({"kind": "click", "point": [5, 5], "element": CLOCK}, Action("open_app", text=""), 0),
        ({"kind": "back", "elements": [BACK, SAVE]}, Action("back"), 1),
        ({"kind": "back", "elements": [BACK, SAVE]}, click(10, 10), 1),  # the smaller of two
        ({"kind": "back", "elements": [BACK, SAVE]}, click(30, 30), 0),
        ({"kind": "open_app", "text": "Clock", "elements": [CLOCK]}, click(60, 60), 1),
        ({"kind": "open_app", "text": "Clock", "elements": [CLOCK]}, click(10, 10), 0),
        (
            {"kind": "open_app", "text": "Clock", "elements": []},
            Action("open_app", text="Clock"),
            1,
        ),
        ({"kind": "open_app", "text": "Clock", "elements": []}, Action("open_app", text="Cloc"), 0),
        ({"kind": "type", "text": "Hi"}, Action("type", text="Hi"), 1),
        ({"kind": "type", "text": "Hi"}, Action("type", text="hi"), 0),
        ({"kind": "scroll", "direction": "up"}, Action("scroll", direction="up"), 1),
        ({"kind": "scroll", "direction": "up"}, Action("scroll", direction="down"), 0),
        ({"kind": "home"}, Action("home"), 1),
        ({"kind": "wait"}, Action("home"), 0),
    ],
)
def test_android_control(target, action, score):
    assert android_control.score(target, [action], SIZE) == score
    assert android_control.score(target, [action, action], SIZE) == 0
    assert android_control.score(target, [], SIZE) == 0


def at(kind, x, y, bbox=None):
    boxes = [] if bbox is None else [{"rel_bbox": bbox}]
    position = {"position": {"x": x, "y": y}}
    return {"type": kind, "params": position, "metadata": {"bboxes": boxes}}


def act(kind, **params):
    return {"type": kind, "params": params, "metadata": {}}


FAR = math.exp(-120 * (0.1 - 0.01 * 2**0.5))


@pytest.mark.parametrize(
    ("truth", "actions", "score"),
    [
        ([at("click", 0.5, 0.5)], [click(500, 250)], 1),
        ([at("click", 0.5, 0.5)], [click(509, 254)], 1),  # near enough
        ([at("click", 0.5, 0.5)], [click(600, 250)], pytest.approx(FAR)),
        ([at("click", 0.5, 0.5, [0.4, 0.4, 0.3, 0.2])], [click(700, 300)], 1),
        ([at("click", 0.5, 0.5)], [click(500, 250, "right_click")], 0),
        ([at("doubleClick", 0.5, 0.5)], [click(500, 250, "double_click")], 1),
        # More than was asked for: half.
        ([at("click", 0.5, 0.5)], [click(500, 250), Action("wait")], 0.5),
        # A mean by type of action, then over types.
        ([at("click", 0.5, 0.5), act("write", text="ab")], [click(500, 250)], 0.5),
        (
            [at("click", 0.5, 0.5), at("click", 0.1, 0.1), act("write", text="ab")],
            [click(500, 250), click(900, 250), Action("type", text="ab")],
            pytest.approx(0.75),
        ),
        # The first action has to be one of those asked for.
        ([act("write", text="ab")], [click(500, 250), Action("type", text="ab")], 0),
        ([act("write", text="Hello")], [Action("type", text=" hello\n")], 1),
        ([act("write", text="hello")], [Action("type", text="help")], pytest.approx(0.6 / 0.8)),
        ([act("write", text="12345")], [Action("type", text="1234")], 1),
        # Enter belongs to what was written before.
        (
            [act("write", text="ab"), act("press", keys=["enter"])],
            [Action("type", text="ab"), Action("press", keys=("Enter",))],
            1,
        ),
        (
            [act("write", text="ab\n")],
            [Action("type", text="ab"), Action("press", keys=("enter",))],
            1,
        ),
        ([act("hotkey", keys=["ctrl", "C"])], [Action("hotkey", keys=("Ctrl", "c"))], 1),
        ([act("hotkey", keys=["ctrl", "c"])], [Action("hotkey", keys=("c", "ctrl"))], 0),
        ([act("press", keys=["down", "down"])], [Action("press", keys=("down",))], 0),
        ([act("scroll", amount=-6)], [Action("scroll", direction="down", amount=3)], 0.5),
        ([act("scroll", amount=-6)], [Action("scroll", direction="up", amount=6)], 0),
        ([act("scroll", amount=-6)], [Action("scroll", direction="down")], 1),
        (
            [at("moveTo", 0.5, 0.5), act("scroll", amount=-6)],
            [Action("scroll", (500, 250), direction="down", amount=6)],
            1,
        ),
        ([act("terminate", status="success")], [Action("finish", text="success")], 1),
        ([act("terminate", status="success")], [Action("finish", text="failure")], 0),
        ([at("click", 0.5, 0.5)], [], 0),
    ],
)
def test_agentnet_bench(truth, actions, score):
    assert agentnet_bench.score([truth], actions, SIZE) == score
    # An alternative that is better counts; one that is worse does not.
    assert agentnet_bench.score([truth, [act("press", keys=["f13"])]], actions, SIZE) == score
    assert agentnet_bench.score([[act("press", keys=["f13"])], truth], actions, SIZE) == score


@pytest.mark.parametrize(
    ("left", "right", "number"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_edits(left, right, number):
    assert edits(left, right) == edits(right, left) == number


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_edits_are_a_distance(a, b, c):
    assert edits(a, c) <= edits(a, b) + edits(b, c)
    assert (edits(a, b) == 0) == (a == b)
    assert edits(a, b) <= max(len(a), len(b))


@given(
    st.lists(st.builds(click, st.floats(0, 1000), st.floats(0, 500)), min_size=1, max_size=3),
)
def test_what_the_demonstration_did_scores_full_marks(actions):
    step = {
        "ground_truth_actions": [
            at("click", a.point[0] / SIZE[0], a.point[1] / SIZE[1]) for a in actions
        ]
    }
    done = agentnet_bench.actions_of(step, SIZE)
    assert agentnet_bench.score([step["ground_truth_actions"]], done, SIZE) == pytest.approx(1)
