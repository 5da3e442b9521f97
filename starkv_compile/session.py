"""An agent's trajectory on one cache: each step prefills only what is new."""

from __future__ import annotations

from typing import Any

import torch

from .cache import StarKVCache
from .errors import UnsupportedModel

_MARK = "\u241f"  # stands for a reply while the chat template is rendered


class AgentSession:
    """Steps of one agent, its past kept compressed in one `StarKVCache`.

    Without it a GUI agent rebuilds the prompt with its last screenshots at every step and
    prefills them all again. Positions go on from the uncompressed length; for M-RoPE models they
    are computed here, since `generate` cannot compute them from the new images alone.

    Args:
        model: compiled with starkv (or not: then nothing is dropped).
        processor: the model's Hugging Face processor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.cache = StarKVCache(model.config)
        self.input_ids: torch.Tensor | None = None
        self._messages: list[dict[str, Any]] = []
        self._ended = False
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
        """
        prompt = self._prompt({"role": "user", "content": content})
        images = [part["image"] for part in content if part["type"] == "image"] or None
        new = self.processor(text=[prompt], images=images, return_tensors="pt")
        new = new.to(self.model.device)
        ids = self._append(new)
        extra = {k: v for k, v in new.items() if k not in ("input_ids", "attention_mask")}
        extra.update(self._positions(ids))
        if self._types is not None:
            extra["mm_token_type_ids"] = self._types
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self.cache,
            **extra,
            **generate,
        )
        self.input_ids = output
        reply = output[:, ids.shape[1] :]
        self._ended = bool(torch.isin(reply[0, -1], _end_tokens(self.model)))
        if self._types is not None:
            self._types = torch.nn.functional.pad(self._types, (0, reply.shape[1]))
        return self.processor.batch_decode(reply, skip_special_tokens=True)[0]

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
        self._messages.append(message)
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


def _end_tokens(model: Any) -> torch.Tensor:
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return torch.tensor(ends, device=model.device)


def _join(old: torch.Tensor | None, new: torch.Tensor | None, dim: int) -> torch.Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return torch.cat([old, new], dim=dim)
