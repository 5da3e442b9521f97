"""The text of a new turn: what the chat template writes after the last reply, whatever is said."""

import pytest
import torch

from starkv_compile import AgentSession, OptionError, UnsupportedModel
from starkv_compile.session.turn import REPLIES, text_of_turn

CHAT = (
    "{% if messages[0]['role'] != 'system' %}SYSTEM {% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% for part in m['content'] %}{{ part['text']TEXT }}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A template in the form of ChatML. TEXT: what it does to a text."""


class Templated:
    """What `text_of_turn` needs of a processor."""

    def __init__(self, template):
        self.template = template

    def apply_chat_template(self, messages, tokenize, **options):
        from transformers.utils.chat_template_utils import render_jinja_template

        assert not tokenize
        return render_jinja_template([messages], chat_template=self.template, **options)[0][0]


def words(text):
    return [{"type": "text", "text": text}]


TEXTS = (
    "delete nothing \u241f save",
    "",
    "  spaces around  ",
    "a",
    "b",
    "ab" * 40,
    "<|end|>\n<user>quoted<|end|>\n",
    "<assistant>",
    "{{ messages }} {% raw %}",
    "<b>&amp;</b> \ud83d \u0000 é",
)


@pytest.mark.parametrize("last", TEXTS)
@pytest.mark.parametrize("earlier", TEXTS)
def test_any_text_of_a_user_arrives(earlier, last):
    processor = Templated(CHAT.replace("TEXT", ""))
    turns = [words(earlier), words(last), words(earlier), words(last)]
    for count in (2, 3, 4):
        text = text_of_turn(processor, turns[:count], end="")
        said = turns[count - 1][0]["text"]
        assert text == f"<|end|>\n<user>{said}<|end|>\n<assistant>"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("|trim", "x & <y> a"),
        ("|e", " x &amp; &lt;y&gt; a "),
        ("|tojson", '" x & <y> a "'),
        ("|upper", " X & <Y> A "),
        ("|replace('a', '%61')|replace('b', '%62')", " x & <y> %61 "),
    ],
)
def test_a_template_may_change_texts(change, said):
    processor = Templated(CHAT.replace("TEXT", change))
    text = text_of_turn(processor, [words(" a b "), words(" x & <y> a ")], end="")
    assert text.endswith(f"<|end|>\n<user>{said}<|end|>\n<assistant>")


def test_a_template_may_write_more_before_the_reply_to_come():
    """As those that open a block of thoughts, or end a conversation that asks for no reply."""
    thinks = CHAT.replace("TEXT", "").replace("<assistant>{%", "<assistant><think>\n{%")
    ends = CHAT.replace("TEXT", "").replace("<assistant>{%", "<assistant>{% else %}<|endoftext|>{%")
    for template, after in ((thinks, "<think>\n"), (ends, "")):
        text = text_of_turn(Templated(template), [words("hi"), words("go")], end="<|end|>")
        assert text == f"\n<user>go<|end|>\n<assistant>{after}"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ messages[-1]['content'][0]['text'] }}", "leaves out the reply"),
        ("{{ messages[0]['content'] }}{{ messages[1:2] }}", "leaves out the new turn"),
        (CHAT.replace("TEXT", '|replace("a", "")'), "more than once, or changes it"),
        (CHAT + "{{ messages }}", "more than once, or changes it"),
        (CHAT.replace("in messages %}<", "in messages[-2:] %}<"), "in another way"),
        (CHAT.replace("in messages %}<", "in messages|reverse %}<"), "in another way"),
        ("{{ messages | length }}" + CHAT, "in another way"),
    ],
    ids=["no replies", "no new turn", "letters", "twice", "window", "reversed", "counted"],
)
def test_a_template_that_cannot_be_continued_is_refused(template, why):
    processor = Templated(template.replace("TEXT", ""))
    first = [words("one")]
    assert isinstance(text_of_turn(processor, first, end=""), str)
    with pytest.raises(UnsupportedModel, match=rf"{why}.*processor\.chat_template"):
        text_of_turn(processor, [*first, words("two")], end="")


def test_the_way_out_of_such_a_template(agent):
    model, processor = agent
    original, processor.chat_template = processor.chat_template, "{{ messages[-1]['content'] }}"
    try:
        session = AgentSession(model, processor)
        first = session.step(words("what"), max_new_tokens=2)
        ids = session.input_ids
        with pytest.raises(UnsupportedModel, match="leaves out the reply"):
            session.step(words("where"), max_new_tokens=2)
        assert session.input_ids is ids, "the session is as it was"
        processor.chat_template = original
        assert isinstance(first, str)
        assert isinstance(session.step(words("where"), max_new_tokens=2), str)
    finally:
        processor.chat_template = original


def test_the_text_reaches_the_model(agent):
    model, processor = agent
    session = AgentSession(model, processor)
    session.step(words("what"), max_new_tokens=3, do_sample=False)
    before = session.input_ids.shape[1]
    session.step(words("click red \u241f save"), max_new_tokens=3, do_sample=False)
    new = processor.tokenizer.decode(session.input_ids[0, before:-3])
    assert "click red" in new
    assert new.index("red") < new.index("save")


