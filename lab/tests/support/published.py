"""The four data sets in their published form, with screens of the demo agent's world.

So the agent can take a real model's place and be right: an instruction is "click red star".
"""

import gzip
import io
import json
import random
import struct

from starkv_lab.agent.render import CELL, screenshot
from starkv_lab.agent.vocabulary import ICON_COLORS
from starkv_lab.agent.world import sample_episode
from starkv_lab.gui.wire import masked_crc


def episode(seed, frames=1):
    """An episode, and an element that all its frames show."""
    rng = random.Random(f"gui-{seed}")
    while True:
        made = sample_episode(rng, frames, first_step=1)
        common = set.intersection(*(set(frame.elements) for frame in made.frames))
        if common:
            return made, rng.choice(sorted(common))


def box(made, name, frame=0):
    """[left, top, right, bottom] of an element's cell, in pixels."""
    row, column = made.frames[frame].elements[name]
    return [column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL]


def kind(name):
    return "icon" if name[0] in ICON_COLORS else "text"


def save(made, frame, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    screenshot(made, frame).save(path)


def screenspot_v2(folder, count=2):
    """`count` samples for each platform."""
    sources = {"mobile": "android", "desktop": "windows", "web": "shop"}
    for platform, source in sources.items():
        records = []
        for number in range(count):
            made, name = episode(f"{platform}-{number}")
            file = f"{platform}_{number}.png"
            save(made, 0, folder / "screenspotv2_image" / file)
            left, top, right, bottom = box(made, name)
            records.append(
                {
                    "img_filename": file,
                    "bbox": [left, top, right - left, bottom - top],
                    "instruction": "click " + " ".join(name),
                    "data_type": kind(name),
                    "data_source": source,
                }
            )
        path = folder / f"screenspot_{platform}_v2.json"
        path.write_text(json.dumps(records, indent=2))
    return folder


def screenspot_pro(folder, count=3):
    """Two applications of `count` samples."""
    (folder / "annotations").mkdir(parents=True)
    for application, group in (("blender", "Creative"), ("vscode", "Dev")):
        records = []
        for number in range(count):
            made, name = episode(f"{application}-{number}")
            file = f"{application}/screenshot_{number}.png"
            save(made, 0, folder / "images" / file)
            records.append(
                {
                    "img_filename": file,
                    "bbox": box(made, name),
                    "instruction": "click " + " ".join(name),
                    "instruction_cn": "点击",
                    "id": f"{application}_{number}",
                    "application": application,
                    "platform": "windows",
                    "img_size": [made.columns * CELL, made.rows * CELL],
                    "ui_type": kind(name),
                    "group": group,
                }
            )
        path = folder / "annotations" / f"{application}_windows.json"
        path.write_text(json.dumps(records, ensure_ascii=False))
    return folder


def android_sample(folder, count=3):
    """UGround's sample: `count` clicks that can be right, and a scroll."""
    records = []
    for number in range(count + 1):
        made, name = episode(f"android-{number}")
        file = f"{number}/screenshot_0.png"
        save(made, 0, folder / file)
        left, top, right, bottom = box(made, name)
        click = {"action_type": "click", "x": (left + right) // 2, "y": (top + bottom) // 2}
        scroll = {"action_type": "scroll", "direction": "down"}
        tree = [
            {
                "text": " ".join(element),
                "content_description": None,
                "bbox_pixels": dict(zip(("x_min", "y_min", "x_max", "y_max"), where, strict=True)),
            }
            for element in made.frames[0].elements
            for where in [box(made, element)]
        ]
        records.append(
            {
                "episode_id": 100 + number,
                "step": 0,
                "goal": "click " + " ".join(name),
                "step_instruction": "click " + " ".join(name),
                "previous_actions": [],
                "screenshot": file,
                "action": click if number < count else scroll,
                "accessibility_tree": tree,
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "500_steps.json").write_text(json.dumps(records, indent=1))
    return folder


def agentnet_bench(folder, steps=3):
    """Two trajectories of `steps` clicks, and at the end one that writes."""
    for task in ("s_1a", "s_2b"):
        made, name = episode(f"agentnet-{task}", steps)
        width, height = made.columns * CELL, made.rows * CELL
        records = []
        for number in range(steps):
            file = f"{task}_{number}.png"
            save(made, number, folder / "images" / file)
            left, top, right, bottom = box(made, name, number)
            x, y = (left + right) / 2 / width, (top + bottom) / 2 / height
            click = {
                "type": "click",
                "params": {"position": {"x": round(x, 4), "y": round(y, 4)}},
                "metadata": {
                    "bboxes": [
                        {
                            "category_id": 1,
                            "rel_bbox": [left / width, top / height, 32 / width, 32 / height],
                        }
                    ]
                },
            }
            write = {"type": "write", "params": {"text": "SAVE\n"}, "metadata": {}}
            records.append(
                {
                    "step_num": number,
                    "image": file,
                    "action": f"pyautogui.click(x={x:.4f}, y={y:.4f})",
                    "inner_monologue": {"low_level_instruction": "Click the " + " ".join(name)},
                    "ground_truth_actions": [click if task == "s_1a" or number == 0 else write],
                    "alternative_options": [],
                }
            )
        trajectory = {
            "task_id": task,
            "user_task_description": "click",
            "high_level_task_description": "click " + " ".join(name),
            "steps": records,
        }
        (folder / f"{task}.json").write_text(json.dumps(trajectory, indent=2))
    return folder


def android_records(folder, episodes=2, steps=2):
    """TFRecords as google-research publishes them: the last episode is of the training split."""
    folder.mkdir(parents=True, exist_ok=True)
    data = b""
    for number in range(episodes + 1):
        made, name = episode(f"records-{number}", steps)
        actions = []
        for frame in range(steps):
            left, top, *_ = box(made, name, frame)
            actions.append({"action_type": "click", "x": left + 5, "y": top + 5})
        shots = []
        for frame in [*range(steps), steps - 1]:
            png = io.BytesIO()
            screenshot(made, frame).save(png, "PNG")
            shots.append(png.getvalue())
        trees = [_forest(made, frame) for frame in [*range(steps), steps - 1]]
        text = ["click " + " ".join(name)]
        data += _record(
            _example(
                episode_id=[number],
                goal=[t.encode() for t in text],
                screenshots=shots,
                accessibility_trees=trees,
                screenshot_widths=[made.columns * CELL] * (steps + 1),
                screenshot_heights=[made.rows * CELL] * (steps + 1),
                actions=[json.dumps(action).encode() for action in actions],
                step_instructions=[t.encode() for t in text * steps],
            )
        )
    (folder / "android_control-00000-of-00001").write_bytes(gzip.compress(data))
    test = list(range(episodes))
    splits = {"train": [episodes], "validation": [], "test": test}
    (folder / "splits.json").write_text(json.dumps(splits))
    parts = {
        "IDD": test[:1],
        "app_unseen": test[1:],
        "task_unseen": [],
        "category_unseen": test[1:],
    }
    (folder / "test_subsplits.json").write_text(json.dumps(parts))
    return folder


def _record(contents):
    head = struct.pack("<Q", len(contents))
    sums = [struct.pack("<I", masked_crc(part)) for part in (head, contents[:64])]
    return head + sums[0] + contents + sums[1]


def _example(**features):
    entries = b""
    for name, values in features.items():
        numbers = isinstance(values[0], int)
        inside = b"".join(_field(1, value) for value in values)
        entries += _field(
            1, _field(1, name.encode()) + _field(2, _field(3 if numbers else 1, inside))
        )
    return _field(1, entries)


def _forest(made, frame):
    nodes = b""
    for name in made.frames[frame].elements:
        sides = b"".join(_field(i, side) for i, side in enumerate(box(made, name, frame), 1))
        node = _field(2, sides) + _field(7, " ".join(name).encode()) + _field(23, 1)
        nodes += _field(1, node)
    window = _field(11, nodes)
    return _field(1, window)


def _field(number, value):
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value & (1 << 64) - 1)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
