"""Attention at the opset that has no such operator: by groups, no key repeated."""

from collections import Counter

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import repeat_kv

from starkv_compile.export.capture.capture import export_program
from starkv_compile.export.capture.ports import Port

onnx = pytest.importorskip("onnx", reason="pip install '.[export]'")
for package in ("onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="pip install '.[export]'")

from starkv_compile.export.onnx.graphs import Graph  # noqa: E402
from starkv_compile.export.onnx.onnx_graph import save, to_onnx  # noqa: E402
from starkv_compile.export.onnx.weights import Weights  # noqa: E402
from tests.support.crossing import first_only  # noqa: E402

HEADS, GROUPS, WIDTH = 6, 2, 8

QUERY = Port("query", ("batch", HEADS, "new", WIDTH), torch.float32)
KEY = Port("key", ("batch", GROUPS, "seen", WIDTH), torch.float32)
VALUE = Port("value", ("batch", GROUPS, "seen", WIDTH + 1), torch.float32)


class Attention(torch.nn.Module):
    """Heads repeated before attention, as in a model."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, ports):
        key, value = (repeat_kv(ports[name], HEADS // GROUPS) for name in ("key", "value"))
        found = F.scaled_dot_product_attention(
            ports["query"], key, value, attn_mask=ports.get("mask"), **self.options
        )
        return {"found": found}


def written(module, ports, folder):
    file = folder / "graph.onnx"
    save(to_onnx(export_program(module, ports)), file, Weights(folder))
    return file


def masks(of_heads, dtype):
    """Of two rows, the first padded so that its first query sees nothing."""
    mask = torch.rand(2, of_heads, 5, 9) > 0.4
    mask[0, :, 0] = False
    mask[:, :, 1:, 0] = True
    if dtype == torch.bool:
        return mask
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)


CASES = {
    "no mask": (None, {}),
    "causal, scaled": (None, {"is_causal": True, "scale": 0.5}),
    "one mask for all heads": (masks(1, torch.bool), {}),
    "a mask for each": (masks(HEADS, torch.bool), {}),
    "a mask of numbers": (masks(1, torch.float32), {}),
}


@pytest.mark.parametrize(("mask", "options"), first_only([*CASES.values()], ci=True), ids=CASES)
def test_as_torch_and_no_key_repeated(mask, options, tmp_path):
    torch.manual_seed(0)
    shapes = {"query": (6, 5, 8), "key": (2, 9, 8), "value": (2, 9, 9)}
    inputs = {name: torch.randn(2, *shape) for name, shape in shapes.items()}
    ports = [QUERY, KEY, VALUE]
    if mask is not None:
        inputs["mask"] = mask
        ports.append(Port("mask", ("batch", mask.shape[1], "new", "seen"), mask.dtype))
    module = Attention(**options)
    file = written(module, ports, tmp_path)
    found = Graph(file)(inputs)["found"]
    expected = module(inputs)["found"]
    assert found.isfinite().all()
    sees = slice(None) if mask is None else slice(1, None)
    torch.testing.assert_close(found[:, :, sees], expected[:, :, sees], atol=1e-6, rtol=1e-5)
    nodes = Counter(node.op_type for node in onnx.load(file).graph.node)
    assert nodes["MatMul"] == 2
    assert nodes["Transpose"] == 1
    assert nodes["Expand"] == (1 if options.get("is_causal") else 0)
