"""Every way to compile a model of one's own."""

import types

import torch

import starkv_compile


def _torch_compile(model, style, **how):
    return torch.compile(model, **how)


def _model_compile(model, style, **how):
    model.compile(**how)
    return model


def _function(model, style, **how):
    """A function around the model, or around its `generate`."""
    if style.generates:
        ours = torch.compile(lambda *args, **others: model.generate(*args, **others), **how)
        return types.SimpleNamespace(generate=ours)
    return torch.compile(lambda *args, **others: model(*args, **others), **how)


def _method(model, style, **how):
    """The bound method that the style's users call."""
    if style.generates:
        return types.SimpleNamespace(generate=torch.compile(model.generate, **how))
    return torch.compile(model.forward, **how)


def _blocks(model, style, **how):
    for block in model.layers:
        block.compile(**how)
    return model


def _compile(model, style, backend, options):
    return starkv_compile.compile(model, **options)


WAYS = {
    "torch.compile(model)": _torch_compile,
    "model.compile()": _model_compile,
    "starkv_compile.compile(model)": _compile,
    "torch.compile(function)": _function,
    "torch.compile(model.method)": _method,
    "each block.compile()": _blocks,
}


def enter(way, model, style, **options):
    """Compiles the model of a style with starkv. Returns what its users go on with."""
    return WAYS[way](model, style, backend="starkv", options=options)
