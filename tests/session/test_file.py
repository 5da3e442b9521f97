"""A session's file: it continues the session, or one error says why not."""

import copy
import json
import os
import random
import stat

import pytest
import torch
from safetensors.torch import load, save

import starkv_compile
from starkv_compile import AgentSession, SessionFileError, StarKVCache
from starkv_compile.session import file as session_file
from tests.support.crossing import slow
from tests.support.turns import steps

HEADER, CHECKSUM = "starkv_session", "checksum"


@pytest.fixture(name="saved", scope="module")
def _saved(untouched_agent, tmp_path_factory):
    """A compressed session of two steps, with codes, and the file that it wrote."""
    model, processor = untouched_agent
    starkv_compile.compile(model, budget=0.3, nbits=4, inner="eager")
    session = AgentSession(model, processor, history=3)
    steps(session, 2)
    starkv_compile.undo(model)
    path = tmp_path_factory.mktemp("saved") / "session"
    session.save(path)
    return session, path.read_bytes()


def same(left, right):
    """Whether two contents of sessions are equal, tensors bit for bit."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def contents(session):
    own = {k: v for k, v in vars(session).items() if k not in ("cache", "model", "processor")}
    own.pop("_inner")
    return {**own, "cache": session.cache.state_dict()}


def loaded(data, path, saved, agent):
    """Whether `data` loads, as the session that was saved. If not, only one error may rise."""
    path.write_bytes(data)
    try:
        session = AgentSession.load(path, *agent)
    except SessionFileError:
        return False
    assert same(contents(session), contents(saved))
    return True


@pytest.mark.parametrize("nbits", [slow(16), slow(4, ci=True)])
def test_a_saved_session_goes_on_where_it_was(agent, tmp_path, nbits):
    model, processor = agent
    starkv_compile.compile(model, budget=0.3, nbits=nbits, inner="eager")
    session = AgentSession(model, processor, history=3, keep_text=False)
    steps(session, 2)
    twin = session.fork()
    session.save(tmp_path / "session.pt")
    expected = steps(session, 2, start=2)
    loaded = AgentSession.load(tmp_path / "session.pt", model, processor)
    for other in (loaded, twin):
        assert steps(other, 2, start=2) == expected
        assert torch.equal(session.cache.shared.layout.counts, other.cache.shared.layout.counts)
        for left, right in zip(session.cache.layers, other.cache.layers, strict=True):
            assert torch.equal(left.keys, right.keys)
            assert torch.equal(left.places(), right.places())


def test_nothing_is_saved_of_a_new_session_but_what_it_is(agent, tmp_path):
    session = AgentSession(*agent, history=2, keep_text=False)
    session.save(tmp_path / "session")
    again = AgentSession.load(tmp_path / "session", *agent)
    assert same(contents(again), contents(session))
    assert len(steps(again, 1)) == 1


def test_texts_and_dtypes_are_saved_as_they_are(agent, tmp_path):
    model, processor = copy.deepcopy(agent[0]).bfloat16(), agent[1]
    session = AgentSession(model, processor)
    session.step([{"type": "text", "text": "\u241f é \U0001f600 \u0000 \\"}], max_new_tokens=2)
    session.save(tmp_path / "session")
    again = AgentSession.load(tmp_path / "session", model, processor)
    assert same(contents(again), contents(session))
    assert again.cache.layers[0].keys.dtype == torch.bfloat16


@pytest.mark.slow(ci=True)
def test_a_damaged_byte_is_found(saved, agent, tmp_path):
    session, data = saved
    rng = random.Random(0)
    head = 8 + int.from_bytes(data[:8], "little")
    places = [*range(12), *(rng.randrange(head) for _ in range(60))]
    places += [rng.randrange(head, len(data)) for _ in range(60)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        whole = loaded(bytes(damaged), tmp_path / "session", session, agent)
        assert not (whole and place >= head), "a tensor's byte"
    assert loaded(data, tmp_path / "session", session, agent)


@pytest.mark.slow(ci=True)
def test_a_file_of_another_length_is_found(saved, agent, tmp_path):
    session, data = saved
    rng = random.Random(1)
    lengths = [*range(10), len(data) - 1, *(rng.randrange(len(data)) for _ in range(40))]
    for length in lengths:
        assert not loaded(data[:length], tmp_path / "session", session, agent)
    assert not loaded(data + b"\0", tmp_path / "session", session, agent)


def signed(data, change):
    """The file after `change(header, tensors)`, with checksums that fit: somebody's own."""
    tensors = load(data)
    opened = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header = json.loads(opened["__metadata__"][HEADER])
    change(header, tensors)
    header["tensors"] = session_file._sum_of_tensors(tensors)
    text = json.dumps(header)
    return save(tensors, {HEADER: text, CHECKSUM: session_file._sum(text)})


