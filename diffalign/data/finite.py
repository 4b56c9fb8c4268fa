"""Latents and embeddings that are no numbers never reach a cache or a step: the pair or prompt is named instead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.data.row import DataError

OVERFLOW = (
    "SDXL's own VAE overflows in float16: use one that does not "
    "(model.pretrained_vae_model_name_or_path: madebyollin/sdxl-vae-fp16-fix), or compute it in "
    "float32; for another VAE, get its weights again"
)


def finite_rows(values: Tensor) -> Tensor:
    """Whether each row of "n …" is finite throughout, bool [n], on the values' device."""
    return values.flatten(1).isfinite().all(1)


def require_latents(values: Tensor, wheres: Sequence[str]) -> None:
    """Raises DataError naming the first row of "n …" whose latents are NaN or infinite. Waits for the device."""
    for good, where in zip(finite_rows(values).tolist(), wheres, strict=True):
        if not good:
            raise _no_latents(where)


def require_text(embeddings: Sequence[Tensor | None], prompts: Sequence[str]) -> None:
    """Raises DataError naming the first prompt whose embeddings "n …" are not finite. Waits for the device."""
    for values in embeddings:
        if values is None:
            continue
        for good, prompt in zip(finite_rows(values).tolist(), prompts, strict=True):
            if not good:
                raise DataError(
                    f"the text encoders give NaN or infinite values for the prompt {prompt!r:.80}: "
                    "compute them in float32 or bfloat16, or get their weights again"
                )


class LatentsGuard:
    """`require_latents` for a stream of batches that must not wait for a GPU: there the answer comes a batch later."""

    def __init__(self) -> None:
        self._asked: tuple[Tensor, torch.cuda.Event, Sequence[str]] | None = None

    def __call__(self, values: Tensor, wheres: Sequence[str]) -> None:
        """`values` is "n …"; raises DataError for these rows, or on a GPU for those of the batch before."""
        if values.device.type != "cuda":
            require_latents(values, wheres)
            return
        if self._asked is not None:
            answer, copied, asked = self._asked
            copied.synchronize()
            for good, where in zip(answer.tolist(), asked, strict=True):
                if not good:
                    raise _no_latents(where)
        answer = torch.empty(len(values), dtype=torch.bool, pin_memory=True)
        answer.copy_(finite_rows(values), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._asked = answer, copied, wheres


def _no_latents(where: str) -> DataError:
    return DataError(f"{where}: the VAE gives NaN or infinite latents for its images. {OVERFLOW}")
