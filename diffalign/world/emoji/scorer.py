"""The emoji world's rewards as scorers, on the CPU; prompts are its captions, images are 64x64."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from diffalign.world.emoji import reward
from diffalign.world.emoji.captions import STYLES, Combination, parse
from diffalign.world.emoji.render import SIZE
from diffalign.world.scorer import pixels, wanted_of


class _OfCaptions:
    """A scorer whose prompts are captions of the emoji world."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises DiffalignError for a prompt that is no caption of this world."""
        for prompt in prompts:
            parse(prompt)


class EmojiReward(_OfCaptions):
    """Faithfulness + (vividness + sharpness) / 2 - 4 x unevenness of the background."""

    name = "emoji"
    span = (-1.0, 2.0)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Rewards [n] float32, -1 to 2. Raises DiffalignError as `read_images` does."""
        return reward.reward(*read_images(images, prompts))


class EmojiSize(_OfCaptions):
    """Faithfulness + size of the drawing: a second reward, on which nothing in the package is tuned."""

    name = "emoji-size"
    span = (0.0, 2.0)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Rewards [n] float32 in [0, 2]. Raises DiffalignError as `read_images` does."""
        return reward.size_reward(*read_images(images, prompts))


class EmojiAccuracy(_OfCaptions):
    """1 where thing, background and (where the caption names one) style are as captioned, else 0."""

    name = "emoji-accuracy"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Zeros and ones [n] float32. Raises DiffalignError as `read_images` does."""
        return reward.accuracy(*read_images(images, prompts))


class EmojiClassic(_OfCaptions):
    """The probability that the style is the classic one (Noto); its mean over images is the share of the style."""

    name = "emoji-classic"
    span = (0.0, 1.0)
    style = "classic"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Probabilities [n] float32. Raises DiffalignError as `read_images` does."""
        return read_images(images, prompts)[0].style[:, STYLES.index(self.style)]


class EmojiFlat(EmojiClassic):
    """The same for the flat style (Twemoji)."""

    name = "emoji-flat"
    style = "flat"


class EmojiGlossy(EmojiClassic):
    """The same for the glossy style (Fluent 3D)."""

    name = "emoji-glossy"
    style = "glossy"


class EmojiTasteGlossy(_OfCaptions):
    """R plus twice the probability of the glossy style: what the committed pairs are labelled by."""

    name = "emoji-taste-glossy"
    span = (-1.0, 4.0)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Rewards [n] float32, -1 to 4. Raises DiffalignError as `read_images` does."""
        return reward.taste_reward(*read_images(images, prompts), "glossy")


def read_images(images: Sequence[Image.Image], prompts: Sequence[str]) -> tuple[reward.Reading, list[Combination]]:
    """What the images show and what their prompts ask for.

    Raises DiffalignError when there are not as many prompts as images, when an image is not 64x64, or when a prompt is
    no caption of the emoji world.
    """
    wanted = wanted_of(images, prompts, parse)
    return reward.read(pixels(images, SIZE, "emoji")), wanted
