"""Crops, flips and sizes, against indexing into the original image and SDXL's published convention."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.data import transforms as images
from diffalign.data.row import ImageError, ImageRef, PairRow, to_rgb
from diffalign.data.transforms import prepare, prepare_pair
from diffalign.engine.random import pair_key
from tests.data.helpers import picture, png


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> ImageRef:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return ImageRef(stream.getvalue(), None, "row 0 image")


def row(chosen: ImageRef, rejected: ImageRef) -> PairRow:
    return PairRow("id", "prompt", chosen, rejected, None, "row 0")


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 127.5 - 1


@pytest.mark.parametrize("size", [(40, 16), (16, 40), (16, 16)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("position", [0.0, 0.3, 1.0])
def test_crop_and_geometry_point_at_the_same_pixels(size: tuple[int, int], flip: bool, position: float) -> None:
    """No resizing at this size, so the crop must be found in the (mirrored) original at the stated place."""
    image = picture(1, size)
    pixels, (height, width, top, left, target_h, target_w) = prepare(image, (16, 16), position, flip)
    assert (width, height) == size
    assert (target_h, target_w) == (16, 16)
    whole = pixels_of(image).flip(2) if flip else pixels_of(image)
    torch.testing.assert_close(pixels.double(), whole[:, top : top + 16, left : left + 16], rtol=0, atol=1e-7)


def test_resized_sizes_and_crop_coordinates_of_a_landscape_image() -> None:
    """1200 x 800 at 512: resized to 768 x 512, centre crop at left (768 - 512) / 2; SDXL crops after resizing."""
    _, geometry = prepare(Image.new("RGB", (1200, 800)), (512, 512), 0.5, False)
    assert geometry == (800, 1200, 0, 128, 512, 512)


def test_small_images_are_enlarged_and_large_ones_antialiased() -> None:
    pixels, geometry = prepare(Image.new("RGB", (10, 12), (255, 0, 0)), (32, 32), 0.5, False)
    assert pixels.shape == (3, 32, 32)
    assert geometry == (12, 10, 3, 0, 32, 32)
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (256, 128)))
    pixels, _ = prepare(stripes.convert("RGB"), (32, 32), 0.5, False)
    assert pixels[:, 2:-2, 2:-2].abs().max() < 0.1  # nearest sampling would give -1 or 1 everywhere


def test_both_sides_get_the_same_relative_crop_and_flip() -> None:
    small, large = picture(1, (48, 16)), picture(1, (48, 16)).resize((96, 32), Image.Resampling.NEAREST)
    seen = set()
    for draw in range(40):
        key = pair_key(0, "id", draw)
        pixels, geometry = prepare_pair(
            row(encoded(small), encoded(large)), (16, 16), key=key, center_crop=False, random_flip=True
        )
        assert geometry[0, 2:].tolist() == geometry[1, 2:].tolist()
        assert (pixels[0] - pixels[1]).abs().mean() < 0.25  # the same place: resampling alone lies between them
        mirrored = (pixels[0].flip(2) - pixels[1]).abs().mean()
        assert mirrored > 0.5
        seen.add(int(geometry[0, 3]))
    assert len(seen) > 10


def test_the_chosen_side_comes_first_and_the_middle_is_cropped() -> None:
    chosen, rejected = picture(1, (40, 16)), picture(2, (16, 30))
    pixels, geometry = prepare_pair(
        row(encoded(chosen), encoded(rejected)), (16, 16), key=1, center_crop=True, random_flip=False
    )
    torch.testing.assert_close(pixels[0].double(), pixels_of(chosen)[:, :, 12:28], rtol=0, atol=1e-7)
    torch.testing.assert_close(pixels[1].double(), pixels_of(rejected)[:, 7:23], rtol=0, atol=1e-7)
    assert geometry.tolist() == [[16, 40, 0, 12, 16, 16], [30, 16, 7, 0, 16, 16]]


def test_crop_and_flip_belong_to_the_key() -> None:
    pair = row(encoded(picture(1, (48, 16))), encoded(picture(2, (48, 16))))

    def at(draw: int) -> torch.Tensor:
        return prepare_pair(pair, (16, 16), key=pair_key(3, "id", draw), center_crop=False, random_flip=True)[0]

    assert torch.equal(at(4), at(4))
    assert len({tuple(at(draw)[0, 0, 0].tolist()) for draw in range(8)}) > 4
    centred = [
        prepare_pair(pair, (16, 16), key=pair_key(3, "id", draw), center_crop=True, random_flip=False)
        for draw in range(2)
    ]
    assert torch.equal(centred[0][0], centred[1][0])
    assert centred[0][1].dtype == torch.int64


def test_flips_come_up_half_of_the_time() -> None:
    ramp = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8) * 16, (16, 1))).convert("RGB")
    pair = row(encoded(ramp), encoded(ramp))
    flips = [
        float(prepare_pair(pair, (16, 16), key=pair_key(0, "id", d), center_crop=True, random_flip=True)[0][0, 0, 0, 0])
        > 0
        for d in range(200)
    ]
    assert 70 <= sum(flips) <= 130  # 4 standard deviations of a fair coin


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """Stored so that a viewer that applies EXIF shows the red corner at the top left."""
    shown = Image.new("RGB", (32, 16), "white")
    shown.paste((255, 0, 0), (0, 0, 16, 8))
    undo = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = shown
    for step in undo[orientation]:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    ref = encoded(stored, "JPEG", exif=exif, quality=95)
    assert ref.size() == ref.open().size == (32, 16)
    red = np.array(ref.open())[2, 2]
    assert red[0] > 200
    assert red[1] < 80


def grey16(value: int) -> Image.Image:
    return Image.fromarray(np.full((16, 16), value, np.uint16))


def palette() -> Image.Image:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    return image


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("RGBA", (16, 16), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (16, 16), (0, 0, 0, 128)), (127, 127, 127)),
        (Image.new("LA", (16, 16), (40, 255)), (40, 40, 40)),
        (Image.new("L", (16, 16), 77), (77, 77, 77)),
        (Image.new("1", (16, 16), 1), (255, 255, 255)),
        (palette(), (10, 200, 30)),
        (grey16(0), (0, 0, 0)),
        (grey16(128 * 257), (128, 128, 128)),
        (grey16(65535), (255, 255, 255)),
    ],
    ids=["transparent", "half", "LA", "L", "1", "P", "16 black", "16 grey", "16 white"],
)
def test_every_mode_becomes_rgb(image: Image.Image, colour: tuple[int, int, int]) -> None:
    opened = encoded(image).open()
    assert opened.mode == "RGB"
    assert opened.getpixel((3, 3)) == colour


def test_transparent_palette_is_composed_on_white() -> None:
    assert encoded(palette(), transparency=1).open().getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_is_converted_and_float_refused() -> None:
    assert to_rgb(Image.new("CMYK", (8, 8), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    for look in (ImageRef.size, ImageRef.open):  # the header is enough
        with pytest.raises(
            ImageError, match="row 0 image: float images have no known range; save them as 8- or 16-bit"
        ):
            look(encoded(Image.new("F", (16, 16), 0.5), "TIFF"))


def test_a_side_that_cannot_be_used_names_its_row() -> None:
    with pytest.raises(ImageError, match="row 0 image: 4x16 pixels; each side needs at least 8"):
        prepare_pair(
            row(encoded(picture(1)), encoded(picture(1, (4, 16)))), (16, 16), key=1, center_crop=True, random_flip=False
        )
    with pytest.raises(ImageError, match="row 7 jpg_0: does not open as an image"):
        ImageRef(png(1)[:300], None, "row 7 jpg_0").open()


def grey(values: np.ndarray, kind: str) -> ImageRef:
    return encoded(Image.fromarray(values), kind)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_by_their_own_range(kind: str) -> None:
    values = np.tile(np.linspace(0, 65535, 16).astype(np.uint16), (16, 1))
    shown = np.array(grey(values, kind).open())[0, :, 0].astype(int)
    assert np.abs(shown - values[0] / 257).max() <= 1


def test_32_bit_integers_are_refused_by_name_as_their_range_is_unknown() -> None:
    values = np.tile(np.arange(16, dtype=np.int32) * 16, (16, 1))  # read as 16-bit, it would be black
    for look in (ImageRef.size, ImageRef.open):
        with pytest.raises(ImageError, match="row 0 image: 32-bit integer images have no known range; save them as 8-"):
            look(grey(values, "TIFF"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for look in (ImageRef.size, ImageRef.open):
        with pytest.raises(
            ImageError, match="13000x13000 is 169000000 pixels, and at most MAX_PIXELS = 89478485 are decoded"
        ) as caught:
            look(ImageRef(bomb(13000), None, "row 3 jpg_0"))
        assert caught.value.kind == "huge image"
        assert "row 3 jpg_0" in str(caught.value)
        assert "save a smaller copy" in str(caught.value)


def bomb(side: int) -> bytes:
    """The header of a large PNG, and no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(130, 20), (20, 130), (1000, 9), (65, 16), (400, 64)])
@pytest.mark.parametrize("position", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("flip", [False, True])
def test_the_crop_of_a_long_image_is_that_of_the_whole_resized(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], position: float, flip: bool
) -> None:
    """Pixels differ by roundings, of 2 of 255 levels; geometry not at all.

    The values leave room for the filter's overshoot: Pillow may take rows or columns first, and clips in between.
    """
    image = picture(1, size).point(lambda value: 64 + value // 2)
    pixels, geometry = prepare(image, (32, 32), position, flip)
    monkeypatch.setattr(images, "EXTREME", 10**6)
    whole, told = prepare(image, (32, 32), position, flip)
    assert geometry == told
    assert (pixels - whole).abs().max() <= 2.01 / 127.5


def test_a_long_image_costs_no_more_than_its_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a, **k: made.append(size) or real(self, size, *a, **k)
    )
    pixels, geometry = prepare(Image.new("RGB", (16000, 8)), (64, 64), 0.5, False)
    assert made == [(64, 64)]
    assert pixels.shape == (3, 64, 64)
    assert geometry == (8, 16000, 0, 63968, 64, 64)
