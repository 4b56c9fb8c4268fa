"""`diffalign data report`: the page says what the report says, draws it, and escapes what the data contain."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffalign.cli.main import main
from tests.browser import Browse
from tests.data.helpers import pick_rows, png, write_parquet

ODD = "<script>window.broken = 1</script>"


@pytest.mark.browser
def test_the_page_shows_what_is_in_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str], browse: Browse) -> None:
    rows = pick_rows(14, prompts=14)
    for i, row in enumerate(rows):
        row["jpg_0"], row["jpg_1"] = png(i, (60 + i, 40)), png(50 + i, (60 + i, 40))
        # the chosen image, number 1 - label_0, has the higher score in all pairs but the last
        row |= {"score_0": row["label_0"], "score_1": 0.5} if i < 13 else {"score_0": 0.9, "score_1": 0.5}
    rows[2]["jpg_0"] = b"no image"
    rows[3]["caption"] = ODD
    rows[13] |= {"label_0": 0.0, "label_1": 1.0, "jpg_0": png(13, (400, 20))}
    file, other = write_parquet(tmp_path / "pairs.parquet", rows), write_parquet(tmp_path / "test.parquet", rows[:2])
    page = tmp_path / "report.html"
    options = ["--resolution", "128", "--aspect-buckets", "sdxl", "--against", str(other)]
    main(["data", "report", str(file), "--out", str(page), *options])
    assert "report.html: 13 pairs" in capsys.readouterr().out
    with browse(page, viewport={"width": 400, "height": 800}) as opened:
        assert opened.evaluate("window.broken") is None
        assert opened.evaluate("document.documentElement.scrollWidth") == 400
        text = opened.locator("body").inner_text()
        titles = opened.locator(".chart h3").all_inner_texts()
        assert opened.locator(".chart svg").count() == len(titles) == 5
        heights = [float(h) for h in opened.locator(".chart").first.locator("rect").evaluate_all(
            "bars => bars.map(bar => bar.getAttribute('height'))")]  # fmt: skip
    assert max(heights) == 100

    assert re.search(r"corrupt image\s+1\s+pairs.parquet row 2: jpg_0: does not open", text)
    assert "2 pairs (first: pairs.parquet row 0, pairs.parquet row 1); 2 of 13 pairs have a prompt of it" in text
    assert ODD in text
    assert "1 of 13 contradict the label" in " ".join(titles)
    worst = text.partition("Cropped most")[2]
    assert re.findall(r"pairs.parquet row \d+", worst)[0] == "pairs.parquet row 13"
    assert "chosen − rejected: -0.4" in worst.partition("Scores against the label")[2]


def test_a_page_is_html_and_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_parquet(tmp_path / "pairs.parquet", pick_rows(3))
    with pytest.raises(SystemExit):
        main(["data", "report", str(file), "--out", str(tmp_path / "a.pdf")])
    assert "name it a.html" in capsys.readouterr().err
    main(["data", "report", str(file), "--out", str(tmp_path / "a.html")])
    with pytest.raises(SystemExit):
        main(["data", "report", str(file), "--out", str(tmp_path / "a.html")])
    assert "a.html" in capsys.readouterr().err
