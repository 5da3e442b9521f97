"""A session's file: safetensors, with a header that names the model and sums for what is inside.

The metadata of safetensors holds two entries: `starkv_session`, the header as JSON, and
`checksum`, that of the header. The header holds the model's facts, the checksum of the tensors,
and the contents as a tree in which {"tensor": name} stands for a tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..errors import SessionFileError
from ..files import replace_file

FORMAT, VERSION = "starkv session", 5

_HEADER, _CHECKSUM, _TENSOR = "starkv_session", "checksum", "tensor"
_ZIP = b"PK\x03\x04"

_FACTS = {
    "layers": "num_hidden_layers",
    "hidden size": "hidden_size",
    "attention heads": "num_attention_heads",
    "KV heads": "num_key_value_heads",
    "head dimension": "head_dim",
    "vocabulary": "vocab_size",
}
"""What a file says of its language model, and the names in the configuration."""


def write_session(file: Path | str, contents: Any, model: Any, processor: Any) -> None:
    """Writes `contents` (dicts, lists, tensors, text, numbers) to `file`, whole or not at all.

    Args:
        file: where to. A symbolic link stays one.
        contents: what `read_session` returns.
        model: the Hugging Face model.
        processor: the model's processor.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    tree = _pack(contents, "", tensors)
    header = json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "model": facts(model, processor),
            "contents": tree,
            "tensors": _sum_of_tensors(tensors),
        }
    )
    replace_file(Path(file), save(tensors, {_HEADER: header, _CHECKSUM: _sum(header)}))


def read_session(file: Path | str, model: Any, processor: Any) -> dict[str, Any]:
    """Returns the contents that `write_session` wrote, with tensors on the model's device.

    Nothing is read of the tensors before the header fits the model and the processor.

    Raises:
        SessionFileError: the file holds something else, is damaged, or belongs to another model
            or processor.
        OSError: the file cannot be opened.
    """
    from safetensors import SafetensorError, safe_open

    with open(file, "rb") as stream:
        if stream.read(len(_ZIP)) == _ZIP:
            raise SessionFileError(
                f"{file}: a zip archive, as torch.save makes them. Before 0.1.0, sessions were "
                "saved so, and this version cannot read them; begin a new session and save it"
            )
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            header = _header(file, opened.metadata() or {})
            _check_facts(file, header.get("model"), facts(model, processor))
            # Copies: the library's tensors are views of the file, which may change.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise SessionFileError(
            f"{file}: no session, or a damaged one ({error}); expected a file that "
            "AgentSession.save wrote"
        ) from error
    if _sum_of_tensors(tensors) != header.get("tensors"):
        _damaged(file, "tensors")
    moved = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    contents = _unpack(file, header.get("contents"), moved)
    if moved or not isinstance(contents, dict):
        _foreign(file, f"tensors that it does not name ({', '.join(moved):.60})")
    return contents


def facts(model: Any, processor: Any) -> dict[str, Any]:
    """What a file says of its model: two models with other facts cannot share a cache."""
    config = model.config
    text = config.get_text_config(decoder=True)
    known = {
        "family": config.model_type,
        "language model": text.model_type,
        **{fact: getattr(text, name, None) for fact, name in _FACTS.items()},
        "dtype": str(model.dtype).removeprefix("torch."),
        "processor": type(processor).__name__,
    }
    return json.loads(json.dumps(known, default=str))


def _header(file: Path | str, metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata.get(_HEADER)
    if text is None:
        _foreign(file, "a safetensors file without a session's header")
    if _sum(text) != metadata.get(_CHECKSUM):
        _damaged(file, "header")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        _foreign(file, "a header of another kind")
    if header.get("version") != VERSION:
        raise SessionFileError(
            f"{file}: written in version {header.get('version')!r:.20} of the format; this "
            f"package reads version {VERSION}. Load it with the package that wrote it"
        )
    return header


def _check_facts(file: Path | str, saved: Any, here: dict[str, Any]) -> None:
    if not isinstance(saved, dict) or saved.keys() != here.keys():
        _foreign(file, "a header that does not name its model")
    other = [name for name in here if saved[name] != here[name]]
    if other:
        raise SessionFileError(
            f"{file}: saved with "
            + ", ".join(f"{name} {saved[name]!r:.60}" for name in other)
            + "; this model or processor has "
            + ", ".join(f"{name} {here[name]!r:.60}" for name in other)
            + ". Load the session with the model and the processor that it was saved with"
        )


def _foreign(file: Path | str, what: str) -> NoReturn:
    raise SessionFileError(f"{file}: holds {what}; expected a file that AgentSession.save wrote")


def _damaged(file: Path | str, what: str) -> NoReturn:
    raise SessionFileError(
        f"{file}: the {what} do not have the checksum that was saved with them, so the file is "
        "damaged; load another copy, or begin a new session"
    )


def _pack(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The tree of `value`. Its tensors go into `tensors`, each with a storage of its own."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    inside = name and name + "."
    if isinstance(value, Mapping):
        return {key: _pack(one, f"{inside}{key}", tensors) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(one, f"{inside}{i}", tensors) for i, one in enumerate(value)]
    return value


def _unpack(file: Path | str, tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The contents of a tree. Takes each of its tensors out of `tensors`."""
    if isinstance(tree, list):
        return [_unpack(file, one, tensors) for one in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.keys() != {_TENSOR}:
        return {key: _unpack(file, one, tensors) for key, one in tree.items()}
    name = tree[_TENSOR]
    if not isinstance(name, str) or name not in tensors:
        _foreign(file, f"no tensor {name!r:.60}, or names it twice")
    return tensors.pop(name)


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sum_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """A checksum of names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
