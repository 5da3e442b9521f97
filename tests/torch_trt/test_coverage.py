"""Which operations of our programs torch-tensorrt has converters for: its dry run, without a GPU.

`make test-torch-trt` installs it. Nothing is built or run.
"""

import importlib.util
from collections import Counter

import pytest
import torch

from starkv_compile import StarKVConfig
from starkv_compile.export.programs import export_programs
from starkv_compile.export.torch_trt import compile_program
from starkv_compile.testing import tiny_model

if importlib.util.find_spec("torch_tensorrt") is None:
    pytest.skip("make test-torch-trt installs torch-tensorrt", allow_module_level=True)

from tests.torch_trt.without_gpu import pretend

CASES = {
    "Qwen2-VL, float32": ("qwen2_vl", "float32", StarKVConfig(budget=0.2)),
    "Qwen3-VL, float16": ("qwen3_vl", "float16", StarKVConfig.paper(budget=0.2)),
}


@pytest.fixture(scope="module", autouse=True)
def torch_tensorrt():
    return pretend()


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def programs(request):
    family, dtype, config = request.param
    model = tiny_model(family, num_hidden_layers=1).to(getattr(torch, dtype))
    return export_programs(model, config, max_seq=4096)


def parts(program, **settings):
    """(engines, operations in them, operations left to PyTorch) of a dry run, the two by name."""
    made = compile_program(program, "cpu", dryrun=True, min_block_size=1, **settings)
    inside, outside, engines = Counter(), Counter(), 0
    for name, part in made.named_children():
        calls = [n.target for n in part.graph.nodes if n.op == "call_function"]
        is_engine = name.startswith("_run_on_acc")
        engines += is_engine
        (inside if is_engine else outside).update(map(named, calls))
    print(f"\n{engines} engines, {inside.total()} operations in them; in PyTorch: {dict(outside)}")
    return engines, inside, outside


def named(target):
    """`cumsum` of aten.cumsum.default."""
    return getattr(target, "overloadpacket", target).__name__


@pytest.mark.parametrize("assumed", [False, True])
def test_a_token_is_one_engine(programs, assumed):
    engines, inside, outside = parts(programs["decode"], assume_dynamic_shape_support=assumed)
    assert engines == 1
    assert {"scaled_dot_product_attention", "linear", "cat"} <= inside.keys()
    assert not outside


@pytest.mark.parametrize("assumed", [False, True])
def test_of_a_prompt_only_what_is_documented_is_left_to_pytorch(programs, assumed):
    _, inside, outside = parts(programs["prefill"], assume_dynamic_shape_support=assumed)
    left = {"sym_max", "cumsum"} if assumed else {"sym_max", "cumsum", "gather"}
    assert outside.keys() == left
    assert inside.total() > 800
