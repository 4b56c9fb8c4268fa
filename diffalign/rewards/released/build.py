"""From renamed tensors to a module of transformers: complete, finite, frozen, or refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffalign.io.loaded_weights import check_module, check_report


def build(what: str, cls: Any, config: Any, state: dict[str, Tensor], **arguments: Any) -> Any:
    """A frozen module of the class `cls` of transformers with the tensors of `state`, in float32.

    what: names the weights in errors. arguments: of the class, or another `dtype`. Raises ModelError for tensors that
    are missing, have no place, have another shape, or are not finite.
    """
    given = {"dtype": torch.float32, **arguments}
    model, report = cls.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True, **given
    )
    check_report(what, report)
    check_module(what, model)
    return model.requires_grad_(False).eval()


def depth(state: dict[str, Tensor], prefix: str) -> int:
    """How many layers a state dict numbers after `prefix`. Raises KeyError where there is none."""
    numbers = [int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix)]
    if not numbers:
        raise KeyError(f"{prefix}0")
    return 1 + max(numbers)
