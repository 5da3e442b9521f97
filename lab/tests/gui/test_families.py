"""Prompts and grammars: what a family writes it reads back; what is no answer is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starkv_lab.gui.actions import Action, UnparsableAnswer
from starkv_lab.gui.families import FAMILIES, SHIPPED_AGENT, UI_TARS, family_of, opencua, ui_tars
from starkv_lab.gui.families.qwen_vl import ABSOLUTE, QWEN2_5_VL, QWEN3_VL, RELATIVE
from starkv_lab.gui.samples import Past, Sample
from starkv_lab.gui.screens import Screen

from starkv_compile import OptionError

SCREEN = Screen((1920, 1080), (1932, 1092))

points = st.tuples(st.floats(0, 1920), st.floats(0, 1080))
words = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r"), max_size=30)
pointed = st.builds(
    Action,
    st.sampled_from(["click", "double_click", "right_click"]),
    points,
)
typed = st.builds(Action, st.just("type"), text=words)
keys = st.lists(st.sampled_from(["ctrl", "shift", "a", "enter", "f5"]), min_size=2, max_size=3)
hotkeys = st.builds(Action, st.just("hotkey"), keys=keys.map(tuple))
pressed = st.builds(Action, st.just("press"), keys=st.just(("enter",)))
scrolled = st.builds(
    Action,
    st.just("scroll"),
    points,
    direction=st.sampled_from(["up", "down"]),
    amount=st.integers(1, 90).map(float),
)
ended = st.builds(Action, st.just("finish"), text=st.sampled_from(["success", "failure"]))
anything = st.one_of(pointed, typed, hotkeys, pressed, scrolled, ended)


def same(read, meant, step, amount=True):
    """Equal, a point within half a `step` in x and y: coordinates are written as whole numbers."""
    assert (read.kind, read.text, read.keys) == (meant.kind, meant.text, meant.keys)
    assert read.direction == meant.direction
    if amount:
        assert read.amount == meant.amount
    assert (read.point is None) == (meant.point is None)
    if meant.point is not None:
        for got, want, unit in zip(read.point, meant.point, step, strict=True):
            assert abs(got - want) <= unit / 2 + 1e-6


PIXEL = (1920 / 1932, 1080 / 1092)


@given(st.one_of(pointed, typed, hotkeys, pressed, scrolled))
def test_ui_tars_reads_what_it_writes(action):
    written = ui_tars.write([action], SCREEN)
    [read] = UI_TARS.parse(f"Thought: so.\nAction: {written}", SCREEN)
    same(read, action, PIXEL, amount=False)


@given(st.lists(anything, min_size=1, max_size=3))
def test_opencua_reads_what_it_writes(actions):
    written = opencua.write(actions, SCREEN)
    read = opencua.parse(f"## Code:\n```python\n{written}\n```", SCREEN)
    assert len(read) == len(actions)
    for got, want in zip(read, actions, strict=True):
        same(got, want, PIXEL)


@pytest.mark.parametrize(("scale", "step"), [(ABSOLUTE, PIXEL), (RELATIVE, (1.92, 1.08))])
@given(action=anything)
def test_qwen_reads_what_it_writes(scale, step, action):
    [read] = scale.parse("I see.\n" + scale.call(action, SCREEN), SCREEN)
    same(read, action, step)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
@given(
    answer=words
    | st.text(st.sampled_from("click(){}[]<>point/'\"=,\\:tool_call Action.x=1 y"), max_size=80)
)
def test_no_answer_breaks_a_parser(family, answer):
    try:
        actions = family.parse(answer, SCREEN)
    except UnparsableAnswer:
        return
    assert actions
    assert all(isinstance(action, Action) for action in actions)


CENTRE = (960.0, 540.0)
MIDDLE = "(966,546)"  # the same in the pixels that the model saw


@pytest.mark.parametrize(
    "call",
    [
        f"click(start_box='<|box_start|>{MIDDLE}<|box_end|>')",
        f"click(start_box='{MIDDLE}')",
        "click(point='<point>966 546</point>')",
        "click(start_box='(900,500,1032,592)')",
        "click(start_box='[900, 500, 1032, 592]')",
        'click(start_box="(966.0, 546.0)")',
    ],
)
def test_ui_tars_writes_points_in_several_ways(call):
    [action] = UI_TARS.parse(f"Thought: There.\nAction: {call}", SCREEN)
    assert action.kind == "click"
    assert math.dist(action.point, CENTRE) < 1e-6


def test_ui_tars_on_phones_and_several_calls():
    def read(calls):
        return UI_TARS.parse(f"Action: {calls}", SCREEN)

    assert read("open_app(app_name='Clock')") == (Action("open_app", text="Clock"),)
    assert read("press_back()") == (Action("back"),)
    assert read("scroll(direction='up')") == (Action("scroll", direction="up"),)
    assert read("finished(content='it's done')") == (Action("finish", text="success"),)
    assert read("type(content='it\\'s\\n')\n\nhotkey(key='ctrl s')") == (
        Action("type", text="it's\n"),
        Action("hotkey", keys=("ctrl", "s")),
    )
    start, end = read(f"drag(start_box='{MIDDLE}', end_box='(0,0)')")
    assert (start.kind, end) == ("move", Action("drag_to", (0.0, 0.0)))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("click(start_box='(1,2)')", "not one 'Action:'"),
        ("Action: click(start_box='(1,2)')\nAction: wait()", "not one 'Action:'"),
        ("Action: click(start_box='(1,2,3)')", "point"),
        ("Action: click(start_box='(1,2) or so')", "point"),
        ("Action: click()", "without a point"),
        ("Action: click(start_box='(1,2)'", "no call"),
        ("Action: jump()", "unknown action 'jump'"),
        ("Action: scroll(direction='in')", "scroll to 'in'"),
        ("Action: hotkey(key='')", "without a key"),
        (f"Action: drag(start_box='{MIDDLE}')", "without an end"),
        ("Action: open_app()", "without its text"),
        ("Action: wait() and see", "no call"),
    ],
)
def test_ui_tars_refuses(answer, why):
    with pytest.raises(UnparsableAnswer, match=why.replace("(", r"\(")):
        UI_TARS.parse(answer, SCREEN)


def tool(arguments, name="computer_use"):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_qwens_count_in_pixels_or_thousandths():
    [absolute] = QWEN2_5_VL.parse(
        tool('{"action": "left_click", "coordinate": [966, 546]}'), SCREEN
    )
    [relative] = QWEN3_VL.parse(tool('{"action": "left_click", "coordinate": [500, 500]}'), SCREEN)
    assert math.dist(absolute.point, CENTRE) < 1e-6
    assert math.dist(relative.point, CENTRE) < 1e-6


def test_qwen_on_phones():
    def read(arguments):
        [action] = QWEN3_VL.parse(tool(arguments, "mobile_use"), SCREEN)
        return action

    up = read('{"action": "swipe", "coordinate": [500, 800], "coordinate2": [500, 200]}')
    assert (up.kind, up.direction) == ("scroll", "down")
    left = read('{"action": "swipe", "coordinate": [800, 500], "coordinate2": [200, 510]}')
    assert left.direction == "right"
    assert read('{"action": "system_button", "button": "Back"}') == Action("back")
    assert read('{"action": "open", "text": "Clock"}') == Action("open_app", text="Clock")
    assert read('{"action": "click", "coordinate": [0, 0]}') == Action("click", (0.0, 0.0))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("left_click at 3, 4", "no <tool_call>"),
        ('<tool_call>{"name": "computer_use"', "no <tool_call>"),
        (tool("{}"), "KeyError"),
        (tool("[]"), "TypeError"),
        (tool('{"action": "left_click"}'), "without a point"),
        (tool('{"action": "left_click", "coordinate": ["1", 2]}'), "coordinate"),
        (tool('{"action": "left_click", "coordinate": [1, 2, 3]}'), "coordinate"),
        (tool('{"action": "left_click", "coordinate": [NaN, 2]}'), "coordinate"),
        (tool('{"action": "scroll", "pixels": 0}'), "scroll by 0"),
        (tool('{"action": "type", "text": 5}'), "text=5"),
        (tool('{"action": "fly"}'), "unknown action 'fly'"),
        (f"<tool_call>{'[' * 10**5}</tool_call>", "no call of a tool"),
        (tool('{"action": "wait"}', "browser"), "tool 'browser'"),
    ],
)
def test_qwen_refuses(answer, why):
    with pytest.raises(UnparsableAnswer, match=why):
        QWEN2_5_VL.parse(answer, SCREEN)


def test_opencua_reads_published_forms():
    answer = """## Action:\nScroll the list.\n\n## Code:\n```python
