"""Latents and embeddings with NaN or infinity are refused with their pair or prompt, before cache and batch."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from diffalign.data.finite import require_text
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.loader.online import Online
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.row import DataError
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from tests.data.cache.test_latents import encode
from tests.data.helpers import FakeEncoder, pick_rows, write_parquet


@pytest.fixture
def table(tmp_path: Path) -> PairTable:
    return open_pairs(write_parquet(tmp_path / "pairs.parquet", pick_rows(4)))


class Broken(FakeEncoder):
    """An encoder whose answers to some images or prompts are no numbers."""

    def __init__(self, *, images: float | None = None, text: float | None = None) -> None:
        super().__init__()
        self.images, self.text = images, text

    def moments(self, pixels: Tensor) -> Tensor:
        out = super().moments(pixels).clone()
        if self.images is not None and len(pixels) > 1:  # one image alone is the blank one that is asked first
            out[-1].flatten()[0] = self.images
        return out

    def prompts(self, prompts: list[str]) -> SimpleNamespace:
        out = super().prompts(prompts)
        if self.text is not None and any(prompts):
            out.pooled[-1] = self.text
        return out


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_cache_takes_no_latents_that_are_no_numbers(table: PairTable, tmp_path: Path, value: float) -> None:
    with pytest.raises(DataError, match=r"row [13].* are not finite and are not stored.*sdxl-vae-fp16-fix.*float32"):
        encode(table, tmp_path / "cache", Broken(images=value), batch_size=2)
    assert not list((tmp_path / "cache").glob("moments-*"))


def test_a_caches_dtype_must_have_the_range(table: PairTable, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row [13].* beyond the range of cache_dtype float16.*bfloat16"):
        encode(table, tmp_path / "cache", Broken(images=1e5), batch_size=2, dtype="float16")


@pytest.mark.parametrize(("fault", "message"), [("images", r"pair .*the VAE gives NaN"), ("text", "for the prompt")])
def test_a_batch_has_no_part_that_is_no_number(table: PairTable, fault: str, message: str) -> None:
    source = OfflinePairs(table, Online(Broken(**{fault: math.nan}), 16), LoaderSpec(3, 2))
    with pytest.raises(DataError, match=message):
        next(source.batches())


@pytest.mark.gpu
def test_on_a_gpu_the_answer_comes_with_the_next_batch() -> None:
    from diffalign.data.finite import LatentsGuard

    guard = LatentsGuard()
    bad = torch.tensor([[1.0], [math.nan]], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        guard(bad, ["pair a", "pair b"])
        with pytest.raises(DataError, match="pair b: the VAE gives NaN"):
            guard(torch.ones(1, 1, device="cuda"), ["pair c"])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_text_that_is_finite_passes() -> None:
    require_text((torch.ones(1, 2), None), ["a"])
