"""The page in a headless browser: keys, buttons, two windows, a server that is away, prompts that are HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.evaluation.by_eye.votes import read_events, read_votes
from tests.browser import Browse
from tests.evaluation.by_eye.helpers import SECRET, served, session

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script></p>&amp;"

LOSE = """() => {
    const real = fetch;
    window.attempts = 0;
    WAITS.fill(.01);
    window.fetch = async (...request) => {
        window.attempts += 1;
        const answer = attempts === 2 ? null : await real(...request);
        if (attempts < 3) throw new TypeError("lost");
        return answer;
    };
}"""


def judged(page: Any, n: int, total: int) -> None:
    """Waits until the page shows so many votes, and takes keys again."""
    text = f"{n} of {total} judged"
    page.wait_for_function(
        "(text) => !busy && document.querySelector('#progress').textContent.includes(text)", arg=text
    )


def test_keys_and_buttons_vote(tmp_path: Path, browse: Browse) -> None:
    """Left, right, tie twice, skip, undo; a held key votes once; the end by Enter. Nothing names a model."""
    prompts = ["a fox", EVIL, "long " * 200, "a hat", "a lamp", "a cup"]
    with served(session(tmp_path, prompts), "THE TABLE") as server, browse(server.url) as page:
        judged(page, 0, 6)
        shown = [page.text_content("#prompt")]
        assert page.evaluate("[...images.keys()]") == [0, 1]  # the next pair is loaded already
        assert page.evaluate("[...document.querySelectorAll('.frame img')].map((image) => image.naturalWidth)") == [
            8,
            8,
        ]
        boxes = [frame.bounding_box() for frame in page.query_selector_all(".frame")]
        assert {(box["width"], box["height"], box["y"]) for box in boxes} == {
            (boxes[0]["width"],) * 2 + (boxes[0]["y"],)
        }
        page.evaluate("dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft', repeat: true}))")
        for n, key in enumerate(("ArrowLeft", "ArrowRight", "=", "ArrowDown", "s"), start=1):
            page.keyboard.press(key)
            judged(page, n, 6)
            shown.append(page.text_content("#prompt"))
        page.keyboard.press("u")
        judged(page, 4, 6)
        page.click("#keys [data-key=skip]")
        judged(page, 5, 6)
        page.click(".side[data-key=right]")
        page.wait_for_selector("main[data-view=end]")
        assert sorted(shown) == sorted(prompts)
        assert page.title() == "Judge by eye"  # no prompt ran
        assert page.query_selector("#prompt *") is None
        assert SECRET not in page.content()
        page.keyboard.press("Enter")
        page.wait_for_selector("main[data-view=result]")
        assert page.text_content("#report") == "THE TABLE"
    votes = [event.vote for _, event in read_events(tmp_path / "ana.jsonl")]
    assert votes[2:6] == ["tie", "tie", "skip", "undo"]
    lefts = [(event.vote == "second") == bool(event.left) for _, event in read_events(tmp_path / "ana.jsonl")]
    assert (lefts[0], lefts[1], lefts[-1]) == (True, False, False)


def test_two_windows_and_a_narrow_one(tmp_path: Path, browse: Browse) -> None:
    """Votes in turn from both windows: each pair has one, and the slower window says what happened."""
    with served(session(tmp_path, [f"prompt {i}" for i in range(4)])) as server:
        narrow = {"viewport": {"width": 400, "height": 800}, "color_scheme": "dark", "has_touch": True}
        with browse(server.url, **narrow) as one:
            judged(one, 0, 4)
            assert one.evaluate("document.documentElement.scrollWidth") <= 400
            other = one.context.new_page()
            other.goto(server.url)
            judged(other, 0, 4)
            one.tap("#keys [data-key=left]")
            judged(one, 1, 4)
            other.keyboard.press("ArrowRight")  # on the pair that was just judged
            judged(other, 1, 4)
            assert "another window" in other.text_content("#notice")
            other.keyboard.press("=")
            judged(other, 2, 4)
            one.keyboard.press("u")  # of a vote that is not the last any more
            judged(one, 2, 4)
    assert len(read_votes(tmp_path)["ana"]) == 2
    assert len(list(read_events(tmp_path / "ana.jsonl"))) == 2


def test_a_vote_waits_for_a_server_that_does_not_answer(tmp_path: Path, browse: Browse) -> None:
    """The first attempt is stored and its answer lost, the second never arrives, the third counts nothing twice."""
    with served(session(tmp_path, ["a fox", "a hat"])) as server, browse(server.url) as page:
        judged(page, 0, 2)
        page.evaluate(LOSE)
        page.keyboard.press("ArrowLeft")
        judged(page, 1, 2)
        assert page.evaluate("attempts") == 3
    assert len(list(read_events(tmp_path / "ana.jsonl"))) == 1
