"""`OnnxSession` and `load_model`: an exported model, called like the Hugging Face model it was.

ONNX Runtime or TensorRT runs the decoder and the vision tower. Configuration, processor, positions
and `generate` are those of transformers, and the cache is a `StarKVCache`.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..cache.cache import StarKVCache, ready_cache
from ..errors import StarKVError, UnsupportedModel
from ..hf.cache_argument import pop_cache
from ..hf.packed_rows import is_packed
from ..session import AgentSession
from ..vision.image_shapes import note_shapes
from .graphs import open_graph
from .onnx.manifest import Manifest
from .runtime import Runtime

OTHER_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
TOKEN_TYPES = ("token_type_ids", "moe_mm_token_type_ids")
"""Types of tokens that a decoder reads. `mm_token_type_ids` gives positions, before the graphs."""


class OnnxSession(AgentSession):
    """Steps of one agent, with an exported folder as its model.

    `step(content, max_new_tokens=..., streamer=...)`, `replace_reply`, `fork` and `save` work as
    in `AgentSession`.
    `OnnxSession.model` is a model for `generate`, without a session.

    Args:
        folder: what `starkv export` wrote.
        processor: the model's processor. None: the one in the folder.
        provider: "cpu" or "cuda" of ONNX Runtime, or "tensorrt" for the engines in the folder.
        history: as in `AgentSession`.
        keep_text: as in `AgentSession`.
        system: as in `AgentSession`.
        chat_template_kwargs: as in `AgentSession`.

    Raises:
        StarKVError: the folder holds no export, or the runtime is missing.
    """

    def __init__(
        self,
        folder: Path | str,
        processor: Any = None,
        provider: str = "cpu",
        history: int | None = None,
        keep_text: bool = True,
        *,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        folder = Path(folder)
        model = load_model(folder, provider)  # first: it says if this is no export
        processor = load_processor(folder) if processor is None else processor
        super().__init__(
            model,
            processor,
            history,
            keep_text,
            system=system,
            chat_template_kwargs=chat_template_kwargs,
        )

    @classmethod
    def load(
        cls,
        file: Path | str,
        folder: Path | str,
        processor: Any = None,
        provider: str = "cpu",
    ) -> OnnxSession:
        """Returns the session that `save` wrote.

        Args:
            file: what `save` wrote.
            folder: as for a new session.
            processor: as for a new session.
            provider: as for a new session.

        Raises:
            SessionFileError: the file holds something else, is damaged, or belongs to another model
                or processor.
            OSError: the file cannot be opened.
            StarKVError: the folder holds no export, or the runtime is missing.
        """
        session = cls(folder, processor, provider)
        session._restore(file)
        return session


def load_processor(folder: Path) -> Any:
    """Returns the processor in the folder; for a text model, its tokenizer."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder, local_files_only=True)


def load_model(folder: Path | str, provider: str = "cpu") -> Any:
    """Returns a Hugging Face model without weights. Its forward runs the folder's graphs.

    Args:
        folder: what `starkv export` wrote.
        provider: "cpu" or "cuda" of ONNX Runtime, or "tensorrt" for the engines in the folder.

    Raises:
        StarKVError: the folder holds no export, or the runtime is missing.
        UnsupportedModel: this transformers does not have the model's class.
    """
    import transformers

    folder = Path(folder)
    manifest = Manifest.read(folder)
    kind = getattr(transformers, manifest.model_class, None)
    if kind is None:
        raise UnsupportedModel(
            f"{folder}: it was exported from a {manifest.model_class}, which transformers "
            f"{transformers.__version__} does not have; install a version that has it"
        )
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):  # of the graphs' dtype: the library casts pixels to the tower's
        model = kind(config).to(manifest.shapes.dtype).eval()
    model.generation_config = transformers.GenerationConfig.from_dict(
        json.loads((folder / "generation_config.json").read_text())
    )
    model.__class__ = _runtime_class(kind)
    model.runtime = Runtime(folder, manifest, provider)
    note_shapes(model)
    tower = getattr(getattr(model, "model", None), "visual", None)
    if tower is not None and manifest.visual:
        visual = open_graph(folder / "visual.onnx", provider)
        from .onnx.visual import run_visual

        tower.forward = MethodType(functools.partial(run_visual, visual), tower)
    return model


@functools.cache
def _runtime_class(kind: type) -> type:
    """A subclass of the model's class that computes with its `runtime`."""

    signature = inspect.signature(kind.forward)  # type: ignore[attr-defined]

    @functools.wraps(kind.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast | tuple[Any, ...]:
        named = signature.bind(self, *args, **kwargs).arguments
        named = {**named, **named.pop("kwargs", {})}
        del named["self"]
        _check_call(self, named)
        named["past_key_values"] = cache = _own_cache(self, pop_cache(named))
        if named["input_ids"].shape[1] > 1:
            self.runtime.begin_chunk(cache, self, named)
        output = self.runtime.forward(self, **named)
        return output.to_tuple() if named.get("return_dict") is False else output

    return type(
        kind.__name__,
        (kind,),
        {
            "forward": forward,
            "device": property(lambda self: torch.device("cpu")),
            "dtype": property(lambda self: self.runtime.shapes.dtype),
        },
    )


def _check_call(model: Any, named: dict[str, Any]) -> None:
    """Raises `StarKVError` for anything without an input or output in the graphs."""
    if model.training:
        raise StarKVError("training mode: an exported model cannot train; call model.eval() first")
    for name in OTHER_OUTPUTS:
        asked = named.get(name)
        if asked or (asked is None and getattr(model.config, name, False)):
            raise StarKVError(
                f"{name}=True: an exported model returns logits and the cache only; pass "
                f"{name}=False, or use the model that was exported"
            )
    if named.get("input_ids") is None:
        raise StarKVError(
            "input_ids are missing: an exported model embeds tokens itself; pass input_ids in "
            "place of inputs_embeds"
        )
    if named.get("inputs_embeds") is not None:
        raise StarKVError("inputs_embeds: an exported model embeds tokens itself; leave them out")
    for name in TOKEN_TYPES:
        if (
            named.get(name) is not None
            and name in inspect.signature(type(model).forward).parameters
        ):
            raise StarKVError(
                f"{name}: the graphs of an exported model read no types of tokens; leave them out, "
                "or use the model that was exported"
            )
    if named.get("use_cache") is False:
        raise StarKVError("use_cache=False: an exported model always has a cache; leave it out")
    if named.get("labels") is not None:
        raise StarKVError("labels: an exported model has no loss; train the model before export")
    mask = named.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        shape = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise StarKVError(
            f"attention_mask of shape {shape}: pass one of [batch, tokens], or none; the exported "
            "model makes its masks from it"
        )
    if is_packed(named.get("position_ids"), mask):
        raise StarKVError(
            "position_ids start again within a row, so several sequences are packed into it; pass "
            "them as rows of a batch, padded on the left"
        )
    wanted = named.get("logits_to_keep", 0)
    if not isinstance(wanted, int) or (wanted == 0 and named["input_ids"].shape[1] > 1):
        raise StarKVError(
            f"logits_to_keep={wanted}: an exported model returns only the last logits of a prompt; "
            "pass logits_to_keep=1, as generate does"
        )


def _own_cache(model: Any, given: Any) -> StarKVCache:
    """Returns the caller's cache as a `StarKVCache`.

    Raises:
        StarKVError: it cannot become one.
    """
    cache = ready_cache(model.config, given)
    if cache is None:
        raise StarKVError(
            f"the cache is a {type(given).__name__}: pass a StarKVCache or an empty DynamicCache "
            "without offloading, or leave it out"
        )
    return cache
