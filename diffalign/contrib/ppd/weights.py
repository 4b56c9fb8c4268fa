"""User attention on disk: `user_attention.safetensors`, with the number of tokens, dim and scale in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.contrib.ppd.user_attention import (
    add_user_attention,
    is_user_weight,
    set_user,
    user_branch,
    user_parameters,
)
from diffalign.io.loaded_weights import is_finite
from diffalign.io.weight_files import check_weights, order_metadata
from diffalign.models.adapters.methods import WeightLayout
from diffalign.models.kernels.attention import cross_attentions
from diffalign.models.loading.family import Family, ModelError
from diffalign.models.loading.modules import UNet

USER_FILE = "user_attention.safetensors"
_METADATA_KEY = "user_attention"  # in the file's header: JSON of tokens, dim, scale
_FACTS = ("tokens", "dim", "scale")


class UserAttentionFile(WeightLayout):
    """The layout, as `find_tuned` and the commands see it."""

    kind = "user"
    label = "user attention"
    names = (USER_FILE,)
    adds_layers = True
    needs_user = True

    def owns(self, file: Path) -> bool:
        """Whether the file's header says so."""
        return holds_user_attention(file)

    def is_on(self, unet: UNet) -> bool:
        """Whether the UNet has user attention."""
        return user_branch(unet) is not None

    def adds(self, parameter: str) -> bool:
        """The projection, and keys and values of users."""
        return is_user_weight(parameter)

    def save(self, unet: UNet, folder: Path, family: Family) -> Path:
        """The file."""
        return save_user_attention(unet, folder)

    def load(self, unet: UNet, path: Path) -> None:
        """Onto the user attention of a UNet, or onto a base."""
        load_user_attention(unet, path)

    def apply(self, pipeline: Any, path: Path, user: Any = None) -> None:
        """Onto a pipeline's UNet in its dtype, for one user."""
        load_user_attention(pipeline.unet, path, pipeline.unet.dtype)
        set_user(pipeline.unet, user)


def save_user_attention(unet: UNet, directory: str | Path) -> Path:
    """Write `user_attention.safetensors`, with number of tokens, dim and scale in its header; returns its path."""
    branch = user_branch(unet)
    if branch is None:
        raise ModelError("this UNet has no user attention to save")
    facts = json.dumps({name: getattr(branch, name) for name in _FACTS})
    state = {name: p.detach().cpu().contiguous() for name, p in user_parameters(unet).items()}
    file = Path(directory) / USER_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file, metadata={"format": "pt", _METADATA_KEY: facts})
    order_metadata(file)
    return file


def holds_user_attention(file: Path) -> bool:
    """Whether the header of a .safetensors file has the mark of user attention."""
    return _METADATA_KEY in check_weights(file).metadata


def load_user_attention(unet: UNet, file: Path, dtype: torch.dtype = torch.float32) -> None:
    """Put a file's user attention onto a UNet: onto the one it has, or onto a base, in `dtype`.

    Raises ModelError when the file is none, or does not fit.
    """
    written = check_weights(file).metadata.get(_METADATA_KEY)
    if written is None:
        raise ModelError(f"{file} is not user attention: its header does not contain the marker")
    try:
        facts = {name: json.loads(written)[name] for name in _FACTS}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{file}: its header does not contain {', '.join(_FACTS)} ({written!r:.80}); save it again"
        ) from (error)
    branch = user_branch(unet)
    if branch is None:
        _fits(file, unet, load_file(file))
        branch = add_user_attention(unet, facts["dim"], facts["tokens"], facts["scale"], dtype=dtype)
    for name, theirs in facts.items():
        if (own := getattr(branch, name)) != theirs:
            raise ModelError(f"{file} has user attention of {name} = {theirs}, this run of {own}; use the file's value")
    state, own_state = load_file(file), user_parameters(unet)
    if bad := [name for name, value in state.items() if not is_finite(value)]:
        raise ModelError(f"{file} has NaN or infinite values in {bad[0]}; use an earlier checkpoint")
    if state.keys() != own_state.keys():
        raise ModelError(
            f"{file} does not fit this base: {sorted(state.keys() ^ own_state.keys())[0]} exists on one side only"
        )
    with torch.no_grad():
        for name, parameter in own_state.items():
            if parameter.shape != state[name].shape:
                raise ModelError(
                    f"{file} does not fit this base: its {name} is {tuple(state[name].shape)}, the UNet's "
                    f"{tuple(parameter.shape)}"
                )
            parameter.copy_(state[name])


def _fits(file: Path, unet: UNet, state: dict[str, Tensor]) -> None:
    """Raise ModelError for a base with other cross-attention layers, before anything is added to it."""
    cross = set(cross_attentions(unet))
    own = {
        f"{name}.to_k_user.weight": module.to_k.weight.shape for name, module in unet.named_modules() if module in cross
    }
    theirs = {name: value.shape for name, value in state.items() if name.endswith(".to_k_user.weight")}
    if own != theirs:
        name = next(n for n in sorted({*own, *theirs}) if own.get(n) != theirs.get(n))
        raise ModelError(
            f"{file} does not fit this base: {name} is {theirs.get(name, 'absent')} in the file and "
            f"{own.get(name, 'absent')} in this base. Use the base it was tuned from"
        )
