"""The training step of diffusers' `train_diffusion_dpo_sdxl.py`, written from scratch: the peer of our LoRA step.

Its arithmetic, in its order (`peer_loss`):

    both sides of all pairs in one batch, chosen first; one noise and one timestep for a pair
    policy        all predictions with the adapters on, with grad
    reference     the same with the adapters off, without grad, while the policy's graph exists
    E             mean over c, h, w of the squared error, float32
    loss          mean over pairs of −log σ( −(β/2) · ((E_p^c − E_p^r) − (E_ref^c − E_ref^r)) )

and the other work of every step (`Peer`): images are decoded, resized and cropped in the main process, a float32 VAE,
both text encoders on every prompt, peft's layers with `disable_adapters` and `enable_adapters`, gradient clipping,
AdamW, and five values read from the device for the log.

`Peer` is a replica, for machines without torchvision and for tests; `live.py` runs the script itself. It follows the
script's behaviour at huggingface/diffusers commit 58eb52c and copies none of its code. Left out: its random flip,
which an option of the script turns off, validation, saving, SDXL-Turbo.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, logsigmoid, mse_loss

TARGETS = ("to_k", "to_q", "to_v", "to_out.0")


@dataclass(frozen=True)
class PeerSettings:
    """The script's options that matter for a step, with its defaults."""

    resolution: int = 1024
    train_batch_size: int = 4  # pairs
    beta_dpo: float = 5000.0
    rank: int = 4  # alpha is the rank
    learning_rate: float = 5e-4
    max_grad_norm: float = 1.0
    vae_encode_batch_size: int = 8  # pictures
    gradient_checkpointing: bool = False
    mixed_precision: str = "no"
    seed: int = 0


@dataclass(frozen=True)
class PeerBatch:
    """A step's draws: n pairs give tensors of 2n rows, chosen first."""

    latents: Tensor  # "2n c h w"
    noise: Tensor  # "2n c h w", both halves equal
    timesteps: Tensor  # int64 [2n], both halves equal
    prompt_embeds: Tensor  # "2n tokens dim"
    pooled: Tensor  # "2n dim"
    time_ids: Tensor  # "2n 6"


def peer_loss(unet: nn.Module, scheduler: Any, batch: PeerBatch, beta: float) -> dict[str, Tensor]:
    """The script's loss with grad under `loss`, and what it logs beside it. `unet` is wrapped or not."""
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    told = {"time_ids": batch.time_ids, "text_embeds": batch.pooled}

    def errors() -> Tensor:
        answer = unet(noisy, batch.timesteps, batch.prompt_embeds, added_cond_kwargs=told).sample
        if scheduler.config.prediction_type == "epsilon":
            target = batch.noise
        else:
            target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
        return mse_loss(answer.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))

    adapters = getattr(unet, "module", unet)
    policy = errors()
    adapters.disable_adapters()
    with torch.no_grad():
        reference = errors()
    adapters.enable_adapters()

    chosen, rejected = policy.chunk(2)
    ref_chosen, ref_rejected = reference.chunk(2)
    inside = -0.5 * beta * ((chosen - rejected) - (ref_chosen - ref_rejected))
    right = (inside > 0).sum().float() + 0.5 * (inside == 0).sum().float()
    return {
        "loss": -logsigmoid(inside).mean(),
        "raw_model_loss": 0.5 * (chosen.mean() + rejected.mean()),
        "ref_loss": reference.mean(),
        "implicit_acc": right / len(inside),
    }


def add_adapter(unet: nn.Module, rank: int) -> list[nn.Parameter]:
    """Freezes `unet` and gives it the script's adapter; returns what is trained."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(TARGETS)))
    return [p for p in unet.parameters() if p.requires_grad]


def fresh_accelerator(mixed_precision: str) -> Any:
    """An Accelerator of its own precision: accelerate keeps one state for the process, and contenders differ."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)
    return Accelerator(mixed_precision=mixed_precision)


