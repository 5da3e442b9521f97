"""`torch.compile(..., backend="starkv")` loads this module; nothing else imports it.

Loading it installs one hook in Dynamo. The hook looks at every `torch.compile` of a module and acts
only if the backend is starkv. Two things need it:

* `torch.compile(model)` returns a wrapper, but `wrapper.generate()` runs the original model, so the
  compiled code never runs, without any error. The hook makes the original call the compiled code.
* A graph cannot reach the cache object. Around each call of the model, `call` turns the stock
  cache into one that counts right after compaction, and describes to it where the frames are.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._dynamo import eval_frame

from ..config import StarKVConfig
from ..errors import OptionError
from ..hf.language_models import language_models
from .attachment import attach
from .backend import starkv_backend
from .stand_in import forwarding


def _is_ours(callback: Any) -> bool:
    wrapper = eval_frame.innermost_backend(callback)
    return getattr(wrapper, "compiler_fn", wrapper) is starkv_backend


def _runs_the_model(method: Any) -> bool:
    """Whether it is `forward`, `generate` or a method that neither torch nor transformers wrote."""
    library = str(getattr(method, "__module__", "")).split(".")[0] in ("torch", "transformers")
    return not library or method.__name__ in ("forward", "generate")


def _check_fullgraph(config: StarKVConfig, fullgraph: bool) -> None:
    """Raises `OptionError` if a graph may break where keys and values that leave are shortened."""
    if config.shorten_outputs and not fullgraph:
        raise OptionError(
            "shorten_outputs=True without fullgraph=True: where a graph breaks, keys and values "
            "leave it too, and the code behind the break needs all of them; use "
            "torch.compile(..., fullgraph=True)"
        )


def _install() -> None:
    context = eval_frame._TorchDynamoContext
    original = context.__call__
    if hasattr(original, "_starkv"):
        return

    @functools.wraps(original)
    def call(self: Any, fn: Any) -> Any:
        if not callable(self.callback) or not _is_ours(self.callback):
            return original(self, fn)
        options = getattr(eval_frame.innermost_backend(self.callback), "kwargs", {}).get("options")
        config = StarKVConfig.from_options(options)
        _check_fullgraph(config, self.fullgraph)
        compiler = functools.partial(original, self)
        if isinstance(fn, torch.nn.Module):  # torch.compile(model)
            attach(fn, config, compiler)
            compiled = original(self, fn)
            compiled.forward = fn._compiled_call_impl
            return compiled
        module, name = getattr(fn, "__self__", None), getattr(fn, "__name__", "")
        if not isinstance(module, torch.nn.Module):
            return original(self, fn)
        if name == "_call_impl":  # model.compile()
            attach(module, config, compiler)
            return module._compiled_call_impl
        if _runs_the_model(fn) and language_models(module):  # torch.compile(model.generate)
            attach(module, config, compiler)
            return forwarding(module.forward if name == "forward" else fn)
        return original(self, fn)

    call._starkv = True  # type: ignore[attr-defined]
    context.__call__ = call  # type: ignore[method-assign]


_install()

__all__ = ["starkv_backend"]
