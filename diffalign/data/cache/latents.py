"""The latent cache: the key of its contents, and reading it. `precompute/latents.py` fills it.

    manifest.json              the key, and how items are spread over shards; written first
    moments-00000.safetensors  moments, geometry, readable, text_row of consecutive pairs
    text-00000.safetensors     prompt_embeds and pooled of consecutive unique prompts; row 0 is the null prompt

Moments (mean and std), not samples, are stored, so every visit draws its own latent. A cache is complete when
every shard of the manifest is there; shards appear by atomic rename, with their hash (`shards.py`). Reading is by
memory map: opening costs the manifest and a directory listing, a pair costs its own bytes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffalign.data.buckets.sizes import Shapes, square
from diffalign.data.cache.shards import MANIFEST, OpenShards, read_content
from diffalign.data.cache.shards import manifest_text as hashed_text
from diffalign.data.loader.loaded import Loaded, sample_latents
from diffalign.data.loader.text import for_sides
from diffalign.data.row import DataError, ImageError
from diffalign.data.table.pairs import PairTable
from diffalign.data.transforms import flips
from diffalign.engine.random import pair_key

FORMAT_VERSION = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Field of the key -> what to do when it differs.
_REMEDY = {
    "format_version": "encode again with this version of diffalign",
    "encoder": "the VAE, the text encoders or how prompts are encoded differ (settings of `model`): encode again "
    "with this model",
    "dataset": "pairs, prompts, labels, order or image files differ: use the data settings (path, "
    "split, columns, keep_ties, invert_preference, max_pairs, verify) of the encode run, or "
    "encode again",
    "pairs": "see dataset",
    "resolution": "set the resolution of the cache, or encode again",
    "buckets": "set data.aspect_buckets as in the cache, or encode again",
    "center_crop": "set center_crop as in the cache, or encode again",
    "random_flip": "set random_flip as in the cache, or encode again",
    "variants": "set the number of variants of the cache, or encode again",
    "run_seed": "random crops and flips were drawn from the run's seed: use that seed, or encode again",
    "dtype": "set the dtype of the cache, or encode again",
}


@dataclass(frozen=True)
class CacheKey:
    """Everything the contents of a cache depend on. In an expected key, variants and dtype may be None: any."""

    format_version: int
    encoder: str  # fingerprint
    dataset: str  # PairTable.identity
    pairs: int
    resolution: int
    center_crop: bool
    random_flip: bool
    variants: int | None  # crops and flips per pair; visit `draw` uses variant draw % variants
    run_seed: int | None  # None when nothing about the pixels is random
    dtype: str | None
    buckets: str = ""  # the table that pairs get their sizes from; empty: squares


@dataclass(frozen=True)
class CacheSpec:
    """How images are prepared for a cache. Raises DataError for settings that no cache can have."""

    resolution: int  # pixels
    center_crop: bool = True
    random_flip: bool = False
    run_seed: int = 0  # of the random crops and flips
    variants: int | None = None  # crops and flips stored per pair; None: any where one is opened, 1 where one is made
    dtype: str | None = None  # of moments and embeddings; None: any where one is opened, float32 where one is made
    buckets: Shapes | None = None  # None: every pair is a square

    @property
    def shapes(self) -> Shapes:
        """The size of each pair's images."""
        return square(self.resolution) if self.buckets is None else self.buckets

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise DataError(f"dtype={self.dtype!r}; a cache is stored as {', '.join(DTYPES)}")
        if self.variants is not None and (self.variants < 1 or (self.variants > 1 and not self.random)):
            raise DataError(
                f"variants={self.variants}; with center_crop and without random_flip all variants are equal, so "
                "set 1; otherwise 1 or more"
            )

    @property
    def random(self) -> bool:
        """Whether crops or flips are drawn."""
        return self.random_flip or not self.center_crop


