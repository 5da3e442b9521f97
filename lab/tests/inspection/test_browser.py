"""The page as a browser shows it: headless Chromium, where one is installed."""

import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape

import pytest
import torch
from starkv_lab.inspection.collect import collect
from starkv_lab.inspection.page import render

from lab.tests.support.inspection_prompts import tiny_prompt
from starkv_compile import StarKVConfig

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"no browser: none of {', '.join(NAMES)} is installed"
)


@pytest.fixture(scope="module", params=["starkv", "gui_kv"])
def shown(request, tmp_path_factory):
    """(inspection, file of its page)."""
    prompt = tiny_prompt("qwen2_vl")
    inspection = collect(prompt, StarKVConfig(policy=request.param), (0.5, 0.1))
    file = tmp_path_factory.mktemp("page") / "inspect.html"
    file.write_text(render(inspection))
    return inspection, file


def dom(file, address):
    """The page's document once its script has run, at an address; fails if the script does."""
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=1280,1000",
            f"--user-data-dir={file.parent / 'profile'}",
            "--enable-logging=stderr",
            "--dump-dom",
            f"{file.as_uri()}#{address}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def text_of(page, name):
    """The text of the element with this id, tags left out."""
    inner = re.search(rf'id="{name}"[^>]*>(.*?)</(?:p|table|output|ol|div)>', page, re.DOTALL)
    return unescape(re.sub(r"<[^>]*>", " ", inner.group(1))).strip()


