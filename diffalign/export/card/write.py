"""Where cards go, and which of them are never replaced: those that someone has edited.

A card ends with a hash of what is above it. A card whose hash differs, or a file without one, is not ours to replace.
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import replace
from pathlib import Path

from diffalign.export.card.evaluation import STRIP as STRIP
from diffalign.export.card.evaluation import Evaluation, draw_strip, find_evaluations, read_evaluation
from diffalign.export.card.facts import CardFacts, Exported
from diffalign.export.card.text import CardParts, card_text
from diffalign.export.names import ExportError
from diffalign.export.tuned_run import TunedRun, recorded_run
from diffalign.io.files import save_text, written_whole

log = logging.getLogger(__name__)

CARD = "README.md"
_SEAL = re.compile(r"\n<!-- diffalign card (?P<sha256>[0-9a-f]{64}) -->\n\Z")
_ID = r"[\w.+-]+"  # of a licence
_LICENSE = re.compile(rf"^license: (?P<id>{_ID})$", re.MULTILINE)


def write_run_card(
    run: str | Path,
    *,
    base: str | None = None,
    evaluation: str | Path | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the README.md of a run (or of a merge, or of a folder with tuned weights); returns it.

    base: as in `find_tuned_run`. evaluation: a folder that `evaluate` wrote; None: the newest that measured these
    weights, in the folder of the run, beside it or in the working folder (`find_evaluations`), if there is one.
    license: an identifier of the Hub; None: as the card that is replaced has it. Raises ExportError for a card that was
    edited, unless it may be overwritten, for an evaluation of other weights, for a licence that is no identifier, and
    for weights on the Hub or a UNet without its folder.
    """
    if license is not None and not re.fullmatch(_ID, license):
        raise ExportError(f"licence {license!r}: give an identifier of the Hub, such as openrail++ or apache-2.0")
    tuned_run = recorded_run(run, base)
    if not Path(run).exists():
        raise ExportError(
            f"{run} is on the Hub, with a card of its own; a card is written into a folder of this machine"
        )
    if tuned_run.tuned.kind == "unet" and tuned_run.tuned.path.is_file():
        raise ExportError(f"{run} is one file of a UNet; a card describes a run, a LoRA or a folder with unet/")
    file = tuned_run.folder / CARD
    check_card(file, overwrite)
    facts = CardFacts(tuned_run)
    parts = CardParts(facts, license=license or stated_license(file), family=facts.family or family_of_base(tuned_run))
    return _write(file, parts, _evaluation(tuned_run, evaluation))


def write_export_card(run: TunedRun, exported: Exported, family: str, *, overwrite: bool = False) -> Path:
    """Write the card of an exported file beside it, with the file's name and the ending .md; returns it."""
    file = exported.file.with_suffix(".md")
    check_card(file, overwrite)
    licence = stated_license(file) or stated_license(run.folder / CARD)
    parts = CardParts(CardFacts(run, exported), license=licence, family=family)
    return _write(file, parts, _evaluation(run, None), strip=f"{exported.file.stem}_{STRIP}")


def check_card(file: Path, overwrite: bool) -> None:
    """Raises ExportError for a file at a card's place that is none of ours, or was edited."""
    if file.exists() and not overwrite and not is_ours(file):
        raise ExportError(
            f"{file} is not a card of diffalign, or was edited since; it is not replaced. Move it, or give --overwrite"
        )


def is_ours(file: Path) -> bool:
    """Whether a card is as diffalign wrote it."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    found = _SEAL.search(text)
    return found is not None and found["sha256"] == _hash(text[: found.start()])


def stated_license(file: Path) -> str | None:
    """The licence in a card's metadata."""
    try:
        head = file.read_text(encoding="utf-8").split("\n---\n", 1)[0]
    except (OSError, UnicodeDecodeError):
        return None
    found = _LICENSE.search(head)
    return None if found is None else found["id"]


def sealed(text: str) -> str:
    """A card's text with its hash, which no page shows."""
    return f"{text}\n<!-- diffalign card {_hash(text)} -->\n"


def unsealed(text: str) -> str:
    """A card's text without its hash."""
    return _SEAL.sub("", text)


def family_of_base(run: TunedRun) -> str | None:
    """sd or sdxl, for the lines that load a single-file base; None where its files are not there."""
    if not run.base.pretrained_model_name_or_path.endswith(".safetensors"):
        return None
    from diffalign.models.loading.base import outline_base

    return outline_base(run.base_spec()).family.name


def _evaluation(run: TunedRun, folder: str | Path | None) -> Evaluation | None:
    if folder is not None:
        return read_evaluation(Path(folder), run)
    return next(iter(find_evaluations(run)), None)


def _write(file: Path, parts: CardParts, evaluation: Evaluation | None, *, strip: str = STRIP) -> Path:
    """strip: name of the file of pictures beside the card."""
    drawn = draw_strip(evaluation) if evaluation is not None else None
    prompts: list[str] = []
    if drawn is not None:
        image, prompts = drawn
        with written_whole(file.with_name(strip)) as partial:
            image.save(partial, "JPEG", quality=92, subsampling=0)
    whole = replace(parts, evaluation=evaluation, strip=prompts, strip_file=strip)
    save_text(file, sealed(card_text(whole)))
    return file


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
