"""A LoRA that approximates a full tune: the change of each linear and convolutional weight, cut to a low rank.

    W_tuned − W_base = D ≈ Σ_{i ≤ r} s_i u_i v_iᵀ,   s_1 ≥ s_2 ≥ …   the singular values of D (Eckart–Young)

r is the given rank, or the smallest that keeps a share of the layer's Σ s². A convolution's D is "out (in height
width)". The squares s² and the v are eigenvalues and -vectors of DᵀD (or DDᵀ, whichever is smaller), computed in
float64: exact to about 1e-8 of s_1, for all ranks at once. For SDXL's largest layer (10240 x 1280) this took a third of
the SVD's time on one core. √s goes to both factors, so that half precision holds them.

What no LoRA has, the changes of norms, biases and other weights, is measured and named. Errors are measured on the
file as it was written.

Differs from sd-scripts' `extract_lora_from_models.py`: no values are clamped to a quantile, and ranks by energy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from diffalign.export.card.facts import Exported
from diffalign.export.card.write import check_card, write_export_card
from diffalign.export.files import DTYPES, check_out
from diffalign.export.kohya import write_kohya
from diffalign.export.metadata import LoraModule
from diffalign.export.names import ExportError
from diffalign.export.single_file import tuned_weights
from diffalign.export.tuned_run import find_tuned_run
from diffalign.io.files import PARTIAL, save_text, written_whole
from diffalign.io.progress import Progress
from diffalign.models.adapters.lora import write_lora
from diffalign.models.adapters.lora_file import lora_config
from diffalign.models.adapters.merge import lora_updates
from diffalign.models.loading.base import Base, load_base
from diffalign.models.loading.modules import UNet

_NOISE = 1e-14  # of the largest eigenvalue: below it an eigenvalue of a float64 product is rounding


@dataclass(frozen=True)
class Extraction:
    """How a full tune is cut to a LoRA, and how that is stored."""

    rank: int | None = None  # at most this rank a layer
    energy: float | None = None  # the smallest rank that keeps this share of a layer's squared change
    layout: str = "kohya"  # or "diffusers"
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            raise ExportError("extracting a LoRA takes a rank (e.g. 64), an energy (e.g. 0.9), or both")
        if self.rank is not None and self.rank < 1:
            raise ExportError(f"rank = {self.rank}: a LoRA has a rank of at least 1 (16 to 128 are usual)")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ExportError(f"energy = {self.energy}: give the share to keep, above 0 and at most 1")


@dataclass(frozen=True)
class LayerError:
    """One layer's change and what the LoRA misses of it; norms are Frobenius norms."""

    name: str
    rank: int  # 0: the layer has not changed
    change: float  # |D|
    missed: float  # |D − what the file's LoRA adds|

    @property
    def relative(self) -> float:
        """Missed over change; 0 for a layer that has not changed."""
        return self.missed / self.change if self.change else 0.0


@dataclass(frozen=True)
class ExtractionReport:
    """How well a LoRA stands for a full tune."""

    layers: list[LayerError]
    left_out: dict[str, float]  # |change| of each weight that no LoRA has, where it has changed; the largest first

    @property
    def relative_error(self) -> float:
        """What is missed of the layers' change together."""
        return _ratio((layer.missed for layer in self.layers), (layer.change for layer in self.layers))

    @property
    def total_error(self) -> float:
        """What is missed of the whole change, norms and biases included."""
        missed = [*(layer.missed for layer in self.layers), *self.left_out.values()]
        return _ratio(missed, [*(layer.change for layer in self.layers), *self.left_out.values()])

    def to_json(self) -> str:
        """All of it, the errors included."""
        layers = [dataclasses.asdict(layer) | {"relative": layer.relative} for layer in self.layers]
        totals = {"relative_error": self.relative_error, "total_error": self.total_error}
        return json.dumps(totals | {"left_out": self.left_out, "layers": layers}, indent=2) + "\n"

    def summary(self) -> str:
        """Some lines for people: ranks, errors, the worst layers, what is left out."""
        used = [layer for layer in self.layers if layer.rank]
        ranks = sorted(layer.rank for layer in used)
        worst = sorted(used, key=lambda layer: -layer.missed)[:3]
        lines = [
            f"{len(used)} of {len(self.layers)} layers changed; ranks {ranks[0]} to {ranks[-1]}, median "
            f"{ranks[len(ranks) // 2]}",
            f"missed of their change: {self.relative_error:.1%} (Frobenius norm); most in "
            + ", ".join(f"{layer.name} ({layer.relative:.1%})" for layer in worst),
        ]
        if self.left_out:
            some = ", ".join(f"{name} ({norm:.2g})" for name, norm in list(self.left_out.items())[:3])
            lines.append(
                f"not in any LoRA: the change of {len(self.left_out)} norms and biases, the largest {some}; with them "
                f"{self.total_error:.1%} of the whole change is missed"
            )
        return "\n".join(lines)


