"""A folder's graphs run by ONNX's reference evaluator, which knows every type."""

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun


class GatherElements(OpRun):
    """The evaluator's own asks for indices as large as the data in all other dimensions."""

    op_domain = ""

    def _run(self, data, indices, axis=0):
        axis %= data.ndim
        part = [slice(None if i == axis else n) for i, n in enumerate(indices.shape)]
        return (np.take_along_axis(data[tuple(part)], indices, axis),)


class ReferenceGraph:
    """As `graphs.Graph`."""

    def __init__(self, file, provider="cpu"):
        self._evaluator = ReferenceEvaluator(onnx.load(file), new_ops=[GatherElements])
        self.inputs, self.outputs = self._evaluator.input_names, self._evaluator.output_names

    def __call__(self, feeds, buffers=None):
        arrays = {name: _array(feeds[name].contiguous()) for name in self.inputs}
        found = self._evaluator.run(None, arrays)
        return {name: _tensor(value) for name, value in zip(self.outputs, found, strict=True)}


def _array(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _tensor(array):
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
