"""Published files: what is read of them, and how what is missing or malformed is told."""

import gzip
import json
import zlib

import pytest
from starkv_lab.gui.benchmarks import DATASETS, dataset_of, fingerprint
from starkv_lab.gui.files import read_objects
from starkv_lab.gui.samples import Reading, open_screen
from starkv_lab.gui.wire import masked_crc, parse, read_records

from lab.tests.support import published
from starkv_compile import StarKVError

MAKERS = {
    "screenspot-v2": published.screenspot_v2,
    "screenspot-pro": published.screenspot_pro,
    "androidcontrol": published.android_sample,
    "agentnetbench": published.agentnet_bench,
}
MAIN = {
    "screenspot-v2": "screenspot_desktop_v2.json",
    "screenspot-pro": "annotations/blender_windows.json",
    "androidcontrol": "500_steps.json",
    "agentnetbench": "s_1a.json",
}


def read(name, folder, **reading):
    return list(DATASETS[name].read(folder, Reading(**reading)))


@pytest.fixture(params=MAKERS)
def made(request, tmp_path):
    return request.param, MAKERS[request.param](tmp_path / "data")


def test_samples_are_whole_and_in_one_order(made):
    name, folder = made
    samples = read(name, folder)
    assert samples == read(name, folder) or name == "agentnetbench"  # closures differ there
    ids = [sample.id for sample in samples]
    assert len(set(ids)) == len(ids)
    for sample in samples:
        assert open_screen(sample.screens[-1]).mode == "RGB"
        json.dumps(sample.target)
        assert all(isinstance(value, str) for value in sample.group.values())


def test_a_missing_file_is_named(made):
    name, folder = made
    (folder / MAIN[name]).rename(folder / "away.bin")
    if name in ("screenspot-v2", "androidcontrol"):
        with pytest.raises(StarKVError, match=MAIN[name]):
            read(name, folder)
    for path in folder.rglob("*.json"):
        path.unlink()
    with pytest.raises(StarKVError, match=r"json"):
        read(name, folder)
    with pytest.raises(StarKVError, match="no files of"):
        fingerprint(dataset_of(name), folder)


def test_a_missing_screenshot_is_named_with_the_record_that_names_it(made):
    name, folder = made
    sample = read(name, folder)[-1]
    sample.screens[-1].unlink()
    with pytest.raises(StarKVError, match=rf"{sample.screens[-1].name}.*\.json.* names it"):
        read(name, folder)


def test_a_screenshot_that_is_none_is_named(tmp_path):
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(StarKVError, match=r"x\.png: not an image"):
        open_screen(tmp_path / "x.png")


def test_no_json_is_told_with_its_line(made):
    name, folder = made
    path = folder / MAIN[name]
    lines = path.read_text().splitlines()
    if len(lines) == 1:  # published without line breaks
        lines = json.dumps(json.loads(lines[0]), indent=1).splitlines()
    lines[4] = '"oops'
    path.write_text("\n".join(lines))
    with pytest.raises(StarKVError, match=rf"{path.name}:[3-6]: no JSON"):
        read(name, folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "screenspot-v2",
            {"bbox": [1, 2, 3]},
            r"v2\.json:\d+: 'bbox' is \[1, 2, 3\], not 4 numbers",
        ),
        ("screenspot-v2", {"bbox": [1, 2, 3, float("nan")]}, "not 4 numbers"),
        ("screenspot-v2", {"instruction": None}, "'instruction' is None"),
        ("screenspot-pro", {"ui_type": 3}, r"windows\.json:1: 'ui_type' is 3"),
        ("screenspot-pro", {"img_size": [0, 10]}, "img_size"),
        ("androidcontrol", {"action": {"action_type": "fly"}}, r"json:\d+: action_type 'fly'"),
        ("androidcontrol", {"action": {"action_type": "click", "x": 1}}, "has no 'y'"),
        (
            "androidcontrol",
            {"action": {"action_type": "scroll", "direction": "in"}},
            "scroll to 'in'",
        ),
        ("androidcontrol", {"accessibility_tree": [{}]}, "has no 'bbox_pixels'"),
        (
            "androidcontrol",
            {"action": {"action_type": "click", "x": 1, "y": float("inf")}},
            "'y' is inf",
        ),
    ],
)
def test_a_malformed_record_is_told_with_its_line(tmp_path, name, change, message):
    folder = MAKERS[name](tmp_path / "data")
    path = folder / MAIN[name]
    records = json.loads(path.read_text())
    records[1] |= change
    path.write_text(json.dumps(records, indent=None if name == "screenspot-pro" else 1))
    with pytest.raises(StarKVError, match=message):
        read(name, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ground_truth_actions": []}, r"s_1a\.json: step 1: no list of actions"),
        ({"ground_truth_actions": [{"type": "fly", "params": {}}]}, "step 1: type 'fly'"),
        ({"ground_truth_actions": [{"type": "click", "params": {}}]}, "has no 'position'"),
        ({"ground_truth_actions": [{"type": "write", "params": {}}]}, "has no 'content'"),
        ({"ground_truth_actions": [{"type": "press", "params": {}}]}, "has no 'keys'"),
        (
            {"ground_truth_actions": [{"type": "hotkey", "params": {"keys": []}}]},
            "hotkey without a key",
        ),
        (
            {"ground_truth_actions": [{"type": "scroll", "params": {"amount": "far"}}]},
            "'amount' is 'far'",
        ),
        ({"image": 4}, "'image' is 4"),
    ],
)
def test_a_malformed_step_is_told_with_its_number(tmp_path, change, message):
    folder = published.agentnet_bench(tmp_path / "data")
    path = folder / "s_1a.json"
    trajectory = json.loads(path.read_text())
    trajectory["steps"][1] |= change
    path.write_text(json.dumps(trajectory))
    with pytest.raises(StarKVError, match=message):
        read("agentnetbench", folder)


