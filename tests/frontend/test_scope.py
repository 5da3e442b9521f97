"""Where a graph is reported that Dynamo compiles."""

import pytest

from starkv_compile.frontend.scope import CompileScope, current_scope, entered, last_graphs
from starkv_compile.reporting import GraphReport, Report


def test_a_scope_ends_with_its_block_also_by_an_error():
    outer, inner = CompileScope(Report(), "marked", 4), CompileScope(Report(), "marked", 2)
    assert current_scope() == CompileScope(None, "nobody", 0)
    with pytest.raises(KeyError, match="planted"):
        _enter(outer, inner)
    assert current_scope() == CompileScope()


def _enter(outer, inner):
    with entered(outer):
        with entered(inner):
            assert current_scope() is inner
        assert current_scope() is outer
        raise KeyError("planted")


def test_a_graph_is_reported_to_the_model_or_to_the_last_graphs():
    scope, graph = CompileScope(Report()), GraphReport()
    before = list(last_graphs)
    scope.file(graph)
    assert scope.report.graphs == [graph]
    assert last_graphs == before
    for number in range(120):
        CompileScope().file(GraphReport(decode_sites=number))
    assert [graph.decode_sites for graph in last_graphs] == list(range(20, 120))
