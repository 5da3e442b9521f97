"""A marker is read by the names of its arguments, however a graph passes them."""

import operator

import pytest
import torch

from starkv_compile import StarKVConfig
from starkv_compile.kernels.marker import WriteArguments, Written
from starkv_compile.passes import Pipeline
from starkv_compile.passes.markers import arguments_of, find_markers, replace_marker
from tests.support.marked_layer import MarkedLayer, marked_inputs
from tests.support.one_layer import CONFIG, D, G, S, X, capture

GIVEN = marked_inputs()
EVERYTHING = StarKVConfig(budget=1.0)


def captured(how="export"):
    """The layer's graph and its marker."""
    graph = capture(MarkedLayer(), X, GIVEN, how=how)
    (marker,) = find_markers(graph.graph)
    return graph, marker


def pass_by_position(marker, count):
    """Let the marker have its first `count` arguments by position, the others by keyword."""
    named = arguments_of(marker)._asdict()
    marker.args = tuple(named.values())[:count]
    marker.kwargs = dict(list(named.items())[count:])


@pytest.mark.parametrize("how", ["dynamo", "export", "core"])
def test_arguments_have_their_names(how):
    _, marker = captured(how)
    given = arguments_of(marker)
    for name in ("key", "value"):
        assert getattr(given, name).meta.keys() & {"example_value", "val"}
    assert len({getattr(given, name) for name in GIVEN}) == len(GIVEN)
    for name, tensor in GIVEN.items():
        assert name in getattr(given, name).name
        meta = getattr(given, name).meta
        assert meta.get("example_value", meta.get("val")).shape == tensor.shape
    assert (given.seen, given.has_layout, given.mask_fits) == (S, True, True)


@pytest.mark.parametrize("config", [CONFIG, EVERYTHING], ids=["compacted", "stripped"])
@pytest.mark.parametrize("count", [0, 5])
def test_keywords_say_the_same_as_places(count, config):
    expected, marker = captured()
    assert len(marker.args) == len(WriteArguments._fields)
    graph, marker = captured()
    pass_by_position(marker, count)
    assert len(marker.kwargs) == len(WriteArguments._fields) - count
    reports = [Pipeline(config).run(one, cache="marked") for one in (expected, graph)]
    assert reports[0] == reports[1]
    assert reports[0].rewritten == (config is CONFIG)
    assert not find_markers(graph.graph)
    (mine, written), (theirs, others) = (one(X, GIVEN) for one in (graph, expected))
    assert torch.equal(mine, theirs)
    for name, tensor in written._asdict().items():
        assert torch.equal(tensor, getattr(others, name)), name
    assert written.key.shape == (2, G, S // 2 if config is CONFIG else S, D)


def test_where_everything_is_kept_results_are_the_arguments():
    graph, marker = captured()
    given = arguments_of(marker)
    assert Pipeline(EVERYTHING).run(graph, cache="marked").found == 0
    returned = graph.graph.output_node().args[0][1:]
    assert Written(*returned) == given.unchanged


def test_each_reader_gets_the_result_of_its_name():
    """One of them read twice, another not at all."""
    graph, marker = captured()
    items = {user.args[1]: user for user in marker.users}
    first, *_, last = Written._fields
    unread = items[Written._fields.index(last)]
    unread.replace_all_uses_with(items[0])
    graph.graph.erase_node(unread)
    with graph.graph.inserting_after(marker):
        again = graph.graph.call_function(operator.getitem, (marker, 0))
    output = graph.graph.output_node()
    output.args = ((output.args[0][0], again, *output.args[0][2:]),)
    given = arguments_of(marker)
    replace_marker(marker, given.unchanged)
    graph.graph.lint()
    _, *returned = output.args[0]
    assert Written(*returned) == given.unchanged._replace(**{last: getattr(given, first)})
