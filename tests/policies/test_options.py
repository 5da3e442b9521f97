"""A policy owns its options: as fields, as flat options, and under a name that others register."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from starkv_compile import OptionError, StarKVConfig
from starkv_compile.kernels.ops import STARKV
from starkv_compile.policies import (
    POLICIES,
    Policy,
    PooledPolicy,
    ScreenNovelty,
    SnapKV,
    StarKV,
    choice,
    find_policy,
    flag,
    integer,
    number,
    policy_names,
    registry,
)


@dataclass(frozen=True, kw_only=True)
class Newest(Policy):
    """The newest tokens; a policy of a user's own."""

    name: ClassVar[str] = "newest"

    share: float = number(0.5, above=0, most=1)
    steps: int = integer(3, least=1)
    order: str = choice("time", ("time", "space"))
    strict: bool = flag(False)


class FakePoint:
    """An entry point of an installed package."""

    dist = None

    def __init__(self, name, value, loads):
        self.name, self.value, self._loads = name, value, loads

    def load(self):
        if isinstance(self._loads, Exception):
            raise self._loads
        return self._loads


@pytest.fixture
def registered(monkeypatch):
    """Registers policies as an installed package would."""

    def register(*points):
        monkeypatch.setattr(registry, "entry_points", lambda group: points)
        registry._registered.cache_clear()

    yield register
    registry._registered.cache_clear()


def newest():
    return FakePoint("newest", f"{__name__}:Newest", Newest)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_made_by_its_name_and_by_its_class(name):
    cls = find_policy(name)
    assert cls.name == name
    assert StarKVConfig(policy=name) == StarKVConfig(policy=cls())
    assert StarKVConfig.from_options({"policy": name}).policy == cls()
    assert hash(cls()) == hash(cls())
    assert cls.__doc__, "documented"


def test_flat_options_reach_the_policy():
    config = StarKVConfig.from_options({"budget": 0.3, "text_weight": 4, "pool": 7})
    assert config.policy == ScreenNovelty(text_weight=4, pool=7)
    assert config.budget == 0.3
    assert StarKVConfig.from_options({"policy": "snapkv", "pool": 7}).policy == SnapKV(pool=7)


def test_an_option_that_the_policy_does_not_read():
    with pytest.raises(OptionError, match=r"boost=1\.0 does nothing with policy='snapkv', whose"):
        StarKVConfig.from_options({"policy": "snapkv", "boost": 1.0})
    # Spelled out at its default it changes nothing.
    assert StarKVConfig.from_options({"policy": "snapkv", "boost": 2.0}) == StarKVConfig(
        policy="snapkv"
    )


def test_an_instance_takes_no_options_from_elsewhere():
    with pytest.raises(OptionError, match=r"policy=SnapKV\(pool=7\)$"):
        StarKVConfig.from_options({"policy": SnapKV(), "pool": 7})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"share": 0}, r"share=0: expected a number, more than 0, at most 1"),
        ({"share": float("nan")}, r"share=nan: expected a number"),
        ({"steps": 1.5}, r"steps=1.5: expected a whole number, at least 1"),
        ({"order": "tme"}, r"order='tme': did you mean 'time'\? expected one of 'time', 'space'"),
        ({"strict": 1}, r"strict=1: expected True or False"),
    ],
    ids=str,
)
def test_fields_are_checked(changes, expected):
    with pytest.raises(OptionError, match=expected):
        Newest(**changes)


def test_even_pools_are_refused_with_the_next_odd_one():
    with pytest.raises(OptionError, match=r"pool=4: expected an odd number; try 5"):
        SnapKV(pool=4)


def test_a_class_without_its_decorator_is_told_of_it():
    class Forgotten(PooledPolicy):
        share: float = number(0.5, above=0)

    with pytest.raises(OptionError, match=r"Forgotten: share cannot be set as an option; decorate"):
        Forgotten()


def test_a_policy_of_one_s_own_is_an_option():
    config = StarKVConfig.from_options({"policy": Newest(share=0.25)})
    assert config.policy.share == 0.25
    assert config.to_options() == {"policy": Newest(share=0.25)}
    assert StarKVConfig.from_options(config.to_options()) == config
    assert config.describe()["policy"] == f"{__name__}:Newest"


