"""The steps of an agent on one cache. Each step prefills only what is new."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from .cache.cache import StarKVCache
from .cache.chunk import describe_chunk
from .errors import CacheError, OptionError, UnsupportedModel
from .hf.cache_argument import with_cache

_MARK = "\u241f"  # stands for a reply while the chat template is rendered


_OWN = (
    "input_ids",
    "history",
    "keep_text",
    "_ended",
    "_types",
    "_grid",
    "_frames",
    "_starts",
)
"""What `save` writes in addition to the messages and the cache."""


class AgentSession:
    """Steps of one agent that share one `StarKVCache`.

    Each step prefills only its new tokens. Without a session, a GUI agent rebuilds its prompt at
    every step and prefills its last screenshots again. Positions continue from the uncompressed
    length. For M-RoPE models the session computes them, because `generate` cannot compute them
    from the new images alone.

    Args:
        model: compiled with starkv. On an uncompiled model a session works and drops nothing.
        processor: the model's Hugging Face processor.
        history: how many of the newest screenshots stay. All tokens of older ones leave the
            cache. None: all screenshots stay.
        keep_text: whether the text of the turns of older screenshots stays. If False, it leaves
            with them. Text before the session's first screenshot (a system prompt, a task) always
            stays.

    Raises:
        OptionError: history is less than 1, or keep_text is False without a history.
    """

    def __init__(
        self, model: Any, processor: Any, history: int | None = None, keep_text: bool = True
    ) -> None:
        if history is not None and history < 1:
            raise OptionError(f"history={history}: expected at least 1 screenshot, or None for all")
        if history is None and not keep_text:
            raise OptionError(
                "keep_text=False with history=None: text leaves together with its screenshots, but "
                "history=None keeps all screenshots; give a history, such as history=5"
            )
        self.model, self.processor = model, processor
        self.history, self.keep_text = history, keep_text
        self.cache = StarKVCache(model.config)
        self.input_ids: torch.Tensor | None = None
        self._messages: list[dict[str, Any]] = []
        self._frames: list[int] = []  # of the layout, by image
        self._starts: list[int] = []  # of the image's turn in the stream, by image
        self._ended, self.failed = False, False
        self._types: torch.Tensor | None = None
        self._grid: torch.Tensor | None = None

    def step(self, content: list[dict[str, Any]], **generate: Any) -> str:
        """Answers one user turn.

        A step that raises or is interrupted leaves the session as it was before. There is one
        exception: if the model also caches in layers of another kind, the session cannot be
        restored, and it ends.

        Args:
            content: parts of the message, {"type": "text", "text": ...} or
                {"type": "image", "image": PIL image}.
            generate: arguments for `model.generate`, such as max_new_tokens.

        Returns:
            The reply without special tokens.

        Raises:
            OptionError: content is not such a list or has more images than `history`, or generate
                asks for several replies.
            UnsupportedModel: the processor gives several rows.
            CacheError: an earlier step failed and ended the session.
        """
        _check_turn(content, generate, self.history)
        if self.failed:
            raise CacheError(
                "an earlier step of this session failed, and this model's cache cannot be restored "
                "to its state before that step; begin a new session, or load a saved one"
            )
        try:
            before = self.fork()
        except CacheError:
            before = None
        try:
            return self._step(content, generate)
        except BaseException:
            if before is None:
                self.failed = True
            else:
                self.__dict__.update(vars(before))
            raise

    def _step(self, content: list[dict[str, Any]], generate: dict[str, Any]) -> str:
        prompt = self._prompt({"role": "user", "content": content})
        images = [part["image"] for part in content if part["type"] == "image"] or None
        if images:
            self._make_way(len(images))
        new = self.processor(text=[prompt], images=images, return_tensors="pt")
        new = new.to(self.model.device)
        ids = self._append(new)
        if self.history is not None:  # a model that compresses describes it, another does not
            chunk = {**new, "input_ids": ids[:, self.cache.get_seq_length() :]}
            chunk.pop("attention_mask", None)
            describe_chunk(self.cache, self.model, chunk)
        extra = {k: v for k, v in new.items() if k not in ("input_ids", "attention_mask")}
        extra.update(self._positions(ids))
        if self._types is not None:
            extra["mm_token_type_ids"] = self._types
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **with_cache(self.cache),
            **extra,
            **generate,
        )
        self._count_frames(len(images or ()))
        self.input_ids = output
        reply = output[:, ids.shape[1] :]
        self._ended = bool(torch.isin(reply[0, -1], _end_tokens(self.model)))
        if self._types is not None:
            self._types = torch.nn.functional.pad(self._types, (0, reply.shape[1]))
        return self.processor.batch_decode(reply, skip_special_tokens=True)[0]

    def _make_way(self, images: int) -> None:
        """Removes the screenshots that `images` new ones push out of the history."""
        start = 0 if self.input_ids is None else self.input_ids.shape[1]
        self._starts += [start] * images
        if self.history is None:
            return
        left = self.history - images
        frames = sum(self._frames[-left:]) if left else 0
        text_from = 0 if self.keep_text else self._starts[-self.history :][0]
        self.cache.keep_newest_frames(frames, text_from)

    def _count_frames(self, images: int) -> None:
        """Notes how many frames each new image has: a processor may cut an image into tiles."""
        layout = self.cache.shared.layout
        if layout is None or not images:
            return
        added = int(layout.frame.max()) + 1 - sum(self._frames)
        self._frames += [added // images] * (images - 1) + [added - added // images * (images - 1)]

    def fork(self) -> AgentSession:
        """Returns a second session with the same past. Steps of one do not change the other.

        Raises:
            CacheError: the model also caches in layers of another kind, which cannot be copied.
        """
        twin = copy.copy(self)
        twin.cache, twin._messages = self.cache.fork(), list(self._messages)
        twin._frames, twin._starts = list(self._frames), list(self._starts)
        return twin

    def save(self, file: Path | str) -> None:
        """Writes the session to `file`. `AgentSession.load` continues it, in any process.

        Raises:
            CacheError: the model also caches in layers of another kind, which cannot be saved.
        """
        own = {name: getattr(self, name) for name in _OWN}
        torch.save({**own, "_messages": self._messages, "cache": self.cache.state_dict()}, file)

    @classmethod
    def load(cls, file: Path | str, model: Any, processor: Any) -> AgentSession:
        """Returns the session that `save` wrote.

        Args:
            file: what `save` wrote.
            model: the same model as before.
            processor: the same processor as before.

        Raises:
            OptionError: the file holds something else.
        """
        state = torch.load(file, map_location=model.device, weights_only=True)
        session = cls(model, processor)
        session._restore(state)
        return session

    def _restore(self, state: dict[str, Any]) -> None:
        """Replaces the contents of a new session by what `save` wrote.

        Raises:
            OptionError: `state` is something else.
        """
        wanted = {*_OWN, "_messages", "cache"}
        if not isinstance(state, dict) or state.keys() != wanted:
            found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise OptionError(
                f"the file holds {found:.90}; expected a session that AgentSession.save wrote"
            )
        self.cache.load_state_dict(state.pop("cache"))
        self.__dict__.update(state)

    def _prompt(self, message: dict[str, Any]) -> str:
        """Returns the text of a new turn: what the chat template writes after the last reply.

        The template renders the whole conversation. So it writes a system prompt only once, and
        it closes a reply that was cut off.
        """
        render = self.processor.apply_chat_template
        if not self._messages:
            text = render([message], add_generation_prompt=True)
        else:
            reply = {"role": "assistant", "content": [{"type": "text", "text": _MARK}]}
            self._messages.append(reply)
            text = render([*self._messages, message], add_generation_prompt=True)
            text = text.split(_MARK)[-1].lstrip(" ")
            if self._ended:
                text = text.removeprefix(self.processor.tokenizer.eos_token or "")
        self._messages.append(_without_pictures(message))
        return text

    def _append(self, new: Any) -> torch.Tensor:
        """Returns all token ids of the session so far, and notes token types and grids."""
        ids = new["input_ids"]
        if len(ids) != 1:
            raise UnsupportedModel(
                f"the processor gave {len(ids)} rows; expected 1, as a session has one row"
            )
        types, grid = new.get("mm_token_type_ids"), new.get("image_grid_thw")
        self._types = _join(self._types, types, dim=1)
        self._grid = _join(self._grid, grid, dim=0)
        return ids if self.input_ids is None else torch.cat([self.input_ids, ids], dim=1)

    def _positions(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns [4, 1, L] position ids (text, then M-RoPE) if the model takes them."""
        core: Any = getattr(self.model, "model", None)
        if self._types is None or not hasattr(core, "get_rope_index"):
            return {}
        vision, deltas = core.get_rope_index(ids, self._types, image_grid_thw=self._grid)
        core.rope_deltas = deltas
        text = torch.arange(ids.shape[1], device=ids.device).expand(1, 1, -1)
        return {"position_ids": torch.cat([text, vision.to(text.device)])}


