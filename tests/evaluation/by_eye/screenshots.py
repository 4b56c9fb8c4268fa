"""Pictures of the page for the documentation, on images of the emoji world's base.

python -m tests.evaluation.by_eye.screenshots --out assets/pages
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from diffalign.evaluation.by_eye.plan import store_plan
from diffalign.evaluation.by_eye.session import Session
from diffalign.evaluation.by_eye.sources import from_images
from diffalign.evaluation.generate import generate
from diffalign.evaluation.sampling import Sampling
from diffalign.world.emoji import base_path
from tests.browser import ARGUMENTS, CHROMIUM
from tests.evaluation.by_eye.helpers import post, served

PROMPTS = ["a strawberry in front of blue", "a carrot in front of blue", "a banana in front of purple"]
VIEWS = {
    "by_eye": {"viewport": {"width": 1000, "height": 640}},
    "by_eye_dark": {"viewport": {"width": 1000, "height": 640}, "color_scheme": "dark"},
    "by_eye_phone": {"viewport": {"width": 400, "height": 420}, "device_scale_factor": 2},
}


def main() -> None:
    """Writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        generate(str(base_path()), PROMPTS, range(4), out_dir=images, sampling=Sampling(num_inference_steps=20))
        made = from_images([images])
        votes = Path(folder) / "votes"
        votes.mkdir()
        store_plan(votes, made.plan)
        with served(Session(made, votes, "ana")) as server, sync_playwright() as playwright:
            for place, seconds in ((0, 14), (1, 11)):
                post(
                    server.url,
                    "vote",
                    {"event": f"event-{place:04}", "place": place, "key": "left", "seconds": seconds},
                )
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            for name, view in VIEWS.items():
                page = browser.new_context(**view).new_page()
                page.goto(server.url)
                page.wait_for_selector("main[data-view=pair]")
                page.screenshot(path=out / f"{name}.png")
                with Image.open(out / f"{name}.png") as picture:
                    picture.convert("RGB").save(out / f"{name}.png", optimize=True)
            browser.close()


if __name__ == "__main__":
    main()
