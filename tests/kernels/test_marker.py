"""The names of the marker's arguments and results are those of the registered op."""

import torch

from starkv_compile.kernels import ops
from starkv_compile.kernels.marker import WriteArguments, Written
from starkv_compile.kernels.reference.star import Layout, State

OP = ops.STARKV.cache_write.default


def arguments():
    """Every tensor another one, so that none can be taken for its neighbour."""
    facts = {"seen": 2, "has_layout": True, "mask_fits": True}
    names = [field for field in WriteArguments._fields if field not in facts]
    tensors = {name: torch.full((1, 2), i) for i, name in enumerate(names)}
    return WriteArguments(**tensors, **facts)


def test_the_fields_are_the_arguments_of_the_op():
    assert tuple(argument.name for argument in OP._schema.arguments) == WriteArguments._fields
    assert not any(argument.has_default_value() for argument in OP._schema.arguments)


def test_the_fields_are_the_results_of_the_op():
    assert len(OP._schema.returns) == len(Written._fields)
    given = arguments()
    for name, tensor in Written(*OP(**given._asdict()))._asdict().items():
        assert torch.equal(tensor, getattr(given, name)), name
        assert tensor is not getattr(given, name), name


def test_groups_of_fields():
    given = arguments()
    for group, kind in ((given.layout, Layout), (given.state, State), (given.unchanged, Written)):
        assert group == kind(*(getattr(given, name) for name in kind._fields))
    assert given.unchanged.state == given.state
