"""The packaged list as Markdown: `docs/published.md` holds what `diffalign published --list` prints."""

from __future__ import annotations

from diffalign.evaluation.published.beside import markdown_table
from diffalign.evaluation.published.catalogue import MEASURED_BY, Catalogue, PublishedTable
from diffalign.evaluation.report import BASE

LAYOUTS = {"unet": "UNet folder", "lora": "LoRA file", "pickle": "pickle, not loaded"}


def list_page(known: Catalogue) -> str:
    """Released weights, then each source's figures, then the band."""
    parts = ["### Weights", _weights(known)]
    for table in known.tables:
        parts += [f"### {table.title}", f"Source: {table.source}. {_sentence(table.protocol)}"]
        parts += [f"**{known.bases[base].title}**\n\n{_figures(table, base)}" for base in table.figures]
    band = known.band
    expected = [
        [each.title, *(f"{low:g} to {high:g}" for low, high in (band.base[name], band.gain[name]))]
        for name, each in known.bases.items()
    ]
    parts += ["### What a pipeline should reach", f"{band.metric} on 500 Pick-a-Pic prompts, over the tables above:"]
    parts += [markdown_table(["base", "mean of the base", f"gain of the released {band.method}"], expected)]
    parts += ["### Win rates and users", "\n".join(f"- {each['text']} ({each['source']})" for each in known.remarks)]
    return "\n\n".join(parts) + "\n"


def _weights(known: Catalogue) -> str:
    rows = [
        [
            each.name,
            known.bases[each.base].title,
            f"[{each.repository}](https://huggingface.co/{each.repository})",
            LAYOUTS[each.layout],
            "; ".join(part for part in (each.paper, each.note) if part),
        ]
        for each in known.weights
    ]
    return markdown_table(["name", "base", "Hub id", "layout", "of"], rows)


def _figures(table: PublishedTable, base: str) -> str:
    rows = [[method, *(f"{value:g}" for value in values)] for method, values in table.figures[base].items()]
    rows.sort(key=lambda row: row[0] != BASE)
    heads = [f"{metric}" + ("" if metric in MEASURED_BY else " *") for metric in table.metrics]
    return markdown_table(["model", *heads], rows)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
