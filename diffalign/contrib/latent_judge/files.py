"""The folder of a latent judge, written by `diffalign train` or released with LPO (arXiv 2502.01051).

    unet/  text_encoder/  [text_encoder_2/]      diffusers' and transformers' folders; of a UNet the later half is
                                                 not written, and ignored where it is there
    tokenizer/  [tokenizer_2/]                   those of the base
    head.safetensors                             visual_projection.weight, [text_projection.weight,] logit_scale
    judge.json                                   family, guidance scale, pixels of one latent position, noise levels

A released folder has state_dict.pt in place of the last two, with the same tensors, and no tokenizers; it is read
without running code. The release's guidance scale, 7.5, is in its code alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.contrib.latent_judge.network import LATER_HALF, LatentJudge
from diffalign.engine.schedule import NoiseSchedule
from diffalign.io.loaded_weights import check_module, named
from diffalign.io.pickles import torch_reason
from diffalign.models.loading.components import ModelFolder, load_text, outline_unet
from diffalign.models.loading.stored import UNET_STEM, choose_weights
from diffalign.models.spec import ModelSpec
from diffalign.rewards.base import ScorerError
from diffalign.rewards.clip import load_state

WEIGHTS_FOLDER = "preference_model"  # in the output folder of a training run
HEAD, RELEASED_HEAD, FACTS = "head.safetensors", "state_dict.pt", "judge.json"
GET = "hf download casiatao/LRM --local-dir LRM"


@dataclass(frozen=True)
class Facts:
    """What the weights do not show; the defaults are the release's."""

    family: str
    guidance_scale: float = 7.5  # of the middle block's features
    pixels_per_latent: int = 8  # in each direction
    noise_levels: tuple[tuple[int, float], ...] = ()  # some t and their ᾱ in training; none: not known, as of a release


