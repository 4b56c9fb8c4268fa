"""What programs show of a file: the keys of sd-scripts (`ss_…`) and of Stability's ModelSpec 1.0.0 (`modelspec.…`).

A1111 shows `ss_output_name`, `ss_sd_model_name` and `ss_network_module`, and sorts LoRA files by
`ss_base_model_version` and `ss_v2`. The names of a base and its architecture are for bases of a released structure
only. A field that would be a guess (of captions, hashes of the base, thumbnails) is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC

from torch import Tensor

from diffalign.export.files import HASHES
from diffalign.export.tuned_run import TunedRun, shown
from diffalign.models.loading.base import Base
from diffalign.models.text.spec import TextSpec

_SGM = "https://github.com/Stability-AI/generative-models"
# family, cross-attention width -> sd-scripts' name of the base and ModelSpec's architecture; the second of each pair
# is for predictions of v. sd-scripts has no name of an SDXL that predicts v.
_RELEASED = {
    ("sdxl", 2048): (("sdxl_base_v1-0", "sdxl_base_v1-0"), ("stable-diffusion-xl-v1-base",) * 2),
    ("sd", 768): (("sd_v1", "sd_v1_v"), ("stable-diffusion-v1",) * 2),
    ("sd", 1024): (("sd_v2", "sd_v2_v"), ("stable-diffusion-v2-512", "stable-diffusion-v2-768-v")),
}
_PREDICTION = {"epsilon": "epsilon", "v_prediction": "v"}


@dataclass(frozen=True)
class LoraModule:
    """A module's part of a LoRA; its update is (alpha / rank) · B A."""

    name: str  # diffusers' name of the UNet's module
    down: Tensor  # A: "rank in", of a convolution "rank in height width"
    up: Tensor  # B: "out rank", of a convolution "out rank 1 1"
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.down)


def kohya_metadata(base: Base, run: TunedRun, modules: Sequence[LoraModule], title: str) -> dict[str, str]:
    """What sd-scripts writes of a network, as far as it is known; `Dynamic` where modules differ."""
    spatial = [module for module in modules if module.down.ndim == 4 and module.down.shape[2] > 1]
    network = {"conv_dim": _one(m.rank for m in spatial), "conv_alpha": _one(m.alpha for m in spatial)}
    found = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": _one(module.rank for module in modules),
        "ss_network_alpha": _one(module.alpha for module in modules),
        "ss_network_args": json.dumps(network if spatial else {}),
        "ss_output_name": title,
        "ss_sd_model_name": shown(run.base.pretrained_model_name_or_path),
        "ss_training_finished_at": str(run.finished.timestamp()),
        **_training(run),
    }
    if released := _released(base):
        found |= {"ss_base_model_version": released[0], "ss_v2": str(released[0].startswith("sd_v2"))}
    return found | model_spec(base, run, title, adapter=True)


def model_spec(base: Base, run: TunedRun, title: str, *, adapter: bool) -> dict[str, str]:
    """The ModelSpec block of a LoRA or a whole model; without a name of the architecture only the hashes."""
    found = dict.fromkeys(HASHES, "")  # the writer fills them in
    if (released := _released(base)) is None:
        return found
    side = (run.config.data.resolution if run.config else None) or base.family.default_resolution
    found |= {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{released[1]}/lora" if adapter else released[1],
        "modelspec.implementation": "diffusers" if adapter and base.family.name == "sd" else _SGM,
        "modelspec.title": title,
        "modelspec.date": run.finished.astimezone(UTC).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{side}x{side}",
    }
    if (prediction := _PREDICTION.get(base.schedule.prediction_type)) is not None:
        found["modelspec.prediction_type"] = prediction
    if run.objective is not None:
        found["modelspec.description"] = f"{shown(run.base.pretrained_model_name_or_path)} tuned with {run.objective}"
    return found


def _training(run: TunedRun) -> dict[str, str]:
    """Settings of the run under sd-scripts' names; empty where no run is recorded."""
    if run.config is None:
        return {}
    training, model = run.config.training, run.config.model
    scheduler = {} if model.scheduler is None else model.scheduler.given
    rescaled = model.rescale_betas_zero_snr or scheduler.get("rescale_betas_zero_snr")
    return {
        "ss_learning_rate": f"{training.learning_rate:g}",
        "ss_lr_scheduler": training.lr_scheduler,
        "ss_optimizer": training.optimizer,
        "ss_seed": f"{run.config.seed}",
        **({} if run.steps is None else {"ss_steps": f"{run.steps}"}),
        **({"ss_zero_terminal_snr": "True"} if rescaled else {}),
        **_text(model.text),
        "ss_training_comment": f"{run.objective}, tuned on preferences with diffalign",
    }


def _text(spec: TextSpec) -> dict[str, str]:
    """Settings of the text encoders that are not the base's own; sd-scripts counts the last layer as 1."""
    found = {"ss_clip_skip": f"{spec.clip_skip + 1}"} if spec.clip_skip else {}
    return found | ({"ss_max_token_length": f"{spec.max_token_length}"} if spec.max_token_length else {})


def _released(base: Base) -> tuple[str, str] | None:
    """sd-scripts' name of the base and ModelSpec's of its architecture; None for a structure that is no release's."""
    found = _RELEASED.get((base.family.name, base.unet.config.cross_attention_dim))
    v = base.schedule.prediction_type == "v_prediction"
    return None if found is None else (found[0][v], found[1][v])


def _one(values: Iterable[float]) -> str:
    distinct = set(values)
    return f"{min(distinct):g}" if len(distinct) == 1 else "Dynamic"