def test_lines_are_those_of_the_records(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('\n[\n {"a": 1},\n\n {"a": 2}, {"a": 3}\n]\n')
    assert [record.where for record in read_objects(path)] == [f"{path}:{n}" for n in (3, 5, 5)]
    for broken, line in (
        ('{"a": 1}', 1),
        ('[{"a": 1}\n {"a": 2}]', 2),
        ("[1]", 1),
        ('[{"a": 1},', 1),
    ):
        path.write_text(broken)
        with pytest.raises(StarKVError, match=rf"list\.json:{line}"):
            list(read_objects(path))


def test_a_trajectory_shows_its_newest_screens_and_steps(tmp_path):
    folder = published.agentnet_bench(tmp_path / "data", steps=4)

    def shape(**reading):
        samples = read("agentnetbench", folder, **reading)[:4]
        return [(len(sample.screens), len(sample.past)) for sample in samples]

    assert shape() == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert shape(images=2) == [(1, 0), (2, 1), (2, 2), (2, 3)]
    assert shape(texts=1) == [(1, 0), (2, 1), (2, 1), (2, 1)]
    assert shape(images=1, texts=0) == [(1, 0)] * 4
    last = read("agentnetbench", folder, images=2)[3]
    assert [path.name for path in last.screens] == ["s_1a_2.png", "s_1a_3.png"]
    [action] = last.past[-1].act((100, 100))
    assert action.kind == "click"


def test_levels_of_android_control(tmp_path):
    folder = published.android_sample(tmp_path / "data")
    path = folder / "500_steps.json"
    records = json.loads(path.read_text())
    records[0] |= {"step_instruction": "tap it", "previous_actions": ["first", "second"]}
    path.write_text(json.dumps(records))
    high, low = (read("androidcontrol", folder, level=level)[0] for level in ("high", "low"))
    assert high.instruction.startswith("click")
    assert [past.said for past in high.past] == ["first", "second"]
    assert (low.instruction, low.past) == ("tap it", ())


def test_tfrecords_of_android_control(tmp_path):
    folder = published.android_records(tmp_path / "data", episodes=2, steps=2)
    samples = read("androidcontrol", folder)
    assert [sample.id for sample in samples] == ["0-0", "0-1", "1-0", "1-1"]  # not the training one
    assert [set(sample.group) for sample in samples] == [
        {"action", "IDD"},
        {"action", "IDD"},
        {"action", "app_unseen", "category_unseen"},
        {"action", "app_unseen", "category_unseen"},
    ]
    made, name = published.episode("records-0", 2)
    assert samples[1].target["element"]["box"] == published.box(made, name, 1)
    assert samples[1].target["element"]["label"] == " ".join(name)
    assert [past.said for past in samples[1].past] == ["click " + " ".join(name)]
    assert open_screen(samples[1].screens[0]).size == (made.columns * 32, made.rows * 32)


def test_damaged_tfrecords_are_told(tmp_path):
    folder = published.android_records(tmp_path / "data")
    path = folder / "android_control-00000-of-00001"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StarKVError, match=r"00001: record \d"):
        read("androidcontrol", folder)
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:500]))
    with pytest.raises(StarKVError, match="record 0 is damaged or cut"):
        read("androidcontrol", folder)
    contents = b"\x0a\x02\x0a\x00"  # an Example with one nameless feature
    record = published._record(contents)
    path.write_bytes(gzip.compress(record))
    with pytest.raises(StarKVError, match=r"record 0: no episode of AndroidControl.*'episode_id'"):
        read("androidcontrol", folder)
    path.write_bytes(b"plain")
    with pytest.raises(StarKVError, match="record 0 cannot be read"):
        read("androidcontrol", folder)
    whole = published.android_records(tmp_path / "other")
    (whole / "test_subsplits.json").unlink()
    with pytest.raises(StarKVError, match=r"test_subsplits\.json: there is no such file"):
        read("androidcontrol", whole)


def test_the_checksum_is_tfrecords():
    """CRC-32C's check value (of "123456789"), masked as TFRecord does; and not zlib's CRC-32."""
    crc = 0xE3069283
    assert masked_crc(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert masked_crc(b"123456789") != zlib.crc32(b"123456789")


def test_protocol_buffers_are_read_as_documented():
    """The examples of protobuf.dev's page on encoding: 150 in field 1, "testing" in field 2."""
    assert parse(bytes.fromhex("089601")) == {1: [150]}
    assert parse(bytes.fromhex("120774657374696e67")) == {2: [b"testing"]}
    for broken in ("0896", "120774", "13", "0d0000"):
        with pytest.raises(ValueError, match=r"beyond|wire type"):
            parse(bytes.fromhex(broken))


def test_records_are_read_in_order(tmp_path):
    folder = published.android_records(tmp_path / "data", episodes=2)
    path = folder / "android_control-00000-of-00001"
    assert [where for where, _ in read_records(path)] == [f"{path}: record {n}" for n in range(3)]


def test_one_copy_is_told_from_another(tmp_path):
    folder = published.screenspot_v2(tmp_path / "data", count=1)
    before = fingerprint(dataset_of("screenspot-v2"), folder)
    path = folder / "screenspot_web_v2.json"
    path.write_text(path.read_text() + "\n")
    assert fingerprint(dataset_of("screenspot-v2"), folder) != before
    with pytest.raises(StarKVError, match="data set 'screenspot': expected one of screenspot-v2"):
        dataset_of("screenspot")
