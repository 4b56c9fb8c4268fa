"""Released checkpoints evaluated under one protocol, with the published figures beside ours.

out_dir/published.json, published.md    every line, with its source and protocol
and what `evaluate` writes there
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.data.prompt_sets.fetch import which_set
from diffalign.errors import DiffalignError
from diffalign.evaluation.evaluate import evaluate
from diffalign.evaluation.published.beside import FigureLine, as_json, as_markdown, lines_beside, verdicts
from diffalign.evaluation.published.catalogue import Catalogue, Release
from diffalign.evaluation.published.weights import release_path
from diffalign.evaluation.report import Result
from diffalign.evaluation.sampling import Sampling
from diffalign.evaluation.scoring import load_judges
from diffalign.io.files import save_text
from diffalign.models.adapters.save_load import find_tuned
from diffalign.rewards import Scorer


@dataclass(frozen=True)
class PublishedRun:
    """Which releases of which base are evaluated, and where the weights are if not on the Hub."""

    base: str  # a key of `Catalogue.bases`
    only: Sequence[str] = ()  # names of releases; empty: all that can be loaded
    model: str | None = None  # the base's folder, file or another Hub id; None: the catalogue's
    tuned: Mapping[str, str] | None = None  # name -> local weights, of a release or of your own

    def chosen(self, known: Catalogue) -> dict[str, Release | str]:
        """The models by name: a release, or the path of weights. Raises DiffalignError for a name that is not known."""
        releases, own = known.releases(self.base), dict(self.tuned or {})
        unknown = [name for name in self.only if name not in releases and name not in own]
        if unknown:
            raise DiffalignError(
                f"--only {unknown[0]}: no such release of {known.bases[self.base].title}; known: {', '.join(releases)}"
            )
        left_out = [each.name for each in known.unreadable(self.base)]
        names = self.only or [name for name in releases if name not in left_out]
        return {name: own.get(name) or releases[name] for name in dict.fromkeys([*names, *own])}


def evaluate_published(
    run: PublishedRun,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    scorers: Sequence[str | Scorer],
    out_dir: Path,
    sampling: Sampling,
    known: Catalogue,
) -> tuple[Result, list[FigureLine]]:
    """Fetches what is missing, evaluates every chosen model beside its base, and writes both kinds of figures.

    Scorers and local weights are checked before anything is fetched; all weights are fetched, and their configs found
    to fit, before the first image. Raises DiffalignError as `release_path` and `evaluate` do.
    """
    base = known.bases[run.base]
    judges = load_judges(scorers, sampling.device)
    for path in (run.tuned or {}).values():
        find_tuned(path)
    paths: dict[str, str | Path] = {
        name: each if isinstance(each, str) else release_path(each, base) for name, each in run.chosen(known).items()
    }
    result = evaluate(
        run.model or base.model,
        paths,
        prompts,
        seeds,
        scorers=judges.scorers,
        out_dir=out_dir,
        sampling=sampling,
    )
    lines = lines_beside(result, run.base, our_protocol(prompts, seeds, sampling), known)
    save_text(out_dir / "published.json", json.dumps(as_json(lines), indent=2, ensure_ascii=False) + "\n")
    notes = [f"- {verdict}" for verdict in verdicts(lines, run.base, known)]
    text = "\n\n".join(
        [f"# Released weights on {base.title}", *(["\n".join(notes)] if notes else []), as_markdown(lines)]
    )
    save_text(out_dir / "published.md", text + "\n")
    return result, lines


def our_protocol(prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> str:
    """How our images were made, in one phrase like those of the tables."""
    found = which_set(prompts)
    first = f"the first {found['count']} of {found['of']}" if "of" in found else str(found["count"])
    named = f"{found['set']}, {first}" if found["set"] else f"{found['count']} prompts of no named set"
    return (
        f"{named}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}; sampling {sampling.scheduler}, "
        f"{sampling.num_inference_steps} steps, guidance {sampling.guidance_scale:g}, {sampling.dtype}"
    )
