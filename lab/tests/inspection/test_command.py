"""The command: the demo agent, a checkpoint, and mistakes."""

import json
import re

import pytest
from PIL import Image
from starkv_lab.agent.checkpoints import SHIPPED
from starkv_lab.inspection import prompt
from starkv_lab.inspection.command import InspectOptions
from starkv_lab.inspection.prompt import episode_prompt

from starkv_compile.cli import main
from tests.support.llava_checkpoint import save_llava


def run(capsys, out, *arguments):
    code = main(["inspect", "--out", str(out), *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def data_of(out):
    page = out.read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))


@pytest.mark.slow
def test_the_shipped_agent_on_an_episode(capsys, tmp_path):
    out = tmp_path / "new" / "page.html"
    code, printed, _ = run(
        capsys, out, "--frames", 2, "--seed", 3, "--budget", "12.5%", "--reply", 4
    )
    assert code == 0
    assert str(out) in printed
    data = data_of(out)
    asked = episode_prompt(2, 3)
    assert data["text"] == asked.text
    assert data["answer"] == asked.asked.answer
    assert len(data["replies"]) == 2
    assert [reply["isRight"] for reply in data["replies"]] == [
        asked.asked.is_right(reply["text"]) for reply in data["replies"]
    ]
    assert [len(frame["needed"]) for frame in data["frames"]] == [
        len(picture.needed) for picture in asked.pictures
    ]
    assert sum(len(picture.needed) for picture in asked.pictures) > 0
    tokens = asked.inputs["input_ids"].shape[1]
    (budget,) = data["budgets"]
    assert (budget["percent"], budget["kept"]) == (12.5, [tokens // 8] * 4)


@pytest.mark.slow(ci=True)
def test_own_screenshots_and_a_policy_with_sets_by_head(capsys, tmp_path):
    Image.effect_noise((300, 170), 80).save(tmp_path / "grey.png")
    question = "what step 1 x=500 y=500"
    code, _, _ = run(
        capsys,
        tmp_path / "a.html",
        "--image",
        tmp_path / "grey.png",
        "--question",
        question,
        "--policy",
        "snapkv",
        "--reply",
        0,
    )
    assert code == 0
    data = data_of(tmp_path / "a.html")
    assert (data["text"], data["policy"], data["heads"]) == (question, "snapkv", 4)
    assert data["frames"][0]["image"].startswith("data:image/png")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("llava"))


def test_a_checkpoint(llava, capsys, tmp_path):
    Image.effect_noise((30, 30), 80).save(tmp_path / "a.png")
    Image.effect_noise((30, 30), 80).save(tmp_path / "b.png")
    said = "w5 w6 w7 w8 w9 w5 w6 w7 w8"
    code, _, err = run(
        capsys,
        tmp_path / "page.html",
        "--model",
        llava,
        "--image",
        tmp_path / "a.png",
        "--image",
        tmp_path / "b.png",
        "--prompt",
        said,
        "--paper",
    )
    assert code == 0
    steps = ["loading the model", "running the prompt and scoring its tokens"]
    assert err.splitlines() == [f"starkv: {step} ..." for step in steps]
    data = data_of(tmp_path / "page.html")
    assert [frame["title"] for frame in data["frames"]] == ["a.png", "b.png"]
    assert [(frame["rows"], frame["columns"]) for frame in data["frames"]] == [(4, 4), (4, 4)]
    assert [word for word in data["words"] if word] == ["w3", "w3", *said.split()]
    assert data["options"]["entropy"] == "global"
    assert data["layers"] == [0, 1]
    assert data["replies"] == []


def test_a_folder_whose_processor_takes_no_images(capsys, tmp_path):
    """As transformers gives the tokenizer alone where it does not know the processor."""
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    arguments = ("--model", SHIPPED, "--image", tmp_path / "a.png", "--prompt", "click")
    code, _, err = run(capsys, tmp_path / "page.html", *arguments)
    assert code == 2
    step, error = err.splitlines()
    assert step == "starkv: loading the model ..."
    assert "its processor takes no images" in error


@pytest.mark.slow(ci=True)
def test_a_checkpoint_with_a_true_grid(capsys, tmp_path, monkeypatch):
    """The agent's folder as any Qwen3-VL's, with the processor that AutoProcessor cannot find."""
    from starkv_lab.agent.processor import AgentProcessor

    monkeypatch.setattr(prompt, "load_processor", AgentProcessor.from_pretrained)
    Image.new("RGB", (300, 170), "white").save(tmp_path / "a.png")
    arguments = ("--model", SHIPPED, "--image", tmp_path / "a.png", "--prompt", "click step 1")
    code, _, _ = run(capsys, tmp_path / "page.html", *arguments)
    assert code == 0
    (frame,) = data_of(tmp_path / "page.html")["frames"]
    assert frame["rows"] * 2 > frame["columns"] > frame["rows"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.png"], "nowhere.png: there is no such file"),
        (["--image", __file__], "not an image that can be read"),
        (["--budget", "0.2,x"], "budget 'x': expected a share such as 0.2, or 20%"),
        (["--budget", "20"], "for 20 percent write 20%"),
        (["--budget", "100%"], "--budget '100%': expected at least 1% and less than 100%"),
        (["--budget", "0"], "--budget '0': expected at least 1% and less than 100%"),
        (["--budget", "0.2%"], "--budget '0.2%': expected at least 1% and less than 100%"),
        (["--budget", ""], "budget '': expected a share such as 0.2, or 20%"),
        (["--reply", "-1"], "--reply -1: expected a number of tokens"),
        (
            ["--policy", "best"],
            "policy='best': expected an instance of starkv_compile.policies.Policy, or one of "
            "'screen_novelty', 'starkv'",
        ),
        (["--policy", "tova", "--paper"], "--paper is a form of policy 'starkv'"),
        (["--frames", "9"], "frames=9: expected 1 to 8 screenshots"),
        (["--question", "where"], "--question needs --image: a generated"),
        (["--image", "a.png", "--seed", "2"], "--frames and --seed need a generated episode"),
        (["--prompt", "click"], "--prompt needs --model"),
        (["--model", "m", "--image", "a.png"], "--model needs --image FILE and --prompt TEXT"),
        (["--model", "m", "--prompt", "click"], "--model needs --image FILE and --prompt"),
        (
            ["--model", "m", "--image", "a.png", "--prompt", "x", "--seed", "1"],
            "--seed is an option of the agent",
        ),
        (["--agent", "nowhere"], "no agent in nowhere"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(arguments, message, capsys, tmp_path):
    out = tmp_path / "page.html"
    code, printed, err = run(capsys, out, *arguments)
    assert (code, printed) == (2, "")
    *steps, error = err.splitlines()
    assert error.startswith("starkv: ")
    assert message in error
    assert all(step == "starkv: loading the model ..." for step in steps)
    assert not out.exists()


def test_a_folder_is_no_file_and_no_checkpoint(capsys, tmp_path):
    code, _, err = run(capsys, tmp_path)
    assert (code, "it is a folder" in err) == (2, True)
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    arguments = ("--model", tmp_path, "--image", tmp_path / "a.png", "--prompt", "x")
    code, _, err = run(capsys, tmp_path / "page.html", *arguments)
    assert (code, "there is no checkpoint (config.json is missing)" in err) == (2, True)


def test_budgets_are_exact_and_sorted():
    assert InspectOptions(budgets="5%, 0.2,7%,20%").shares() == [0.2, 0.07, 0.05]
