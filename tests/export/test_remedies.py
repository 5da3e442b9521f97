"""What exporters get wrong or cannot do, each as a graph of a few operations."""

import pytest
import torch

from starkv_compile.export.capture.capture import export_program
from starkv_compile.export.capture.carve import carve
from starkv_compile.export.capture.ports import Port
from starkv_compile.passes import fx
from tests.support.crossing import slow


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, ports):
        return {"found": self.function(ports["values"] * self.weight)}


def in_onnx(function, port, values, folder):
    """What the function returns in ONNX Runtime."""
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install '.[export]'")
    from starkv_compile.export.onnx.graphs import Graph
    from starkv_compile.export.onnx.onnx_graph import save, tidy, to_onnx
    from starkv_compile.export.onnx.weights import Weights

    program = export_program(Module(function).eval(), [port])
    save(tidy(to_onnx(program)), folder / "graph.onnx", Weights(folder))
    return Graph(folder / "graph.onnx")({"values": values})["found"]


LINE = Port("values", ("batch", "seen"), torch.float32)


def test_a_small_constant_stays(tmp_path):
    values = torch.zeros(2, 5)
    found = in_onnx(lambda x: (x + 1e-12).log(), LINE, values, tmp_path)
    torch.testing.assert_close(found, (values + 1e-12).log())


@pytest.mark.slow(ci=True)
def test_a_stable_sort_gives_ties_in_order(tmp_path):
    values = (3 * torch.rand(2, 300)).floor()
    found = in_onnx(lambda x: x.sort(dim=-1, stable=True).indices, LINE, values, tmp_path)
    assert torch.equal(found, values.sort(dim=-1, stable=True).indices)


@pytest.mark.parametrize("bias", [None, slow(torch.randn(6))])
def test_a_convolution_of_patches(bias, tmp_path):
    weight = torch.randn(6, 3, 2, 4, 4)

    def patches(x):
        return torch.nn.functional.conv3d(x, weight, bias, stride=(2, 4, 4))[:, :, 0, 0, 0]

    port = Port("values", ("batch", 3, 2, 4, 4), torch.float32)
    values = torch.randn(5, 3, 2, 4, 4)
    found = in_onnx(patches, port, values, tmp_path)
    torch.testing.assert_close(found, patches(values), atol=1e-5, rtol=1e-5)


def test_a_convolution_in_bfloat16(tmp_path):
    weight = torch.randn(6, 3, 2, 4, 4).bfloat16()

    def patches(x):
        found = torch.nn.functional.conv3d(x.bfloat16(), weight, stride=(2, 4, 4))
        return found[:, :, 0, 0, 0].float()

    port = Port("values", ("batch", 3, 2, 4, 4), torch.float32)
    values = torch.randn(5, 3, 2, 4, 4)
    found = in_onnx(patches, port, values, tmp_path)
    torch.testing.assert_close(found, patches(values), atol=1e-1, rtol=1e-2)


def test_what_is_written_in_place_is_not_cut_off():
    def function(x):
        view = x + 1
        view[:, :1].mul_(3)
        return {"sum": view.sum(1), "double": x * 2}

    program = export_program(Module(function).eval(), [LINE])
    whole = program.module(check_guards=False)
    inputs = {"values": whole.graph.find_nodes(op="placeholder")[0]}
    total, double = fx.outputs(whole.graph)
    answer, _ = carve(whole, inputs, {"sum": total}, [{"double": double}])
    values = torch.rand(2, 4)
    found = answer.module({"values": values})["sum"]
    torch.testing.assert_close(found, function(values)["sum"])
