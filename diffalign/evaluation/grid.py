"""A grid of images: one row per prompt, one column per model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from diffalign.errors import DiffalignError

CELL = 160  # pixels per side of an image in the grid, at least
LARGEST = 384  # larger images are shrunk to this
TEXT = 220  # width of the prompt column
GAP = 8
FONT = 15
INK, PAPER = (20, 20, 20), (255, 255, 255)


def comparison_grid(
    prompts: Sequence[str], columns: Mapping[str, Sequence[Image.Image]], *, cell: int | None = None
) -> Image.Image:
    """Row i shows the i-th image of every column beside `prompts[i]`.

    Small images are enlarged by a whole number without smoothing, so that a pixel stays a square. `cell` is the
    side of an image in the grid in pixels (None: 160 or more, 384 at most).
    """
    for name, images in columns.items():
        if len(images) != len(prompts):
            raise DiffalignError(
                f"column '{name}' has {len(images)} images for {len(prompts)} prompts; give one for each"
            )
    first = next(iter(columns.values()))[0]
    cell = cell or max(CELL, min(LARGEST, max(first.size)))
    font = ImageFont.load_default(FONT)
    fitted = {name: [fit(image, cell) for image in images] for name, images in columns.items()}
    side = max(max(image.size) for images in fitted.values() for image in images)
    heads = {name: wrap(name, font, side) for name in fitted}
    line = FONT + 4
    head = line * max(len(lines) for lines in heads.values()) + GAP
    texts = [wrap(prompt, font, TEXT)[: max(1, side // line)] for prompt in prompts]

    canvas = Image.new(
        "RGB", (GAP + TEXT + len(fitted) * (side + GAP) + GAP, head + GAP + len(prompts) * (side + GAP)), PAPER
    )
    draw = ImageDraw.Draw(canvas)
    for column, (name, images) in enumerate(fitted.items()):
        left = GAP + TEXT + GAP + column * (side + GAP)
        draw.multiline_text((left, GAP), "\n".join(heads[name]), INK, font, spacing=4)
        for row, image in enumerate(images):
            canvas.paste(image, (left, head + GAP + row * (side + GAP)))
    for row, lines in enumerate(texts):
        draw.multiline_text((GAP, head + GAP + row * (side + GAP)), "\n".join(lines), INK, font, spacing=4)
    return canvas


def fit(image: Image.Image, cell: int) -> Image.Image:
    """The image enlarged by the largest whole factor that stays within `cell`, or shrunk to it."""
    image = image.convert("RGB")
    largest = max(image.size)
    if largest > cell:
        width, height = (max(1, round(side * cell / largest)) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    factor = cell // largest
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels, broken at spaces; a longer word is broken inside."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
