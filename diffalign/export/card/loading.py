"""The lines of Python that load the weights of a card and generate an image. A test executes them."""

from __future__ import annotations

import json
from typing import Any

from diffalign.export.card.facts import CardFacts, Source
from diffalign.export.tuned_run import shown

HERE = "here = {}  # this folder, or the repository's id on the Hub"
PIPELINES = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
PROMPT = "a photo of a red fox in the snow"


def diffusers_lines(facts: CardFacts, prompt: str | None, family: str | None) -> list[str]:
    """For diffusers; without diffalign, except for long prompts and clip skip.

    `family` (sd, sdxl) is needed of single files only.
    The names of a local base and of this folder are relative to the folder that has them.
    """
    model, imported = facts.run.base, {"DiffusionPipeline"}
    single = facts.kind == "single-file" or facts.base.name.endswith(".safetensors")
    loader = "DiffusionPipeline.from_pretrained"
    if single:
        imported = {PIPELINES[family or "sdxl"]}
        loader = f"{PIPELINES[family or 'sdxl']}.from_single_file"
    if facts.kind == "single-file":
        assert facts.exported is not None
        lines = [f"pipeline = {loader}({_text(facts.exported.file.name)})"]
    else:
        parts = [_text(facts.base.name)]
        if not facts.base.on_hub:
            lines = [f"base = {_text(facts.base.name)}  # the base's folder or file"]
            parts = ["base"]
        else:
            lines = []
        parts += [f"{key}={_text(value)}" for key in ("revision", "variant") if (value := getattr(model, key))]
        folder = facts.run.folder.absolute().name if facts.exported is None else "."
        lines.append(HERE.format(_text(folder)))
        if facts.kind == "unet":
            imported.add("UNet2DConditionModel")
            lines.append(f"unet = UNet2DConditionModel.from_pretrained(here, subfolder={_text(facts.weights.name)})")
            parts.append("unet=unet")
        if model.pretrained_vae_model_name_or_path is not None:
            imported.add("AutoencoderKL")
            lines.append(f"vae = AutoencoderKL.from_pretrained({_text(_vae(facts))})")
            parts.append("vae=vae")
        lines.append(f"pipeline = {loader}({', '.join(parts)})")
        for place, weight in model.merge_lora.items() if facts.kind == "lora" else ():
            repository, _, inside = place.partition("::")
            name = f", weight_name={_text(inside)}" if inside else ""
            lines.append(f"pipeline.load_lora_weights({_text(shown(repository))}{name})  # part of the base")
            lines.append(f"pipeline.fuse_lora(lora_scale={weight:g})")
            lines.append("pipeline.unload_lora_weights()")
        if facts.kind == "lora":
            lines.append(f"pipeline.load_lora_weights(here, weight_name={_text(facts.weights.name)})")
    scheduler = {} if model.scheduler is None else model.scheduler.given
    if model.prediction_type is not None:
        scheduler["prediction_type"] = model.prediction_type
    if scheduler:
        # not every class can rescale its betas, and one that cannot ignores the key
        kind = "DDIMScheduler" if "rescale_betas_zero_snr" in scheduler else "type(pipeline.scheduler)"
        imported |= {kind} if kind == "DDIMScheduler" else set()
        given = ", ".join(f"{key}={_literal(value)}" for key, value in scheduler.items())
        lines.append(f"pipeline.scheduler = {kind}.from_config(pipeline.scheduler.config, {given})")
    imports = [f"from diffusers import {', '.join(sorted(imported))}"]
    given = _text(prompt or PROMPT)
    if text := model.text.recorded:  # no argument of diffusers' pipelines stands for all of it
        imports.append("from diffalign.models.text.pipeline import pipeline_embeddings")
        imports.append("from diffalign.models.text.spec import TextSpec")
        spec = ", ".join(f"{name}={value!r}" for name, value in text.items())
        lines.append(f'embeddings = pipeline_embeddings(pipeline, [{given}], TextSpec({spec}), "", guided=True)')
        given = "**embeddings"
    lines.append(f"image = pipeline({given}, num_inference_steps=25, guidance_scale=5.0).images[0]")
    return [*imports, "", *lines, 'image.save("image.png")']


def on_the_hub(card: str, folder: str, repo_id: str) -> str:
    """A card whose lines load from the repository in place of the folder."""
    return card.replace(HERE.format(_text(folder)), HERE.format(_text(repo_id)))


def _vae(facts: CardFacts) -> str:
    return Source.of(str(facts.run.base.pretrained_vae_model_name_or_path)).name


def _literal(value: Any) -> str:
    return _text(value) if isinstance(value, str) else repr(value)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