def test_a_registered_name_is_found_and_written(registered):
    with pytest.raises(OptionError, match="policy='newest'"):
        find_policy("newest")
    registered(newest())
    config = StarKVConfig.from_options({"policy": "newest", "share": 0.25})
    assert config.policy == Newest(share=0.25)
    assert config.to_options() == {"policy": "newest", "share": 0.25}
    assert policy_names()[-1] == "newest"
    with pytest.raises(OptionError, match=r"did you mean 'newest'"):
        find_policy("newst")


def test_a_registered_policy_that_cannot_be_loaded(registered):
    registered(FakePoint("broken", "gone:Policy", ImportError("no module named 'gone'")))
    assert StarKVConfig().policy == ScreenNovelty(), "others are not concerned"
    with pytest.raises(OptionError, match=r"'broken' of gone:Policy cannot be loaded \(no module"):
        find_policy("broken")
    registered(FakePoint("number", "some:NUMBER", 3))
    with pytest.raises(OptionError, match="must name a subclass of"):
        find_policy("number")


def test_a_registered_name_does_not_replace_a_policy_of_ours(registered):
    registered(FakePoint("snapkv", f"{__name__}:Newest", Newest))
    assert find_policy("snapkv") is SnapKV


def test_the_defaults_of_shared_options_agree():
    """`from_options` takes an option at its default for any policy, so there is one default."""
    defaults = {}
    for policy in POLICIES.values():
        for name in policy.options():
            assert defaults.setdefault(name, getattr(policy, name)) == getattr(policy, name), name


def test_the_op_of_the_paper_s_scores_takes_the_policy_s_options():
    arguments = [argument.name for argument in STARKV.star_scores.default._schema.arguments]
    assert tuple(arguments[11:]) == StarKV.options()
    assert len(StarKV().scalars()) == len(StarKV.options())


def test_an_option_of_the_configuration_is_no_option_of_a_policy():
    @dataclass(frozen=True, kw_only=True)
    class Recent(Policy):
        window: int = integer(3, least=1)

    with pytest.raises(OptionError, match=r"an option 'window', which is an option of StarKVConf"):
        StarKVConfig(policy=Recent())


def test_options_are_plain_values():
    @dataclass(frozen=True, kw_only=True)
    class Listed(Policy):
        places: object = ()

    with pytest.raises(OptionError, match=r"Listed\(places=\[1\]\): expected a number, a text"):
        Listed(places=[1])


@pytest.mark.parametrize("code", ["pool: int = 7", "pool = 7"])
def test_another_default_without_the_decorator_is_seen(code):
    members = {}
    exec(code, {}, members)
    forgotten = type("Forgotten", (PooledPolicy,), members)
    with pytest.raises(OptionError, match="Forgotten: pool cannot be set as an option; decorate"):
        forgotten()


def test_a_policy_that_needs_an_option(registered):
    @dataclass(frozen=True, kw_only=True)
    class Needy(Policy):
        share: float

    registered(FakePoint("needy", f"{__name__}:Needy", Needy))
    with pytest.raises(OptionError, match="policy='needy' needs a value for share"):
        StarKVConfig(policy="needy")
    assert StarKVConfig.from_options({"policy": "needy", "share": 0.5}).policy == Needy(share=0.5)


@pytest.mark.parametrize("value", [[1], {}, None, 3], ids=repr)
def test_what_is_neither_a_name_nor_a_policy(value):
    with pytest.raises(OptionError, match="policy="):
        StarKVConfig.from_options({"policy": value})


def test_a_re_exported_class_has_its_registered_name(registered):
    registered(FakePoint("newest", f"{__name__.partition('.')[0]}:Newest", Newest))
    assert StarKVConfig(policy=Newest()).to_options() == {"policy": "newest"}


def test_a_shadowed_name_is_not_written_for_another_class(registered):
    registered(FakePoint("snapkv", f"{__name__}:Newest", Newest))
    assert StarKVConfig(policy=Newest()).to_options() == {"policy": Newest()}


def test_a_near_name_of_another_policy_is_named():
    with pytest.raises(OptionError, match="did you mean 'mi_weight'"):
        StarKVConfig.from_options({"policy": "snapkv", "mi_wieght": 0.4})


def test_an_instance_may_come_with_what_it_has():
    options = {"policy": SnapKV(pool=7), "pool": 7}
    assert StarKVConfig.from_options(options).policy == SnapKV(pool=7)


def test_the_paper_is_of_one_policy():
    with pytest.raises(OptionError, match=r"with paper\(\): the paper's is policy 'starkv'"):
        StarKVConfig.paper(policy=StarKV(pool=3))
