"""What is asked of a session while its step runs: by a streamer, a signal handler, a thread."""

import os
import signal
import threading

import pytest
import torch

import starkv_compile
from starkv_compile import AgentSession, CacheError, StarKVCache
from tests.support.crossing import slow
from tests.support.turns import contents, steps

RUNNING = "a step of this session is running"


class During:
    """A streamer that calls `act` when the `count`-th piece arrives. The prompt is the first."""

    def __init__(self, count, act):
        self.left, self.act = count, act

    def put(self, tokens):
        self.left -= 1
        if self.left == 0:
            self.act()

    def end(self):
        assert self.left < 0


def step_with(session, number, streamer):
    content = list(contents(5))[number]
    return session.step(content, max_new_tokens=5, do_sample=False, streamer=streamer)


@pytest.mark.parametrize("count", [1, 3], ids=["in the prompt", "while decoding"])
@pytest.mark.parametrize("options", [None, slow({"budget": 0.3, "decode_tokens": 8})])
def test_a_file_and_a_fork_hold_the_session_before_the_step(agent, tmp_path, count, options):
    model, processor = agent
    if options:
        starkv_compile.compile(model, inner="eager", **options)
    session, file = AgentSession(model, processor, history=2), tmp_path / "session"
    steps(session, 2)
    undisturbed, forks = session.fork(), []

    def act():
        session.save(file)
        forks.append(session.fork())

    reply = step_with(session, 2, During(count, act))
    for other in (undisturbed, *forks, AgentSession.load(file, model, processor)):
        assert steps(other, 1, start=2) == [reply]
        assert torch.equal(other.input_ids, session.input_ids)
        for left, right in zip(other.cache.layers, session.cache.layers, strict=True):
            assert torch.equal(left.places(), right.places())
            assert torch.equal(left.keys[:, :, : left.stored], right.keys[:, :, : right.stored])


def test_no_other_step_begins_and_no_reply_is_replaced(agent):
    session = AgentSession(*agent)
    steps(session, 1)
    undisturbed = session.fork()

    def act():
        for call in (lambda: steps(session, 1, start=2), lambda: session.replace_reply("click")):
            with pytest.raises(CacheError, match=RUNNING):
                call()

    step_with(session, 1, During(2, act))
    steps(undisturbed, 1, start=1)
    assert torch.equal(session.input_ids, undisturbed.input_ids)
    session.replace_reply("click")
    steps(session, 1, start=2)


def test_a_thread_finds_it_running_or_at_rest(agent, tmp_path):
    session = AgentSession(*agent)
    steps(session, 1)
    before, said = session.input_ids, []

    def other():
        session.save(tmp_path / "session")
        try:
            steps(session, 1)
        except CacheError as error:
            said.append(str(error))

    def act():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    step_with(session, 1, During(2, act))
    assert RUNNING in said[0]
    loaded = AgentSession.load(tmp_path / "session", *agent)
    assert torch.equal(loaded.input_ids, before)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the system has no such signal")
def test_a_signal_handler_saves_and_ends_the_step(agent, tmp_path):
    session = AgentSession(*agent)
    steps(session, 1)

    def handle(*_):
        session.save(tmp_path / "session")
        raise SystemExit

    old = signal.signal(signal.SIGUSR1, handle)
    try:
        with pytest.raises(SystemExit):
            step_with(session, 1, During(2, lambda: os.kill(os.getpid(), signal.SIGUSR1)))
    finally:
        signal.signal(signal.SIGUSR1, old)
    loaded = AgentSession.load(tmp_path / "session", *agent)
    assert steps(loaded, 1, start=1) == steps(session, 1, start=1)


def test_without_a_state_before_the_step_it_is_said(agent, tmp_path, monkeypatch):
    """As with layers of another kind, which cannot be copied."""

    def no_fork(cache):
        raise CacheError("fork: another kind of layer")

    session = AgentSession(*agent)
    monkeypatch.setattr(StarKVCache, "fork", no_fork)

    def act():
        for call in (session.fork, lambda: session.save(tmp_path / "session")):
            with pytest.raises(CacheError, match=RUNNING):
                call()

    step_with(session, 0, During(2, act))
    assert not (tmp_path / "session").exists()
