"""What is compared: images in folders, existing pairs, or a base with tuned models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.data.row import DataError, ImageRef
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_columns, open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.errors import DiffalignError
from diffalign.evaluation.by_eye.plan import ImagePair, Kind, Material, VotePlan, digest
from diffalign.evaluation.compare import in_order
from diffalign.evaluation.manifest import GeneratedImage, read_image_manifest
from diffalign.evaluation.report import BASE, check_name
from diffalign.io.progress import Progress

Images = dict[str, tuple[ImageRef, ImageRef]]  # by the id of a comparison


@dataclass(frozen=True)
class Selection:
    """Which comparisons are made."""

    seed: int = 0
    limit: int | None = None  # comparisons at most, drawn by the seed
    per_prompt: int | None = None  # of images in folders; None: as many as show each image once


ALL = Selection()


def from_images(folders: Sequence[str | Path], selection: Selection = ALL) -> Material:
    """Comparisons of images of the same prompt, from all folders together.

    Of a prompt's images these are the pairs of a round-robin tournament, in an order drawn by the seed; the first round
    shows each image once. Raises DiffalignError where no prompt has two images that differ.
    """
    by_prompt: dict[str, dict[str, ImageRef]] = {}  # prompt -> content -> image
    found = [image for folder in folders for image in read_image_manifest(folder, complete=True)]
    for image, content in _hashed(found):
        by_prompt.setdefault(image.prompt, {}).setdefault(content, _ref(image))
    images: Images = {}
    comparisons = []
    for prompt, by_content in by_prompt.items():
        contents = sorted(by_content, key=lambda content: digest("images", selection.seed, prompt, content))
        count = len(contents) // 2 if selection.per_prompt is None else selection.per_prompt
        for i, j in list(_rounds(len(contents)))[:count]:
            sides = by_content[contents[i]], by_content[contents[j]]
            id = digest("label", prompt, *sorted((contents[i], contents[j]))).hex()
            comparisons.append(ImagePair(id, prompt, (_name(sides[0]), _name(sides[1]))))
            images[id] = sides
    alone = sum(len(some) == 1 for some in by_prompt.values())
    if not comparisons:
        raise DiffalignError(
            f"there is nothing to compare: each of {alone} prompts has one image, or equal ones; generate several "
            "images of each prompt (`diffalign generate --seeds 0-3`)"
        )
    unused = sum(map(len, by_prompt.values())) - alone - len({ref for sides in images.values() for ref in sides})
    notes = {
        "prompts have one image": alone,
        "images equal another of their prompt": len(found) - sum(map(len, by_prompt.values())),
        "images of other prompts are in no comparison (--per-prompt makes more)": unused,
    }
    return _material("label", comparisons, images.__getitem__, selection, notes)


def from_pairs(
    path: str, selection: Selection = ALL, *, without: Sequence[str] = (), only: Path | None = None
) -> tuple[Material, PairTable]:
    """Existing pairs and ties, with the table that they come from. The page does not show their labels.

    without: columns that belong to the old labels and are left out. only: a file with the ids of the pairs to compare.
    Raises DataError where the pairs have columns of the old labels, and for an id that they do not have.
    """
    table = open_pairs(path, DataSpec(keep_ties=True, columns=dict.fromkeys(without, "")))
    table.require_usable()
    layout = table.layout
    users = [part for part in ("user", "user_embed") if getattr(layout, part) is not None]
    if lost := [*table.terms, *users]:
        raise DataError(
            f"{path} has {', '.join(lost)}, which belong to the old labels; leave them out of the new pairs with "
            f"--without {' '.join(lost)}"
        )
    places = {id: index for index, id in enumerate(table.ids)}
    wanted = places.keys() if only is None else _ids(only, path, table.ids)
    comparisons = [ImagePair(id, table.prompts[i], ("chosen", "rejected")) for id, i in places.items() if id in wanted]

    def images(id: str) -> tuple[ImageRef, ImageRef]:
        pair = table[places[id]]
        return pair.chosen, pair.rejected

    notes = {
        "pairs are not in --only": len(table) - len(comparisons),
        "rows are unusable (`diffalign data check` names them)": sum(each.dropped for each in table.problems),
    }
    return _material("relabel", comparisons, images, selection, notes), table


def from_models(base: str | Path, others: Mapping[str, str | Path], selection: Selection = ALL) -> Material:
    """The base's images, each with that of another folder that has the same prompt and seed.

    Raises DiffalignError for images without a partner, for a name that is none, and where all images are equal.
    """
    for name in others:
        check_name(name)
    of_base = list(_hashed(read_image_manifest(base, complete=True)))
    images: Images = {}
    comparisons: list[ImagePair] = []
    equal: list[ImagePair] = []
    for name, folder in others.items():
        tuned = in_order(name, read_image_manifest(folder, complete=True), [image for image, _ in of_base])
        for (image, content), (other, found) in zip(of_base, _hashed(tuned), strict=True):
            id = digest("blind", name, image.prompt, image.seed, content, found).hex()
            (equal if content == found else comparisons).append(ImagePair(id, image.prompt, (BASE, name)))
            images[id] = _ref(image), _ref(other)
    if not comparisons:
        raise DiffalignError(f"every image of {', '.join(others)} equals the base's: there is nothing to compare")
    notes = {"images equal the base's to the byte: they count as ties and are not shown": len(equal)}
    return _material("blind", comparisons, images.__getitem__, selection, notes, equal)


def _ids(file: Path, path: str, known: Sequence[str]) -> set[str]:
    """The ids in a file's column `id`. Raises DataError for a file without one, and for an id that is not known."""
    listed = open_columns(file)
    if "id" not in listed.names:
        raise DataError(f"{file} has the columns {', '.join(listed.names)}; it needs one that is called id")
    found = {str(id) for id in listed.column("id")}
    if not found or (odd := found - set(known)):
        raise DataError(
            f"{file} has {f'the id {min(odd)!r:.80}, which is none of' if found else 'no id of'} the pairs of {path}; "
            "take a list that was made from these pairs"
        )
    return found


