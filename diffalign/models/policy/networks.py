"""Policy and reference as `measure` sees them: one code path, one border for casts, float32 out.

Sampling loops, losses and optimisers know nothing of families, wrappers or dtypes; this file does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from diffalign.engine.schedule import NoiseSchedule
from diffalign.models.adapters.lora import leave_casts_to_autocast, refuse_dropout
from diffalign.models.adapters.save_load import layout_on
from diffalign.models.kernels.attention import shares_text
from diffalign.models.kernels.checkpointing import memory_format
from diffalign.models.loading.base import check_unet
from diffalign.models.loading.family import Family, ModelError
from diffalign.models.loading.modules import UNet
from diffalign.models.policy.reference import Reference
from diffalign.models.policy.sharding import gathered
from diffalign.types import Conditioning


class Networks:
    """The two networks of a run; implements the engine's `Models`."""

    def __init__(
        self,
        module: nn.Module,
        *,
        family: Family,
        schedule: NoiseSchedule,
        reference: Reference | None = None,
        autocast_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`module` is the trainable UNet, DDP- or FSDP-wrapped or not; autocast None computes in its own dtype.

        Autocast is entered here for both networks, so an outer one (accelerate's mixed_precision) must be off.
        """
        unet = unwrap(module)
        check_unet(unet, "policy")
        if any(parameter.requires_grad for parameter in unet.parameters()):
            refuse_dropout(unet)
        self.module = module
        self.family = family
        self.schedule = schedule
        self.device = torch.device(device)
        self.autocast_dtype = autocast_dtype
        if autocast_dtype is not None:
            leave_casts_to_autocast(unet)
        self._reference = reference
        self.compares_with = "none" if reference is None else reference.description  # the plan's word for it
        self._takes_users = layout_on(unet).needs_user
        self.shares_text = shares_text(unet)  # keys and values of a prompt that both sides have are made once
        self._memory_format = memory_format(unet)
        self._input_dtype = autocast_dtype or next(unet.parameters()).dtype
        self.reference_forwards = 0  # what a run pays for having one
        self.image_forwards = 0  # images through either network so far, with and without grad

    def policy(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The trainable network's raw prediction "n c h w", float32, with grad where grad is enabled."""
        return self._predict(self.module, xt, t, cond)

    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The reference's raw prediction "n c h w", float32, without grad. Raises ModelError without a reference."""
        if self._reference is None:
            raise ModelError(
                "these networks have no reference, and the objective needs one; give Networks a reference: "
                "LoraOff(unet) for LoRA, FrozenCopy(unet) for full fine-tuning"
            )
        self.reference_forwards += 1
        with torch.no_grad(), self._reference.active() as module:
            return self._predict(module, xt, t, cond)

    def gathered(self) -> AbstractContextManager[None]:
        """A block in which the processes may call the networks without grad, each as often as it needs.

        All processes enter and leave it together. Only sharded networks change, which have their whole weights there.
        """
        own = getattr(self._reference, "module", None)
        return gathered([self.module, *([] if own is None else [own])])

    def forget_reference(self) -> None:
        """Give up a reference that will not be asked any more, with the memory it takes.

        `compares_with` stays: the run compares with it all the same.
        """
        self._reference = None

    def _predict(self, module: nn.Module, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.image_forwards += len(xt)
        xt, cond = self._cast_inputs(xt, cond)
        inputs = self.family.unet_inputs(cond)
        if self._takes_users != (cond.user is not None):
            raise ModelError(
                "this network predicts for users and the batch has no users; train on pairs with users"
                if self._takes_users
                else "the batch has users and this network takes none; use a tuning method that needs users"
            )
        if cond.user is not None:
            inputs["user_embeds"] = cond.user
        with self._autocast():
            out = module(xt, t, return_dict=False, **inputs)[0]
        return out.float()

    def _cast_inputs(self, xt: Tensor, cond: Conditioning) -> tuple[Tensor, Conditioning]:
        """The border: latents and embeddings take the computing dtype and layout, t stays int64 and time ids float32.

        Time ids are pixel counts: bfloat16 has no 1023.
        """
        dtype = self._input_dtype
        once = cond.distinct_prompts if self.shares_text else None
        return xt.to(dtype).contiguous(memory_format=self._memory_format), Conditioning(
            prompt_embeds=(cond.prompt_embeds if once is None else once).to(dtype),
            pooled=None if cond.pooled is None else cond.pooled.to(dtype),
            time_ids=cond.time_ids,
            user=None if cond.user is None else cond.user.to(dtype),
        )

    def _autocast(self) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)


def unwrap(module: nn.Module) -> UNet:
    """The UNet inside DDP and torch.compile wrappers."""
    while True:
        inner = getattr(module, "module", None) or getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return cast("UNet", module)
        module = inner
