"""A budget on the command line: one meaning of "%", two of a plain number."""

import pytest

from starkv_compile import OptionError
from starkv_compile.cli import share_of


@pytest.mark.parametrize("plain", ["share", "percent"])
@pytest.mark.parametrize(
    ("text", "share"),
    [("20%", 0.2), (" 20 % ", 0.2), ("7%", 0.07), ("12.5%", 0.125), ("0.5%", 0.005), ("100%", 1.0)],
)
def test_a_percent_sign_means_the_same_everywhere(text, share, plain):
    assert share_of(text, plain) == share


@pytest.mark.parametrize(
    ("text", "plain", "share"),
    [
        ("0.2", "share", 0.2),
        (" 1 ", "share", 1.0),
        ("20", "share", 20.0),
        ("20", "percent", 0.2),
        ("7", "percent", 0.07),
        ("0.2", "percent", 0.002),
    ],
)
def test_a_plain_number_means_what_the_command_says(text, plain, share):
    assert share_of(text, plain) == share


def test_a_plain_number_is_a_share_by_default():
    assert share_of("0.2") == 0.2


@pytest.mark.parametrize(
    "text",
    ["", "%", "x", "20%%", "20% x", "%20", "0,2", "20 percent", "nan", "inf%", "1/0", "1e400"],
)
@pytest.mark.parametrize(
    ("plain", "expected"),
    [("share", "a share such as 0.2"), ("percent", "a percentage such as 20")],
)
def test_anything_else_is_named_with_what_was_expected(text, plain, expected):
    with pytest.raises(OptionError) as raised:
        share_of(text, plain)
    said = f"budget {text.strip()!r}: expected {expected}, or with a percent sign 20%"
    assert str(raised.value) == said