def levels_of(schedule: NoiseSchedule) -> tuple[tuple[int, float], ...]:
    """Nine timesteps from 0 to T−1 and their ᾱ, to six digits: by them a schedule is known again."""
    last = schedule.num_train_timesteps - 1
    return tuple((t, round(float(schedule.alphas_cumprod[t]), 6)) for t in (last * k // 8 for k in range(9)))


def save_judge(
    judge: LatentJudge, tokenizers: tuple[Any, ...], facts: Facts, folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Writes the folder."""
    from safetensors.torch import save_file

    config = {k: v for k, v in judge.unet.config.items() if k == "_class_name" or not k.startswith("_")}  # no paths
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    _write(folder / "unet" / "config.json", config)
    save_file(_stored(judge.unet.state_dict(), dtype), folder / "unet" / f"{UNET_STEM}.safetensors", {"format": "pt"})
    model: Any
    for suffix, model, tokenizer in zip(("", "_2"), judge.text_encoders, tokenizers, strict=False):
        place = folder / f"text_encoder{suffix}"
        place.mkdir(exist_ok=True)
        model.config.save_pretrained(place)
        save_file(_stored(model.state_dict(), dtype), place / "model.safetensors", {"format": "pt"})
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    save_file(_stored(_head(judge), dtype), folder / HEAD, {"format": "pt"})
    _write(folder / FACTS, asdict(facts))


def load_judge(path: str) -> tuple[LatentJudge, tuple[Any, ...], Facts]:
    """The network in float32, its tokenizers, and its facts.

    `path`: a run's output folder, its weights folder, or a released folder. Raises ScorerError or ModelError saying
    which file is missing or does not fit, and how to get it.
    """
    place = Path(path)
    if not path or not place.is_dir():
        raise ScorerError(
            f"latent judge: {f'there is no folder {path}' if path else 'no weights are named'}. Write "
            "latent-judge=PATH: the output folder of `diffalign train` with preference_model.kind=latent, or a "
            f"released folder, e.g. after\n    {GET}"
        )
    folder = place / WEIGHTS_FOLDER if (place / WEIGHTS_FOLDER).is_dir() else place
    files = ModelFolder(ModelSpec(str(folder)), folder, torch.float32)
    head, facts = _read_head(folder)
    suffixes = ("",) if facts.family == "sd" else ("", "_2")
    tokenizers, models = zip(*(load_text(files, suffix) for suffix in suffixes), strict=True)
    unet = outline_unet(files)
    judge = LatentJudge(unet, models, facts.guidance_scale)
    _fill_unet(judge, folder / "unet")
    _fill_head(judge, head, folder)
    check_module(f"the latent judge in {folder}", judge)
    return judge, tokenizers, facts


def load_weights(judge: LatentJudge, folder: Path) -> None:
    """Puts what `save_judge` wrote into the network of a run that continues."""
    _fill_unet(judge, folder / "unet")
    for suffix, model in zip(("", "_2"), judge.text_encoders, strict=False):
        model.load_state_dict(load_state(folder / f"text_encoder{suffix}" / "model.safetensors"))
    _fill_head(judge, load_state(folder / HEAD), folder)


def _head(judge: LatentJudge) -> dict[str, Tensor]:
    parts = ("visual_projection", "text_projection", "logit_scale")
    return {name: value for name, value in judge.state_dict().items() if name.partition(".")[0] in parts}


def _read_head(folder: Path) -> tuple[dict[str, Tensor], Facts]:
    """The head's tensors by name, and the facts; of a released folder the family is seen from its text encoders."""
    if (folder / HEAD).is_file():
        try:
            facts = _checked(Facts(**json.loads((folder / FACTS).read_text())))
            return load_state(folder / HEAD), replace(facts, noise_levels=tuple((t, a) for t, a in facts.noise_levels))
        except (OSError, ValueError, TypeError) as error:
            raise ScorerError(f"{folder / FACTS} is not a latent judge's ({error}); copy the folder again") from error
    file = folder / RELEASED_HEAD
    if not file.is_file():
        raise ScorerError(f"{folder} has no {HEAD} and no {RELEASED_HEAD}: not a latent judge's folder")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint, or contains code
        raise ScorerError(f"{file} is not read ({torch_reason(error)}); download it again") from error
    head: dict[str, Tensor] = {}
    for name, value in found.items() if isinstance(found, dict) else ():
        if isinstance(value, dict):
            head |= {f"{name}.{inner}": tensor for inner, tensor in value.items()}
        else:
            head[name] = torch.as_tensor(value)
    return head, Facts("sdxl" if (folder / "text_encoder_2").is_dir() else "sd")


def _checked(facts: Facts) -> Facts:
    """Raises ValueError naming the key whose value no judge has."""
    allowed = {
        "family": (facts.family in ("sd", "sdxl"), "sd or sdxl"),
        "guidance_scale": (_finite(facts.guidance_scale), "a finite number, 0 or more"),
        "pixels_per_latent": (facts.pixels_per_latent in range(1, 65), "an integer from 1 to 64"),
        "noise_levels": (_levels(facts.noise_levels), "pairs of a timestep and its ᾱ, from 0 to 1"),
    }
    for key, (right, what) in allowed.items():
        if not right:
            raise ValueError(f"{key} is {getattr(facts, key)!r}, and must be {what}")
    return facts


def _finite(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]


def _levels(found: object) -> bool:
    return isinstance(found, list | tuple) and all(
        isinstance(one, list | tuple) and len(one) == 2 and type(one[0]) is int and _finite(one[1]) and one[1] <= 1
        for one in found
    )


def _fill_unet(judge: LatentJudge, folder: Path) -> None:
    stored: dict[str, Tensor] = {}
    for file in choose_weights(folder, UNET_STEM, None)[1]:
        stored |= {k: v.float() for k, v in load_state(file).items() if not k.startswith(LATER_HALF)}
    _fit(f"the UNet in {folder}", judge.unet.state_dict(), stored)
    own = next(judge.unet.parameters())
    judge.unet.load_state_dict(stored, assign=own.is_meta)


def _fill_head(judge: LatentJudge, head: dict[str, Tensor], folder: Path) -> None:
    stored = {name: value.float() for name, value in head.items()}
    own = _head(judge)
    if "logit_scale" in stored:
        stored["logit_scale"] = stored["logit_scale"].reshape(())
    _fit(f"the head in {folder}", own, stored)
    judge.load_state_dict(stored, strict=False)  # all of the head, as `_fit` has checked


def _fit(what: str, own: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Raises ScorerError unless names and shapes are the network's."""
    missing, unknown = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    unlike = [f"{k} {tuple(v.shape)}" for k, v in stored.items() if k in own and v.shape != own[k].shape]
    kinds = {"missing": missing, "unknown": unknown, "of another shape": unlike}
    if faults := [f"{kind} {named(names)}" for kind, names in kinds.items() if names]:
        raise ScorerError(f"{what} does not fit a latent judge of its config: {'; '.join(faults)}; download it again")


def _stored(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.detach().cpu().to(dtype if v.is_floating_point() else v.dtype).contiguous() for k, v in state.items()}


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
