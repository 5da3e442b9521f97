"""Writes a checkpoint as a folder that another runtime can serve."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...config import StarKVConfig
from ...errors import OptionError, StarKVError
from ...hf.checkpoints import check_folder, load_pretrained, read_config
from ...optional import needs
from ...policies import ScreenNovelty, StarKV
from ..capture.decoder import Decode, DecodeInSlots, Decoder, Prefill, describe, traceable
from ..capture.ports import Shapes, decode_ports, prefill_ports
from ..capture.select import chosen
from .manifest import Manifest

if TYPE_CHECKING:
    from .weights import Weights  # imports onnx

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LEAST_SEQ = 16
CACHES = ("dynamic", "static")
EXPORTED = (ScreenNovelty, StarKV)
"""The policies that export supports: their graphs have been written and run."""
LEAST_SLOTS = 64
REPLY = 1024
"""Room for this many tokens in a static cache by default, in addition to what the budget keeps."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of `starkv export`.

    Attributes:
        checkpoint: folder that `save_pretrained` wrote.
        out: new folder to write.
        config: the configuration; its policy must be one of `EXPORTED`.
        max_seq: most tokens that a session may see.
        dtype: type of weights and cache: "float32", "float16" or "bfloat16".
        select: form of the selection: "auto", "topk" or "threshold".
        cache: "dynamic", or "static" for buffers of fixed length.
        slots: number of tokens that fit in the buffers of a static cache. None: what the budget
            keeps of `max_seq` tokens, plus a reply.
    """

    checkpoint: Path
    out: Path
    config: StarKVConfig
    max_seq: int = 16384
    dtype: str = "float32"
    select: str = "auto"
    cache: str = "dynamic"
    slots: int | None = None

    @property
    def room(self) -> int:
        """Slots of each layer's buffers; 0 for a dynamic cache."""
        if self.cache == "dynamic":
            return 0
        if self.slots is not None:
            return self.slots
        return max(LEAST_SLOTS, min(self.most_kept + REPLY, self.max_seq))

    @property
    def most_kept(self) -> int:
        """Tokens that the longest session stores after a prompt."""
        return min(self.config.capacity(self.max_seq), self.max_seq)


def export_checkpoint(options: ExportOptions, say: Callable[[str], Any] = print) -> Path:
    """Writes the folder `options.out`. If it fails, it leaves no files.

    Args:
        options: the options of the command.
        say: called with the name of each file before it is written.

    Returns:
        The folder.

    Raises:
        StarKVError: a package is missing, an option is impossible, or the model cannot be exported.
    """
    for package in ("onnx", "onnxscript"):
        needs(package)
    _check(options)
    config = read_config(options.checkpoint)
    _check_positions(config, options)
    model = load_pretrained(options.checkpoint, config, DTYPES[options.dtype])
    return export_model(model, options, say)


