"""The gallery: sliders move to pictures of another strength, each stored once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from diffalign.errors import DiffalignError
from diffalign.pages.html import ImageCoding, image_uri
from diffalign.pages.strengths_page import Strengths, write_strengths_page
from tests.browser import Browse
from tests.pages.pictures import Painted, column

PROMPTS = ["a cat", "a <b>dog</b>"]
STRENGTHS = [0.0, 0.5, 1.0]
GREYS = {"dpo": [10, 20, 30], "sft": [10, 40, 50]}  # of the first prompt by strength; the base is at strength 0


def gallery(strengths: list[float] = STRENGTHS) -> Strengths:
    models = [
        (name, [column(name, PROMPTS, grey, [[grey / 10, 0.0]]) for grey in greys]) for name, greys in GREYS.items()
    ]
    return Strengths(column("base", PROMPTS, 10, [[1.0, 0.0]]), strengths, models, [("score", 2)], note="<i>note</i>")


def uri(grey: int) -> str:
    return image_uri(Painted("", 0, grey).open(), ImageCoding("png"))


def test_an_image_is_stored_once_and_odd_strengths_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    size = write_strengths_page(file, gallery(), ImageCoding("png"))
    text = file.read_text()
    assert len(text.encode()) == size
    block = re.search(r'<script type="application/json" id="strengths">(.*?)</script>', text)
    assert block is not None
    found = json.loads(block[1])
    assert len(found["images"]) == len(set(found["images"])) == 10  # 5 levels of 2 prompts; the base is one of them
    assert [found["images"][i] for i in found["rows"][0]["cells"][1]] == [uri(grey) for grey in GREYS["sft"]]
    for odd, why in (([1.0, 0.5, 0.0], "ascending"), ([0.0, 0.5, 0.5], "ascending"), ([0.0, 1.0], "'dpo' needs")):
        with pytest.raises(DiffalignError, match=why):
            write_strengths_page(file, gallery(odd), ImageCoding("png"))


@pytest.mark.browser
def test_sliders_keys_and_the_strip(browse: Browse, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_strengths_page(file, gallery(), ImageCoding("png"))
    with browse(file, viewport={"width": 400, "height": 800}) as page:
        images, words = page.locator(".card").first.locator("img"), page.locator(".card").first.locator("figcaption")

        def shown() -> list[str | None]:
            return [image.get_attribute("src") for image in images.all()]

        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert page.locator("h3").all_text_contents() == PROMPTS
        assert shown() == [uri(10), uri(30), uri(50)]  # strength 1 at first
        assert words.all_text_contents() == ["basescore1.00", "dpo at 1score3.00", "sft at 1score5.00"]
        page.keyboard.press("ArrowLeft")
        assert page.locator("#value").inner_text() == "0.5"
        assert shown() == [uri(10), uri(20), uri(40)]
        assert page.locator(".means td.here").all_inner_texts() == ["1.00", "2.00"]  # means over two prompts
        page.locator("summary").click()
        page.locator("#each input").nth(1).focus()
        page.keyboard.press("ArrowRight")
        assert shown() == [uri(10), uri(20), uri(50)]  # sft alone
        page.locator(".card").first.focus()
        page.keyboard.press("v")
        assert len(page.locator(".wipe").all()) == 4
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert page.locator(".wipe .over").first.get_attribute("src") == uri(10)
        page.keyboard.press("v")
        page.keyboard.press("2")
        assert shown() == [uri(grey) for grey in GREYS["sft"]]
        assert words.locator("b").all_text_contents() == ["strength 0", "strength 0.5", "strength 1"]
