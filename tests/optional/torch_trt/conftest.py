"""torch-tensorrt without a GPU, and programs to try it on. `make test-torch-trt` installs it."""

import importlib.util

import pytest
import torch

from starkv_compile import StarKVConfig
from starkv_compile.export.tensorrt.programs import export_programs
from starkv_compile.testing import tiny_model
from tests.support.without_gpu import pretend

CASES = {
    "Qwen2-VL, float32": ("qwen2_vl", "float32", StarKVConfig(budget=0.2, policy="starkv")),
    "Qwen3-VL, float16": ("qwen3_vl", "float16", StarKVConfig.paper(budget=0.2)),
}


@pytest.fixture(scope="session")
def torch_tensorrt():
    if importlib.util.find_spec("torch_tensorrt") is None:
        pytest.skip("make test-torch-trt installs torch-tensorrt")
    return pretend()


@pytest.fixture(scope="session", params=CASES.values(), ids=CASES)
def programs(request, torch_tensorrt):
    family, dtype, config = request.param
    model = tiny_model(family, num_hidden_layers=1).to(getattr(torch, dtype))
    return export_programs(model, config, max_seq=4096)
