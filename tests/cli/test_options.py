"""A budget on the command line is a share; with "%" it is the same share in percent."""

import pytest

from starkv_compile import OptionError
from starkv_compile.cli import share_of, shares_of


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("0.2", 0.2),
        (" 1 ", 1.0),
        ("0.07", 0.07),
        ("20%", 0.2),
        (" 20 % ", 0.2),
        ("7%", 0.07),
        ("12.5%", 0.125),
        ("0.5%", 0.005),
        ("100%", 1.0),
    ],
)
def test_shares_and_percentages(text, share):
    assert share_of(text) == share
    assert shares_of(f"{text},0.5") == [share, 0.5]


@pytest.mark.parametrize(
    "text",
    ["", "%", "x", "20%%", "20% x", "%20", "20 percent", "nan", "inf%", "1/0", "1e400x", "-0.1"],
)
def test_anything_else_is_named_with_what_was_expected(text):
    with pytest.raises(OptionError) as raised:
        share_of(text)
    said = f"budget {text.strip()!r}: expected a share such as 0.2, or 20%"
    assert str(raised.value) == said


@pytest.mark.parametrize(
    ("text", "meant"),
    [("20", "; for 20 percent write 20%"), ("1.5", "; for 1.5 percent write 1.5%"), ("120%", "")],
)
def test_a_number_above_one_may_be_meant_as_a_percentage(text, meant):
    with pytest.raises(OptionError) as raised:
        share_of(text)
    assert str(raised.value).endswith(f"expected a share of the tokens, at most 1 or 100%{meant}")
