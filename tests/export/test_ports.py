"""Exported modules take and return tensors by the names of their ports."""

from dataclasses import replace

import pytest
import torch

from starkv_compile.export.capture.capture import EXAMPLE_SIZES, export_program, port_names
from starkv_compile.export.capture.decoder import (
    Decode,
    DecodeInSlots,
    Decoder,
    Prefill,
    describe,
    traceable,
)
from starkv_compile.export.capture.ports import (
    Layer,
    Port,
    Shapes,
    decode_ports,
    fields_of,
    of_layer,
    prefill_ports,
)
from starkv_compile.testing import tiny_model

SLOTS = 128
GRAPHS = {
    "prefill": (Prefill, prefill_ports, {}),
    "prefill into slots": (Prefill, prefill_ports, {"slots": SLOTS}),
    "decode": (Decode, decode_ports, {}),
    "decode in slots": (DecodeInSlots, decode_ports, {"slots": SLOTS}),
    "decode from codes": (Decode, decode_ports, {"nbits": 4}),
}


@pytest.fixture(scope="module")
def decoder():
    model = tiny_model("qwen3_vl")
    made = Decoder(model)
    with traceable(made.decoder):
        yield made, describe(model, made)


@pytest.mark.parametrize(("module", "ports_of", "form"), GRAPHS.values(), ids=GRAPHS)
def test_the_order_of_the_ports_is_nothing_to_a_module(decoder, module, ports_of, form):
    """What it takes, turned round, gives the same; what it returns are its output ports."""
    inner, shapes = decoder
    shapes = replace(shapes, **form)
    ports = ports_of(shapes)
    sizes = {**EXAMPLE_SIZES, "seen": 94, "budgeted": 94}
    torch.manual_seed(0)
    feeds = {port.name: _example(port, sizes) for port in ports.inputs}
    with torch.no_grad():
        found = module(inner, shapes)(feeds)
        again = module(inner, shapes)(dict(reversed(feeds.items())))
    assert list(found) == list(again) == [port.name for port in ports.outputs]
    for name, tensor in found.items():
        assert torch.equal(tensor, again[name]), name


def _example(port, sizes):
    shape, dtype = (zeros := port.zeros(sizes)).shape, zeros.dtype
    if dtype.is_floating_point:
        return torch.rand(shape).to(dtype)
    if port.name == "input_ids":
        return torch.randint(1, 50, shape)
    if port.name.endswith(".kept"):
        return torch.arange(shape[-1]).expand(shape).clone()
    return torch.ones(shape, dtype=dtype)


def test_a_program_says_its_names():
    class Swapped(torch.nn.Module):
        def forward(self, ports):
            return {"out.1": ports["in.b"] + 1, "out.0": ports["in.a"] * 2}

    ports = [Port(name, ("batch", 3), torch.float32) for name in ("in.b", "unread", "in.a")]
    program = export_program(Swapped(), ports)
    assert port_names(program) == (["in.b", "unread", "in.a"], ["out.1", "out.0"])


def test_names_of_a_layer_and_back():
    values = {"key": 1, "mi_steps": 2}
    first, eleventh = of_layer("past", 1, values), of_layer("past", 11, values)
    assert first == {"past.1.key": 1, "past.1.mi_steps": 2}
    assert fields_of("past", 1, {**eleventh, **first, "logits": 3}) == values


def test_each_name_is_of_one_port():
    layer = Layer(heads=2, key_dim=8, value_dim=8)
    shapes = Shapes((layer,) * 12, 16, 50, torch.float32, images=True, deepstack=2, slots=SLOTS)
    for ports in (prefill_ports(shapes), decode_ports(shapes)):
        for side in (ports.inputs, ports.outputs):
            names = [port.name for port in side]
            assert len(set(names)) == len(names)
