"""Graphs of one folder refer to one file, in which nothing stands twice."""

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="pip install '.[export]'")
ir = pytest.importorskip("onnx_ir", reason="pip install '.[export]'")

import ml_dtypes  # noqa: E402
from onnx_ir.tensor_adapters import TorchTensor  # noqa: E402

from starkv_compile.export.onnx.weights import FILE, PAGE, Weights, in_order  # noqa: E402


def model(**tensors):
    made = {
        name: TorchTensor(t) if isinstance(t, torch.Tensor) else ir.tensor(t)
        for name, t in tensors.items()
    }
    values = [ir.Value(name=name, const_value=t) for name, t in made.items()]
    graph = ir.Graph([], [], nodes=[], initializers=values, name="g", opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def test_what_is_written_is_read_again(tmp_path):
    weights = Weights(tmp_path)
    weight = torch.nn.Parameter(torch.randn(400, 1000))
    table = torch.arange(999).numpy()
    first = model(weight=weight, table=table, small=torch.ones(3).numpy())
    turned = weight.detach().numpy().T
    second = model(again=weight, same=table.copy(), turned=turned, other=weight + 1)
    for one in (first, second):
        weights.move_out(one)
    found = {n: v.const_value for m in (first, second) for n, v in m.graph.initializers.items()}
    for name, expected in {
        "weight": weight,
        "again": weight,
        "table": table,
        "same": table,
        "turned": turned,
        "other": weight + 1,
    }.items():
        assert torch.equal(torch.tensor(found[name].numpy()), torch.as_tensor(expected).detach())
        assert found[name].offset % PAGE == 0
    assert not isinstance(found["small"], ir.ExternalTensor)
    assert found["again"].offset == found["weight"].offset
    assert found["same"].offset == found["table"].offset
    assert (tmp_path / FILE).stat().st_size < 4 * (1_600_000 + PAGE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int64", "bool"])
def test_a_turned_matrix_is_put_in_order(dtype):
    kind = getattr(ml_dtypes, dtype, dtype)
    values = np.arange(60).reshape(3, 4, 5).astype(kind)
    for turned in (values.T, values.transpose(0, 2, 1), values):
        found = in_order(turned)
        assert found.flags.c_contiguous
        assert found.dtype == turned.dtype
        assert (found == turned).all()


def places(file):
    """(offset, length) of every matrix that the graph reads."""
    initializers = onnx.load(str(file), load_external_data=False).graph.initializer
    kept = [{e.key: e.value for e in t.external_data} for t in initializers if len(t.dims) == 2]
    return {(entry["offset"], entry["length"]) for entry in kept if entry}


def test_decoding_reads_the_weights_of_the_prompt(exported):
    folder = exported.folder
    decode = places(folder / "decode.onnx")
    assert len(decode) >= 7 * exported.layers
    assert decode <= places(folder / "prefill.onnx")
    assert [file.name for file in folder.glob("*.data")] == [FILE]
