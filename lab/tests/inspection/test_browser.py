"""The page as a browser shows it: headless Chromium, where one is installed."""

import re
import shutil
from dataclasses import replace
from html import unescape

import pytest
import torch
from starkv_lab.inspection.collect import collect
from starkv_lab.inspection.page import render

from lab.tests.support.inspection_prompts import tiny_prompt
from starkv_compile import StarKVConfig

Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe
sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright

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


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def visit(browser):
    """A function that opens a file at an address. The test fails if a script of the page does."""
    opened, said = [], []

    def visit(file, address="", width=1280, scheme="light"):
        page = browser.new_page(
            viewport={"width": width, "height": 1000}, color_scheme=scheme, reduced_motion="reduce"
        )
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"{file.as_uri()}#{address}")
        opened.append(page)
        return page

    yield visit
    for page in opened:
        page.close()
    assert not said


@pytest.fixture
def dom(visit):
    """A function that returns the page's document once its script has run, at an address."""
    return lambda file, address: visit(file, address).content()


def text_of(page, name):
    """The text of the element with this id, tags left out."""
    inner = re.search(rf'id="{name}"[^>]*>(.*?)</(?:p|table|span|ol|div)>', page, re.DOTALL)
    return unescape(re.sub(r"<[^>]*>", " ", inner.group(1))).strip()


def rows_of(page, name):
    table = re.search(rf'<table id="{name}">(.*?)</table>', page, re.DOTALL).group(1)
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table, re.DOTALL)
    return [
        [
            unescape(re.sub(r"<[^>]*>", "", cell))
            for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)
        ]
        for row in rows
    ]


def readable(number):
    """Bytes as the page writes them."""
    assert number < 2**20
    return (
        f"{number} B" if number < 1024 else f"{mean([number / 1024 + 1e-9])} KiB"
    )  # a half goes up, as in the page


def mean(counts):
    """As the page writes it."""
    return f"{sum(counts) / len(counts):.1f}".removesuffix(".0")


@pytest.mark.parametrize(("layer", "frame", "percent"), [(1, 2, 10), (0, 1, 50)])
def test_counts_at_an_address(shown, dom, layer, frame, percent):
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
        full = tokens * inspection.token_bytes[number].full
        assert row[:3] == [str(number), str(budget.kept[number]), str(tokens)]
        assert row[-2:] == [readable(inspection.nbytes(budget, number)), readable(full)]
    dropped = rows_of(page, "dropped")[1:]
    gone = [len(here) - len(k.intersection(here)) for k in kept]
    assert dropped[frame - 1][1] == mean(gone)
    bars = re.findall(r'class="bar dropped"[^>]*><i style="width: ?([\d.]+)%', page)
    assert float(bars[frame - 1]) == pytest.approx(100 * sum(gone) / len(gone) / len(here), abs=0.1)

    marks = re.search(r'<div id="text"[^>]*>(.*?)</div>', page, re.DOTALL).group(1)
    marks = re.findall(r'<span id="token-\d+"[^>]* class="(\w+)"', marks)
    words = [mark for mark in marks if mark != "screen"]
    assert len(marks) - len(words) == 2
    for mark, token in zip(words, text, strict=True):
        keepers = sum(token in k for k in kept)
        expected = "dropped" if not keepers else "kept" if keepers == len(kept) else "part"
        assert mark == expected


def test_one_token_and_one_head(shown, dom):
    inspection, file = shown
    budget, head = inspection.budgets[1], inspection.budgets[1].ranks.shape[1] - 1
    address = f"layer=1&frame=2&budget=10&head={head + 1}&row=3&column=4&show=attention"
    page = dom(file, address)
    place = (inspection.frame == 1) & (inspection.row == 2) & (inspection.column == 3)
    token = int(place.nonzero())
    rows = dict(row for row in rows_of(page, "token") if len(row) == 2)
    assert rows["place"] == "screenshot 2, row 3, column 4"
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