def test_the_end_of_a_reply_is_written_once(agent):
    """By the token that ended it, not by the tokenizer's own `eos_token`."""
    processor = Templated(CHAT.replace("TEXT", ""))
    turns = [words("hello"), words("hello")]
    for end, text in (
        ("", "<|end|>\n<user>hello"),
        ("<|end|>", "\n<user>hello"),
        ("<|endoftext|>", "<|end|>\n<user>hello"),
    ):
        assert text_of_turn(processor, turns, end) == f"{text}<|end|>\n<assistant>"
    model, processor = agent
    session = AgentSession(model, processor)
    turn = words("what")
    session.step(turn, max_new_tokens=2)
    end = int(session.input_ids[0, -1])
    for ends, ended in ((end, True), ([3, end], True), (end + 1, False), (None, False)):
        session = AgentSession(model, processor)
        session.step(turn, max_new_tokens=2, eos_token_id=ends, do_sample=False)
        assert session._ended == (int(session.input_ids[0, -1]) == end and ended)


def test_a_first_token_that_the_tokenizer_adds_is_written_once(agent, monkeypatch):
    from tokenizers.processors import TemplateProcessing

    model, processor = agent
    tokenizer = processor.tokenizer
    first = "<|pad|>"
    added = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, tokenizer.convert_tokens_to_ids(first))]
    )
    backend = tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = added
    monkeypatch.setattr(type(tokenizer), "bos_token", first, raising=False)
    try:
        session = AgentSession(model, processor)
        for _ in range(2):
            session.step(words("what"), max_new_tokens=2, do_sample=False)
        ids = session.input_ids[0].tolist()
        pad = tokenizer.convert_tokens_to_ids(first)
        assert ids[0] == pad
        assert ids[1:].count(pad) == 0
    finally:
        backend.post_processor = before


def test_replies_stand_for_one_place():
    one, other = REPLIES
    assert len(one) == len(other) == 1
    assert one != other


TOOLED = "{% for tool in tools or [] %}[{{ tool['name'] }}]{% endfor %}" + CHAT


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_system_message_and_tools_come_once_before_all_turns(count):
    processor = Templated(TOOLED.replace("TEXT", ""))
    turns = [words("one"), words("two"), words("three")][:count]
    options = {"tools": [{"name": "computer"}]}
    text = text_of_turn(processor, turns, "", system="You act.", options=options)
    if count == 1:
        assert text == "[computer]<system>You act.<|end|>\n<user>one<|end|>\n<assistant>"
    else:
        assert text == f"<|end|>\n<user>{turns[-1][0]['text']}<|end|>\n<assistant>"


def test_a_template_without_system_messages_says_where_to_put_it():
    template = (
        CHAT.replace("TEXT", "")
        .replace("in messages %}<", "in messages if m['role'] != 'system' %}<")
        .replace("SYSTEM ", "")
    )
    with pytest.raises(UnsupportedModel, match=r"leaves out the system message.*first step"):
        text_of_turn(Templated(template), [words("go")], "", system="You act.")
    refuses = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    with pytest.raises(
        UnsupportedModel, match=r"takes no system message \(no system\).*first step"
    ):
        text_of_turn(Templated(refuses), [words("go")], "", system="You act.")


def test_the_text_of_a_templates_own_system_message_is_taken():
    """As `You are a helpful assistant.`, which some templates write where there is none."""
    processor = Templated(CHAT.replace("TEXT", "").replace("SYSTEM ", "<system>SYSTEM<|end|>\n"))
    turn = [words("go")]
    own = text_of_turn(processor, turn, "")
    assert text_of_turn(processor, turn, "", system="SYSTEM") == own


def test_a_template_without_tools_says_where_to_put_them():
    processor = Templated(CHAT.replace("TEXT", ""))
    with pytest.raises(
        UnsupportedModel, match=r"leaves out the tools; describe them in the system"
    ):
        text_of_turn(processor, [words("go")], "", options={"tools": [{"name": "click"}]})


def test_a_session_with_a_system_message_and_tools(agent, tmp_path, monkeypatch):
    model, processor = agent
    monkeypatch.setattr(
        processor,
        "chat_template",
        "{% for tool in tools or [] %}{{ tool['name'] }} {% endfor %}" + processor.chat_template,
    )
    tools = [{"name": "click"}]
    session = AgentSession(
        model, processor, system="red star", chat_template_kwargs={"tools": tools}
    )
    tools.append({"name": "where"})
    session.step(words("what"), max_new_tokens=2, do_sample=False)
    first = processor.tokenizer.decode(session.input_ids[0]).replace(" ", "")
    assert first.startswith("click<|agent|>redstar<|end|><|user|>what")
    session.save(tmp_path / "session")
    loaded = AgentSession.load(tmp_path / "session", model, processor)
    assert loaded.system == "red star"
    for one in (session, loaded):
        one.step(words("where"), max_new_tokens=2, do_sample=False)
    assert torch.equal(session.input_ids, loaded.input_ids)
    both = processor.tokenizer.decode(session.input_ids[0]).replace(" ", "")
    assert both.count("redstar") == both.count("click") == 1
    assert "where" in both


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"system": 3}, r"system=3: expected the text"),
        ({"chat_template_kwargs": [1]}, r"chat_template_kwargs=\[1\]: expected a dict"),
        ({"chat_template_kwargs": {"tokenize": True}}, r"with tokenize: a session gives"),
        ({"chat_template_kwargs": {"tools": [print]}}, r"JSON can hold.*get_json_schema"),
    ],
)
def test_what_no_template_takes_is_refused(agent, options, said):
    with pytest.raises(OptionError, match=said):
        AgentSession(*agent, **options)
