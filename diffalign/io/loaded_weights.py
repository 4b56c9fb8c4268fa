"""Whether a component has all of its weights, and whether they are finite.

Libraries fill missing weights with random values, or leave them on the meta device, and at most print a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from diffalign.errors import ModelError

NAMED = 3  # tensors that a message names
# tensors of released text encoders that the loaded models do not have: CLIP's image encoder, buffers of older versions
_UNUSED = ("position_ids", "logit_scale", "text_projection.weight", "vision_model.", "visual_projection.")


def named(names: Iterable[str]) -> str:
    """The first few of some names, and how many more there are."""
    found = list(names)
    rest = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ", ".join(found[:NAMED]) + rest


def is_finite(values: Tensor) -> bool:
    """Whether every value is finite: one pass over them in their own dtype (a sum could overflow in float16)."""
    if not values.is_floating_point() or not values.numel():
        return True
    least, most = (values.float() if values.itemsize == 1 else values).aminmax()  # NaN if any value is
    return bool(least.isfinite() & most.isfinite())


def check_report(what: str, report: Mapping[str, Any] | Any, is_text: bool = False) -> None:
    """Raises ModelError for a component whose weights did not match, by the report of diffusers or transformers.

    A text encoder may leave out what `_UNUSED` names; e.g. the image encoder of a full CLIP.
    """
    keys = report if isinstance(report, Mapping) else vars(report)
    missing, unexpected, shapes = (
        sorted(str(x[0] if isinstance(x, tuple) else x) for x in keys.get(kind) or ())
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    missing = [name for name in missing if not name.endswith("position_ids")]  # a buffer that is computed
    if is_text:
        unexpected = [name for name in unexpected if not any(part in name for part in _UNUSED)]
    if missing or unexpected or shapes:
        raise ModelError(f"{what} {_mismatch(missing, unexpected, shapes)}")


def _mismatch(missing: list[str], unexpected: list[str], shapes: list[str]) -> str:
    kinds = {"are missing": missing, "have no place in it": unexpected, "have another shape": shapes}
    faults = [f"{len(names)} tensors {kind} ({named(names)})" for kind, names in kinds.items() if names]
    return (
        f"does not match its config: {'; '.join(faults)}. Weights and config are of different models, or the file is "
        "not complete: download the model again, or save it again from a working copy"
    )


def check_module(what: str, module: nn.Module) -> None:
    """Raises ModelError for weights that are missing, of integers, NaN or infinite. Reads every weight once."""
    state = module.state_dict()
    if missing := [name for name, value in state.items() if value.is_meta]:
        raise ModelError(
            f"{what} is not complete: {len(missing)} of its {len(state)} tensors are missing ({named(missing)}); "
            "download the model again, or save it again from a working copy"
        )
    if quantised := [name for name, value in module.named_parameters() if not value.is_floating_point()]:
        raise ModelError(f"{what} has quantised weights ({named(quantised)}): give the model in float32, bf16 or fp16")
    bad = [name for name, value in state.items() if not is_finite(value)]
    if bad:
        raise ModelError(
            f"{what} has NaN or infinite values in {len(bad)} of its {len(state)} tensors ({named(bad)}), so "
            "every loss would be NaN. Download the model again, or use another one"
        )
