"""The steps of an agent on one cache. Each step prefills only what is new."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..cache.cache import StarKVCache
from ..cache.checks import expect
from ..cache.chunk import describe_chunk
from ..errors import CacheError, OptionError, SessionFileError, UnsupportedModel
from ..hf.cache_argument import with_cache
from ..vision.describe import image_token_ids
from .contents import check_contents, has_heads_of
from .file import read_session, write_session
from .generation import check_options, check_output, end_tokens
from .inner import generating_model, inner_model, positions_owner
from .token_types import UNUSED, Types, check_outputs, joined, resized
from .turn import (
    Content,
    check_template_options,
    check_turn,
    text_of_turn,
    without_pictures,
)

_OWN = {
    "input_ids": "input_ids",
    "types": "_types",
    "grid": "_grid",
    "history": "history",
    "keep_text": "keep_text",
    "ended": "_ended",
    "frames": "_frames",
    "starts": "_starts",
    "turns": "_turns",
    "prompt_length": "prompt_length",
    "system": "system",
    "template_options": "_template_options",
}
"""What `save` writes in addition to the cache: names in the file, and attributes."""


_CHANGING = threading.RLock()
"""Held while a step begins, and while a session is copied or put into a file. Signal handlers may
come between, and hold it once more."""


class AgentSession:
    """Steps of one agent that share one `StarKVCache`.

    Each step prefills only its new tokens. Without a session, a GUI agent rebuilds its prompt at
    every step and prefills its last screenshots again. Positions continue from the uncompressed
    length. For M-RoPE models the session computes them, because `generate` cannot compute them
    from the new images alone.

    Args:
        model: compiled with starkv. On an uncompiled model a session works and drops nothing. It
            may be in a wrapper, such as that of PEFT or `torch.compile`.
        processor: the model's Hugging Face processor.
        history: how many of the newest screenshots stay. All tokens of older ones leave the
            cache. None: all screenshots stay.
        keep_text: whether the text of the turns of older screenshots stays. If False, it leaves
            with them. Text before the session's first screenshot (a system prompt, a task) always
            stays.
        system: text of a system message before the first turn. None: no such message, or the one
            that the chat template writes itself.
        chat_template_kwargs: further arguments of `processor.apply_chat_template`, such as
            {"tools": [...]} with the JSON schemas of tools. JSON must be able to hold them.

    Attributes:
        cache: the session's `StarKVCache`.
        input_ids: [1, L] int64, all tokens so far, with those that left the cache. None before the
            first step.
        prompt_length: how many of these L tokens came before the last reply.

    Raises:
        OptionError: history is less than 1, keep_text is False without a history, or system or
            chat_template_kwargs cannot be rendered or saved.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        history: int | None = None,
        keep_text: bool = True,
        *,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not callable(getattr(model, "modules", None)):
            raise OptionError(
                f"AgentSession's first argument is of type {type(model).__name__}: expected a "
                "model; write AgentSession(model, processor)"
            )
        if history is not None and history < 1:
            raise OptionError(f"history={history}: expected at least 1 screenshot, or None for all")
        if history is None and not keep_text:
            raise OptionError(
                "keep_text=False with history=None: text leaves together with its screenshots, but "
                "history=None keeps all screenshots; give a history, such as history=5"
            )
        options = {} if chat_template_kwargs is None else chat_template_kwargs
        check_template_options(system, options)
        self.model, self.processor = model, processor
        self.history, self.keep_text, self.system = history, keep_text, system
        # Text: later changes of the caller's dict do not reach a running session.
        self._template_options = json.dumps(dict(options))
        self._inner = inner_model(model)
        self.cache = StarKVCache(self._inner.config)
        self.input_ids: torch.Tensor | None = None
        # Lists and tensors are replaced, never changed: forks and files in progress share them.
        self._turns: list[Content] = []  # the user's
        self._frames: list[int] = []  # of the layout, by image
        self._starts: list[int] = []  # of the image's turn in the stream, by image
        self.prompt_length = 0
        self._ended, self.failed = False, False
        self._running = False
        self._before: AgentSession | None = None  # while a step runs
        self._types: Types = {}
        self._grid: torch.Tensor | None = None

    def step(self, content: list[dict[str, Any]], **generate: Any) -> str:
        """Answers one user turn.

        A step that raises or is interrupted leaves the session as it was before. There is one
        exception: if the model also caches in layers of another kind, the session cannot be
        restored, and it ends. While a step runs (seen from a streamer, a signal handler or another
        thread), `save` and `fork` give the state before it.

        Args:
            content: parts of the message, {"type": "text", "text": ...} or
                {"type": "image", "image": PIL image}.
            generate: arguments for `model.generate`, such as max_new_tokens.

        Returns:
            The reply without special tokens.

        Raises:
            OptionError: content is not such a list or has more images than `history`, or an option
                of generate, given or in a `generation_config`, does not fit a session: several
                replies, drafted tokens, another cache.
            UnsupportedModel: the processor gives several rows or numbers of tokens that a session
                does not know, its chat template does not write a new turn after all others, or the
                model reads a whole prompt in both directions.
            CacheError: an earlier step failed and ended the session, a step of this session is
                running, or the model's `generate` did not leave its reply in the session's cache.
        """
        check_turn(content, self.history)
        check_options(self._inner, generate)
        with _CHANGING:
            self._check_idle()
            self._check_alive()
            try:
                before = self.fork()
            except CacheError:
                before = None
            self._before, self._running = before, True
        try:
            return self._step(content, generate)
        except BaseException:
            if before is None:
                self.failed = True
            else:
                self.__dict__.update(vars(before))
            raise
        finally:
            self._running, self._before = False, None

    def _check_idle(self) -> None:
        if self._running:
            raise CacheError(
                "a step of this session is running; wait until it returns, or work on a fork"
            )

    def _at_rest(self) -> AgentSession:
        """The session, or what it was before the step that is running."""
        if self._running and self._before is not None:
            return self._before
        self._check_idle()
        return self

    def _check_alive(self) -> None:
        if self.failed:
            raise CacheError(
                "an earlier step of this session failed, and this model's cache cannot be restored "
                "to its state before that step; begin a new session, or load a saved one"
            )

    def _step(self, content: Content, generate: dict[str, Any]) -> str:
        prompt = self._prompt(content)
        images = [part["image"] for part in content if part["type"] == "image"] or None
        if images:
            self._make_way(len(images))
        new = self.processor(
            text=[prompt], images=images, return_tensors="pt", **self._special_tokens(prompt)
        )
        new = new.to(self._inner.device)
        ids = self._append(new)
        self.cache.begin_turn()
        if self.history is not None:  # a model that compresses describes it, another does not
            chunk = {**new, "input_ids": ids[:, self.cache.get_seq_length() :]}
            chunk.pop("attention_mask", None)
            describe_chunk(self.cache, self._inner, chunk)
        extra = {k: v for k, v in new.items() if k not in ("input_ids", *UNUSED)}
        extra.update(self._positions(ids), **self._types)
        output = generating_model(self.model).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **with_cache(self.cache),
            **extra,
            **generate,
        )
        check_output(output, ids, self.cache.get_seq_length())
        self._count_frames(images or [])
        self.input_ids = output
        self.prompt_length = ids.shape[1]
        reply = output[:, self.prompt_length :]
        self._ended = int(reply[0, -1]) in end_tokens(self._inner, generate)
        self._types = resized(self._types, self.prompt_length, output.shape[1])
        return self.processor.batch_decode(reply, skip_special_tokens=True)[0]

    def _make_way(self, images: int) -> None:
        """Removes the screenshots that `images` new ones push out of the history."""
        start = 0 if self.input_ids is None else self.input_ids.shape[1]
        self._starts = [*self._starts, *[start] * images]
        if self.history is None:
            return
        left = self.history - images
        frames = sum(self._frames[-left:]) if left else 0
        text_from = 0 if self.keep_text else self._starts[-self.history :][0]
        self.cache.keep_newest_frames(frames, text_from)

    def _count_frames(self, images: list[Any]) -> None:
        """Notes how many frames each new image has: a processor may cut an image into tiles.

        Images of one turn that differ in size may have different numbers of tiles, and nothing says
        whose a tile is. The last of them then has all of the turn, so they leave together.
        """
        layout = self.cache.shared.layout
        if layout is None or not images:
            return
        added, count = int(layout.frame.max()) + 1 - sum(self._frames), len(images)
        sizes = [getattr(image, "size", None) for image in images]
        alike = count == 1 or (isinstance(sizes[0], tuple) and len(set(sizes)) == 1)  # as of PIL
        if added % count == 0 and (alike or added == count):
            new = [added // count] * count
        else:
            new = [0] * (count - 1) + [added]
        self._frames = [*self._frames, *new]

    def replace_reply(self, reply: str) -> None:
        """Puts `reply` in the place of the last step's reply, so that later steps read it.

        For a reply that a person corrected, or that the history of a model's own prompt gives in
        another form, such as without its thoughts. The next step prefills `reply` with its turn,
        after `history` has removed old screenshots. So with `keep_text=False` it leaves one step
        later than a decoded reply.

        Args:
            reply: text without the token that ends it. It may be empty. It follows what the chat
                template writes before a reply. If that opens a block of thoughts, `reply` has to
                close it.

        Raises:
            OptionError: `reply` is no text or has a token that stands for an image, or the session
                has no step yet.
            CacheError: an earlier step failed and ended the session, a step of this session is
                running, or the model also caches in layers of another kind, from which no token can
                be removed. The session stays as it is.
        """
        if not isinstance(reply, str):
            raise OptionError(f"replace_reply({reply!r:.60}): expected the text of a reply")
        if self.input_ids is None:
            raise OptionError(
                "replace_reply before the first step: there is no reply to replace; call step first"
            )
        self._check_idle()
        self._check_alive()
        tokens = self._tokenizer(reply, add_special_tokens=False)["input_ids"]
        images = set(tokens) & set(image_token_ids(self._inner.config))
        if images:
            raise OptionError(
                f"replace_reply({reply!r:.60}): {self._tokenizer.decode([min(images)])!r} stands "
                "for an image, and a reply has none; leave it out"
            )
        decoded = self.cache.get_seq_length() - self.prompt_length
        try:
            if decoded:
                self.cache.crop(-decoded)
        except CacheError:
            raise
        except RuntimeError as error:  # of the layers of transformers
            raise CacheError(
                "replace_reply: this model also caches in layers of another kind, from which no "
                f"token can be removed ({error!s:.90}); say in the next turn what the reply "
                "should have been"
            ) from error
        prompt = self.input_ids[:, : self.prompt_length]
        new = torch.tensor([tokens], dtype=prompt.dtype, device=prompt.device)
        self.input_ids = torch.cat([prompt, new], dim=1)
        self._types = resized(self._types, self.prompt_length, self.input_ids.shape[1])
        self._ended = False

    def fork(self) -> AgentSession:
        """Returns a second session with the same past. Steps of one do not change the other.

        While a step runs, it is a session without that step.

        Raises:
            CacheError: the model also caches in layers of another kind, which cannot be copied.
        """
        with _CHANGING:
            past = self._at_rest()
            twin = copy.copy(past)
            twin.cache = past.cache.fork()
        return twin

    def save(self, file: Path | str) -> None:
        """Writes the session to `file`. `AgentSession.load` continues it, in any process.

        The file is replaced at once when everything is on the disk. If writing fails, an older
        file stays as it was. While a step runs, the file holds the session without that step.

        Raises:
            CacheError: the model also caches in layers of another kind, which cannot be saved.
            OSError: the file cannot be written.
        """
        with _CHANGING:  # a step that begins later changes none of the contents in place
            past = self._at_rest()
            own = {name: getattr(past, attribute) for name, attribute in _OWN.items()}
            configured = has_heads_of(past._inner.config, past.cache.compressed_layers)
            contents = {**own, "configured_heads": configured, "cache": past.cache.state_dict()}
        write_session(file, contents, self._inner, self.processor)

    @classmethod
    def load(cls, file: Path | str, model: Any, processor: Any) -> AgentSession:
        """Returns the session that `save` wrote.

        Args:
            file: what `save` wrote.
            model: the same model as before. The file names its family, sizes, vocabulary and dtype,
                and these are compared. The weights are not.
            processor: of the same class as before.

        Raises:
            SessionFileError: the file holds something else, is damaged, or belongs to another model
                or processor.
            OSError: the file cannot be opened.
        """
        session = cls(model, processor)
        session._restore(file)
        return session

    def _restore(self, file: Path | str) -> None:
        """Replaces the contents of a new session by what `save` wrote.

        Raises:
            SessionFileError: as in `load`. The session stays as it is.
        """
        contents = read_session(file, self._inner, self.processor)
        cache = contents.pop("cache", None)
        try:
            check_contents(contents, self._inner.config)
            self.cache.load_state_dict(cache)
            self._check_fit(contents)
        except CacheError as error:
            self.cache = StarKVCache(self._inner.config)
            raise SessionFileError(f"{file}: {error}") from error
        for name, attribute in _OWN.items():
            setattr(self, attribute, contents[name])

    def _check_fit(self, contents: dict[str, Any]) -> None:
        """Raises `CacheError` unless the cache fits `contents` and the model."""
        ids = contents["input_ids"]
        tokens = 0 if ids is None else ids.shape[1] - 1
        layers = self.cache.compressed_layers
        seen = sorted({layer.seen for layer in layers})
        expect(
            seen in ([], [tokens], [contents["prompt_length"]]),
            f"the layers have seen {seen} tokens; expected {tokens}, all but the last, or "
            f"{contents['prompt_length']}, without a reply that was replaced",
        )
        expect(
            not contents["configured_heads"] or has_heads_of(self._inner.config, layers),
            "the layers store other heads than those of the model; expected those of its "
            "configuration",
        )
        if ids is None:
            return
        try:
            self._rope(ids, contents["types"], contents["grid"])
        except Exception as error:  # of the model's code, by what does not fit
            expect(
                False,
                f"no positions follow from the tokens and the images' grids ({error!r:.90}); "
                "expected the grid of each image among the tokens",
            )

    def _prompt(self, content: Content) -> str:
        """Returns the text of a new turn, and notes the turn."""
        end = ""
        if self._ended and self.input_ids is not None:
            end = self._tokenizer.decode([int(self.input_ids[0, -1])]).strip()
        self._turns = [*self._turns, without_pictures(content)]
        options = json.loads(self._template_options)
        return text_of_turn(self.processor, self._turns, end, self.system, options)

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def _special_tokens(self, prompt: str) -> dict[str, bool]:
        """Keeps a tokenizer from adding a first token that is cached or in `prompt` already."""
        if not self._tokenizer("")["input_ids"]:
            return {}
        first = self._tokenizer.bos_token
        once = self.input_ids is not None or (first is not None and prompt.startswith(first))
        return {"add_special_tokens": False} if once else {}

    def _append(self, new: Any) -> torch.Tensor:
        """Returns all token ids of the session so far, and notes token types and grids."""
        ids = new["input_ids"]
        if len(ids) != 1:
            raise UnsupportedModel(
                f"the processor gave {len(ids)} rows; expected 1, as a session has one row"
            )
        before = 0 if self.input_ids is None else self.input_ids.shape[1]
        check_outputs(self._inner, new, before)
        self._types = joined(self._types, new, before)
        grids = [grid for grid in (self._grid, new.get("image_grid_thw")) if grid is not None]
        self._grid = torch.cat(grids) if grids else None
        return ids if self.input_ids is None else torch.cat([self.input_ids, ids], dim=1)

    def _positions(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns [4, 1, L] position ids (text, then M-RoPE) if the model takes them."""
        rope = self._rope(ids, self._types, self._grid)
        if rope is None:
            return {}
        core, vision, deltas = rope
        core.rope_deltas = deltas
        text = torch.arange(ids.shape[1], device=ids.device).expand(1, 1, -1)
        return {"position_ids": torch.cat([text, vision.to(text.device)])}

    def _rope(self, ids: torch.Tensor, types: Types, grid: Any) -> tuple[Any, Any, Any] | None:
        """The module that computes M-RoPE positions, the positions, and what decoding adds."""
        visual = types.get("mm_token_type_ids")
        core = None if visual is None else positions_owner(self._inner)
        if core is None:
            return None
        return core, *core.get_rope_index(ids, visual, image_grid_thw=grid)
