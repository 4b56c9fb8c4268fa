"""Images of many prompts and seeds from one model, written to a folder that can be resumed.

out_dir/00003_7.png      prompt number 3, seed 7
out_dir/manifest.jsonl   one line per finished image: file, prompt, seed, noise_seed, settings
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffalign.data.table.prompts import prompts_of, unique
from diffalign.engine.random import noise_seed
from diffalign.errors import DiffalignError, out_of_memory
from diffalign.evaluation.manifest import MANIFEST, GeneratedImage, manifest_rows, mend_end
from diffalign.evaluation.recipe import PATHS, ImageRecipe, Tuned, as_tuned
from diffalign.evaluation.sampling import Guidance, Sampling, default_batch, default_resolution, sample_images
from diffalign.io.files import written_whole
from diffalign.io.folder_lock import folder_lock
from diffalign.io.plugins import imported
from diffalign.io.progress import Progress
from diffalign.models.spec import ModelSpec

# Loads the `Guidance` of negative weights; imported when some are given.
NEGATIVE_GUIDANCE = ("diffalign.contrib.negative_guidance", "load_guidance")


def generate(
    model: str,
    prompts: str | Sequence[str],
    seeds: Sequence[int],
    *,
    out_dir: str | Path,
    tuned: str | Path | Tuned | None = None,
    sampling: Sampling | None = None,
) -> list[GeneratedImage]:
    """Every prompt with every seed, prompt-major, written to `out_dir`.

    `prompts` are texts, or the name of a prompt set (`diffalign list prompts`) or of a file of prompts.
    `model` is a diffusers folder, Hub id or single-file checkpoint; `tuned` the path of weights to put on it, or a
    `Tuned`. `sampling` says how (None: `Sampling()`). Images that the manifest already lists with the same settings are
    not made again, and the model is not even loaded when none is missing. Raises DiffalignError when `out_dir` contains
    images made with other settings, FolderInUseError while another process writes images there.
    """
    recipe = ImageRecipe(model, as_tuned(tuned), sampling or Sampling())
    return generate_by(recipe, prompts_of(prompts), seeds, Path(out_dir))


def generate_by(
    recipe: ImageRecipe, prompts: Sequence[str], seeds: Sequence[int], folder: Path, *, title: str = ""
) -> list[GeneratedImage]:
    """The images of `generate`, by a recipe that was checked before. title: of its progress; else the folder's name."""
    wanted = [(prompt, int(seed)) for prompt in unique(prompts) for seed in dict.fromkeys(seeds)]
    done, _ = _finished(folder, recipe.settings)
    if any(key not in done for key in wanted):
        with folder_lock(folder, "a process that generates images"), _with_remedies(recipe.sampling):
            done, numbers = _finished(folder, recipe.settings)  # another process may have made some meanwhile
            if missing := [key for key in wanted if key not in done]:
                done |= _generate_missing(recipe, missing, folder, numbers, title or folder.name)
    return [done[key] for key in wanted]


def _generate_missing(
    recipe: ImageRecipe, missing: Sequence[tuple[str, int]], folder: Path, numbers: dict[str, int], title: str
) -> dict[tuple[str, int], GeneratedImage]:
    """Writes an image of each (prompt, seed), and its line of the manifest. numbers: of prompts that have files."""
    from diffalign.models.adapters.save_load import load_pipeline

    tuned, sampling = recipe.tuned, recipe.sampling
    spec = ModelSpec(
        recipe.model,
        pretrained_vae_model_name_or_path=sampling.vae,
        prediction_type=sampling.prediction_type,
        merge_lora=sampling.merge_lora,
        scheduler=sampling.scheduler_config,
    )
    place: dict[str, Any] = {"torch_dtype": sampling.torch_dtype, "device": sampling.device}
    weights = None if tuned.path is None else str(tuned.path)
    pipe = load_pipeline(spec, tuned=weights, user=tuned.user, strength=tuned.strength, **place)
    guidance = None if tuned.negative is None else _guidance(recipe.model, str(tuned.negative), **place)
    batch = sampling.batch_size or default_batch(sampling.resolution or default_resolution(pipe))
    made = {}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).is_file():
        mend_end(folder)
    with (
        (folder / MANIFEST).open("a", encoding="utf-8") as manifest,
        Progress(total=len(missing), desc=title, unit="img") as bar,
    ):
        for start in range(0, len(missing), batch):
            keys = missing[start : start + batch]
            texts, own = [prompt for prompt, _ in keys], [seed for _, seed in keys]
            images = sample_images(pipe, texts, own, sampling, guidance=guidance)
            for (prompt, seed), image in zip(keys, images, strict=True):
                file = f"{numbers.setdefault(prompt, len(numbers)):05d}_{seed}.png"
                with written_whole(folder / file) as partial:  # on the disk before its line
                    image.save(partial, "PNG", compress_level=1)  # level 6 costs .3 s more at 1024 pixels
                line = {"file": file, "prompt": prompt, "seed": seed, "noise_seed": noise_seed(prompt, seed)}
                manifest.write(json.dumps({**line, "settings": recipe.settings}, ensure_ascii=False) + "\n")
                made[prompt, seed] = GeneratedImage(prompt, seed, folder / file)
            manifest.flush()
            bar.update(len(keys))
    return made


def _guidance(model: str, negative: str, **place: Any) -> Guidance:
    guidance: Guidance = imported(*NEGATIVE_GUIDANCE, "negative guidance")(model, negative, **place)
    return guidance


@contextmanager
def _with_remedies(sampling: Sampling) -> Iterator[None]:
    """Where memory runs out within the block, the error says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (cause := out_of_memory(error)) is None:
            raise
        raise DiffalignError(
            f"{cause}: lower batch_size (now {sampling.batch_size or 'by resolution'}; 1 needs the least, and no "
            f"image depends on it) or resolution (now {sampling.resolution or 'that of the model'}), or take dtype "
            f"bfloat16 (now {sampling.dtype})"
        ) from error


def _finished(folder: Path, settings: dict[str, Any]) -> tuple[dict[tuple[str, int], GeneratedImage], dict[str, int]]:
    """Images already made with these settings, and the number each prompt has in this folder."""
    done: dict[tuple[str, int], GeneratedImage] = {}
    numbers: dict[str, int] = {}
    for row in manifest_rows(folder) if (folder / MANIFEST).is_file() else ():
        theirs = row.get("settings", {})
        differ = [key for key in settings if key not in PATHS and theirs.get(key) != settings[key]]
        if differ:
            what = ", ".join(f"{key} {theirs.get(key)} there, {settings[key]} now" for key in differ)
            raise DiffalignError(f"{folder} contains images made with other settings ({what}); choose another folder")
        numbers.setdefault(row["prompt"], len(numbers))
        image = GeneratedImage(row["prompt"], row["seed"], folder / row["file"])
        if image.file.is_file():
            done[image.prompt, image.seed] = image
    return done, numbers
