"""One turn of a conversation: the check of its parts, and the text that its tokens are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from ..errors import OptionError, UnsupportedModel

Content = list[dict[str, Any]]
Messages = list[dict[str, Any]]

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


_OURS = (
    "conversation",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
)
"""Arguments of `apply_chat_template` that a session gives itself."""


def check_template_options(system: Any, options: Any) -> None:
    """Raises `OptionError` unless a session can render with them and a file can hold them."""
    if system is not None and not isinstance(system, str):
        raise OptionError(f"system={system!r:.60}: expected the text of a system message, or None")
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise OptionError(
            f"chat_template_kwargs={options!r:.60}: expected a dict of the chat template's "
            'arguments, such as {"tools": [...]}'
        )
    ours = [name for name in _OURS if name in options]
    if ours:
        raise OptionError(
            f"chat_template_kwargs with {', '.join(ours)}: a session gives these arguments itself; "
            "leave them out"
        )
    try:
        json.dumps(dict(options))
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(
            f"chat_template_kwargs={options!r:.60}: expected values that JSON can hold ({error}); "
            "transformers.utils.get_json_schema makes a tool's description from a function"
        ) from error


def without_pictures(content: Content) -> Content:
    """The parts without their pictures. A chat template writes the same text for any picture."""
    return [{k: v for k, v in part.items() if k in ("type", "text")} for part in content]


def text_of_turn(
    processor: Any,
    turns: Sequence[Content],
    end: str,
    system: str | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Returns what the chat template writes for the last turn, after the reply to those before.

    The template renders the whole conversation. So it writes a system prompt only once, and it
    closes a reply that was cut off.

    Args:
        processor: the model's processor.
        turns: the user's turns, the new one last.
        end: the special token with which the model ended its reply; "" if the reply was cut off.
        system: text of a system message before the first turn.
        options: further arguments of the template, such as tools.

    Raises:
        UnsupportedModel: the template does not write the new turn after all others, or leaves out
            the system message or the tools.
    """

    def render(messages: Messages, prompt: bool = True) -> str:
        return _render(processor, messages, prompt, options)

    new = _conversation(turns, REPLIES[0], system)
    if len(turns) == 1:
        if system is not None:
            _check_system(render, turns, system)
        text = render(new)
        if options.get("tools") and text == _render(processor, new, True, {**options, "tools": []}):
            raise UnsupportedModel(
                "the processor's chat template leaves out the tools; describe them in the system "
                "message"
            )
        return text
    texts = [render(_conversation(turns, reply, system)) for reply in REPLIES]
    text, other = texts
    place = next((i for i, (x, y) in enumerate(zip(*texts, strict=False)) if x != y), len(text))
    before, after = text[:place], text[place + 1 :]
    if text == other:
        _refuse("leaves out the reply before the new turn")
    if after != other[place + 1 :]:
        _refuse("writes the reply before the new turn more than once, or changes it")
    if text == render(new[:-1]):
        _refuse("leaves out the new turn")
    # With or without what it writes for the reply to come, which may be more than its role.
    earlier = (render(new[:-2], prompt) for prompt in (True, False))
    if not any(before.startswith(one) for one in earlier):
        _refuse("writes the earlier turns in another way when a new turn follows")
    rest = after.lstrip()
    return rest.removeprefix(end) if end and rest.startswith(end) else after


def _check_system(render: Callable[[Messages], str], turns: Sequence[Content], text: str) -> None:
    """Raises `UnsupportedModel` unless the template writes a system message."""
    way_out = "give its text in the first step, before the first screenshot"
    try:
        first, second = (render(_conversation(turns, "", text + end)) for end in REPLIES)
    except Exception as error:  # of the template
        raise UnsupportedModel(
            f"the processor's chat template takes no system message ({error!s:.90}); {way_out}"
        ) from error
    if first == second:
        raise UnsupportedModel(
            f"the processor's chat template leaves out the system message; {way_out}"
        )


def _conversation(turns: Sequence[Content], reply: str, system: str | None = None) -> Messages:
    """All turns with replies between them. The last of these is `reply`."""
    messages: Messages = []
    if system is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
    for number, content in enumerate(turns, start=1):
        messages.append({"role": "user", "content": content})
        if number < len(turns):
            text = reply if number == len(turns) - 1 else REPLIES[0]
            parts = [{"type": "text", "text": text}]
            messages.append({"role": "assistant", "content": parts})
    return messages


def _render(processor: Any, messages: Messages, prompt: bool, options: Mapping[str, Any]) -> str:
    text = processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt, **options
    )
    return text if isinstance(text, str) else text[0]


def _refuse(what: str) -> NoReturn:
    raise UnsupportedModel(
        f"the processor's chat template {what}, so no text can continue what is cached; give "
        "processor.chat_template a template that writes the turns one after another, or begin a "
        "new session for each prompt"
    )
