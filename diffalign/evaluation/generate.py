"""Pictures of many prompts and seeds from one model, written to a folder that can be resumed.

out_dir/00003_7.png      prompt number 3, seed 7
out_dir/manifest.jsonl   one line per finished picture: file, prompt, seed, noise_seed, settings
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from diffalign.data.table.prompts import unique
from diffalign.engine.random import noise_seed
from diffalign.errors import DiffalignError, out_of_memory
from diffalign.evaluation.fingerprint import fingerprint
from diffalign.evaluation.manifest import MANIFEST, Picture, manifest_rows, mend_end
from diffalign.evaluation.sampling import Sampling, default_batch, default_resolution, sample_images
from diffalign.io.folder_lock import folder_lock
from diffalign.models.spec import ModelSpec

PATHS = ("model", "tuned", "negative_tuned", "vae")  # where the weights lay; their fingerprints say what they were


def settings_of(
    model: str,
    tuned: str | None,
    sampling: Sampling,
    *,
    negative_tuned: str | None = None,
    user: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Everything a picture depends on besides prompt and seed, as it is written to the manifest."""
    if negative_tuned is not None and sampling.guidance_scale <= 1:
        raise DiffalignError(
            f"negative-tuned {negative_tuned} answers the unconditional branch, and guidance_scale "
            f"{sampling.guidance_scale} has none; give one above 1"
        )
    weights: dict[str, str | None] = {"model": model, "vae": sampling.vae, "tuned": None, "negative_tuned": None}
    for name, path in (("tuned", tuned), ("negative_tuned", negative_tuned)):
        if path is not None:
            from diffalign.models.adapters.save_load import find_tuned

            weights[name] = str(find_tuned(path).path)
    return {
        **weights,
        "fingerprint": {name: fingerprint(path) for name, path in weights.items() if path},
        **sampling.recorded(),
        "user": None if user is None else _user_hash(user),
    }


def generate(
    model: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    out_dir: str | Path,
    tuned: str | None = None,
    sampling: Sampling | None = None,
    negative_tuned: str | None = None,
    user: Sequence[float] | None = None,
    progress: bool = True,
) -> list[Picture]:
    """Every prompt with every seed, prompt-major, written to `out_dir`.

    `model` is a diffusers folder, Hub id or single-file checkpoint; `tuned` a full UNet folder, a LoRA file or a
    training output folder to be put on it; `negative_tuned` the same for the unconditional branch of guidance, which
    otherwise has the weights of the other one (Diffusion-NPO); `user` the embedding of whom the pictures are for, with
    user attention only. `sampling` says how (None: `Sampling()`). Pictures that the manifest already
    lists with the same settings are not made again, and the model is not even loaded when none is missing. Raises
    DiffalignError when `out_dir` holds pictures made with other settings, FolderInUseError while another process makes
    pictures there.
    """
    sampling = sampling or Sampling()
    settings = settings_of(model, tuned, sampling, negative_tuned=negative_tuned, user=user)
    folder = Path(out_dir)
    wanted = [(prompt, int(seed)) for prompt in unique(prompts) for seed in dict.fromkeys(seeds)]
    done, numbers = _resume(folder, settings)
    missing = [key for key in wanted if key not in done]
    if not missing:
        return [done[key] for key in wanted]
    with folder_lock(folder, "a process that makes pictures"), _with_remedies(sampling):
        done, numbers = _resume(folder, settings)  # another process may have made some meanwhile
        missing = [key for key in wanted if key not in done]
        from diffalign.models.adapters.save_load import load_pipeline

        spec = ModelSpec(
            model, pretrained_vae_model_name_or_path=sampling.vae, prediction_type=sampling.prediction_type
        )
        pipe = load_pipeline(spec, tuned=tuned, torch_dtype=sampling.torch_dtype, device=sampling.device, user=user)
        negative = None
        if negative_tuned is not None:
            from diffalign.models.policy.negative_guidance import load_negative

            negative = load_negative(model, negative_tuned, torch_dtype=sampling.torch_dtype, device=sampling.device)
        batch = sampling.batch_size or default_batch(sampling.resolution or default_resolution(pipe))
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).is_file():
            mend_end(folder)
        with (
            (folder / MANIFEST).open("a", encoding="utf-8") as manifest,
            tqdm(total=len(missing), desc=folder.name, unit="img", disable=not progress) as bar,
        ):
            for start in range(0, len(missing), batch):
                keys = missing[start : start + batch]
                drawn, own = [prompt for prompt, _ in keys], [seed for _, seed in keys]
                images = sample_images(pipe, drawn, own, sampling, negative=negative)
                for (prompt, seed), image in zip(keys, images, strict=True):
                    number = numbers.setdefault(prompt, len(numbers))
                    file = f"{number:05d}_{seed}.png"
                    image.save(folder / file, compress_level=1)  # level 6 costs .3 s more at 1024 pixels
                    line = {"file": file, "prompt": prompt, "seed": seed, "noise_seed": noise_seed(prompt, seed)}
                    manifest.write(json.dumps({**line, "settings": settings}, ensure_ascii=False) + "\n")
                    done[prompt, seed] = Picture(prompt, seed, folder / file)
                manifest.flush()
                bar.update(len(keys))
    return [done[key] for key in wanted]


@contextmanager
def _with_remedies(sampling: Sampling) -> Iterator[None]:
    """Memory that runs out within the block is told with what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (said := out_of_memory(error)) is None:
            raise
        raise DiffalignError(
            f"{said}: lower batch_size (now {sampling.batch_size or 'by resolution'}; 1 needs the least, and no "
            f"picture depends on it) or resolution (now {sampling.resolution or 'that of the model'}), or take dtype "
            f"bfloat16 (now {sampling.dtype})"
        ) from error


def _user_hash(user: Sequence[float]) -> str:
    """16 hex digits of an embedding as float32; the embedding itself may be long."""
    return hashlib.blake2b(torch.as_tensor(user, dtype=torch.float32).numpy().tobytes(), digest_size=8).hexdigest()


def _resume(folder: Path, settings: dict[str, Any]) -> tuple[dict[tuple[str, int], Picture], dict[str, int]]:
    """Pictures already made with these settings, and the number each prompt has in this folder."""
    done: dict[tuple[str, int], Picture] = {}
    numbers: dict[str, int] = {}
    if not (folder / MANIFEST).is_file():
        return done, numbers
    for row in manifest_rows(folder):
        theirs = row.get("settings", {})
        differ = [key for key in settings if key not in PATHS and theirs.get(key) != settings[key]]
        if differ:
            what = ", ".join(f"{key} {theirs.get(key)} there, {settings[key]} now" for key in differ)
            raise DiffalignError(f"{folder} holds pictures made with other settings ({what}); choose another folder")
        numbers.setdefault(row["prompt"], len(numbers))
        picture = Picture(row["prompt"], row["seed"], folder / row["file"])
        if picture.file.is_file():
            done[picture.prompt, picture.seed] = picture
    return done, numbers
