"""One turn of a conversation: the check of its parts, and the text that its tokens are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import OptionError, UnsupportedModel

Content = list[dict[str, Any]]

REPLIES = ("a", "b")
"""What stands for a reply while a template is rendered: two letters of one length. Where two
renderings differ is the place of the reply, whatever the users' texts are."""


def check_turn(content: Any, history: int | None) -> None:
    """Raises `OptionError` unless `content` is one turn, whose images fit `history`."""
    whole = isinstance(content, list) and bool(content)
    for part in content if whole else ():
        kind = part.get("type") if isinstance(part, dict) else None
        whole = whole and kind in ("text", "image") and kind in part
        whole = whole and (kind != "text" or isinstance(part["text"], str))
    if not whole:
        raise OptionError(
            f"content={content!r:.90}: expected the parts of one user turn, a list of "
            '{"type": "text", "text": "..."} and {"type": "image", "image": picture}'
        )
    images = sum(part["type"] == "image" for part in content)
    if history is not None and images > history:
        raise OptionError(
            f"{images} images in one turn with history={history}: the session cannot keep them "
            f"all; give history={images} or more"
        )


def without_pictures(content: Content) -> Content:
    """The parts without their pictures. A chat template writes the same text for any picture."""
    return [{k: v for k, v in part.items() if k in ("type", "text")} for part in content]


def text_of_turn(processor: Any, turns: Sequence[Content], end: str) -> str:
    """Returns what the chat template writes for the last turn, after the reply to those before.

    The template renders the whole conversation. So it writes a system prompt only once, and it
    closes a reply that was cut off.

    Args:
        processor: the model's processor.
        turns: the user's turns, the new one last.
        end: the special token with which the model ended its reply; "" if the reply was cut off.

    Raises:
        UnsupportedModel: the template does not write the new turn after all others.
    """
    new = _conversation(turns, REPLIES[0])
    if len(turns) == 1:
        return _render(processor, new)
    texts = [_render(processor, _conversation(turns, reply)) for reply in REPLIES]
    text, other = texts
    place = next((i for i, (x, y) in enumerate(zip(*texts, strict=False)) if x != y), len(text))
    before, after = text[:place], text[place + 1 :]
    if text == other:
        _refuse("leaves out the reply before the new turn")
    if after != other[place + 1 :]:
        _refuse("writes the reply before the new turn more than once, or changes it")
    if text == _render(processor, new[:-1]):
        _refuse("leaves out the new turn")
    # With or without what it writes for the reply to come, which may be more than its role.
    earlier = (_render(processor, new[:-2], prompt) for prompt in (True, False))
    if not any(before.startswith(one) for one in earlier):
        _refuse("writes the earlier turns in another way when a new turn follows")
    rest = after.lstrip()
    return rest.removeprefix(end) if end and rest.startswith(end) else after


def _conversation(turns: Sequence[Content], reply: str) -> list[dict[str, Any]]:
    """All turns with replies between them. The last of these is `reply`."""
    messages: list[dict[str, Any]] = []
    for number, content in enumerate(turns, start=1):
        messages.append({"role": "user", "content": content})
        if number < len(turns):
            text = reply if number == len(turns) - 1 else REPLIES[0]
            parts = [{"type": "text", "text": text}]
            messages.append({"role": "assistant", "content": parts})
    return messages


def _render(processor: Any, messages: list[dict[str, Any]], prompt: bool = True) -> str:
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return text if isinstance(text, str) else text[0]


def _refuse(what: str) -> NoReturn:
    raise UnsupportedModel(
        f"the processor's chat template {what}, so no text can continue what is cached; give "
        "processor.chat_template a template that writes the turns one after another, or begin a "
        "new session for each prompt"
    )
