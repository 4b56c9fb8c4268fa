"""The card as Markdown with the Hub's metadata. Everything that comes from data is escaped."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from diffalign import __version__
from diffalign.export.card.evaluation import STRIP, Evaluation, gains_table
from diffalign.export.card.facts import CardFacts, Source
from diffalign.export.card.loading import diffusers_lines

PROJECT = "https://github.com/diffalign/diffalign"
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&$]|^[-+=]|(?<=^\d)[.)])")  # the last two only where a line begins
_PIPE = re.compile(r"(?<!\\)\|")  # inside code too a cell has it escaped
_CITED = re.compile(r"(?P<authors>[^,]+), (?P<title>.+), arXiv (?P<id>\d{4}\.\d{4,5})")
_FOLDERS = {
    "lora": ("`models/loras` (node *Load LoRA*)", "`models/Lora` (prompt `<lora:NAME:1>`)"),
    "single-file": ("`models/checkpoints` (node *Load Checkpoint*)", "`models/Stable-diffusion`"),
}


@dataclass(frozen=True)
class CardParts:
    """What a card is made of."""

    facts: CardFacts
    evaluation: Evaluation | None = None
    strip: Sequence[str] = ()  # the prompts of the pictures in the file `strip_file`; empty: no pictures
    strip_file: str = STRIP  # beside the card
    license: str | None = None  # an identifier of the Hub, such as openrail++; None: not stated
    family: str | None = None  # sd or sdxl, where it is known


def card_text(parts: CardParts) -> str:
    """The whole card."""
    facts = parts.facts
    method = facts.run.objective or "preferences"
    name = facts.base.name if facts.base.on_hub else facts.run.folder.absolute().name
    sections = [
        f"---\n{_metadata(parts)}\n---",
        f"# {md(name)}, tuned with {md(method)}",
        _what(facts),
        _pictures(parts),
        _gains(parts.evaluation),
        _use(parts),
        _training(facts),
        _data(facts),
        _license(parts),
        _citation(facts),
        f"Written by [diffalign]({PROJECT}) {__version__}.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def md(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Inline code that shows the text as it is, on one line."""
    text = " ".join(text.split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def fenced(lines: Sequence[str], language: str) -> str:
    """A block of code, whatever backticks are in it."""
    text = "\n".join(lines)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of a header and rows; cells are Markdown already."""
    lines = ["| " + " | ".join(_PIPE.sub(r"\\|", cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def bibtex(paper: str) -> str | None:
    """The BibTeX entry of "Authors, title, arXiv id"; None for a paper that has no arXiv id."""
    found = _CITED.search(paper)
    if found is None:
        return None
    first = found["authors"].removesuffix(" et al.")
    year = f"20{found['id'][:2]}"
    word = re.sub(r"\W", "", found["title"].split()[0]).lower()
    fields = {
        "title": f"{{{found['title']}}}",
        "author": f"{first} and others" if found["authors"].endswith("et al.") else first,
        "year": year,
        "eprint": found["id"],
        "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{found['id']}",
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@article{{{first.lower()}{year}{word},", *lines, "}"])


def _metadata(parts: CardParts) -> str:
    from huggingface_hub import ModelCardData

    facts, objective = parts.facts, parts.facts.run.objective
    tags = ["text-to-image", "diffusers", *(["lora"] if facts.kind == "lora" else []), "diffalign"]
    tags += ["preference-tuning", *([objective] if objective and re.fullmatch(r"[\w.-]+", objective) else [])]
    relation = "adapter" if facts.kind == "lora" else "finetune"
    more: dict[str, Any] = {"base_model_relation": relation} if facts.base.on_hub else {}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
        license=parts.license,
        base_model=facts.base.name if facts.base.on_hub else None,
        datasets=facts.data.name if facts.data is not None and facts.data.on_hub else None,
        **more,
    )
    return str(data.to_yaml())


def _what(facts: CardFacts) -> str:
    kinds = {"lora": "A LoRA for the UNet", "unet": "All weights of the UNet", "single-file": "The whole model"}
    what = kinds.get(facts.kind, f"{facts.run.tuned.layout.label.capitalize()} for the UNet")
    told = f"{what} of {_linked(facts.base, 'models')}, tuned on preferences"
    told += f" with {code(facts.run.objective)}" if facts.run.objective else ""
    told += f" ({md(facts.papers[0])})" if facts.papers else ""
    notes = f"\n\n{md(facts.exported.notes)}" if facts.exported is not None and facts.exported.notes else ""
    return f"{told}.{notes}"


def _pictures(parts: CardParts) -> str:
    if not parts.strip:
        return ""
    listed = "\n".join(f"{number}. {md(prompt)}" for number, prompt in enumerate(parts.strip, 1))
    file = quote(parts.strip_file)
    return f"![The base above, the tuned model below]({file})\n\nSame prompts, same noise, from left:\n\n{listed}"


def _gains(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "## What it gained\n\nNot measured: no evaluation of these weights was given."
    result = evaluation.result
    head, *rows = gains_table(evaluation)
    shown = {name: md(name) for _, name, *_ in rows} | {evaluation.model: f"**{md(evaluation.model)}**"}
    cells = [[code(scorer), shown[name], *values] for scorer, name, *values in rows]
    sampling = result["settings"][evaluation.model][0]
    how = ", ".join(
        f"{name} {sampling[name]}" for name in ("steps", "guidance", "scheduler") if sampling.get(name) is not None
    )
    return (
        f"## What it gained\n\n{table([head, *cells])}\n\nThe base and each model generated images of "
        f"{len(result['prompts'])} prompts with {len(result['seeds'])} seeds each, from the same noise ({md(how)}). "
        "A gain is the mean difference of the scores; its interval counts prompts, not images. A win is an image that "
        "scores higher than the base's."
    )


def _use(parts: CardParts) -> str:
    facts = parts.facts
    if facts.kind not in ("lora", "unet", "single-file"):
        return "## Use\n\nOther programs do not have these layers. In diffalign: `diffalign generate BASE --tuned RUN`."
    validated = facts.config.validation.prompts if facts.config is not None else ()
    prompt = next(iter(parts.evaluation.prompts if parts.evaluation is not None else validated), None)
    lines = diffusers_lines(facts, prompt, parts.family)
    return f"## Use\n\n**diffusers**\n\n{fenced(lines, 'python')}\n\n{_programs(facts)}"


def _programs(facts: CardFacts) -> str:
    if facts.exported is None:
        to, name = ("kohya", "lora") if facts.kind == "lora" else ("single-file", "tuned")
        command = f"diffalign export {shlex.quote(facts.run.folder.absolute().name)} --to {to} --out {name}.safetensors"
        return f"**ComfyUI, A1111, Forge** read SD and SDXL: {code(command)} makes the file and names its folder."
    if facts.exported.layout == "diffusers":
        return ""
    comfy, a1111 = _FOLDERS[facts.kind]
    return f"**ComfyUI**: copy {code(facts.weights.name)} to {comfy}. **A1111, Forge**: {a1111}."


def _training(facts: CardFacts) -> str:
    config = facts.config
    if config is None:
        return ""
    training, tree = config.training, config.resolved()
    processes = facts.recorded.get("processes", 1)
    pairs = training.train_batch_size * training.gradient_accumulation_steps * processes
    rows = [
        ["objective", _settings(tree["objective"])],
        ["tuning", _settings(tree["tuning"])],
        *([["source of pairs", _settings(tree["source"])]] if tree["source"] else []),
        ["steps", str(facts.run.steps or training.max_train_steps) + f" of {pairs} pairs"],
        ["learning rate", f"{training.learning_rate:g}, {training.lr_scheduler}, {training.optimizer}"],
        ["precision", "float32" if training.mixed_precision == "no" else training.mixed_precision],
        ["resolution", str(config.data.resolution or "the base's own")],
        ["seed", str(config.seed)],
        *([["SHA-256 of the weights", ", ".join(map(code, hashes))]] if (hashes := facts.run.hashes) else []),
    ]
    versions = facts.recorded.get("versions")
    if isinstance(versions, dict):
        rows.append(["versions", md(", ".join(f"{name} {version}" for name, version in versions.items()))])
    beside = "" if facts.exported is not None else "\n\nEvery setting: `config.yaml`."
    return f"## Training\n\n{table([['setting', 'value'], *rows])}{beside}"


def _settings(node: object) -> str:
    """A node of the config with its non-empty settings; paths by their last name."""
    assert isinstance(node, dict)
    name = next(iter(node.get(key) for key in ("name", "method") if key in node), "")
    rest = [
        f"{key} {Source.of(value).name if isinstance(value, str) else value}"
        for key, value in node.items()
        if key not in ("name", "method") and value is not None
    ]
    return code(f"{name}: {', '.join(rest)}" if rest else str(name))


def _data(facts: CardFacts) -> str:
    if facts.data is None or facts.config is None:
        return ""
    what = "pairs" if facts.config.source is None else "rows"
    count = f", {int(facts.rows['pairs']):,} {what}" if facts.rows.get("pairs", "").isdigit() else ""
    split = f", split {code(facts.config.data.split)}" if facts.data.on_hub else ""
    hashes = ", ".join(f"{name} {code(value)}" for name, value in facts.rows.items() if name != "pairs")
    same = f"\n\nHashes of the rows as they were used: {hashes}." if hashes else ""
    return f"## Data\n\n{_linked(facts.data, 'datasets')}{split}{count}.{same}"


def _license(parts: CardParts) -> str:
    base = parts.facts.base
    of = f"[its page](https://huggingface.co/{base.name})" if base.on_hub else "its own files"
    if parts.license is not None:
        return f"## Licence\n\n{code(parts.license)}. The licence of the base, in {of}, holds for these weights too."
    return (
        "## Licence\n\n**TODO: not stated.** These weights are derived from the base, whose licence "
        f"({of}) holds for them too. `diffalign card RUN --license ID` states it."
    )


def _citation(facts: CardFacts) -> str:
    if not facts.papers:
        return ""
    entries = [bibtex(paper) for paper in facts.papers]
    plain = [f"- {md(paper)}" for paper, entry in zip(facts.papers, entries, strict=True) if entry is None]
    known = [entry for entry in entries if entry is not None]
    blocks = ["\n".join(plain)] * bool(plain) + [fenced(["\n\n".join(known)], "bibtex")] * bool(known)
    return "## Citation\n\n" + "\n\n".join(blocks)


def _linked(source: Source, kind: str) -> str:
    if not source.on_hub:
        return code(source.name)
    place = source.name if kind == "models" else f"{kind}/{source.name}"
    return f"[{md(source.name)}](https://huggingface.co/{place})"
