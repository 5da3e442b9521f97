"""A user's program, for type checkers alone: `make types` runs mypy and pyright on it.

Every `assert_type` fails if a public name became `Any`; every ignored line fails if its mistake is
no longer seen.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import assert_type

import starkv_compile
from starkv_compile import AgentSession, GraphReport, Report, StarKVCache, StarKVConfig
from starkv_compile.policies import Policy, Scored, ScoreInputs, ScreenNovelty, number


@dataclass(frozen=True, kw_only=True)
class Mine(Policy):
    name: ClassVar[str] = "mine"

    weight: float = number(1.0, above=0)

    def score(self, inputs: ScoreInputs) -> Scored:
        return Scored(inputs.window_attention().mean(1) * self.weight, inputs.state)


class Net(torch.nn.Linear):
    pass


net = Net(2, 2)
config = StarKVConfig(budget=0.2, policy=ScreenNovelty(text_weight=4))
assert_type(starkv_compile.compile(net, config), Net)
assert_type(starkv_compile.compile(net, budget=0.2, policy="snapkv", pool=7), Net)
assert_type(starkv_compile.report(net), Report)
assert_type(starkv_compile.last_report(), GraphReport | None)
assert_type(starkv_compile.undo(net), bool)
assert_type(config.policy, Policy)
assert_type(StarKVConfig(policy="snapkv").policy, Policy)
assert_type(StarKVConfig(policy=Mine(weight=2)).budget, float)
assert_type(AgentSession(net, None, history=3).cache, StarKVCache)
with starkv_compile.compiled(net, budget=0.3) as compressed:
    assert_type(compressed, Net)

graph = torch.fx.symbolic_trace(net)
assert_type(starkv_compile.passes.apply(graph, config), GraphReport)
program = torch.export.export(net, (torch.ones(1, 2),))
assert_type(
    starkv_compile.passes.apply(program, config), tuple[torch.export.ExportedProgram, GraphReport]
)
assert_type(starkv_compile.policies.POLICIES["starkv"], type[Policy])
starkv_compile.export.OnnxSession("folder")

starkv_compile.compile(net, buget=0.2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
starkv_compile.compile(net, budget="20%")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
starkv_compile.compile("net")  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
StarKVConfig(0.2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
StarKVConfig(budgt=0.2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
StarKVConfig(policy=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
starkv_compile.report("net")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
AgentSession(net, None, histroy=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
