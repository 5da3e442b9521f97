"""Which operations of our programs torch-tensorrt has converters for: its dry run, without a GPU.

Nothing is built: what passes here can still be refused, see `test_builds.py`.
"""

from collections import Counter

import pytest

from starkv_compile.export.tensorrt.torch_trt import compile_program


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
