"""User attention: a second cross-attention beside the text's, through which a network is conditioned on a user.

PPD, "Personalized Preference Fine-tuning of Diffusion Models" (Dang et al., arXiv 2501.06655), with IP-Adapter's
decoupled cross-attention (Ye et al., arXiv 2308.06721, equation 5). A user is a vector; a projection makes N tokens of
it; every cross-attention layer adds

    out = W_o Attention(Q, K_text, V_text) + scale · W_o Attention(Q, K_user, V_user)

with the layer's own Q and W_o, and with K_user, V_user of its own. Trained are the projection, K_user and V_user; the
base stays frozen. K_user starts as the layer's K_text, V_user at 0: at the start the network is the base to the last
bit, and the gradient at V_user is not zero. Without users, or switched off, none of this is called.

The text's part is the base's own processor, whichever kernel it uses. The user's part has a handful of keys, so its
matmuls are written out and no kernel is chosen for it. Q is computed twice.
Left out: several vectors per user, users beside LoRA, other networks than UNets with cross-attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffalign.models.kernels.attention import cross_attentions, is_plain
from diffalign.models.loading.family import ModelError
from diffalign.models.loading.modules import UNet

_BRANCH = "user_attention"  # the UNet's submodule


class UserBranch(nn.Module):
    """From users to tokens: IP-Adapter's projection, a linear layer and a LayerNorm; `enabled` switches it."""

    def __init__(self, dim: int, tokens: int, width: int, scale: float, seed: int = 0) -> None:
        """`dim` numbers per user become `tokens` tokens of the UNet's cross-attention `width`."""
        super().__init__()
        self.dim, self.tokens, self.width, self.scale = dim, tokens, width, scale
        self.enabled = True
        self.proj = nn.Linear(dim, tokens * width)
        self.norm = nn.LayerNorm(width)
        self.default: Tensor | None
        self.register_buffer("default", None, persistent=False)  # [dim], the user of calls that name none
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.proj.weight.copy_(torch.randn(self.proj.weight.shape, generator=generator) / dim**0.5)
            self.proj.bias.zero_()

    def forward(self, users: Tensor) -> Tensor:
        """Tokens "n tokens width" of users "n dim"."""
        return self.norm(self.proj(users).unflatten(-1, (self.tokens, self.width)))


class WithUser:
    """A cross-attention processor with the user's part added; given text alone it is the processor it was made from."""

    def __init__(self, processor: Any, scale: float) -> None:
        self.processor, self.scale = processor, scale

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, Tensor] | None = None,
        **others: Any,
    ) -> Tensor:
        """`encoder_hidden_states` is the text, or (text, user tokens) as `_join_user` gives them to the UNet."""
        if not isinstance(encoder_hidden_states, tuple):
            return self.processor(attn, hidden_states, encoder_hidden_states, **others)
        text, tokens = encoder_hidden_states
        out = self.processor(attn, hidden_states, text, **others)
        q, k, v = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k_user(tokens), attn.to_v_user(tokens))
        )
        weights = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
        user = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
        return out + self.scale * functional.linear(user, attn.to_out[0].weight)


def add_user_attention(
    unet: UNet,
    dim: int,
    tokens: int = 4,
    scale: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> UserBranch:
    """Freeze `unet` and give it user attention for users of `dim` numbers, in `dtype`; the only trainable part.

    Choose the attention kernel before. Raises ModelError for a UNet that has user attention or LoRA, or whose
    cross-attention is not that of SD and SDXL.
    """
    if dim < 1 or tokens < 1:
        raise ModelError(f"user attention with dim = {dim} and tokens = {tokens}: both must be at least 1")
    if user_branch(unet) is not None or any(".lora_" in name for name, _ in unet.named_parameters()):
        raise ModelError("this UNet already has user attention or LoRA layers; load a new base")
    layers = _cross_attentions(unet)
    device = layers[0].to_k.weight.device
    unet.requires_grad_(False)
    branch = UserBranch(dim, tokens, layers[0].to_k.in_features, scale, seed)
    setattr(unet, _BRANCH, branch.to(device, dtype))
    for layer in layers:
        layer.to_k_user, layer.to_v_user = (
            nn.Linear(layer.to_k.in_features, layer.to_k.out_features, bias=False, device=device, dtype=dtype)
            for _ in range(2)
        )
        with torch.no_grad():
            layer.to_k_user.weight.copy_(layer.to_k.weight)
            layer.to_v_user.weight.zero_()
        layer.set_processor(WithUser(layer.processor, scale))
    unet.register_forward_pre_hook(_join_user, with_kwargs=True)
    return branch


def user_branch(unet: UNet) -> UserBranch | None:
    """The user attention of a UNet, or None."""
    return cast("UserBranch | None", getattr(unet, _BRANCH, None))


def user_parameters(unet: UNet) -> dict[str, nn.Parameter]:
    """The weights of user attention by name, in module order; empty without."""
    return {name: p for name, p in unet.named_parameters() if is_user_weight(name)}


def is_user_weight(name: str) -> bool:
    """Whether a parameter of this name belongs to user attention."""
    return name.startswith(f"{_BRANCH}.") or ".to_k_user." in name or ".to_v_user." in name


def set_user(unet: UNet, embedding: Tensor | Sequence[float] | None) -> None:
    """The user of calls that name none, a pipeline's for example; None: no user, which is the base.

    Both halves of guidance see the user: for one user the network is an ordinary network.
    Raises ModelError without user attention, or for an embedding of another length or with values not finite.
    """
    branch = user_branch(unet)
    if branch is None:
        raise ModelError("a user was given and these weights have no user attention; remove the user")
    if embedding is None:
        branch.default = None
        return
    user = torch.as_tensor(embedding, dtype=torch.float32).flatten()
    if len(user) != branch.dim:
        raise ModelError(
            f"the user's embedding has {len(user)} numbers, and this network was tuned with users of {branch.dim}; "
            "use an embedding from the file that it was tuned with, or one made in the same way"
        )
    if not bool(user.isfinite().all()):
        raise ModelError("the user's embedding has values that are not finite")
    branch.default = user.to(branch.proj.weight)


def _join_user(unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the UNet's forward: the text becomes (text, user tokens), as IP-Adapter's image tokens travel.

    `user_embeds` is "n dim"; without it the default user stands for all rows. A call that names no user, where there is
    no default, and every call while the branch is off, is the base's own.
    """
    branch: UserBranch = getattr(unet, _BRANCH)
    users = kwargs.pop("user_embeds", None)
    if users is None and branch.default is not None:
        users = branch.default.expand(len(args[0] if args else kwargs["sample"]), -1)
    if users is None or not branch.enabled:
        return args, kwargs
    if users.ndim != 2 or users.shape[1] != branch.dim:
        raise ModelError(f"users of shape {tuple(users.shape)}; this network takes [n, {branch.dim}]")
    tokens = branch(users)
    if len(args) > 2:
        return (*args[:2], (args[2], tokens), *args[3:]), kwargs
    return args, {**kwargs, "encoder_hidden_states": (kwargs["encoder_hidden_states"], tokens)}


def _cross_attentions(unet: UNet) -> list[Any]:
    layers = cross_attentions(unet)
    if not layers:
        raise ModelError("this UNet has no cross-attention layers, which user attention needs")
    for layer in layers:
        if not is_plain(layer):
            raise ModelError(
                "the cross-attention of this UNet is not that of SD and SDXL; user attention does not support it"
            )
    return layers
