"""User attention as a tuning method: `tuning.method: user_attention`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from diffalign.contrib.ppd.user_attention import add_user_attention, set_user, user_branch
from diffalign.contrib.ppd.weights import UserAttentionFile
from diffalign.models.adapters.methods import Start, TuningMethod
from diffalign.models.loading.family import ModelError
from diffalign.models.loading.modules import UNet
from diffalign.models.policy.reference import Reference


@dataclass(frozen=True)
class UserAttention(TuningMethod):
    """A frozen base with user attention for the users of the pairs; the reference is the base."""

    layout = UserAttentionFile()
    needs_users = True

    user_tokens: int = field(default=4, metadata={"ge": 1})  # tokens made of a user (IP-Adapter's 4)
    user_scale: float = field(default=1.0, metadata={"gt": 0})  # of what user attention adds to the text's

    def prepare(self, unet: UNet, start: Start) -> None:
        """Adds user attention. Raises ModelError where the pairs have no users."""
        if start.user_dim is None:
            raise ModelError("user attention: the length of the users' embeddings is not known; open pairs with users")
        add_user_attention(unet, start.user_dim, self.user_tokens, self.user_scale, seed=start.seed)
        if start.default_user is not None:
            set_user(unet, start.default_user)

    def make_reference(self, unet: UNet, autocast_dtype: torch.dtype | None) -> Reference:
        """The same network without user attention."""
        return UserOff(unet)

    def describe(self, unet: UNet) -> str:
        """Tokens of a user, and numbers that a user is given by."""
        branch = user_branch(unet)
        assert branch is not None
        return f"{self.method} of {branch.tokens} tokens, users of {branch.dim} numbers"


class UserOff:
    """The policy's unwrapped UNet without its user attention: exactly the base, whoever the batch's users are."""

    kind = "user_off"
    description = "the policy with user attention off"

    def __init__(self, unet: UNet) -> None:
        """Raises ModelError when `unet` has no user attention."""
        branch = user_branch(unet)
        if branch is None:
            raise ModelError(
                "reference user_off: this UNet has no user attention to switch off, so the reference would be the "
                "policy itself. Add it with add_user_attention, or use reference copy"
            )
        self._unet, self._branch = unet, branch

    @contextmanager
    def active(self) -> Iterator[UNet]:
        """User attention off inside the block, and back on however it ends."""
        try:
            self._branch.enabled = False
            yield self._unet
        finally:
            self._branch.enabled = True