@pytest.mark.slow(ci=True)
def test_a_file_signed_anew_loads(saved, agent, tmp_path):
    session, data = saved
    assert loaded(signed(data, lambda h, t: None), tmp_path / "session", session, agent)


def put(path, value):
    """Changes the header at `path`."""

    def change(header, tensors):
        *way, last = path
        for step in way:
            header = header[step]
        if value is GONE:
            del header[last]
        else:
            header[last] = value

    return change


def tensor(name, make):
    """Changes a tensor."""

    def change(header, tensors):
        tensors[name] = make(tensors[name]).contiguous()

    return change


def both(*changes):
    def change(header, tensors):
        for one in changes:
            one(header, tensors)

    return change


GONE = object()
IN, LAYER = ("contents",), ("contents", "cache", "layers", 1)
KEYS, CODES = "cache.layers.1.keys", "cache.layers.1.codes.key.0"
TYPES = "types.mm_token_type_ids"
LIES = {
    "another format": put(("format",), "pictures"),
    "a later version": put(("version",), session_file.VERSION + 1),
    "no version": put(("version",), GONE),
    "no model": put(("model",), GONE),
    "another model": put(("model", "KV heads"), 3),
    "no contents": put(("contents",), GONE),
    "contents of another kind": put(("contents",), [1]),
    "a huge count": put((*LAYER, "seen"), 10**12),
    "a huge count in all layers": both(
        *(put(("contents", "cache", "layers", i, "seen"), 10**12) for i in range(2))
    ),
    "a negative count": put((*LAYER, "seen"), -1),
    "no whole number": put((*LAYER, "seen"), 2.5),
    "more left than seen": put((*LAYER, "retired"), 10**12),
    "a layer less": put(("contents", "cache", "layers", 1), GONE),
    "an entry named update": put((*LAYER, "update"), 1),
    "an entry less": put((*LAYER, "kept"), GONE),
    "an entry of the session": put((*IN, "step"), 1),
    "a missing entry": put((*IN, "starts"), GONE),
    "no cache": put((*IN, "cache"), GONE),
    "a cache of another kind": put((*IN, "cache"), 3),
    "keys of other heads": tensor(KEYS, lambda t: t[:, :3]),
    "keys of another dimension": tensor(KEYS, lambda t: t[..., :1]),
    "keys and values of other heads": both(
        tensor(KEYS, lambda t: t[:, :3]), tensor("cache.layers.1.values", lambda t: t[:, :3])
    ),
    "keys of other tokens": tensor(KEYS, lambda t: t[:, :, 1:]),
    "keys that are counts": tensor(KEYS, lambda t: t.long()),
    "keys of three axes": tensor(KEYS, lambda t: t[0]),
    "keys of two rows": tensor(KEYS, lambda t: t.repeat(2, 1, 1, 1)),
    "keys that are a number": put((*LAYER, "keys"), 3),
    "no keys": put((*LAYER, "keys"), None),
    "codes of other heads": tensor(CODES, lambda t: t[:, :3]),
    "codes of other tokens": tensor(CODES, lambda t: t[:, :, 1:]),
    "codes of another dtype": tensor(CODES, lambda t: t.float()),
    "codes of other bits": put((*LAYER, "codes", "nbits"), 8),
    "codes of bits that are no whole number": put((*LAYER, "codes", "nbits"), 4.0),
    "codes of no bits": put((*LAYER, "codes", "nbits"), 3),
    "ranges of another dtype": tensor("cache.layers.1.codes.value.1", lambda t: t.double()),
    "ranges of other tokens": tensor("cache.layers.1.codes.value.1", lambda t: t[:, :, 1:]),
    "a centre of two rows": tensor("cache.layers.1.codes.key.2", lambda t: t.repeat(1, 1, 2, 1)),
    "codes without a centre": put((*LAYER, "codes", "key", 2), GONE),
    "no codes": put((*LAYER, "codes"), None),
    "codes of another kind": put((*LAYER, "codes"), 3),
    "codes with more": put((*LAYER, "codes", "update"), 3),
    "codes that are a number": put((*LAYER, "codes", "value"), 3),
    "places out of order": tensor("cache.layers.1.kept", lambda t: t.flip(-1)),
    "places beyond the stream": tensor("cache.layers.1.kept", lambda t: t + 10**9),
    "places below zero": tensor("cache.layers.1.kept", lambda t: t - t.max()),
    "more places than tokens": tensor("cache.layers.1.kept", lambda t: t.repeat(1, 9)),
    "novelties of other tokens": tensor("cache.layers.1.novelty", lambda t: t[:, 1:]),
    "a state of other heads": tensor("cache.layers.1.state.0", lambda t: t[:, :1]),
    "a state of another kind": put((*LAYER, "state"), "what"),
    "a layout of other tokens": tensor("cache.layout.frame", lambda t: t[:, :-1]),
    "a layout too short": both(
        *(
            tensor(f"cache.layout.{part}", lambda t: t[:, :5])
            for part in ("frame", "row", "column", "counted")
        )
    ),
    "frames beyond all tokens": tensor("cache.layout.frame", lambda t: t + 10**9),
    "rows beyond all tokens": tensor("cache.layout.row", lambda t: t + 10**9),
    "a current frame of nothing": tensor("cache.layout.current", lambda t: t[:, :0]),
    "padding of other rows": put(("contents", "cache", "padding"), [1]),
    "another grid": put(("contents", "cache", "layout", "grid"), "round"),
    "a layout with more": put(("contents", "cache", "layout", "select"), 1),
    "tokens below zero": tensor("input_ids", lambda t: t - 10**6),
    "tokens beyond the vocabulary": tensor("input_ids", lambda t: t + 10**6),
    "a token less": both(
        tensor("input_ids", lambda t: t[:, 1:]), tensor(TYPES, lambda t: t[:, 1:])
    ),
    "no tokens": both(put((*IN, "input_ids"), None), lambda h, t: t.pop("input_ids") is None),
    "types of other tokens": tensor(TYPES, lambda t: t[:, 1:]),
    "types of another name": put((*IN, "types"), {"kinds": {"tensor": TYPES}}),
    "types without a name": put((*IN, "types"), {"tensor": TYPES}),
    "types of videos": tensor(TYPES, lambda t: t * 2),
    "grids of other images": tensor("grid", lambda t: t + 1),
    "a grid of two numbers": tensor("grid", lambda t: t[:, :2]),
    "a huge grid": tensor("grid", lambda t: t * 10**9),
    "an impossible history": put((*IN, "history"), 0),
    "text that leaves with nothing": both(
        put((*IN, "history"), None), put((*IN, "keep_text"), False)
    ),
    "a flag of another kind": put((*IN, "ended"), "yes"),
    "frames of another kind": put((*IN, "frames"), ["x"]),
    "starts out of order": put((*IN, "starts"), [9, 0]),
    "turns of another kind": put((*IN, "turns"), "what"),
    "a turn of another kind": put((*IN, "turns", 0), [{"type": "text", "text": 3}]),
    "a reply before all tokens": put((*IN, "prompt_length"), 0),
    "a reply beyond all tokens": put((*IN, "prompt_length"), 10**9),
    "a reply at no place": put((*IN, "prompt_length"), "here"),
    "a system message of another kind": put((*IN, "system"), 3),
    "options that are no JSON": put((*IN, "template_options"), "what"),
    "options that are no dict": put((*IN, "template_options"), "[1]"),
    "options that are no text": put((*IN, "template_options"), {"tools": []}),
    "options of the session's own": put((*IN, "template_options"), '{"tokenize": true}'),
    "a tensor named twice": put((*IN, "types", "token_type_ids"), {"tensor": "input_ids"}),
    "a tensor that is not there": put((*IN, "types", "token_type_ids"), {"tensor": "no"}),
    "a tensor that nobody names": lambda h, t: t.update(extra=torch.ones(1)),
}


