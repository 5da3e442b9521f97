"""An agent's trajectory on one cache: each step prefills only what is new."""

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
"""What `save` writes beside the messages and the cache."""


class AgentSession:
    """Steps of one agent, its past kept compressed in one `StarKVCache`.

    Without it a GUI agent rebuilds the prompt with its last screenshots at every step and
    prefills them all again. Positions go on from the uncompressed length; for M-RoPE models they
    are computed here, since `generate` cannot compute them from the new images alone.

    Args:
        model: compiled with starkv (or not: then nothing is dropped).
        processor: the model's Hugging Face processor.
        history: how many of the newest screenshots are remembered; older ones leave the cache
            whole. None: all of them.
        keep_text: whether the text of their turns stays. If not, it leaves with them, but for what
            stands before the session's first screenshot: a system prompt, a task.

    Raises:
        OptionError: history is less than 1, or keep_text is False without a history.
    """

    def __init__(
        self, model: Any, processor: Any, history: int | None = None, keep_text: bool = True
    ) -> None:
        if history is not None and history < 1:
            raise OptionError(f"history={history}: a session remembers at least 1 screenshot")
        if history is None and not keep_text:
            raise OptionError(
                "keep_text=False: text leaves with its screenshots, and history=None keeps them "
                "all; give history=5"
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
        """One user turn, answered.

        Args:
            content: parts of the message, {"type": "text", "text": ...} or
                {"type": "image", "image": PIL image}.
            generate: for `model.generate`, such as max_new_tokens.

        Returns:
            The reply, special tokens left out.

        A step that raises, an interrupted one too, leaves the session as it was. (Where another
        kind of layer caches as well, which cannot be kept so, the session ends with it.)

        Raises:
            OptionError: content is no such list or has more images than are remembered, or
                generate asks for several replies.
            CacheError: the session has ended so.
        """
        _check_turn(content, generate, self.history)
        if self.failed:
            raise CacheError(
                "an earlier step of this session failed part-way, and this model's cache cannot be "
                "taken back to before it; begin a new session, or load a saved one"
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
        """Let the screenshots that `images` new ones push out of the history leave the cache."""
        start = 0 if self.input_ids is None else self.input_ids.shape[1]
        self._starts += [start] * images
        if self.history is None:
            return
        left = self.history - images
        frames = sum(self._frames[-left:]) if left else 0
        text_from = 0 if self.keep_text else self._starts[-self.history :][0]
        self.cache.keep_newest_frames(frames, text_from)

    def _count_frames(self, images: int) -> None:
        """How many frames of the layout each new image is: a processor may cut it into tiles."""
        layout = self.cache.shared.layout
        if layout is None or not images:
            return
        added = int(layout.frame.max()) + 1 - sum(self._frames)
        self._frames += [added // images] * (images - 1) + [added - added // images * (images - 1)]

    def fork(self) -> AgentSession:
        """A second session with this past, to try something on; neither notices the other."""
        twin = copy.copy(self)
        twin.cache, twin._messages = self.cache.fork(), list(self._messages)
        twin._frames, twin._starts = list(self._frames), list(self._starts)
        return twin

    def save(self, file: Path | str) -> None:
        """Write the session to `file`; `AgentSession.load` goes on from it, in any process."""
        own = {name: getattr(self, name) for name in _OWN}
        torch.save({**own, "_messages": self._messages, "cache": self.cache.state_dict()}, file)

    @classmethod
    def load(cls, file: Path | str, model: Any, processor: Any) -> AgentSession:
        """The session that `save` wrote. `model` and `processor` as it was made with."""
        state = torch.load(file, map_location=model.device, weights_only=True)
        session = cls(model, processor)
        session._restore(state)
        return session

    def _restore(self, state: dict[str, Any]) -> None:
        """Take what `save` wrote in the place of what a new session holds.

        Raises:
            OptionError: it is something else.
        """
        wanted = {*_OWN, "_messages", "cache"}
        if not isinstance(state, dict) or state.keys() != wanted:
            found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise OptionError(f"not a session that AgentSession.save wrote, but {found:.90}")
        self.cache.load_state_dict(state.pop("cache"))
        self.__dict__.update(state)

    def _prompt(self, message: dict[str, Any]) -> str:
        """The text of a new turn: what the chat template puts after the last reply.

        Rendered with the whole conversation, so that a template which opens every chat with a
        system prompt does so once, and closes a reply that was cut off.
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
        """All token ids of the session so far; token types and grids are kept alongside."""
        ids = new["input_ids"]
        if len(ids) != 1:
            raise UnsupportedModel(f"a session has one row, the processor gave {len(ids)}")
        types, grid = new.get("mm_token_type_ids"), new.get("image_grid_thw")
        self._types = _join(self._types, types, dim=1)
        self._grid = _join(self._grid, grid, dim=0)
        return ids if self.input_ids is None else torch.cat([self.input_ids, ids], dim=1)

    def _positions(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """[4, 1, L] position ids (text, then M-RoPE) where the model wants them."""
        core: Any = getattr(self.model, "model", None)
        if self._types is None or not hasattr(core, "get_rope_index"):
            return {}
        vision, deltas = core.get_rope_index(ids, self._types, image_grid_thw=self._grid)
        core.rope_deltas = deltas
        text = torch.arange(ids.shape[1], device=ids.device).expand(1, 1, -1)
        return {"position_ids": torch.cat([text, vision.to(text.device)])}


def _check_turn(content: Any, generate: dict[str, Any], history: int | None) -> None:
    """Raise `OptionError` for what is not one user turn with one reply, and remembered whole."""
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
            f"{images} images in a turn of a session with history={history}: it could not "
            f"remember them all; give history={images} or more"
        )
    for name in ("num_beams", "num_return_sequences"):
        if generate.get(name, 1) != 1:
            raise OptionError(
                f"{name}={generate[name]}: a session has one row; try several replies on forks"
            )
    if generate.get("return_dict_in_generate"):
        raise OptionError(
            "return_dict_in_generate=True: step returns the reply; its tokens are the last of "
            "session.input_ids, the cache is session.cache"
        )


def _without_pictures(message: dict[str, Any]) -> dict[str, Any]:
    """All that a chat template reads: it puts the same tokens for any picture."""
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
