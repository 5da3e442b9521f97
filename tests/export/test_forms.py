"""Each form of selection as an ONNX graph of its own: ties, sinks and zeros go as in a sort."""

import pytest
import torch

from starkv_compile.export.capture.select import SELECTIONS
from starkv_compile.kernels.reference.capacity import every_length
from starkv_compile.kernels.reference.selection import select_tokens

WINDOW = 4


class Select(torch.nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, ports):
        real = ports["real"]
        length = real.shape[1]
        window = torch.sym_max(1, torch.sym_min(WINDOW, length // 5 - 2))
        scores = ports["scores"][:, : length - window]
        return {"kept": self.form(scores, real, length, window, length // 5)}


@pytest.mark.slow(ci=True)
@pytest.mark.parametrize("name", SELECTIONS)
def test_every_length_of_one_graph(name, tmp_path):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install '.[export]'")
    from starkv_compile.export.capture.capture import export_program
    from starkv_compile.export.capture.ports import Port
    from starkv_compile.export.onnx.graphs import Graph
    from starkv_compile.export.onnx.onnx_graph import save, to_onnx
    from starkv_compile.export.onnx.weights import Weights

    ports = [
        Port("scores", ("batch", "seen"), torch.float32),
        Port("real", ("batch", "seen"), torch.bool),
    ]
    with every_length():
        program = export_program(Select(SELECTIONS[name]), ports)
    save(to_onnx(program), tmp_path / "select.onnx", Weights(tmp_path))
    graph = Graph(tmp_path / "select.onnx")
    torch.manual_seed(0)
    for length in (6, 16, 31, 500):
        sink = torch.softmax(9 * torch.randn(2, length), -1)
        ties = (4 * torch.rand(2, length)).floor()
        real = torch.rand(2, length) > 0.2
        for scores in (sink, ties, torch.zeros(2, length), torch.randn(2, length)):
            kept = graph({"scores": scores, "real": real})["kept"]
            window = max(1, min(WINDOW, length // 5 - 2))
            past = scores[:, : length - window]
            assert torch.equal(kept, select_tokens(past, real, length, window, length // 5))