@pytest.mark.parametrize("lie", LIES)
def test_contents_that_lie_are_found(saved, agent, tmp_path, lie):
    session, data = saved
    lying = signed(data, LIES[lie])
    assert not loaded(lying, tmp_path / "session", session, agent)


@pytest.mark.slow(ci=True)
def test_entries_of_one_session_in_another(saved, agent, tmp_path):
    """Entries swapped at random load only if both are alike."""
    _, data = saved
    names = sorted(load(data))
    rng = random.Random(2)
    for _ in range(60):
        one, other = rng.sample(names, 2)

        def swap(header, tensors, one=one, other=other):
            tensors[one], tensors[other] = tensors[other], tensors[one]

        (tmp_path / "session").write_bytes(signed(data, swap))
        try:
            again = AgentSession.load(tmp_path / "session", *agent)
        except SessionFileError:
            continue
        assert isinstance(steps(again, 1, start=2)[0], str), (one, other)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: path.write_bytes(b""), "no session, or a damaged one"),
        (lambda path: path.write_text("{}" * 40), "no session, or a damaged one"),
        (lambda path: torch.save({"input_ids": torch.ones(1)}, path), "a zip archive, as torch"),
        (
            lambda path: path.write_bytes(save({"w": torch.ones(1)})),
            "without a session's header; expected a file that AgentSession.save wrote",
        ),
    ],
    ids=["empty", "text", "torch.save", "weights"],
)
def test_another_file_is_refused(agent, tmp_path, write, said):
    write(tmp_path / "other")
    with pytest.raises(SessionFileError, match=said):
        AgentSession.load(tmp_path / "other", *agent)
    with pytest.raises(FileNotFoundError):
        AgentSession.load(tmp_path / "none", *agent)