class Peer:
    """The script's loop on a pipeline folder and a parquet file, one optimiser step a call."""

    def __init__(self, folder: Path, parquet: Path, settings: PeerSettings, device: torch.device | str) -> None:
        from datasets import load_dataset
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from tqdm import tqdm
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

        torch.manual_seed(settings.seed)
        self.settings, self.device = settings, torch.device(device)
        self.accelerator = fresh_accelerator(settings.mixed_precision)
        dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.mixed_precision]
        self.dtype = dtype
        self.tokenizers = [AutoTokenizer.from_pretrained(folder, subfolder=n) for n in ("tokenizer", "tokenizer_2")]
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.text = [
            cls.from_pretrained(folder, subfolder=name, dtype=torch.float32).requires_grad_(False).to(device, dtype)
            for name, cls in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection))
        ]
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
        self.vae.requires_grad_(False).to(device)
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
        unet.requires_grad_(False).to(device, dtype)
        self.parameters = add_adapter(unet, settings.rank)
        if settings.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, weight_decay=1e-2)
        rows = load_dataset("parquet", data_files=str(parquet), split="train").with_transform(self._prepare)
        loader = torch.utils.data.DataLoader(
            rows, batch_size=settings.train_batch_size, shuffle=True, collate_fn=_collate
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        self.unet, self.optimizer, self.loader, self.lr_scheduler = self.accelerator.prepare(
            unet, optimizer, loader, schedule
        )
        self.unet.train()
        self._batches = self._endless()
        self._bar = tqdm(total=None, file=io.StringIO())
        self.logged: list[dict[str, float]] = []

    def step(self) -> None:
        """The next pairs, from pictures to the update and the values read back."""
        loaded = next(self._batches)
        with self.accelerator.accumulate(self.unet):
            values = peer_loss(self.unet, self.scheduler, self.draw(loaded), self.settings.beta_dpo)
            self.accelerator.backward(values["loss"])
            self.accelerator.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
            self.optimizer.step()
            self.lr_scheduler.step()
            self.optimizer.zero_grad()
        read = {name: value.detach().item() for name, value in values.items()}
        read["lr"] = self.lr_scheduler.get_last_lr()[0]
        self._bar.update(1)
        self._bar.set_postfix(**read)
        self.logged.append(read)

    def draw(self, loaded: dict[str, Any]) -> PeerBatch:
        """Pictures and tokens to the latents, noise, timesteps and conditioning of one step."""
        s = self.settings
        pixels = torch.cat(loaded["pixels"].to(self.vae.dtype).chunk(2, dim=1))
        parts = [self.vae.encode(part).latent_dist.sample() for part in pixels.split(s.vae_encode_batch_size)]
        latents = (torch.cat(parts) * self.vae.config.scaling_factor).to(self.dtype)
        noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
        last = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, last, (len(latents) // 2,), device=latents.device).repeat(2)
        rows = [torch.tensor([[*size, *crop, s.resolution, s.resolution]]) for size, crop in loaded["geometry"]]
        time_ids = torch.cat([row.to(latents.device, self.dtype) for row in rows]).repeat(2, 1)
        embeds, pooled = self._encode(loaded["tokens"])
        return PeerBatch(latents, noise, timesteps, embeds.repeat(2, 1, 1), pooled.repeat(2, 1), time_ids)

    def _encode(self, tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        outs = [m(ids.to(m.device), output_hidden_states=True) for m, ids in zip(self.text, tokens, strict=True)]
        return torch.cat([out.hidden_states[-2] for out in outs], dim=-1), outs[-1][0]

    def _prepare(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Both pictures of each row as "6 H W" in [-1, 1], chosen first, with their size and crop; and its tokens."""
        from PIL import Image

        side = self.settings.resolution
        pixels, geometry = [], []
        for one, other, label in zip(rows["jpg_0"], rows["jpg_1"], rows["label_0"], strict=True):
            first, second = (Image.open(io.BytesIO(data)).convert("RGB") for data in (one, other))
            second = second.resize(first.size)
            both = [_to_tensor(first), _to_tensor(second)]
            stacked = torch.cat(both if label else both[::-1])
            h, w = stacked.shape[1:]
            scale = side / min(h, w)
            size = (max(side, int(h * scale)), max(side, int(w * scale)))
            if size != (h, w):
                stacked = interpolate(stacked[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]
            top, left = ((n - side) // 2 for n in size)
            pixels.append((stacked[:, top : top + side, left : left + side] - 0.5) / 0.5)
            geometry.append(((h, w), (top, left)))
        tokens = [
            t(
                list(rows["caption"]),
                truncation=True,
                padding="max_length",
                max_length=t.model_max_length,
                return_tensors="pt",
            ).input_ids
            for t in self.tokenizers
        ]
        return {"pixels": pixels, "geometry": geometry, "tokens_one": list(tokens[0]), "tokens_two": list(tokens[1])}

    def _endless(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self.loader


def _collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "pixels": torch.stack([row["pixels"] for row in rows]).contiguous().float(),
        "geometry": [row["geometry"] for row in rows],
        "tokens": [torch.stack([row[name] for row in rows]) for name in ("tokens_one", "tokens_two")],
    }


def _to_tensor(picture: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)
