"""The page of doubtful pairs: marks by key and by button, and the file of decisions."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.pages.doubtful_page import DoubtfulPair, write_doubtful_page
from tests.browser import Browse

IDS = ["a:b", 'odd, "id"', "<script>alert(1)</script>"]


def pairs(ids: list[str]) -> list[DoubtfulPair]:
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return [
        DoubtfulPair(i + 1, x, f"a cat <b>{i}</b>", *images, margin=-0.5 + i, quarter="q3") for i, x in enumerate(ids)
    ]


def test_a_page_needs_pairs_with_ids_of_their_own(tmp_path: Path) -> None:
    for ids, why in (([], "no doubtful pair"), (["x", "y", "x"], "the id 'x'")):
        with pytest.raises(DiffalignError, match=why):
            write_doubtful_page(tmp_path / "page.html", pairs(ids), title="Doubtful pairs")
    assert not list(tmp_path.iterdir())


@pytest.mark.browser
def test_pairs_are_marked_by_keys_and_saved(browse: Browse, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_doubtful_page(file, iter(pairs(IDS)), title="Doubtful <pairs>", note="3 of 9")
    with browse(file) as page:
        cards = page.locator(".card")
        assert page.locator("h1").inner_text() == "Doubtful <pairs>"
        assert cards.first.locator("h3").text_content() == "a cat <b>0</b>"
        assert cards.first.locator(".facts").text_content() == "margin −0.5000 · q3 · a:b"
        assert page.locator("#save").is_disabled()
        for key in ("ArrowDown", "s", "ArrowDown", "k", "ArrowDown", "d", "ArrowUp", "k", "d"):
            page.keyboard.press(key)
        assert cards.evaluate_all("cards => cards.map(card => card.dataset.mark)") == ["swap", "drop", "drop"]
        cards.nth(2).get_by_role("button", name="drop").click()  # again: no mark
        page.get_by_role("button", name="without a mark").click()
        assert [card.get_attribute("data-id") for card in cards.all()] == IDS[2:]
        page.keyboard.press("/")
        page.keyboard.type("cat <b>0")  # k, s and d in a field are letters
        assert page.locator("#count").inner_text() == "0 of 3 pairs · 0 keep · 1 swap · 1 drop"
        with page.expect_download() as download:
            page.locator("#save").click()
        saved = 'id,decision,prompt,chosen_image\na:b,swap,a cat <b>0</b>,0\n"odd, ""id""",drop,a cat <b>1</b>,0\n'
        assert Path(download.value.path()).read_text() == saved