def test_an_address_that_names_nothing_changes_nothing(shown, dom):
    _, file = shown
    page = dom(file, "layer=77&frame=-1&budget=x&head=99&show=nothing&row=900&column=1")
    assert text_of(page, "budget-name") == "10 %", "the nearest to 20 %"
    assert text_of(page, "layer-name").startswith("0 ")
    assert text_of(page, "frame-name") == "2 of 2 (newest)"


def test_a_prompt_in_which_nobody_knows_the_frames(shown, dom):
    inspection, file = shown
    unknown = torch.full_like(inspection.frame, -1)
    page = file.with_name("unknown.html")
    page.write_text(render(replace(inspection, frame=unknown)))
    seen = dom(page, "frame=1&row=0&column=0")
    kept, tokens = inspection.budgets[1].kept[0], len(unknown)
    assert "The page cannot tell which tokens belong" in seen
    said = text_of(seen, "summary")
    assert f"tokens: 0 of 0 of the screenshots, {kept} of {tokens} of the text" in said


def test_keyboard_alone(shown, visit):
    """Tab and arrow keys reach every control, and every token of screenshots and text."""
    inspection, file = shown
    page = visit(file)
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.id || document.activeElement.textContent")
        if name in reached[:1]:
            break
        reached.append(name)
    sliders = ["layer", "head", "frame", "budget"]
    heads = inspection.budgets[0].ranks.shape[1]
    expected = [*(s for s in sliders if s != "head" or heads > 1), "show", "screen"]
    assert reached[: len(expected)] == expected
    assert {"text", "0", "1"} <= set(reached), "the text and a button for each layer"

    page.focus("#budget")
    page.keyboard.press("ArrowLeft")
    assert page.get_attribute("#budget", "aria-valuetext") == "50 %"
    page.focus("#screen")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowUp", "ArrowUp", "ArrowDown"):
        page.keyboard.press(key)
    assert "screenshot 2, row 2, column 2" in page.inner_text("#token")
    assert page.inner_text("#spoken").startswith("screenshot 2, row 2, column 2 · score ")
    page.get_by_role("button", name="layer 1").press("Enter")
    assert page.inner_text("#layer-name").startswith("1 ")
    assert page.evaluate("document.activeElement.ariaLabel") == "layer 1"
    page.focus("#text")
    page.keyboard.press("ArrowRight")
    first = int((inspection.frame < 0).nonzero()[0])
    assert f"token {first + 1} ·" in page.inner_text("#spoken")
    assert page.get_attribute("#text", "aria-activedescendant") == f"token-{first}"
    assert page.evaluate("location.hash").endswith(
        f"layer=1&frame=2&budget=50{'&head=all' * (heads > 1)}&token={first + 1}"
    )


def test_pointer(shown, visit):
    _, file = shown
    page = visit(file, "frame=2&budget=10")
    box = page.locator("#screen").bounding_box()
    spot = (box["x"] + box["width"] * 0.99, box["y"] + box["height"] * 0.99)
    page.mouse.move(*spot)
    said = page.inner_text("#tip")
    assert said.startswith("screenshot 2, row 3, column 4 · score ")
    assert re.search(r" · rank .+ · (kept|dropped)", said)
    page.mouse.click(*spot)
    assert "frame=2&budget=10" in page.evaluate("location.hash")
    assert page.evaluate("location.hash").endswith("row=3&column=4")
    page.click("#text .screen >> nth=0")
    assert page.inner_text("#frame-name") == "1 of 2"


def test_dropped_tokens_can_be_told_apart(shown, visit):
    _, file = shown
    page = visit(file)
    listed = page.locator("#nearest button").all_inner_texts()
    assert len(listed) == len(set(listed)) == 8


def test_a_slider_with_one_position_is_not_shown(shown, visit):
    inspection, file = shown
    one = file.with_name("one.html")
    one.write_text(render(replace(inspection, budgets=inspection.budgets[:1])))
    page = visit(one)
    assert not page.is_visible("#budget")
    assert page.is_visible("#layer")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1440])
def test_every_width_and_scheme(shown, visit, width, scheme):
    """Nothing scrolls sideways, and axe-core finds no fault of accessibility."""
    _, file = shown
    page = visit(file, width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
