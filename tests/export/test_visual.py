"""Vision towers as graphs for images of any size."""

import pytest
import torch

from starkv_compile.export.onnx.graphs import Graph
from starkv_compile.export.onnx.visual import export_visual, run_visual
from starkv_compile.export.onnx.windows import Windows, window_inputs
from starkv_compile.testing import tiny_model

for package in ("onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="pip install '.[export]'")

from starkv_compile.export.onnx.onnx_graph import NEWEST, OPSET  # noqa: E402
from starkv_compile.export.onnx.weights import Weights  # noqa: E402

WINDOW = 2  # merged patches at a window's side: 16 pixels, 4 a patch, 2 patches merged


@pytest.fixture(scope="module", params=[OPSET, NEWEST])
def windowed(request, tmp_path_factory):
    """(tower, graph) of Qwen2.5-VL: one block attends within windows, one everywhere."""
    model = tiny_model("qwen2_5_vl")
    tower, folder = model.model.visual, tmp_path_factory.mktemp("visual")
    form = tower.config._attn_implementation
    assert export_visual(model, Weights(folder), request.param, lambda text: None)
    assert tower.config._attn_implementation == form
    return tower, Graph(folder / "visual.onnx")


SIZES = {
    "whole windows": [(1, 4, 4)],
    "less than a window": [(1, 1, 1)],
    "cut at both edges": [(1, 5, 7)],
    "cut at one": [(1, 6, 3)],
    "several images and a video": [(1, 4, 2), (1, 1, 5), (2, 3, 3)],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.slow
def test_windows_of_all_sizes(windowed, sizes):
    tower, graph = windowed
    assert tower.window_size // tower.patch_size // tower.spatial_merge_size == WINDOW
    grid = torch.tensor([[t, 2 * rows, 2 * columns] for t, rows, columns in sizes])
    pixels = torch.randn(int(grid.prod(1).sum()), 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = tower(pixels, grid_thw=grid).pooler_output
    mine = run_visual(graph, tower, pixels, grid).pooler_output
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_windows_keep_to_themselves(windowed):
    """A change in one window reaches others by the block that attends everywhere alone."""
    tower, _ = windowed
    inputs = window_inputs(tower, torch.tensor([[1, 10, 6]]))
    where = (inputs[name] for name in ("window_places", "window_real", "window_home"))
    windows = Windows(tower, *where)
    assert windows.inside == {tower.blocks[0].attn}
    query, key, value = torch.randn(3, 1, 2, 60, 8).unbind()
    before = windows.attend(query, key, value, 1.0)
    value[:, :, 17] += 1  # the second of the windows, of 16 patches each but for the edges
    changed = (windows.attend(query, key, value, 1.0) != before).any(-1).any(1)[0]
    assert changed.nonzero()[:, 0].tolist() == list(range(16, 24))
