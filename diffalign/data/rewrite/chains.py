"""Ranked lists from pairs: chains of preferences among the images of one prompt.

Where a is preferred to b and b to c, a, b, c is a list, as in Diffusion-LPO (Bai et al., arXiv 2510.01540). The pairs
of a prompt are the edges of a graph over its images, which are told apart by their bytes. Preferences that go round in
a circle contradict each other and are left out. The rest is cut into chains, the longest first: each comparison is
between neighbours of exactly one list, and an image may be in several lists.

Left out: ties, and by whom a pair was labelled. How the paper cuts its graphs is not known to us.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

from diffalign.data.rewrite.duplicates import image_hashes
from diffalign.data.row import DataError, ImageRef
from diffalign.data.table.pairs import PairTable
from diffalign.types import LONGEST_LIST

Node = TypeVar("Node", bound=Hashable)


@dataclass(frozen=True)
class Chains:
    """Lists of a table's images: each a prompt, and pair and side (0: chosen) of its images, the best first."""

    lists: list[tuple[str, list[tuple[int, int]]]] = field(default_factory=list)
    circles: int = 0  # comparisons in a circle, which are in no list
    repeated: int = 0  # pairs with a comparison that an earlier pair has

    def rows(self, table: PairTable) -> Iterator[dict[str, Any]]:
        """The lists as rows of docs/data.md, images byte for byte. Raises ImageError for one that cannot be read."""
        for prompt, places in self.lists:
            images = [_side(table, *place).read() for place in places]
            yield {"prompt": prompt, "images": images, "ranking": list(range(1, len(images) + 1))}


def chains_of(table: PairTable) -> Chains:
    """The lists that the pairs of a table make. Raises DataError for pairs with weights, margins or masks."""
    if table.terms:
        raise DataError(
            f"the pairs have {', '.join(table.terms)}, and a list of several pairs has no one value of it; write the "
            "data without that column"
        )
    where: dict[tuple[str, bytes], tuple[int, int]] = {}
    graphs: dict[str, dict[tuple[bytes, bytes], None]] = {}  # ordered sets: by prompt, (better, worse)
    repeated = 0
    for index, edge in enumerate(image_hashes(table, "images of the pairs")):
        prompt = table.prompts[index]
        edges = graphs.setdefault(prompt, {})
        repeated += edge in edges
        edges[edge] = None
        for side, image in enumerate(edge):
            where.setdefault((prompt, image), (index, side))
    found, circles = [], 0
    for prompt, edges in graphs.items():
        clear = without_circles(list(edges))
        circles += len(edges) - len(clear)
        found += [(prompt, [where[prompt, image] for image in chain]) for chain in cut_into_chains(clear)]
    return Chains(found, circles, repeated)


def without_circles(edges: Sequence[tuple[Node, Node]]) -> list[tuple[Node, Node]]:
    """The edges that are on no directed circle: their end does not lead back to their start."""
    after: dict[Node, list[Node]] = {}
    for one, other in edges:
        after.setdefault(one, []).append(other)

    def reached(start: Node) -> set[Node]:
        seen, rest = {start}, [start]
        while rest:
            new = [node for node in after.get(rest.pop(), ()) if node not in seen]
            seen.update(new)
            rest += new
        return seen

    leads_to = {node: reached(node) for node in {other for _, other in edges}}
    return [(one, other) for one, other in edges if one not in leads_to[other]]


def cut_into_chains(edges: Sequence[tuple[Node, Node]], longest: int = LONGEST_LIST) -> list[list[Node]]:
    """Chains of at most `longest` nodes that have each edge of a graph without circles once, the longest first."""
    rest, chains = list(dict.fromkeys(edges)), []
    while rest:
        after: dict[Node, list[Node]] = {}
        for one, other in rest:
            after.setdefault(one, []).append(other)
        best: dict[Node, list[Node]] = {}
        for node in _worst_first(after):
            below = max((best[other] for other in after.get(node, ())), key=len, default=[])
            best[node] = [node, *below]
        chain = max((best[one] for one, _ in rest), key=len)[:longest]
        chains.append(chain)
        used = set(pairwise(chain))
        rest = [edge for edge in rest if edge not in used]
    return chains


def _worst_first(after: dict[Node, list[Node]]) -> list[Node]:
    """All nodes of a graph without circles, each after those that it leads to."""
    order: dict[Node, None] = {}
    rest = [(node, False) for node in reversed(list(after))]
    while rest:
        node, done = rest.pop()
        if done:
            order[node] = None
        elif node not in order:
            rest.append((node, True))
            rest += [(other, False) for other in after.get(node, ()) if other not in order]
    return list(order)


def _side(table: PairTable, index: int, side: int) -> ImageRef:
    return table[index].images[side]