def export_model(model: Any, options: ExportOptions, say: Callable[[str], Any] = print) -> Path:
    """Does the same for a model in memory. The other files come from `options.checkpoint`."""
    _check(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{options.out.name}-", dir=options.out.parent))
    try:
        _write(model, options, work, say)
        work.chmod(0o755)
        work.rename(options.out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return options.out


def _check(options: ExportOptions) -> None:
    check_folder(options.checkpoint)
    if options.out.exists():
        raise StarKVError(f"{options.out}: it exists already; remove it or give another folder")
    if options.dtype not in DTYPES:
        raise OptionError(f"dtype={options.dtype!r}: expected one of {', '.join(DTYPES)}")
    chosen(options.select, options.max_seq)
    check_config(options.config, options.max_seq)
    _check_slots(options)


def check_config(config: StarKVConfig, max_seq: int) -> None:
    """Raises `OptionError` for options that exported graphs do not support."""
    if max_seq < LEAST_SEQ:
        raise OptionError(f"max_seq={max_seq}: expected at least {LEAST_SEQ} tokens")
    if type(config.policy) not in EXPORTED:
        raise OptionError(
            f"policy={config.policy.name!r} is not exported yet; use "
            f"{' or '.join(repr(policy.name) for policy in EXPORTED)}, or run this policy with "
            "starkv_compile.compile"
        )
    if config.debug:
        raise OptionError(
            "debug=True reads values on the host, which an exported graph cannot do; leave it out"
        )
    for name in ("budget_bytes", "decode_tokens", "layer_budgets"):
        if getattr(config, name) is not None:
            raise OptionError(f"{name} is not exported yet; use budget or budget_tokens")
    if config.keeps_everything:
        raise OptionError(
            "budget=1.0 keeps everything, so starkv has nothing to export; give a smaller budget"
        )


def _check_slots(options: ExportOptions) -> None:
    if options.cache not in CACHES:
        raise OptionError(f"cache={options.cache!r}: expected one of {', '.join(CACHES)}")
    if options.cache == "static" and options.config.nbits != 16:
        raise OptionError(
            f"nbits={options.config.nbits} with cache='static': buffers of codes are not exported "
            "yet; leave out one of the two"
        )
    if options.slots is None:
        return
    if options.cache == "dynamic":
        raise OptionError(
            f"slots={options.slots}: a dynamic cache has none, because it grows; leave slots out, "
            "or give --cache static"
        )
    kept = options.most_kept
    least = max(LEAST_SLOTS, min(kept + 1, options.max_seq))
    if options.slots < least:
        raise OptionError(
            f"slots={options.slots}: the budget keeps up to {kept} of {options.max_seq} tokens, "
            f"and a reply needs room too; give at least {least}, a smaller budget or max_seq"
        )


def _write(model: Any, options: ExportOptions, folder: Path, say: Callable[[str], Any]) -> None:
    from .onnx_graph import opset_for
    from .visual import export_visual
    from .weights import Weights

    weights = Weights(folder)
    shapes = _write_decoder(model, options, weights, say)
    opset = opset_for(shapes)
    visual = export_visual(model, weights, opset, say)
    Manifest(
        model_class=type(model).__name__,
        shapes=shapes,
        config=options.config,
        max_seq=options.max_seq,
        opset=opset,
        select=chosen(options.select, options.max_seq),
        visual=visual,
    ).write(folder)
    _copy_files(model, options.checkpoint, folder)


def _write_decoder(
    model: Any, options: ExportOptions, weights: Weights, say: Callable[[str], Any]
) -> Shapes:
    """Writes `prefill.onnx` and `decode.onnx`, the model's language part."""
    from ..capture.capture import capture_prompt
    from .onnx_graph import opset_for, prompt_model, save

    decoder = Decoder(model)
    shapes = describe(model, decoder)
    shapes = replace(shapes, slots=options.room, nbits=options.config.nbits)
    opset = opset_for(shapes)
    select = chosen(options.select, options.max_seq)
    ports = prefill_ports(shapes)
    with traceable(decoder.decoder):
        say("prefill.onnx")
        captured = capture_prompt(
            Prefill(decoder, shapes).eval(), ports, options.config, select, options.max_seq
        )
        made = prompt_model(captured, ports, opset)
        save(made, weights.folder / "prefill.onnx", weights)
        say("decode.onnx")
        write_decode(decoder, shapes, opset, weights)
    return shapes


def write_decode(decoder: Decoder, shapes: Shapes, opset: int, weights: Weights) -> None:
    """Writes `decode.onnx`."""
    from ..capture.capture import capture_decode
    from .onnx_graph import name_lengths, save, tidy, to_onnx

    ports = decode_ports(shapes)
    decode = DecodeInSlots if shapes.slots else Decode
    one = to_onnx(capture_decode(decode(decoder, shapes).eval(), ports, shapes.nbits), opset)
    name_lengths(one, ports.inputs)
    save(tidy(one), weights.folder / "decode.onnx", weights)


def _check_positions(config: Any, options: ExportOptions) -> None:
    text = config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", None)
    if most is not None and options.max_seq > most:
        raise OptionError(
            f"max_seq={options.max_seq}: the model has positions for {most} tokens only; give "
            f"--max-seq {most} or less"
        )


def _copy_files(model: Any, checkpoint: Path, folder: Path) -> None:
    """Copies all files but weights: configuration, tokenizer, processor, chat template."""
    for file in sorted(checkpoint.iterdir()):
        if file.suffix in (".json", ".jinja", ".txt", ".model") and "index" not in file.name:
            shutil.copyfile(file, folder / file.name)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
