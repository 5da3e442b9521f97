"""The command: what it prints, its exit code, and mistakes."""

import pytest
from PIL import Image
from starkv_lab.verification import command
from starkv_lab.verification.checks import Check

from starkv_compile.cli import main
from tests.support.llava_checkpoint import save_llava


def run(capsys, *arguments):
    code = main(["verify", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.slow(ci=True)
def test_a_checkpoint(capsys, tmp_path):
    save_llava(tmp_path / "llava")
    Image.effect_noise((32, 32), 80).save(tmp_path / "a.png")
    code, out, err = run(
        capsys,
        *("--model", tmp_path / "llava", "--image", tmp_path / "a.png", "--prompt", "w5 w6 w7 w8"),
        *("--budget", "40%", "--policy", "snapkv_mean", "--dtype", "float32"),
    )
    assert code == 0, out
    assert "llava, float32, on the CPU: 1 turns, policy snapkv_mean, budget 0.4" in out
    assert out.count("right  ") == 4
    assert "tokens kept / seen" in out
    assert "without starkv" in err


@pytest.mark.slow
def test_the_demo_agent_and_a_fault(capsys, monkeypatch):
    monkeypatch.setattr(command, "FRAMES", 1)
    verify = command.verify

    def faulty(*arguments, **options):
        found = verify(*arguments, **options)
        fault = Check("a promise", "WRONG", "something else came out")
        return type(found)((*found.checks, fault), found.replies, found.report)

    monkeypatch.setattr(command, "verify", faulty)
    code, out, _ = run(capsys, "--reply", 2)
    assert code == 1
    assert "WRONG       a promise" in out
    assert "starkv doctor" in out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--image", "a.png"), "--image needs --model"),
        (("--prompt", "where?"), "--prompt needs --model"),
        (("--model", "m"), "--model needs --image FILE and --prompt TEXT"),
        (("--budget", "20"), "20"),
        (("--budget", "1.0"), "keeps everything"),
        (("--model", "m", "--image", "a.png", "--prompt", "w5"), "a.png: there is no such file"),
    ],
)
def test_mistakes(capsys, arguments, match):
    code, _, err = run(capsys, *arguments)
    assert code != 0
    assert match in err