def _check_turn(content: Any, generate: dict[str, Any], history: int | None) -> None:
    """Raises `OptionError` unless it is one turn with one reply, whose images fit `history`."""
    whole = isinstance(content, list) and bool(content)
    for part in content if whole else ():
        kind = part.get("type") if isinstance(part, dict) else None
        whole = whole and kind in ("text", "image") and kind in part
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
    for name in ("num_beams", "num_return_sequences"):
        if generate.get(name, 1) != 1:
            raise OptionError(
                f"{name}={generate[name]}: a session gives one reply; for several, call step on "
                "several forks"
            )
    if generate.get("return_dict_in_generate"):
        raise OptionError(
            "return_dict_in_generate=True: step returns the reply as text; leave it out. The "
            "reply's tokens are the last of session.input_ids, and the cache is session.cache"
        )


def _without_pictures(message: dict[str, Any]) -> dict[str, Any]:
    """The message without its pictures. A chat template writes the same tokens for any picture."""
    parts = [{k: v for k, v in p.items() if k in ("type", "text")} for p in message["content"]]
    return {**message, "content": parts}


def _end_tokens(model: Any) -> torch.Tensor:
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return torch.tensor(ends, device=model.device)


def _join(old: torch.Tensor | None, new: torch.Tensor | None, dim: int) -> torch.Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return torch.cat([old, new], dim=dim)
