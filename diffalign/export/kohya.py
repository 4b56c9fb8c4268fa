"""A LoRA in the layout of kohya's sd-scripts, which ComfyUI, A1111 and diffusers read.

    lora_unet_<module, dots as underscores>.lora_down.weight    A
    lora_unet_<module, dots as underscores>.lora_up.weight      B
    lora_unet_<module, dots as underscores>.alpha               a number; the update is (alpha / rank) · B A

sd-scripts trains SDXL on the original UNet and SD on diffusers', so modules have the names of the one or the other.
sd-scripts itself applies a LoRA only inside the UNet's blocks. ComfyUI, A1111 and diffusers also patch the first and
last convolution and the embeddings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffalign.export.card.facts import Exported
from diffalign.export.card.write import check_card, write_export_card
from diffalign.export.files import DTYPES, TensorEntry, check_out, write_entries
from diffalign.export.metadata import LoraModule, kohya_metadata
from diffalign.export.names import ExportError, unet_module
from diffalign.export.tuned_run import TunedRun, find_tuned_run
from diffalign.io.loaded_weights import named
from diffalign.models.adapters.merge import lora_updates
from diffalign.models.loading.base import Base, outline_base

log = logging.getLogger(__name__)

_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")


def export_kohya(
    run: str | Path, out: str | Path, *, base: str | None = None, dtype: str = "fp32", overwrite: bool = False
) -> Path:
    """Write the LoRA at `run` to the file `out` in kohya's layout, and a card beside it; returns `out`.

    `base`: as in `find_tuned_run`. Only the base's configs are read, not its weights, unless it is a single file.
    `dtype` is fp32, in which LoRA weights are trained and which loses nothing, fp16 or bf16. Raises ExportError,
    ModelError and, for settings that this release cannot read, ConfigError; all are DiffalignErrors.
    """
    out = Path(out)
    tuned_run = find_tuned_run(run, base)
    if tuned_run.tuned.kind != "lora":
        raise ExportError(
            f"{tuned_run.tuned.path} is a full UNet, which is no LoRA: approximate it by one (--extract-rank 64 or "
            "--extract-energy 0.9), export it with --to single-file, or train with tuning.method=lora"
        )
    check_out(out, overwrite, [tuned_run.tuned.path])
    check_card(out.with_suffix(".md"), overwrite)
    outline = outline_base(tuned_run.base_spec())
    modules = [
        LoraModule(name, down, up, scale * len(down))
        for name, down, up, scale in lora_updates(outline.unet, tuned_run.tuned.path)
    ]
    write_kohya(out, modules, outline, tuned_run, dtype)
    write_export_card(tuned_run, Exported(out, "kohya", dtype), outline.family.name, overwrite=overwrite)
    return out


def write_kohya(out: Path, modules: Sequence[LoraModule], base: Base, run: TunedRun, dtype: str) -> None:
    """Write modules of the base's UNet in kohya's layout. Logs which of them sd-scripts would not apply."""
    entries = []
    for module in modules:
        name = kohya_module(module.name, base)
        entries += [_entry(f"{name}.lora_down.weight", module.down), _entry(f"{name}.lora_up.weight", module.up)]
        entries.append(TensorEntry(f"{name}.alpha", (), partial(torch.tensor, module.alpha), torch.float32))
    metadata = kohya_metadata(base, run, modules, out.stem) | run.provenance()
    write_entries(out, entries, DTYPES[dtype], metadata)
    if outside := not_in_sd_scripts(module.name for module in modules):
        log.warning(
            "%s: sd-scripts applies a LoRA only inside the UNet's blocks and would ignore %d of its %d modules (%s). "
            "ComfyUI, A1111 and diffusers apply them",
            *(out, len(outside), len(modules), named(outside)),
        )


def kohya_module(name: str, base: Base) -> str:
    """sd-scripts' name of a module of the base's UNet, by diffusers' name; raises ExportError where it has none."""
    original = unet_module(name, base.unet.config) if base.family.name == "sdxl" else name
    return f"lora_unet_{original.replace('.', '_')}"


def not_in_sd_scripts(names: Iterable[str]) -> list[str]:
    """Of a UNet's modules those that sd-scripts' LoRA network does not have: outside the blocks."""
    return [name for name in names if not name.startswith(_BLOCKS)]


def _entry(name: str, value: Tensor) -> TensorEntry:
    return TensorEntry(name, tuple(value.shape), lambda: value)
