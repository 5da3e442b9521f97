"""A mistake in a user's policy raises an error that names policy and layer."""

import pytest

import starkv_compile
from starkv_compile import OptionError, PolicyError
from starkv_compile.policies import Policy, Scored
from starkv_compile.testing import TinyPrompt, generate, tiny_inputs, tiny_model
from tests.support.crossing import first_only


def branches(inputs):
    if inputs.key.sum() > 0:
        return Scored(inputs.window_attention().mean(1), inputs.state)
    raise AssertionError


FAULTS = {
    "a branch on a value": (branches, "failed on layer 0: .*do not branch on a value"),
    "no Scored": (lambda inputs: inputs.window_attention().mean(1), "expected Scored"),
    "no state": (lambda inputs: Scored(inputs.key.mean(1).mean(-1), None), "expected Scored"),
    "an error": (lambda inputs: 1 / 0, "failed on layer 0: ZeroDivisionError"),
}


@pytest.mark.parametrize(("score", "message"), first_only([*FAULTS.values()], ci=True), ids=FAULTS)
def test_it_is_an_error(score, message):
    class Faulty(Policy):
        def score(self, inputs):
            return score(inputs)

    model = starkv_compile.compile(tiny_model("llava"), policy=Faulty(), inner="eager")
    with pytest.raises(PolicyError, match=rf"policy='Faulty' .*{message}"):
        generate(model, tiny_inputs("llava", TinyPrompt()), tokens=1)


@pytest.mark.parametrize("weights", [(1,), (1, 0.5), (0, 1)], ids=str)
def test_weights_that_fit_no_layers(weights):
    class Faulty(Policy):
        uneven = True

        def layer_weights(self, layers):
            return weights

    config = starkv_compile.StarKVConfig(policy=Faulty())
    with pytest.raises(OptionError, match=r"layer_weights\(2\) gave .*expected a whole number"):
        config.layer_weights(2)
