"""Images to latent moments and back, prompts to embeddings: the frozen half of a base, which a cache can replace.

A cache stores the moments and not a sample: latents drawn from them later are exact, and a new draw costs nothing.
All results are float32, whatever dtype computed them.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.models.loading.base import Base, vae_factor
from diffalign.models.loading.decoder import SLICE_ABOVE_PIXELS, decode_latents, latent_scaling
from diffalign.models.loading.family import PromptEmbeds, TextEncoders
from diffalign.models.loading.fingerprint import hash_module
from diffalign.models.loading.modules import VAE
from diffalign.models.text.notices import PromptNotices

# Raise it when the same weights give other moments or embeddings than before: it makes earlier caches stale.
ENCODING_VERSION = 1


class Encoder:
    """VAE and text encoders of a base on one device."""

    def __init__(self, base: Base, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Moves the base's own modules to `device` and `dtype`; raises ValueError if it was loaded without them."""
        if base.vae is None or base.text is None:
            raise DiffalignError(
                f"{base.source!r} was loaded without VAE and text encoders; load it with vae_and_text=True"
            )
        self.base = base
        self.device = torch.device(device)
        self.dtype = dtype
        # Some VAEs (SDXL's own) overflow in float16; their config says so.
        upcast = dtype == torch.float16 and getattr(base.vae.config, "force_upcast", False)
        self.vae_dtype = torch.float32 if upcast else dtype
        nn.Module.to(base.vae, self.device, self.vae_dtype)  # ModelMixin.to warns of an empty list of fp32 modules
        for model in base.text.models:
            model.to(self.device, dtype)
        self.notices = PromptNotices()  # prompts so far that were not encoded as they are written

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that determines moments and embeddings: weights in their compute dtype, configs, tokenizers.

        Reads every weight once (seconds for SDXL). Caches with the same fingerprint have the same content.
        """
        vae, text = self._loaded()
        digest = hashlib.sha256()
        facts: dict[str, Any] = {
            "version": ENCODING_VERSION,
            "family": self.base.family.name,
            "zero_empty_prompt": text.zero_empty_prompt,
            "tokenizers": [_tokenizer_facts(tokenizer) for tokenizer in text.tokenizers],
            **text.spec.recorded,  # nothing by default, so that caches of earlier versions stay valid
        }
        digest.update(json.dumps(facts, sort_keys=True).encode())
        for module in (vae, *text.models):
            hash_module(digest, module)
        return digest.hexdigest()

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and standard deviation of the scaled latents, "n 2c h w" float32, for pixels "n 3 H W" in [-1, 1].

        A latent is mean + std · ε. Raises ValueError for a shape the VAE cannot halve as often as it must.
        """
        vae, _ = self._loaded()
        factor = vae_factor(vae)
        n, channels, height, width = pixels.shape
        if channels != 3 or height % factor or width % factor:
            raise DiffalignError(
                f"pixels have shape {tuple(pixels.shape)}; required is [n, 3, H, W] with H and W multiples of {factor}"
            )
        chunk = 1 if height * width > SLICE_ABOVE_PIXELS else n
        parts = [self._moments(vae, part) for part in pixels.split(chunk)]
        return torch.cat(parts)

    def _moments(self, vae: VAE, pixels: Tensor) -> Tensor:
        # copied first, then cast: the result of a cast on the CPU is not in pinned memory, and its copy would block
        placed = pixels.to(self.device, non_blocking=True).to(self.vae_dtype)
        mean, std = _posterior(vae.encode(placed))
        shift, scale = latent_scaling(vae, mean)
        return torch.cat([(mean - shift) * scale, std * scale], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels "n 3 H W" float32 in [0, 1] of scaled latents "n c h w", on the VAE's device.

        A VAE that overflows gives NaN, which the caller checks: it can name the image.
        """
        vae, _ = self._loaded()
        return (decode_latents(vae, latents.to(self.device, non_blocking=True)) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embeddings of the prompts, float32; "" is the null prompt.

        A prompt longer than `max_token_length` is cut, as in every pipeline. The log names the first few, with the
        number of tokens lost, and the first few with weights such as (word:1.2), which are encoded as text;
        `notices` has all. Raises ModelError for weights that the spec refuses.
        """
        _, text = self._loaded()
        self.notices.check(text, prompts)
        out = self.base.family.encode_prompts(text, prompts)
        return PromptEmbeds(out.prompt_embeds.float(), None if out.pooled is None else out.pooled.float())

    def time_ids(self, geometry: Tensor) -> Tensor | None:
        """SDXL's micro-conditioning for a geometry int64 "... 6" (see Family.time_ids); None for SD."""
        return self.base.family.time_ids(geometry)

    def unload(self) -> None:
        """Free the memory of VAE and text encoders, the base's included; the fingerprint is computed before."""
        if self.base.vae is not None:
            _ = self.fingerprint
        self.base.vae = None
        self.base.text = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _loaded(self) -> tuple[VAE, TextEncoders]:
        if self.base.vae is None or self.base.text is None:
            raise RuntimeError("this encoder was unloaded; load the base again with load_base to encode")
        return self.base.vae, self.base.text


def _posterior(encoded: Any) -> tuple[Tensor, Tensor]:
    """Mean and std of a VAE's encoding; std is 0 for autoencoders that are not variational."""
    if hasattr(encoded, "latent_dist"):
        mean = encoded.latent_dist.mean.float()
        return mean, encoded.latent_dist.std.float().expand_as(mean)
    latent = encoded.latent if hasattr(encoded, "latent") else encoded.latents
    return latent.float(), torch.zeros_like(latent, dtype=torch.float32)


def _tokenizer_facts(tokenizer: Any) -> Any:
    """Vocabulary, merges and rules; padding and truncation are call arguments here and left out."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {key: value for key, value in state.items() if key not in ("padding", "truncation")}
    return [rules, tokenizer.model_max_length, tokenizer.pad_token]