def extract_lora(
    run: str | Path, out: str | Path, how: Extraction, *, base: str | None = None, overwrite: bool = False
) -> ExtractionReport:
    """Write a LoRA that approximates the full tune at `run` (or a LoRA of a higher rank) to the file `out`.

    A `.extraction.json` beside it has the errors of all layers, a `.md` the card. `base`: as in `find_tuned_run`; it is
    loaded in float32. Raises ExportError, also where nothing differs from the base, ModelError and ConfigError.
    """
    out = Path(out)
    tuned_run = find_tuned_run(run, base)
    check_out(out, overwrite, [tuned_run.tuned.path])
    check_card(out.with_suffix(".md"), overwrite)
    errors = out.with_suffix(".extraction.json")
    if errors.exists() and not overwrite:
        raise ExportError(f"{errors} exists; give another name for --out, or --overwrite to replace it")
    loaded = load_base(tuned_run.base_spec(), vae_and_text=False)
    tuned = tuned_weights(loaded.unet, tuned_run.tuned)
    modules = [
        cut
        for name, change in Progress(list(_layers(loaded.unet, tuned)), desc="layers")
        if (cut := cut_to_rank(name, change(), how)) is not None
    ]
    if not modules:
        raise ExportError(f"{tuned_run.tuned.path} has the weights of its base: there is no change to extract")
    if how.layout == "kohya":
        write_kohya(out, modules, loaded, tuned_run, how.dtype)
    else:
        _write_diffusers(out, modules, loaded, how.dtype)
    report = measure_errors(loaded.unet, tuned, out)
    what = "a LoRA of higher ranks" if tuned_run.tuned.kind == "lora" else "a full tune"
    save_text(errors, report.to_json())
    exported = Exported(out, how.layout, how.dtype, f"Extracted from {what}: {report.summary()}")
    write_export_card(tuned_run, exported, loaded.family.name, overwrite=overwrite)
    return report


@torch.no_grad()
def cut_to_rank(name: str, change: Tensor, how: Extraction) -> LoraModule | None:
    """The best LoRA of one layer's change, float64 "out in" or "out in height width"; None for a change of 0.

    Raises ExportError for a change that is not finite.
    """
    matrix = change.flatten(1)
    if not matrix.isfinite().all():
        raise ExportError(f"{name} has weights that are not finite, in the tuned model or in its base")
    wide = matrix.shape[1] > matrix.shape[0]
    values, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)  # ascending
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    rank = int((values > _NOISE * values[0]).sum())
    if how.energy is not None:
        kept = values.cumsum(0) / values.sum()
        rank = min(rank, int((kept < how.energy - 1e-12).sum()) + 1)
    rank = min(rank, how.rank or rank)
    if not rank or not values[0]:
        return None
    scale = values[:rank].sqrt().sqrt()  # √s
    if wide:
        up = vectors[:, :rank] * scale
        down = (vectors[:, :rank] / scale).T @ matrix
    else:
        down = (vectors[:, :rank] * scale).T
        up = matrix @ (vectors[:, :rank] / scale)
    if change.ndim == 4:
        down, up = down.reshape(rank, *change.shape[1:]), up[:, :, None, None]
    return LoraModule(name, down.float().contiguous(), up.float().contiguous(), float(rank))


@torch.no_grad()
def measure_errors(unet: UNet, tuned: Callable[[str], Tensor], file: Path) -> ExtractionReport:
    """What a LoRA file misses of the change from `unet` to the weights that `tuned` gives by name."""
    updates = {name: (down, up, scale) for name, down, up, scale in lora_updates(unet, file)}
    layers = []
    for name, change in _layers(unet, tuned):
        whole, rank = change(), 0
        rest = whole.flatten(1)
        if name in updates:
            down, up, scale = updates[name]
            rank = len(down)
            rest = rest - scale * (up.double().flatten(1) @ down.double().flatten(1))
        layers.append(LayerError(name, rank, float(whole.norm()), float(rest.norm())))
    ours = {f"{layer.name}.weight" for layer in layers}
    left_out = {
        n: float((tuned(n).double() - w.double()).norm()) for n, w in unet.state_dict().items() if n not in ours
    }
    changed = {name: norm for name, norm in left_out.items() if norm}
    return ExtractionReport(layers, dict(sorted(changed.items(), key=lambda item: -item[1])))


def _layers(unet: UNet, tuned: Callable[[str], Tensor]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Each layer that a LoRA can change, and a function for its change in float64."""
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield name, partial(_change, tuned, f"{name}.weight", module.weight)


def _change(tuned: Callable[[str], Tensor], name: str, own: Tensor) -> Tensor:
    return tuned(name).double() - own.double()


def _write_diffusers(out: Path, modules: Sequence[LoraModule], base: Base, dtype: str) -> None:
    """The file of diffusers' layout that `load_lora_weights` reads, moved into place when it is whole."""
    ranks = {module.name: module.rank for module in modules}
    state = {}
    for module in modules:
        state[f"{module.name}.lora_A.weight"] = module.down.to(DTYPES[dtype])
        state[f"{module.name}.lora_B.weight"] = module.up.to(DTYPES[dtype])
    needed = sum(tensor.nbytes for tensor in state.values())
    with (
        written_whole(out, needed) as partial,
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=PARTIAL) as folder,
    ):
        os.replace(write_lora(lora_config(ranks, ranks), state, folder, base.family), partial)


def _ratio(parts: Iterable[float], whole: Iterable[float]) -> float:
    return math.hypot(*parts) / math.hypot(*whole)
