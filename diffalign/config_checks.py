"""What settings of several sections must not contradict: checks of a whole config that are about one feature."""

from __future__ import annotations

from typing import Any

LORA_ONLY = ("rank", "alpha", "target_modules", "resume_lora")
USERS_ONLY = ("user_tokens", "user_scale")


def check_tuning(tuning: Any) -> None:
    """Raises ValueError for settings of a method that is not the run's."""
    fields = type(tuning).model_fields
    for method, names in (("lora", LORA_ONLY), ("user_attention", USERS_ONLY)):
        idle = [name for name in names if getattr(tuning, name) != fields[name].default]
        if idle and tuning.method != method:
            raise ValueError(f"tuning.{', tuning.'.join(idle)}: only tuning.method: {method} has such a setting")


def check_users(config: Any) -> None:
    """Raises ValueError for users without user attention, or user attention in a run that cannot have users."""
    users, validation = config.data.users, config.validation
    if config.tuning.method != "user_attention":
        if users is not None or validation.user is not None:
            name = "data.users" if users is not None else "validation.user"
            raise ValueError(f"{name}: only tuning.method: user_attention knows users")
        return
    if config.tuning.reference is not None:
        raise ValueError("tuning.reference: user attention is compared with the network without it; leave this out")
    if config.source is not None:
        raise ValueError(
            f"tuning.method: user_attention needs pairs that say whose they are, and source {config.source.name} makes "
            "pairs of nobody; leave out the source"
        )
    if bool(validation.prompts) != (validation.user is not None):
        raise ValueError("validation.user: pictures are for somebody; give validation.prompts and an id of data.users")
    if validation.user is not None and users is None:
        raise ValueError("validation.user: is an id in data.users, and there is no such file")
