"""Exports the vision tower of Qwen-VL models as its own graph: one image per call, of any size."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Graph

from ...errors import UnsupportedModel
from ..capture.ports import Port, deepstack
from .graphs import Runnable
from .windows import Windows, as_batch, has_windows, window_inputs, window_ports

if TYPE_CHECKING:
    from .weights import Weights  # imports onnx

PATCH = ("in_channels", "temporal_patch_size", "patch_size")
"""Fields of a tower's configuration that give the size of a patch."""

INDICES = "interp_indices"


class OneImage:
    """Replaces `cu_seqlens`, which says where images begin and end: one image has all patches.

    The tower computes the lengths between and splits by them. A list of values would fix the graph
    to one size. This object returns the symbolic length itself.
    """

    def __init__(self, patches: int) -> None:
        self.patches = patches

    def __getitem__(self, part: slice) -> OneImage:
        return self

    def __sub__(self, other: OneImage) -> OneImage:
        return self

    def tolist(self) -> list[int]:
        return [self.patches]


class Visual(nn.Module):
    """Takes `visual_ports`. The host computes what depends on the grid alone."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, ports: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pixels = ports["pixel_values"]
        image = OneImage(pixels.shape[0])
        named: dict[str, Any] = {"cu_seqlens": image, "position_ids": ports["position_ids"]}
        if _has_table(self.tower):
            named |= {name: ports[name] for name in (INDICES, "interp_weights")}
        if has_windows(self.tower):
            windows = Windows(
                self.tower,
                places=ports["window_places"],
                real=ports["window_real"],
                home=ports["window_home"],
            )
            named |= {"window_index": ports["window_index"], "cu_window_seqlens": image}
            named["windows"] = windows
        grid = torch.zeros(1, 3, dtype=torch.int64)  # not read: ports give all that follows from it
        found = self.tower(pixels, grid_thw=grid, return_dict=True, **named)
        deep = getattr(found, "deepstack_features", [])
        return {
            "image_embeds": found.pooler_output,
            **dict(zip(deepstack(len(deep)), deep, strict=True)),
        }


def visual_ports(tower: Any, dtype: torch.dtype) -> list[Port]:
    """Inputs of the tower's graph."""
    config = tower.config
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    inputs = [
        Port("pixel_values", ("patches", width), dtype),
        Port("position_ids", ("patches", 2), torch.int64),
    ]
    if _has_table(tower):
        side = 2 * tower.spatial_merge_size
        taps = _grid_inputs(tower, torch.tensor([[1, side, side]]))[INDICES].shape[1]
        inputs += [
            Port(INDICES, ("patches", taps), torch.int64),
            Port("interp_weights", ("patches", taps), torch.float32),
        ]
    if has_windows(tower):
        inputs += window_ports(tower)
    return inputs


def export_visual(model: Any, weights: Weights, opset: int, say: Callable[[str], Any]) -> bool:
    """Writes `visual.onnx` if the model takes images. Returns whether it did.

    Raises:
        UnsupportedModel: the tower is of another kind.
    """
    if not hasattr(model, "get_image_features"):
        return False
    from ..capture.capture import export_program
    from .onnx_graph import name_lengths, save, tidy, to_onnx

    tower = getattr(getattr(model, "model", None), "visual", None)
    if tower is None or not _is_exportable(tower):
        raise UnsupportedModel(
            f"{type(model).__name__}: its vision tower cannot be exported yet; towers of Qwen2-VL, "
            "Qwen2.5-VL and Qwen3-VL can"
        )
    say("visual.onnx")
    inputs = visual_ports(tower, tower.dtype)
    unit = tower.spatial_merge_size**2
    with as_batch(tower):
        program = export_program(
            Visual(tower).eval(),
            inputs,
            sizes={"patches": 6 * unit, "merged": 6, "windows": 3},
            multiples={"patches": unit},
        )
    _join_splits_into_one(program.graph)
    model_of_tower = to_onnx(program, opset)
    name_lengths(model_of_tower, inputs)
    save(tidy(model_of_tower), weights.folder / "visual.onnx", weights)
    return True


def _join_splits_into_one(graph: Graph) -> None:
    """Removes splits with a single part, as one image has.

    In ONNX they are sequences. TensorRT has no sequences, and they cannot hold bfloat16.
    """
    for split in graph.find_nodes(
        op="call_function", target=torch.ops.aten.split_with_sizes.default
    ):
        whole, sizes, *_ = split.args
        if len(sizes) > 1:
            continue
        for part in list(split.users):
            part.replace_all_uses_with(whole)
            graph.erase_node(part)
        graph.erase_node(split)


def run_visual(
    graph: Runnable, tower: Any, pixels: torch.Tensor, grid_thw: torch.Tensor, **named: Any
) -> Any:
    """Returns what the tower's forward returns. It runs image by image."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    frames = [(1, *hw) for t, *hw in grid_thw.tolist() for _ in range(t)]
    found = []
    start = 0
    for frame in frames:
        patches = frame[1] * frame[2]
        grid = torch.tensor([frame])
        feeds = {"pixel_values": pixels[start : start + patches], **_grid_inputs(tower, grid)}
        found.append(graph(feeds))
        start += patches
    joined = {name: torch.cat([f[name] for f in found]) for name in graph.outputs}
    output = BaseModelOutputWithPooling(pooler_output=joined.pop("image_embeds"))
    if joined:  # `generate` reads such a list if there is one: Qwen2-VL has none
        output.deepstack_features = [joined[name] for name in deepstack(len(joined))]
    return output


def _has_table(tower: Any) -> bool:
    """Whether learned positions are resampled to the image's grid."""
    return hasattr(tower, "num_grid_per_side")


def _is_exportable(tower: Any) -> bool:
    parameters = inspect.signature(tower.forward).parameters
    windowed = hasattr(tower, "get_window_index") or hasattr(tower.config, "window_size")
    known = all(hasattr(tower.config, name) for name in PATCH)
    return known and "grid_thw" in parameters and (has_windows(tower) or not windowed)


def _grid_inputs(tower: Any, grid: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the tower computes from the grid alone, by the library's own functions."""
    try:
        from transformers import vision_utils
    except ImportError as error:
        raise UnsupportedModel(
            f"the export of vision towers needs transformers 5.23 or later ({error}); there, "
            "towers take as inputs what follows from the grid"
        ) from error
    merge = tower.spatial_merge_size
    inputs = {"position_ids": vision_utils.get_vision_position_ids(grid, merge)}
    if _has_table(tower):
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        inputs |= {INDICES: indices, "interp_weights": weights.float()}
    if has_windows(tower):
        inputs |= window_inputs(tower, grid)
    return inputs
