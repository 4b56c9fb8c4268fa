"""The fixtures of a tiny CLIP and its images."""

from __future__ import annotations

from tests.rewards.conftest import clip_dir as clip_dir
from tests.rewards.conftest import pictures as pictures
from tests.rewards.conftest import prompts as prompts
