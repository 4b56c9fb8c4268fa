"""Small images, small data sets and an encoder with exact results, for the tests of data."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor


def picture(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A noisy RGB image, (width, height)."""
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def png(seed: int, size: tuple[int, int] = (24, 16)) -> bytes:
    """The encoded bytes of `picture`."""
    stream = io.BytesIO()
    picture(seed, size).save(stream, "PNG")
    return stream.getvalue()


def pick_rows(n: int, prompts: int = 3) -> list[dict[str, Any]]:
    """Usable Pick-a-Pic rows; the chosen image alternates between the columns."""
    return [
        {
            "caption": f"prompt {i % prompts}",
            "jpg_0": png(2 * i),
            "jpg_1": png(2 * i + 1),
            "label_0": float(i % 2),
            "label_1": 1.0 - i % 2,
            "has_label": True,
            "image_0_uid": f"a{i}",
            "image_1_uid": f"b{i}",
        }
        for i in range(n)
    ]


def write_parquet(file: Path, rows: Sequence[dict[str, Any]], row_group_size: int = 3) -> Path:
    """Rows as one parquet file of several row groups."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), file, row_group_size=row_group_size)
    return file


def write_jsonl(file: Path, n: int, **extra: Any) -> Path:
    """A listing of n pairs with their images in images/ beside it."""
    (file.parent / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(n):
        for side, seed in (("c", 2 * i), ("r", 2 * i + 1)):
            (file.parent / "images" / f"{i}{side}.png").write_bytes(png(seed))
        row = {"prompt": f"prompt {i % 3}", "chosen": f"images/{i}c.png", "rejected": f"images/{i}r.png"}
        lines.append(json.dumps(row | extra))
    file.write_text("\n".join(lines) + "\n")
    return file


def write_tar(file: Path, n: int, extra: tuple[tarfile.TarInfo, bytes] | None = None) -> Path:
    """Pick-a-Pic rows as a webdataset shard, and one more member."""
    with tarfile.open(file, "w") as tar:
        for i in range(n):
            parts = {
                "original_prompt.txt": f"prompt {i % 3}".encode(),
                "jpg_0.jpg": png(2 * i),
                "jpg_1.jpg": png(2 * i + 1),
                "label_0.txt": b"1",
            }
            for name, data in parts.items():
                member = tarfile.TarInfo(f"{i:06d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        if extra is not None:  # last, where it would replace a field of the same name
            tar.addfile(extra[0], io.BytesIO(extra[1]))
    return file


class FakeEncoder:
    """Average pooling for a VAE and hashed numbers for text: exact, and the same in any batch. Counts calls."""

    fingerprint = "fake-1"

    def __init__(self, *, pooled: bool = True, times: bool = True) -> None:
        self.pooled, self.times = pooled, times
        self.image_calls, self.prompts_seen = 0, []  # type: ignore[var-annotated]

    def moments(self, pixels: Tensor) -> Tensor:
        self.image_calls += 1
        mean = torch.nn.functional.avg_pool2d(pixels, 4)
        return torch.cat([mean, 0.1 + 0.05 * mean.abs()], dim=1)

    def prompts(self, prompts: list[str]) -> SimpleNamespace:
        self.prompts_seen += prompts
        numbers = torch.stack([_numbers(prompt) for prompt in prompts])
        return SimpleNamespace(
            prompt_embeds=numbers.view(len(prompts), 4, 8), pooled=numbers[:, :6] if self.pooled else None
        )

    def time_ids(self, geometry: Tensor) -> Tensor | None:
        return geometry.float() if self.times else None


def _numbers(prompt: str) -> Tensor:
    raw = hashlib.blake2b(prompt.encode(), digest_size=32).digest()
    return torch.tensor(list(raw), dtype=torch.float32) / 255