def test_another_model_or_processor_is_refused_before_a_tensor_is_read(
    saved, agent, tmp_path, monkeypatch
):
    model, processor = agent
    _, data = saved
    (tmp_path / "session").write_bytes(data)
    monkeypatch.setattr(session_file, "_sum_of_tensors", None)
    other = copy.deepcopy(model).bfloat16()
    other.config.text_config.num_key_value_heads = 2
    with pytest.raises(SessionFileError, match=r"KV heads 4, dtype 'float32'.*has KV heads 2, dty"):
        AgentSession.load(tmp_path / "session", other, processor)
    with pytest.raises(SessionFileError, match=r"processor 'AgentProcessor'.*'Other'.*Load the"):
        AgentSession.load(tmp_path / "session", model, type("Other", (), {})())


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_older_file(
    saved, agent, tmp_path, monkeypatch, call, fault
):
    _, data = saved
    path = tmp_path / "session"
    path.write_bytes(data)

    def fail(*args):
        raise fault

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(fault)):
        AgentSession(*agent).save(path)
    assert path.read_bytes() == data
    assert [one.name for one in tmp_path.iterdir()] == ["session"]


def test_a_save_puts_a_whole_file_in_the_place_of_the_older_one(saved, agent, tmp_path):
    """With its permissions, and through a link."""
    session, _ = saved
    path, link = tmp_path / "session", tmp_path / "link"
    AgentSession(*agent).save(path)
    new = path.stat().st_mode
    (tmp_path / "plain").touch()
    assert new == (tmp_path / "plain").stat().st_mode
    path.chmod(0o640)
    link.symlink_to(path)
    inode = path.stat().st_ino
    session.save(link)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.stat().st_ino != inode, "written beside it"
    assert loaded(path.read_bytes(), tmp_path / "again", session, agent)
    with pytest.raises(OSError, match="none"):
        session.save(tmp_path / "none" / "session")


def test_a_loaded_session_does_not_read_its_file_again(saved, agent, tmp_path):
    session, data = saved
    path = tmp_path / "session"
    path.write_bytes(data)
    again = AgentSession.load(path, *agent)
    path.write_bytes(b"\0" * len(data))
    assert same(contents(again), contents(session))


def test_a_state_of_a_cache_is_checked_as_well(saved, agent):
    session, _ = saved
    state = session.cache.state_dict()
    for path, value, said in (
        (("layers", 0, "seen"), 10**12, "has seen 1000000000000 tokens"),
        (("layers", 0, "update"), 1, "holds .*update; expected keys, values"),
        (("layers", 0, "keys"), torch.ones(1, 4, 2, 32), "keys float32"),
        (("layers", 1), None, "layer 1 holds NoneType"),
        (("layout", "frame"), torch.zeros(1, 3), "the layout has frames"),
        (("padding",), torch.tensor([3, 0]), r"the padding is int64\[2\]; expected int64 of shape"),
        (("padding",), torch.tensor([-1]), "from 0 to"),
    ):
        lying = copy.deepcopy(state)
        inside = lying
        for step in path[:-1]:
            inside = inside[step]
        inside[path[-1]] = value
        cache = StarKVCache(agent[0].config)
        with pytest.raises(starkv_compile.CacheError, match=said):
            cache.load_state_dict(lying)
        assert cache.get_seq_length() == 0
        assert cache.shared.layout is None
        cache.load_state_dict(copy.deepcopy(state))
        assert same(cache.state_dict(), state)
    with pytest.raises(starkv_compile.CacheError, match="1 layers; expected the 2"):
        StarKVCache(agent[0].config).load_state_dict({**state, "layers": state["layers"][:1]})