def rows_of(page, name):
    table = re.search(rf'<table id="{name}">(.*?)</table>', page, re.DOTALL).group(1)
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table, re.DOTALL)
    return [
        [unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<td>(.*?)</td>", row)]
        for row in rows
    ]


def mean(counts):
    """As the page writes it."""
    return f"{sum(counts) / len(counts):.1f}".removesuffix(".0")


@pytest.mark.parametrize(("layer", "frame", "percent"), [(1, 2, 10), (0, 1, 50)])
def test_counts_at_an_address(shown, layer, frame, percent):
    inspection, file = shown
    page = dom(file, f"layer={layer}&frame={frame}&budget={percent}")
    (budget,) = (b for b in inspection.budgets if b.share == percent / 100)
    heads = range(budget.ranks.shape[1])
    kept = [set(budget.places(layer, head)) for head in heads]
    frames = inspection.frame.tolist()
    here = [i for i, number in enumerate(frames) if number == frame - 1]
    text = [i for i, number in enumerate(frames) if number < 0]
    said = text_of(page, "summary")
    tokens = len(frames)
    assert said.startswith(f"Layer {layer} keeps {budget.kept[layer]} of {tokens} tokens: ")
    assert f"{mean([len(k.intersection(text)) for k in kept])} of {len(text)} of the text" in said
    counted = mean([len(k.intersection(here)) for k in kept])
    assert f"It keeps {counted} of the {len(here)} tokens of screenshot {frame}." in said
    assert text_of(page, "budget-name") == f"{percent} %"

    table = rows_of(page, "layers")[1:]
    for number, row in enumerate(table[:-1]):
        nbytes = budget.kept[number] * inspection.token_bytes[number]
        assert row[:3] == [str(number), str(budget.kept[number]), str(tokens)]
        assert row[-2:] == [f"{nbytes:,}", f"{tokens * inspection.token_bytes[number]:,}"]
    dropped = rows_of(page, "dropped")[1:]
    assert dropped[frame - 1][1] == mean([len(here) - len(k.intersection(here)) for k in kept])

    marks = re.search(r'<p id="text">(.*?)</p>', page, re.DOTALL).group(1)
    marks = re.findall(r'<span class="(\w+)"(?: title="[^"]*")?>', marks)
    words = [mark for mark in marks if mark != "screen"]
    assert len(marks) - len(words) == 2
    for mark, token in zip(words, text, strict=True):
        keepers = sum(token in k for k in kept)
        expected = "dropped" if not keepers else "kept" if keepers == len(kept) else "part"
        assert mark == expected


def test_one_token_and_one_head(shown):
    inspection, file = shown
    budget, head = inspection.budgets[1], inspection.budgets[1].ranks.shape[1] - 1
    address = f"layer=1&frame=2&budget=10&head={head + 1}&row=2&column=3&show=attention"
    page = dom(file, address)
    place = (inspection.frame == 1) & (inspection.row == 2) & (inspection.column == 3)
    token = int(place.nonzero())
    rows = dict(row for row in rows_of(page, "token") if len(row) == 2)
    assert rows["place"] == "screenshot 2, row 2, column 3"
    rank, window = int(budget.ranks[1, head, token]), budget.window[1]
    same = torch.equal(budget.ranks, inspection.budgets[0].ranks)
    if same or rank < budget.kept[1]:
        assert rows["rank"] == f"{rank - window + 1} of {len(inspection.frame) - window}"
    else:  # each budget has a ranking of its own, which lists what is kept
        assert rows["rank"].startswith(f"after {budget.kept[1] - window} of ")
    assert rows["state"] == ("kept" if rank < budget.kept[1] else "dropped")
    for axis in inspection.axes:
        value = float(rows[axis.title.lower()].lstrip("\u00d7\u202f"))
        assert value == pytest.approx(float(axis.values[1, token]), rel=0.02, abs=1e-12)
    assert 'aria-pressed="true" title="attention of the last queries' in re.sub(
        r'(title="[^"]*") (aria-pressed="[^"]*")', r"\2 \1", page
    )


def test_an_address_that_names_nothing_changes_nothing(shown):
    _, file = shown
    page = dom(file, "layer=77&frame=-1&budget=x&head=99&show=nothing&row=900&column=1")
    assert text_of(page, "budget-name") == "50 %"
    assert text_of(page, "layer-name").startswith("0 ")
    assert text_of(page, "frame-name") == "1 of 2"


def test_a_prompt_in_which_nobody_knows_the_frames(shown):
    inspection, file = shown
    unknown = torch.full_like(inspection.frame, -1)
    page = file.with_name("unknown.html")
    page.write_text(render(replace(inspection, frame=unknown)))
    seen = dom(page, "frame=1&row=0&column=0")
    kept, tokens = inspection.budgets[0].kept[0], len(unknown)
    assert "The page cannot tell which tokens belong" in seen
    said = text_of(seen, "summary")
    assert f"tokens: 0 of 0 of the screenshots, {kept} of {tokens} of the text" in said


def test_keys_pointer_and_sliders(shown):
    """What a person does, done by a script at the end of the page."""
    _, file = shown
    acts = """<script>
      const press = key => board.dispatchEvent(new KeyboardEvent("keydown", { key }));
      at("frame").value = 1;
      at("frame").dispatchEvent(new Event("input"));
      at("budget").value = 1;
      at("budget").dispatchEvent(new Event("input"));
      ["ArrowRight", "ArrowRight", "ArrowDown", "ArrowUp", "ArrowUp", "ArrowDown"].forEach(press);
      document.body.dataset.keys = at("token").textContent;
      const box = board.getBoundingClientRect();
      const spot = { clientX: box.left + box.width * 0.99, clientY: box.top + box.height * 0.99 };
      board.dispatchEvent(new PointerEvent("pointermove", spot));
      document.body.dataset.tip = tip.textContent;
      board.dispatchEvent(new MouseEvent("click"));
      document.body.dataset.address = location.hash;
    </script></body>"""
    driven = file.with_name("driven.html")
    driven.write_text(file.read_text().replace("</body>", acts))
    page = dom(driven, "")
    said = dict(re.findall(r'data-(keys|tip|address)="([^"]*)"', page))
    assert "screenshot 2, row 1, column 1" in said["keys"]
    assert said["tip"].startswith("screenshot 2, row 2, column 3 · score ")
    assert re.search(r" · rank .+ · (kept|dropped)", said["tip"])
    assert "frame=2&amp;budget=10" in said["address"]
    assert said["address"].endswith("row=2&amp;column=3")