pyautogui.moveTo(x=966, y=546)
pyautogui.scroll(-5)
pyautogui.hotkey(['command', 'c'])
pyautogui.press(keys=['enter'])
pyautogui.click(966, 546, clicks=2)
computer.triple_click(x=0, y=0)
computer.terminate(status='success')\n```"""
    actions = opencua.parse(answer, SCREEN)
    assert [action.kind for action in actions] == [
        "move",
        "scroll",
        "hotkey",
        "press",
        "double_click",
        "triple_click",
        "finish",
    ]
    assert actions[1] == Action("scroll", direction="down", amount=5)
    assert actions[2].keys == ("ctrl", "c")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("Click on Save.", "no line"),
        ("pyautogui.click(x=a, y=2)", "plain values"),
        ("pyautogui.click(x=1", "plain values"),
        ("pyautogui.click(x=True, y=2)", "click at"),
        ("pyautogui.click", "no call"),
        ("pyautogui.sleep(2)", "unknown call"),
        ("pyautogui.write(5)", "message=5"),
        ("pyautogui.scroll(0)", "scroll by 0"),
        ("pyautogui.click(x=1, y=2, button='side')", "action ''"),
        ("pyautogui.press()", "without a key"),
        ("pyautogui.click(x=1, y=2, clicks=[2])", "clicks=.2."),
        ("pyautogui.click(x=1, y=2, button=['left'])", "button=..left"),
        ("pyautogui.click(x=1, y=2, clicks=2, button='right')", "2 clicks with the right button"),
    ],
)
def test_opencua_refuses(answer, why):
    with pytest.raises(UnparsableAnswer, match=why):
        opencua.parse(answer, SCREEN)


def test_the_shipped_agent_answers_in_thousandths():
    [action] = SHIPPED_AGENT.parse("click ( x=500 y=500 )", SCREEN)
    assert action == Action("click", CENTRE)
    with pytest.raises(UnparsableAnswer, match="not 'click"):
        SHIPPED_AGENT.parse("it is red star .", SCREEN)


def acted(size):
    return (Action("click", (size[0] / 2, size[1] / 2)),)


def trajectory(steps, screens, setting="desktop"):
    past = [Past(f"did {n}", acted) for n in range(steps)]
    return Sample(
        id="t",
        setting=setting,
        instruction="Save it",
        screens=[b""] * screens,
        target=None,
        group={},
        past=past,
    )


def flat(chat):
    """All text of a chat, a picture as <image>."""
    parts = []
    for message in chat:
        content = message["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts += [part.get("text", "<image>") for part in content]
    return parts


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
@pytest.mark.parametrize(("steps", "screens"), [(0, 1), (2, 3), (7, 3)])
def test_a_chat_has_all_screens_and_all_that_was_done(family, steps, screens):
    chat = family.messages(trajectory(steps, screens), [SCREEN] * screens)
    said = flat(chat)
    assert said.count("<image>") == screens
    whole = "\n".join(said)
    assert "Save" in whole or family is SHIPPED_AGENT
    if family is not SHIPPED_AGENT:
        assert [f"did {n}" in whole for n in range(steps)] == [True] * steps
        assert "did" not in (said[-1] if screens > 1 else "")


def test_what_was_done_is_told_in_the_familys_own_grammar():
    told = "\n".join(flat(UI_TARS.messages(trajectory(1, 2), [SCREEN] * 2)))
    assert "Thought: did 0\nAction: click(start_box='<|box_start|>(966,546)<|box_end|>')" in told
    told = "\n".join(flat(QWEN3_VL.messages(trajectory(1, 2), [SCREEN] * 2)))
    assert '"action": "left_click", "coordinate": [500, 500]' in told
    assert "1000x1000" in told
    told = "\n".join(flat(QWEN2_5_VL.messages(trajectory(1, 2), [SCREEN] * 2)))
    assert '"action": "left_click", "coordinate": [966, 546]' in told
    assert "1932x1092" in told


def test_a_phone_has_other_actions_than_a_desktop():
    phone = flat(UI_TARS.messages(trajectory(0, 1, "phone"), [SCREEN]))
    assert "open_app(" in phone[0]
    assert "hotkey(" not in phone[0]
    assert "mobile_use" in flat(QWEN3_VL.messages(trajectory(0, 1, "phone"), [SCREEN]))[0]


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("ByteDance-Seed/UI-TARS-1.5-7B", "ui-tars"),
        ("xlangai/OpenCUA-7B", "opencua"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5-vl"),
        ("/models/Qwen3-VL-8B-Instruct", "qwen3-vl"),
        ("shipped", "agent"),
    ],
)
def test_a_name_tells_the_family(checkpoint, name):
    assert family_of(checkpoint).name == name


@pytest.mark.parametrize(
    "checkpoint", ["ByteDance-Seed/UI-TARS-7B-DPO", "UI-TARS-2B-SFT", "xlangai/OpenCUA-Qwen2-7B"]
)
def test_a_checkpoint_with_other_coordinates_is_refused(checkpoint):
    with pytest.raises(OptionError, match=r"gives coordinates as .*Give one of these checkpoints"):
        family_of(checkpoint)


def test_what_tells_no_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(OptionError, match="give --family, one of ui-tars"):
        family_of(str(tmp_path))
    assert family_of(str(tmp_path), "ui-tars") is UI_TARS
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    assert family_of(str(tmp_path)) is QWEN3_VL
    with pytest.raises(OptionError, match="family 'tars': expected one of ui-tars"):
        family_of("shipped", "tars")
