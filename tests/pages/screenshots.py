"""Pictures of pages for the documentation.

    python -m tests.pages.screenshots PAGE.html --click "#tab-images" --out X.png

Needs Chromium or Chrome, and playwright. Colours are reduced to 256, which is enough for text and curves.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image

from tests.browser import ARGUMENTS, CHROMIUM, visit


def main() -> None:
    """Opens the page, clicks, and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--click", action="append", default=[], help="a CSS selector, clicked first; may be repeated")
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=1000)
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()

    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        size = {"width": args.width, "height": args.height}
        with visit(chromium, args.page, viewport=size, color_scheme="dark" if args.dark else "light") as page:
            for selector in args.click:
                page.click(selector)
            page.mouse.move(0, 0)
            page.wait_for_timeout(500)
            picture = Image.open(io.BytesIO(page.screenshot()))
        chromium.close()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
