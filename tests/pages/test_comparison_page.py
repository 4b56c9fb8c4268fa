"""The page of a comparison: outcomes counted by hand, filters, order, wipe, large view, keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffalign.errors import DiffalignError
from diffalign.pages.comparison_page import Column, Comparison, Gain, write_comparison_page
from diffalign.pages.html import ImageCoding
from tests.browser import Browse
from tests.pages.pictures import column

PROMPTS = ["a red apple", "a <script>alert(1)</script> cat", "a blue door", "a red door"]
# by scorer: base, dpo, sft of each prompt. Threshold .1; dpo by the first: win, tie, loss, loss; by the second: win,
# win, win, tie: they disagree on the blue door
FIRST = [[0.0, 0.0, 0.0, 0.0], [0.5, 0.05, -0.2, -0.4], [0.0, 0.3, 0.3, 0.3]]
SECOND = [[1.0, 1.0, 1.0, 1.0], [1.2, 1.3, 1.4, 1.0], [1.0, 1.0, 1.0, 1.0]]


def columns() -> list[Column]:
    greys = {"base": 0, "dpo": 100, "sft": 200}
    return [column(name, PROMPTS, greys[name], [FIRST[i], SECOND[i]]) for i, name in enumerate(greys)]


def write(folder: Path) -> Path:
    gains = [
        Gain("dpo", "one", -0.0125, -0.2, 0.2, 1, 1, 2),
        Gain("sft", "<b>two</b>", 0.0, float("nan"), float("nan"), 0, 4, 0),
    ]
    scorers = [("one", 0.1), ("<b>two</b>", 0.1)]
    file = folder / "new" / "page.html"
    size = write_comparison_page(
        file, Comparison(columns(), scorers, gains, "A & B", "<i>note</i>"), ImageCoding("png")
    )
    assert file.stat().st_size == size
    return file


def titles(page: Any) -> list[str]:
    return page.locator(".card h3").all_text_contents()  # a card out of view is not laid out and has no inner text


def test_columns_of_other_images_are_refused(tmp_path: Path) -> None:
    base, other = column("base", PROMPTS, 0), column("dpo", PROMPTS[::-1], 0)
    with pytest.raises(DiffalignError, match="'dpo' has other prompts and seeds than 'base'"):
        write_comparison_page(tmp_path / "page.html", Comparison([base, other], [], []), ImageCoding())
    assert not list(tmp_path.iterdir())


@pytest.mark.browser
def test_rows_are_filtered_counted_and_ordered(browse: Browse, tmp_path: Path) -> None:
    with browse(write(tmp_path)) as page:
        assert titles(page) == PROMPTS
        assert page.locator(".gains tr").all_inner_texts()[1:] == [
            "dpo\tone\t−0.013\t−0.200 to +0.200\t1\t1\t2",
            "sft\t<b>two</b>\t+0.000\tno interval\t0\t4\t0",
        ]
        buttons = page.locator("#outcome button")
        assert buttons.all_inner_texts() == ["all 4", "win 1", "tie 1", "loss 2", "scorers disagree 1"]
        assert page.locator(".card").nth(2).locator("figure").nth(1).locator(".score").all_text_contents() == [
            "one−0.200 ▼ −0.200",
            "<b>two</b>1.400 ▲ +0.400",
        ]
        page.keyboard.press("4")
        assert titles(page) == PROMPTS[2:]
        page.keyboard.press("5")
        assert titles(page) == [PROMPTS[2]]
        page.select_option("#scorer", label="<b>two</b>")
        page.select_option("#sort", "gain")
        page.keyboard.press("Escape")
        page.locator("#outcome button").nth(1).click()
        assert titles(page) == [PROMPTS[2], PROMPTS[1], PROMPTS[0]]
        page.select_option("#column", label="sft")
        assert buttons.all_inner_texts() == ["all 4", "win 0", "tie 4", "loss 0", "scorers disagree 0"]
        assert "No picture is left" in page.locator("#cards").inner_text()
        page.locator("#outcome button").first.click()
        page.keyboard.press("/")
        page.keyboard.type("RED 1")
        assert titles(page) == []
        page.fill("#search", "RED ")
        assert titles(page) == [PROMPTS[0], PROMPTS[3]]
        assert buttons.first.inner_text() == "all 2"
        assert page.locator("#count").inner_text() == "2 of 4 shown"
        page.get_by_role("button", name="sft").click()  # its column is hidden
        assert page.locator(".card").first.locator("figcaption b").all_text_contents() == ["base", "dpo"]


@pytest.mark.browser
def test_the_wipe_moves_by_keys_and_by_drag(browse: Browse, tmp_path: Path) -> None:
    """On a narrow window in dark colours, where nothing may overflow."""
    with browse(write(tmp_path), viewport={"width": 400, "height": 800}, color_scheme="dark") as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        at = "box => box.style.getPropertyValue('--at')"
        page.keyboard.press("v")
        page.keyboard.press("ArrowDown")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        wipes = page.locator(".wipe")
        assert [wipe.evaluate(at) for wipe in wipes.all()[:4]] == [
            "65%",
            "65%",
            "",
            "",
        ]  # both models of the first card
        box = wipes.nth(1).bounding_box()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 10)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 10, steps=4)
        page.wait_for_function("document.querySelectorAll('.wipe')[1].style.getPropertyValue('--at').startsWith('25')")
        page.mouse.up()
        clip = wipes.nth(1).locator(".over").evaluate("image => getComputedStyle(image).clipPath")
        assert clip.startswith("inset(0px 0px 0px 25")
        page.locator(".card").nth(1).focus()
        page.keyboard.press("Enter")
        assert page.locator("#large-title").inner_text() == PROMPTS[1]
        page.keyboard.press("ArrowLeft")
        assert page.locator("#large .wipe").evaluate(at) == "45%"
        page.keyboard.press("ArrowDown")
        assert page.locator("#large-title").inner_text() == PROMPTS[2]
        page.keyboard.press("Escape")
        focused = "document.activeElement.querySelector('h3')?.textContent"  # the dialog's closing is an event
        page.wait_for_function(f"text => {focused} === text", arg=PROMPTS[2])
