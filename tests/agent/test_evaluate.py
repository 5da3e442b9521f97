"""The agent's score: counted by frames and kind, held out, and 1 for a model that is right."""

from types import SimpleNamespace

from torch.nn import functional as F

from starkv_compile.agent import evaluate as module
from starkv_compile.agent.questions import KINDS
from starkv_compile.agent.vocabulary import IMAGE, TOKEN_ID, TOKENS


class Oracle:
    """Says the next token of its input, or with `wrong` never does so for a noun."""

    config = SimpleNamespace(image_token_id=TOKEN_ID[IMAGE])

    def __init__(self, wrong=()):
        self.wrong = {TOKEN_ID[word] for word in wrong}

    def __call__(self, input_ids, **_):
        following = input_ids.roll(-1, 1)
        for token in self.wrong:
            following = following.masked_fill(following == token, 0)
        return SimpleNamespace(logits=F.one_hot(following, len(TOKENS)).float())


def test_a_model_that_is_always_right(monkeypatch):
    monkeypatch.setattr(module, "MAX_FRAMES", 2)
    score = module.evaluate(Oracle(), episodes=3, questions=8)
    assert {frames for frames, _ in score} == {1, 2}
    assert {kind for _, kind in score} <= set(KINDS)
    assert all(right == asked for right, asked in score.values())
    assert sum(asked for _, asked in score.values()) == 2 * 3 * 8


def test_one_wrong_token_costs_the_answer(monkeypatch):
    monkeypatch.setattr(module, "MAX_FRAMES", 1)
    score = module.evaluate(Oracle(wrong=["click"]), episodes=3, questions=12)
    assert score[1, "click"][0] == 0
    assert score[1, "where"][0] == score[1, "where"][1]
