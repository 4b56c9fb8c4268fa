"""Whether a component has all of its weights, and whether they are numbers.

Libraries fill what a file lacks with random values, or leave it on the meta device, and warn at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from diffalign.errors import ModelError

NAMED = 3  # tensors that a message names
# in released files, and in no model that is loaded from them here: a CLIP's other half, buffers of older versions
_UNUSED = ("position_ids", "logit_scale", "text_projection.weight", "vision_model.", "visual_projection.")


def named(names: Iterable[str]) -> str:
    """The first few of some names, and how many more there are."""
    found = list(names)
    rest = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ", ".join(found[:NAMED]) + rest


def is_finite(values: Tensor) -> bool:
    """Whether every value is a number: one pass over them in their own dtype (a sum could overflow in float16)."""
    if not values.is_floating_point() or not values.numel():
        return True
    least, most = (values.float() if values.itemsize == 1 else values).aminmax()  # NaN if any is
    return bool(least.isfinite() & most.isfinite())


def check_report(what: str, report: Mapping[str, Any] | Any, is_text: bool = False) -> None:
    """Raises ModelError for a component whose weights did not match, by the report of diffusers or transformers.

    A text encoder may leave out what `_UNUSED` names; of a CLIP with both halves, the one for pictures is one.
    """
    found = report if isinstance(report, Mapping) else vars(report)
    missing = sorted(map(str, found.get("missing_keys") or ()))
    unexpected = sorted(map(str, found.get("unexpected_keys") or ()))
    shapes = sorted(str(x[0] if isinstance(x, tuple) else x) for x in found.get("mismatched_keys") or ())
    unexpected = [name for name in unexpected if not (is_text and any(part in name for part in _UNUSED))]
    missing = [name for name in missing if not name.endswith("position_ids")]  # a buffer, which is made anew
    faults = [
        f"{len(names)} {said} ({named(names)})"
        for names, said in (
            (missing, "tensors are missing"),
            (unexpected, "tensors have no place in it"),
            (shapes, "tensors have another shape"),
        )
        if names
    ]
    if faults:
        raise ModelError(
            f"{what} does not match its config: {'; '.join(faults)}. Weights and config are of different models, or "
            "the file is not whole: download the model again, or save it again from where it works"
        )


def check_module(what: str, module: nn.Module) -> None:
    """Raises ModelError for weights that are missing, of integers, NaN or infinite. Reads every weight once."""
    state = module.state_dict()
    if missing := [name for name, value in state.items() if value.is_meta]:
        raise ModelError(
            f"{what} is not whole: {len(missing)} of its {len(state)} tensors are missing ({named(missing)}); download "
            "the model again, or save it again from where it works"
        )
    if quantised := [name for name, value in module.named_parameters() if not value.is_floating_point()]:
        raise ModelError(f"{what} has quantised weights ({named(quantised)}): give the model in float32, bf16 or fp16")
    bad = [name for name, value in state.items() if not is_finite(value)]
    if bad:
        raise ModelError(
            f"{what} has NaN or infinite values in {len(bad)} of its {len(state)} tensors ({named(bad)}): no learning "
            "rate will mend that. Download the model again, or give another one"
        )
