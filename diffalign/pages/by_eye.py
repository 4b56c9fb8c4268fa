"""The page on which two images of a prompt are compared by eye; `evaluation.by_eye.server` serves it."""

from __future__ import annotations

from diffalign.pages.html import asset, html_page

_BODY = """
<main id="main" data-view="wait">
<header><p id="progress" class="numbers small soft" aria-live="polite"></p><progress id="bar" max="1" value="0"></progress></header>
<p id="prompt"></p>
<p id="notice" class="bad" role="status" aria-live="polite"></p>
<div id="pair">
<button class="side" data-key="left" aria-label="prefer the left image"><span class="frame"></span></button>
<button class="side" data-key="right" aria-label="prefer the right image"><span class="frame"></span></button>
</div>
<div id="keys">
<button data-key="left"><kbd>←</kbd> Left</button>
<button data-key="tie"><kbd>=</kbd> Tie</button>
<button data-key="right">Right <kbd>→</kbd></button>
<button data-key="skip"><kbd>s</kbd> Skip</button>
<button data-key="undo"><kbd>u</kbd> Undo</button>
</div>
<section id="end">
<h1>All pairs are judged</h1>
<p id="counts"></p>
<p><button data-key="finish"><kbd>Enter</kbd> Finish</button> <button data-key="undo"><kbd>u</kbd> Undo the last one</button></p>
</section>
<section id="result"><h1>Finished</h1><p>The server has stopped; you may close this window.</p><pre id="report"></pre></section>
</main>
"""


def by_eye_page() -> str:
    """The HTML of the page. Prompts and images come from the server when they are shown."""
    return html_page("Judge by eye", _BODY, style=asset("by_eye.css"), scripts=[asset("by_eye.js")], served=True)
