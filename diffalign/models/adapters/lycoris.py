"""LyCORIS files as changes of a UNet's weights, to become part of a base: LoHa, LoKr, LoCon with a middle, DoRA.

    LoHa     ΔW = (α/r) · (w1_a w1_b) ∘ (w2_a w2_b)              (arXiv 2108.06098)
    LoKr     ΔW = (α/r) · w1 ⊗ w2, each a matrix or the product of two; α/r is 1 where neither is a product
    LoCon    ΔW = (α/r) · up ∘ mid ∘ down, of convolutions
    DoRA     W' = m · (W + ΔW) / ‖W + ΔW‖, the lengths over rows or over columns, as the shape of dora_scale says

With a core tensor t (Tucker) the two factors are w[o, i, k, l] = Σ t[a, b, k, l] w_a[a, o] w_b[b, i]. The names of
modules are those of kohya's files, after diffusers' names or the originals'. Without an alpha it is the rank.
Left out: OFT, BOFT, GLoRA, (IA)³, whole differences, norms, and text encoders; such files are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffalign.io.loaded_weights import is_finite, named
from diffalign.models.adapters.lora_names import is_alpha
from diffalign.models.ldm_names import unet_place
from diffalign.models.loading.family import ModelError
from diffalign.models.loading.modules import UNet

_PIECES = (".hada_", ".lokr_", ".lora_mid.", ".dora_scale")
_PREFIXES = ("lora_unet_", "lycoris_")
_LOHA = frozenset(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
_LOHA_CORES = frozenset(("hada_t1", "hada_t2"))
_LORA = frozenset(("lora_down.weight", "lora_up.weight"))

Parts = Mapping[str, Tensor]


def is_lycoris(names: Iterable[str]) -> bool:
    """Whether tensors of these names are of a kind that is read here."""
    return any(piece in name for name in names for piece in _PIECES)


def lycoris_changes(unet: UNet, file: Path) -> dict[str, Callable[[Tensor], Tensor]]:
    """By a weight's name: its change by the file, in float64, as a function of the base's own weight.

    Raises ModelError unless every tensor of the file is understood, finite and of a module of this UNet.
    """
    weights = {name: value.double() for name, value in load_file(file).items()}
    if bad := [name for name, value in weights.items() if not is_finite(value)]:
        raise ModelError(f"{file} has NaN or infinite values in {named(bad)}; use an earlier checkpoint of it")
    modules, parts = _modules(unet), dict[str, dict[str, Tensor]]()
    homeless = []
    for name, value in weights.items():
        place, _, part = name.partition(".")
        prefix = next((each for each in _PREFIXES if place.startswith(each)), None)
        if prefix is None or place.removeprefix(prefix) not in modules:
            homeless.append(name)
        else:
            parts.setdefault(modules[place.removeprefix(prefix)], {})[part] = value
    if homeless:
        raise ModelError(
            f"{file} does not fit this base: {len(homeless)} of its {len(weights)} tensors have no module, e.g. "
            f"{named(homeless)}. LyCORIS files are read for UNets, without parts of text encoders; nothing was applied"
        )
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    for module, own in parts.items():
        weight = unet.get_submodule(module).weight
        assert isinstance(weight, Tensor)
        try:
            update = _update(own)
        except (LookupError, RuntimeError, ValueError) as error:
            listed = ", ".join(sorted(own))
            raise ModelError(f"{file}: the tensors of {module} ({listed}) make no update: {error}") from error
        if update.numel() != weight.numel() or update.shape[0] != weight.shape[0]:
            raise ModelError(
                f"{file} does not fit this base: the update of {module} is {list(update.shape)}, and its weight "
                f"{list(weight.shape)}"
            )
        lengths = own.get("dora_scale")
        if lengths is not None and tuple(lengths.shape) not in _length_shapes(weight):
            shapes = f"{list(lengths.shape)}, and its weight {list(weight.shape)}"
            raise ModelError(f"{file} does not fit this base: dora_scale of {module} is {shapes}")
        changes[f"{module}.weight"] = partial(_change, update, lengths)
    return changes


def _modules(unet: UNet) -> dict[str, str]:
    """Names of the UNet's layers by what kohya's files call them, in both spellings."""
    found = {}
    for name, module in unet.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim in (2, 4):
            found[name.replace(".", "_")] = name
            if (place := unet_place(name, unet.config)) is not None:
                found[place.replace(".", "_")] = name
    return found


def _update(parts: Parts) -> Tensor:
    """ΔW, out first. Raises LookupError, ValueError or RuntimeError for tensors that do not belong together."""
    names = parts.keys() - {"alpha", "dora_scale"}
    if names == _LOHA or names == _LOHA | _LOHA_CORES:
        factors = [_product(parts, f"hada_w{i}", parts.get(f"hada_t{i}")) for i in (1, 2)]
        return _scale(parts, len(parts["hada_w1_b"])) * factors[0] * factors[1]
    if names and all(name.startswith("lokr_") for name in names):
        return _kronecker(parts, names)
    if names in (_LORA, _LORA | {"lora_mid.weight"}):
        up, down = parts["lora_up.weight"].flatten(1), parts["lora_down.weight"]
        scale = _scale(parts, len(down))
        if "lora_mid.weight" in parts:
            return scale * torch.einsum("om,mnkl,ni->oikl", up, parts["lora_mid.weight"], down.flatten(1))
        return scale * (up @ down.flatten(1)).unflatten(1, down.shape[1:])
    raise ValueError("they are of no kind that is read (LoHa, LoKr, LoCon, DoRA)")


def _kronecker(parts: Parts, names: set[str]) -> Tensor:
    factors, used, rank = [], set[str](), None
    for which in ("w1", "w2"):
        name = f"lokr_{which}"
        if name in parts:
            factors.append(parts[name])
            used.add(name)
        else:
            core = f"lokr_t{which[1]}"
            factors.append(_product(parts, name, parts.get(core)))
            used |= {f"{name}_a", f"{name}_b"} | ({core} & names)
            rank = len(parts[f"{name}_b"])
    if names != used:
        raise ValueError(f"{', '.join(sorted(names - used))} does not belong to them")
    first, second = factors
    first = first.reshape(*first.shape, *(1,) * (second.ndim - first.ndim))
    return torch.kron(first, second) * (1.0 if rank is None else _scale(parts, rank))


def _product(parts: Parts, name: str, core: Tensor | None) -> Tensor:
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    return a @ b if core is None else torch.einsum("abkl,ao,bi->oikl", core, a, b)


def _scale(parts: Parts, rank: int) -> float:
    alpha = parts.get("alpha")
    if alpha is not None and not is_alpha(alpha):
        raise ValueError(f"alpha is {alpha!r:.60}, and not one number above 0")
    return (rank if alpha is None else float(alpha)) / rank


def _length_shapes(weight: Tensor) -> tuple[tuple[int, ...], ...]:
    ones = (1,) * (weight.ndim - 2)
    return (weight.shape[0], 1, *ones), (1, weight.shape[1], *ones)


def _change(update: Tensor, lengths: Tensor | None, weight: Tensor) -> Tensor:
    moved = update.reshape(weight.shape)
    if lengths is None:
        return moved
    own = weight.double()
    over = [axis for axis in range(weight.ndim) if lengths.shape[axis] == 1]
    norm = torch.linalg.vector_norm(own + moved, dim=over, keepdim=True)
    return lengths / norm * (own + moved) - own
