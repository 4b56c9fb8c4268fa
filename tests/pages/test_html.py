"""The one function that writes pages, and the helper that opens them."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.pages.html import ImageCoding, asset, escape, html_page, image_uri
from tests.browser import Browse, foreign

ODD = "</script><script>alert(1)</script> & \"quoted\" 'too' \u2028 <!--"


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_what_comes_from_data_is_escaped() -> None:
    page = html_page(ODD, f"<p title='{escape(ODD)}'>{escape(ODD)}</p>", data={"rows": [ODD]})
    assert "alert(1)</script>" not in page
    block = re.search(r'<script type="application/json" id="rows">(.*?)</script>', page)
    assert block is not None
    assert json.loads(block[1]) == [ODD]


def test_a_number_that_json_has_not_and_a_script_that_ends_itself_are_refused() -> None:
    with pytest.raises(DiffalignError, match="data 'scores' of a page"):
        html_page("x", "", data={"scores": [float("nan")]})
    for script in ("x = '</SCRIPT>'", "x = '<!--'"):
        with pytest.raises(DiffalignError, match="ends its element"):
            html_page("x", "", scripts=[script])
    with pytest.raises(DiffalignError, match="</style"):
        html_page("x", "", style="</style>")


@pytest.mark.parametrize("coding", [ImageCoding("png"), ImageCoding("webp", quality=100)])
def test_an_image_comes_back_to_the_bit(coding: ImageCoding) -> None:
    image = Image.effect_noise((24, 16), 90).convert("RGB")
    image.info["comment"] = "made by somebody"
    uri = image_uri(image, coding)
    back = opened(uri)
    assert back.convert("RGB").tobytes() == image.tobytes()
    assert b"somebody" not in base64.b64decode(uri.partition(",")[2])


def test_an_image_is_shrunk_to_its_side_and_never_enlarged() -> None:
    image = Image.effect_noise((80, 40), 90)
    assert opened(image_uri(image, ImageCoding("jpeg", side=20))).size == (20, 10)
    assert opened(image_uri(image, ImageCoding("jpeg", side=200))).size == (80, 40)
    for wrong in ({"format": "gif"}, {"quality": 0}, {"side": 0}):
        with pytest.raises(DiffalignError, match="give"):
            ImageCoding(**wrong)  # type: ignore[arg-type]


def test_the_style_names_no_address() -> None:
    assert re.findall(r"url\(|@import|https?:", asset("style.css")) == []


@pytest.mark.parametrize(
    ("url", "target", "elsewhere"),
    [
        ("data:image/png;base64,x", "file:///a.html", False),
        ("file:///a.html", "file:///a.html#part", False),
        ("file:///b.css", "file:///a.html", True),
        ("http://127.0.0.1:80/x", "http://127.0.0.1:80/", False),
        ("http://127.0.0.1:81/x", "http://127.0.0.1:80/", True),
        ("https://example.org/", "file:///a.html", True),
    ],
)
def test_a_request_elsewhere_is_seen(url: str, target: str, elsewhere: bool) -> None:
    assert foreign(url, target) == elsewhere


@pytest.mark.browser
def test_a_page_runs_its_own_scripts_and_reads_its_data(browse: Browse, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    image = f"<img alt='' src='{image_uri(Image.new('RGB', (4, 4), 'red'))}'>"
    script = "document.body.title = JSON.parse(document.getElementById('rows').textContent)[0]"
    file.write_text(html_page("before", f"<h1>A page</h1>{image}", scripts=[script], data={"rows": [ODD]}))
    with browse(file, viewport={"width": 400, "height": 700}) as page:
        assert page.evaluate("document.body.title") == ODD
        assert page.evaluate("document.images[0].naturalWidth") == 4


@pytest.mark.browser
@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<img src=https://example.invalid/a.png>", "example.invalid"),
        ("<p onclick='x()'></p><script>document.title = 'bad'</script>", "Content Security Policy"),
        ("<script src=b.js></script>", "b.js"),
    ],
)
def test_the_helper_sees_what_the_policy_refuses(browse: Browse, tmp_path: Path, body: str, fault: str) -> None:
    file = tmp_path / "page.html"
    file.write_text(html_page("good", body))
    with pytest.raises(AssertionError, match=fault), browse(file) as page:
        assert page.title() == "good"
