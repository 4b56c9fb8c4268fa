"""The page on which two images of a prompt are compared by eye; `evaluation.by_eye.server` serves it."""

from __future__ import annotations

from diffalign.pages.html import asset, html_page


def by_eye_page() -> str:
    """The HTML of the page. Prompts and images come from the server when they are shown."""
    return html_page(
        "Judge by eye", asset("by_eye.html"), style=asset("by_eye.css"), scripts=[asset("by_eye.js")], served=True
    )