def cache_key(table: PairTable, fingerprint: str, spec: CacheSpec) -> CacheKey:
    """The key of the cache that a run with these settings needs."""
    return CacheKey(
        FORMAT_VERSION,
        fingerprint,
        table.identity,
        len(table),
        spec.resolution,
        spec.center_crop,
        spec.random_flip,
        spec.variants,
        spec.run_seed if spec.random else None,
        spec.dtype,
        spec.shapes.name,
    )


@dataclass(frozen=True)
class Plan:
    """How pairs and unique prompts are spread over shards."""

    pairs: int
    pairs_per_shard: int
    prompts: int
    prompts_per_shard: int
    pair_bytes: int = 0  # of all variants; 0: not known
    prompt_bytes: int = 0
    factor: int = 0  # pixels for a place of the latents, where pairs have several sizes

    def moments_shards(self) -> list[str]:
        """Shard files of the pairs, in order."""
        return [f"moments-{i:05d}.safetensors" for i in range(-(-self.pairs // self.pairs_per_shard))]

    def text_shards(self) -> list[str]:
        """Shard files of the prompts, in order."""
        return [f"text-{i:05d}.safetensors" for i in range(-(-self.prompts // self.prompts_per_shard))]

    def missing(self, folder: Path) -> list[str]:
        """Shards that are not there yet."""
        there = {file.name for file in folder.iterdir()}
        return [name for name in self.text_shards() + self.moments_shards() if name not in there]

    def missing_bytes(self, folder: Path) -> int:
        """About how many bytes the shards that are not there yet will take; 0 where that is not known."""
        pairs = min(self.pairs, self.pairs_per_shard) * self.pair_bytes
        prompts = min(self.prompts, self.prompts_per_shard) * self.prompt_bytes
        return sum(pairs if name.startswith("moments") else prompts for name in self.missing(folder))


def read_cache_manifest(folder: Path) -> tuple[CacheKey, Plan, bool] | None:
    """Key and plan of a cache folder and whether its shards carry hashes, or None when there is no manifest.

    Raises DataError on a damaged one.
    """
    found = read_content(folder)
    if found is None:
        return None
    content, hashed = found
    try:
        return CacheKey(**content["key"]), Plan(**content["plan"]), hashed
    except (TypeError, KeyError) as error:
        raise DataError(
            f"{folder / MANIFEST} is not a manifest of this version ({error}); delete {folder} and encode again"
        ) from error


def manifest_text(key: CacheKey, plan: Plan) -> str:
    """The manifest's json; equal for equal caches."""
    return hashed_text({"key": asdict(key), "plan": asdict(plan)})


def differences(found: CacheKey, expected: CacheKey) -> list[str]:
    """One line per field that differs: its name, both values, what to do."""
    lines = []
    for name, remedy in _REMEDY.items():
        has, needs = getattr(found, name), getattr(expected, name)
        if has != needs and not (needs is None and name in ("variants", "dtype")):
            lines.append(f"  {name}: the cache has {has!r}, this run needs {needs!r}; {remedy}")
    return lines


def open_cache(cache_dir: str | Path, expected: CacheKey, buckets: Shapes | None = None) -> PairCache:
    """The cache in a folder, if it is complete and what this run needs; otherwise DataError.

    buckets: those of the spec that the cache was filled by.
    """
    folder = Path(cache_dir)
    found = read_cache_manifest(folder)
    if found is None:
        raise DataError(f"{folder} contains no latent cache (no {MANIFEST}); make it with `diffalign encode`")
    key, plan, _ = found
    if lines := differences(key, expected):
        raise DataError("\n".join([f"the latent cache {folder} does not match this run:", *lines]))
    if missing := plan.missing(folder):
        raise _incomplete(folder, plan, missing)
    return PairCache(folder, key, plan, buckets)


def _incomplete(folder: Path, plan: Plan, missing: list[str]) -> DataError:
    total = len(plan.moments_shards()) + len(plan.text_shards())
    return DataError(
        f"the latent cache {folder} is incomplete: {len(missing)} of {total} shards are missing (first: "
        f"{missing[0]}); run the same `diffalign encode` again, it continues where it stopped"
    )


class PairCache:
    """Encoded pairs by index: moments, geometry and text, without any model."""

    def __init__(self, folder: Path, key: CacheKey, plan: Plan, buckets: Shapes | None = None) -> None:
        self.folder, self.key, self.plan = folder, key, plan
        self.pairs = plan.pairs
        self.shapes = square(key.resolution) if buckets is None else buckets
        self._shards = OpenShards(folder)

    @property
    def cache(self) -> PairCache:
        """Itself, as `Trajectories` and `ReferenceErrors` have the cache below them."""
        return self

    @property
    def factor(self) -> int:
        """Pixels for a place of the latents, in each direction."""
        return self.plan.factor or self.key.resolution // self.latent_shape[-1]

    @property
    def latent_shape(self) -> torch.Size:
        """c, h, w of the latents, where any pair could be read and all are squares."""
        shape = self._shards["moments-00000.safetensors"].shape("moments")
        return torch.Size((shape[3] // 2, *shape[4:]))

    def load(self, index: int, key: int, draw: int, prompt: str | None) -> Loaded:
        """One visit of a pair: latents, geometry and text (the null prompt's for `prompt` None).

        Raises ImageError for a pair that could not be read when the cache was made.
        """
        moments, geometry = self.moments(index, draw)
        keys = torch.tensor([key], dtype=torch.int64)
        latents = sample_latents(moments[:, None], keys)
        text = for_sides(self.null_text() if prompt is None else self.text(index), len(moments))
        return Loaded(keys, geometry[:, None], latents=latents, cond=text)

    def flip(self, name: str, key: int, draw: int) -> bool:
        """Whether the variant for this draw was mirrored."""
        if not self.key.random_flip:
            return False
        return flips(pair_key(int(self.key.run_seed or 0), name, draw % int(self.key.variants or 1)))

    def moments(self, index: int, draw: int) -> tuple[Tensor, Tensor]:
        """Moments float32 "side 2c h w" and geometry int64 "side 6" of a pair's or list's variant for this draw."""
        number, row = divmod(index, self.plan.pairs_per_shard)
        shard = self._shards[f"moments-{number:05d}.safetensors"]
        if not int(shard.read("readable", row)):
            problem = json.loads(shard.metadata["unreadable"])[str(row)]
            raise ImageError(problem["kind"], problem["reason"])
        variant = draw % int(self.key.variants or 1)
        moments, geometry = shard.read("moments", row, variant).float(), shard.read("geometry", row, variant)
        sides = int((geometry[:, 4] > 0).sum())  # shorter lists are filled up with zeros
        moments, geometry = moments[:sides], geometry[:sides]
        if self.plan.factor:  # all sizes are stored at the length of the largest
            height, width = (int(side) // self.plan.factor for side in geometry[0, 4:])
            moments = moments[..., : height * width].unflatten(-1, (height, width))
        return moments, geometry

    def text(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Float32 embeddings [1 tokens dim] of a pair's prompt and the pooled one [1 dim], where there is one."""
        number, row = divmod(index, self.plan.pairs_per_shard)
        return self._text_row(int(self._shards[f"moments-{number:05d}.safetensors"].read("text_row", row)))

    def null_text(self) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the null prompt, as `text` gives them."""
        return self._text_row(0)

    def _text_row(self, text_row: int) -> tuple[Tensor, Tensor | None]:
        number, row = divmod(text_row, self.plan.prompts_per_shard)
        shard = self._shards[f"text-{number:05d}.safetensors"]
        only = slice(row, row + 1)
        pooled = shard.read("pooled", only).float() if "pooled" in shard.names else None
        return shard.read("prompt_embeds", only).float(), pooled
