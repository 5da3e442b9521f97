"""A module to stand in for `tensorrt`: its engines name an ONNX file, which ONNX Runtime runs.

It has the part of TensorRT's interface that this package calls, works on addresses as TensorRT
does, and is as strict about them. What TensorRT computes, it cannot tell.
"""

import ctypes
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime

KINDS = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(int64)": ("INT64", np.int64),
    "tensor(bool)": ("BOOL", np.bool_),
}


__version__ = "0.0"
BuilderFlag = SimpleNamespace(TF32="TF32")
NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=3)


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class ILogger:
    Severity = IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO", start=0)


class Context:
    def __init__(self, engine):
        self.engine, self.shapes, self.addresses, self.found = engine, {}, {}, None

    def set_input_shape(self, name, shape):
        self.shapes[name], self.found = shape, None
        return max(shape) <= self.engine.longest

    def set_tensor_address(self, name, address):
        assert address, "a null pointer"
        self.addresses[name] = address

    def get_tensor_shape(self, name):
        return self._results()[name].shape

    def execute_async_v3(self, stream):
        assert stream == 0
        for name, given in self.engine.aliases.items():
            assert self.addresses[name] == self.addresses[given], "not written in place"
        for name, value in self._results().items():
            ctypes.memmove(self.addresses[name], value.ctypes.data, value.nbytes)
        return True

    def _results(self):
        if self.found is None:
            feeds = {name: self._read(name) for name in self.engine.inputs}
            names = list(self.engine.outputs)
            values = self.engine.session.run(names, feeds)
            self.found = {n: np.ascontiguousarray(v) for n, v in zip(names, values, strict=True)}
        return self.found

    def _read(self, name):
        kind = np.dtype(KINDS[self.engine.inputs[name]][1])
        size = int(np.prod(self.shapes[name])) * kind.itemsize
        memory = (ctypes.c_byte * size).from_address(self.addresses[name])
        return np.frombuffer(bytes(memory), kind).reshape(self.shapes[name])


class Engine:
    longest = 4096

    def __init__(self, file):
        self.session = onnxruntime.InferenceSession(file)
        self.inputs = {port.name: port.type for port in self.session.get_inputs()}
        self.outputs = {port.name: port.type for port in self.session.get_outputs()}
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        graph = onnx.load(file, load_external_data=False).graph
        self.aliases = {
            node.output[0]: node.input[0] for node in graph.node if node.op_type == "TensorScatter"
        }
        read = [n for node in graph.node if node.op_type != "Shape" for n in node.input]
        in_place = self.aliases.values()
        assert all(read.count(name) == 1 for name in in_place), "read as well, at any time"

    def get_tensor_name(self, i):
        return [*self.outputs, *self.inputs][i]

    def get_aliased_input_tensor(self, name):
        return self.aliases.get(name)

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=KINDS[{**self.inputs, **self.outputs}[name]][0])

    def create_execution_context(self):
        return Context(self)


class Runtime:
    def __init__(self, log):
        self.log = log

    def deserialize_cuda_engine(self, data):
        if not data.startswith(b"engine of "):
            self.log.log(ILogger.Severity.ERROR, "magic tag does not match")
            return None
        return Engine(data.decode().removeprefix("engine of "))


class Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, least, usual, most):
        assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True)), name
        self.shapes[name] = least


class Config:
    def __init__(self):
        self.profiles, self.cleared = [], []

    def clear_flag(self, flag):
        self.cleared.append(flag)

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)


class Builder:
    def __init__(self, log):
        self.log = log

    def create_network(self, flags):
        assert flags == 1 << 3
        return SimpleNamespace()

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        assert config.cleared == ["TF32"]
        file = Path(network.file)
        if file.with_suffix(".refused").exists():
            self.log.log(ILogger.Severity.ERROR, "out of memory")
            return None
        return f"engine of {file}".encode()


class OnnxParser:
    def __init__(self, network, log):
        self.network = network

    def parse(self, model, path):
        nodes = onnx.load_model_from_string(model).graph.node
        attentions = [node for node in nodes if node.op_type == "Attention"]
        assert all("TRT_decomposable" in {a.name for a in n.attribute} for n in attentions)
        self.network.file = path
        return True
