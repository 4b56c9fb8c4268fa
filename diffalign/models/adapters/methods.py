"""What a tuning method is, and the methods by the name that `tuning.method` has in a config.

A method is a frozen dataclass whose fields are its settings, the keys of a config's section `tuning`. It makes a base's
UNet trainable and makes the reference that the policy is compared with. Its `layout` defines how weights are stored.

Methods and layouts are imported when a config or a file needs them. Your own is named `package.module:Class`, or by an
entry point in the group `diffalign.tuning_methods`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.errors import DiffalignError, ModelError
from diffalign.io.plugins import known_names, name_of, resolve
from diffalign.io.weight_files import check_weights
from diffalign.models.loading.family import Family
from diffalign.models.loading.modules import UNet

if TYPE_CHECKING:
    from diffalign.models.policy.reference import Reference

log = logging.getLogger(__name__)

METHODS = {
    "lora": "diffalign.models.adapters.core_methods:LoRA",
    "full": "diffalign.models.adapters.core_methods:FullFineTuning",
    "user_attention": "diffalign.contrib.ppd.method:UserAttention",
}
WHAT = "tuning method"


@dataclass(frozen=True)
class Start:
    """What a run gives its method besides the method's own settings."""

    seed: int = 0
    weights_dtype: torch.dtype | None = None  # of trained weights without a float32 master; None: as the base has them
    user_dim: int | None = None  # length of the users' embeddings, for a method that needs users
    default_user: Tensor | None = None  # [user_dim], whom validation images are for


class WeightLayout:
    """One way in which tuned weights lie on disk and on a UNet. Inherit from it and return one instance as `layout`."""

    kind: ClassVar[str]  # `TunedWeights.kind`
    label: ClassVar[str]  # in messages: "X is LABEL"
    names: ClassVar[tuple[str, ...]]  # files and folders that it writes into an output folder
    adds_layers: ClassVar[bool] = False  # layers that no other program has: neither merged nor exported
    needs_user: ClassVar[bool] = False  # the network predicts for a user, whose embedding it is given

    def find(self, folder: Path) -> list[Path]:
        """The weights of this layout in an output folder."""
        return [folder / name for name in self.names if (folder / name).exists()]

    def owns(self, file: Path) -> bool:
        """Whether a .safetensors file of any name has this layout."""
        return False

    def check_whole(self, path: Path) -> None:
        """Raises ModelError for weights that are damaged or incomplete."""
        check_weights(path)

    def check_fit(self, unet: UNet, path: Path) -> None:
        """Raises ModelError unless the weights fit this UNet, which stays as it is."""
        return

    def is_on(self, unet: UNet) -> bool:
        """Whether a UNet carries weights of this layout."""
        raise NotImplementedError

    def adds(self, parameter: str) -> bool:
        """Whether a parameter of this name was added to the base's own."""
        return False

    def save(self, unet: UNet, folder: Path, family: Family) -> Path:
        """Writes the tuned weights into `folder` and returns the file or folder with them."""
        raise NotImplementedError

    def load(self, unet: UNet, path: Path) -> None:
        """Puts weights onto a UNet, in place. Raises ModelError if they do not fit."""
        raise NotImplementedError

    def apply(self, pipeline: Any, path: Path, user: Any = None) -> None:
        """Puts weights onto a diffusers pipeline, in place; `user` is an embedding where the layout needs one."""
        self.load(pipeline.unet, path)

    def apply_at(self, pipeline: Any, path: Path, strength: float) -> None:
        """`apply`, but base + strength · (tuned − base). Raises ModelError where the layout has no such sum."""
        raise ModelError(f"{path} is {self.label}, and its strength cannot be changed; leave the strength at 1")


class TuningMethod:
    """What a run trains and what it compares with. A method inherits from this class, and so has its defaults."""

    layout: ClassVar[WeightLayout]
    needs_users: ClassVar[bool] = False  # each pair has a user, and batches carry the users' embeddings
    may_follow: ClassVar[bool] = (
        False  # a reference can follow the policy: `models/policy/moving_reference.py` knows how
    )
    trains_base: ClassVar[bool] = False  # the base's own weights change; False: they are frozen
    reference: str | None = None  # tuned weights of the reference, for methods with such a setting

    @property
    def method(self) -> str:
        """The name in configs."""
        return name_of(type(self), METHODS)

    @property
    def starts_at_reference(self) -> bool:
        """Whether policy and reference are equal before the first step."""
        return True

    def check(self) -> None:
        """Raises DiffalignError for weights that the settings name and the method cannot use; no model is loaded."""
        return

    def check_base(self, unet: UNet) -> None:
        """Raises ModelError where the settings do not fit a base, before anything is encoded."""
        return

    def prepare(self, unet: UNet, start: Start) -> None:
        """Makes a base's UNet trainable, in place."""
        raise NotImplementedError

    def after_placement(self, unet: UNet) -> None:
        """What depends on the frozen weights in the dtype and on the device of the training, before the first step."""
        return

    def undecayed(self, unet: UNet) -> list[nn.Parameter]:
        """Trained parameters without weight decay: those whose value at the base is not 0."""
        return []

    def make_reference(self, unet: UNet, autocast_dtype: torch.dtype | None) -> Reference:
        """What the policy is compared with, from the prepared UNet before training."""
        raise NotImplementedError

    def describe(self, unet: UNet) -> str:
        """The method with the settings in force, in a few words for the plan of a run."""
        return self.method


_used: dict[str, type[TuningMethod]] = {}  # those that were asked for by package.module:Class
_skipped: set[str] = set()  # entry points that cannot be used, each logged once


def find_method(name: str) -> type[TuningMethod]:
    """The class of the method called `name`. Raises DiffalignError for an unknown one, or one that is no method."""
    found = _resolved(name)
    if name not in METHODS:
        _used[name] = found
    return found


def known_methods() -> dict[str, type[TuningMethod]]:
    """All methods by name: ours, those of entry points, and those that this process was asked for.

    An entry point that cannot be used is left out with a warning: it is no fault of a run that does not name it.
    """
    known = {}
    for name in known_names(METHODS, WHAT):
        try:
            known[name] = _resolved(name)
        except Exception as error:  # of whatever kind: another package's module is imported here
            if name in METHODS:
                raise
            if name not in _skipped:
                log.warning("%s %r is left out: %s (%s)", WHAT, name, error, type(error).__name__)
            _skipped.add(name)
    return known | _used


def _resolved(name: str) -> type[TuningMethod]:
    found = resolve(name, METHODS, WHAT)
    if not (isinstance(found, type) and issubclass(found, TuningMethod) and is_dataclass(found)):
        raise DiffalignError(
            f"{WHAT} {name!r} is not a dataclass that inherits from {TuningMethod.__module__}.TuningMethod; "
            "make it one, its fields are its settings"
        )
    return found


def known_layouts() -> list[WeightLayout]:
    """The layouts of all known methods, each once."""
    return list({method.layout.kind: method.layout for method in known_methods().values()}.values())