def _material(
    kind: Kind,
    comparisons: Sequence[ImagePair],
    images: Callable[[str], tuple[ImageRef, ImageRef]],
    selection: Selection,
    notes: Mapping[str, int],
    equal: Sequence[ImagePair] = (),
) -> Material:
    """At most `limit` comparisons, equal ones among them, the same for every annotator."""
    seed, limit = selection.seed, selection.limit
    drawn = sorted([*comparisons, *equal], key=lambda each: digest("limit", seed, each.id))[:limit]
    chosen = {each.id for each in drawn}
    shown, tied = ([each for each in some if each.id in chosen] for some in (comparisons, equal))
    counts = {**notes, "comparisons are left out by --limit": len(comparisons) + len(equal) - len(drawn)}
    return Material(
        VotePlan(kind, seed, shown, tied), images, [f"{count} {what}" for what, count in counts.items() if count]
    )


def _rounds(n: int) -> Iterator[tuple[int, int]]:
    """All pairs of n places by the circle method: rounds in which each place occurs once (with odd n, one rests)."""
    places: list[int | None] = [*range(n), *([None] if n % 2 else [])]
    half = len(places) // 2
    for _ in range(len(places) - 1):
        for one, two in zip(places[:half], reversed(places[half:])):
            if one is not None and two is not None:
                yield one, two
        places = [places[0], places[-1], *places[1:-1]]


def _hashed(images: Sequence[GeneratedImage]) -> Iterator[tuple[GeneratedImage, str]]:
    """Each image with a hash of its file."""
    for image in Progress(images, desc="read images", unit="img", delay=1.0):
        yield image, hashlib.blake2b(_ref(image).read(), digest_size=16).hexdigest()


def _ref(image: GeneratedImage) -> ImageRef:
    return ImageRef(None, str(image.file), str(image.file))


def _name(ref: ImageRef) -> str:
    """The image's file and its folder, without where the folder is."""
    return "/".join(Path(ref.where).parts[-2:])
