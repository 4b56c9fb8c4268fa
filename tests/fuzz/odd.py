"""Invalid values and damage from a seeded generator, as people, editors, disks and other programs cause them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

TEXTS = (
    "", " ", "\t", "x", "true", "no", "null", "nan", "-inf", "1e3", "1e400", "010", "0x10", "1_000", "١٢", "-1", "3,5",
    "~", "~/x", "..", "../../x/y", "/", "/dev/null", "C:\\x\\y.png", "https://example.org/a.png", "a=b", "[1, 2",
    "{a: 1}", "a: b", "%s%n", "{0}", "*", "&a", "!x", "\x00", "a\x00b", "\x1b[31m", "\ufeffx", "\u2028", "\x0c",
    "\ud800", "é", "e\u0301", "漢字", "🦊", "\u202e", "a\nb", "\r\n", "x" * 300, "y " * 700,
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 7, -0.0, 0.5, 1.5, 1e-3, 255, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"), 2**31,
    2**53 + 1, 2**63, -(2**63) - 1, 10**30, 10**400, True, False,
)  # fmt: skip


def scalar(rng: Random) -> Any:
    """A text, a number or nothing."""
    return rng.choice((rng.choice(TEXTS), rng.choice(NUMBERS), rng.choice(NUMBERS), None))


def value(rng: Random, depth: int = 2) -> Any:
    """A scalar, or lists and mappings of them."""
    kind = rng.random()
    if depth and kind < 0.15:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if depth and kind < 0.25:
        return {str(scalar(rng)): value(rng, depth - 1) for _ in range(rng.randrange(3))}
    if kind < 0.27:
        return deep(rng.choice((20, 60)))
    return scalar(rng)


def deep(levels: int) -> Any:
    """A list in a list in a list."""
    found: Any = 1
    for _ in range(levels):
        found = [found]
    return found


def mutated(rng: Random, tree: Any, times: int = 1) -> Any:
    """A copy of nested mappings and lists with entries changed, dropped, renamed, added or exchanged."""
    tree = copy.deepcopy(tree)
    for _ in range(times):
        places = list(_places(tree))
        if not places:
            return value(rng)
        node, key = rng.choice(places)
        how = rng.randrange(8)
        if how == 0:
            del node[key]
        elif how == 1 and isinstance(node, dict):
            node[rng.choice((key + "s", key.upper(), key[:-1], str(scalar(rng))))] = node.pop(key)
        elif how == 2 and isinstance(node, dict):
            node[str(scalar(rng))] = value(rng)
        elif how == 3:
            node[key] = [node[key]]
        elif how == 4:
            other, name = rng.choice(places)
            node[key] = copy.deepcopy(other[name])
        elif how == 5 and isinstance(node[key], int | float):
            node[key] = rng.choice((-node[key], str(node[key]), bool(node[key]), node[key] * 1e6, node[key] / 3))
        else:
            node[key] = value(rng)
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in it, down to a hundred levels."""
    stack = [(tree, 0)]
    while stack:
        node, depth = stack.pop()
        if depth > 100 or not isinstance(node, dict | list):
            continue
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield node, key
            stack.append((node[key], depth + 1))


def damaged(rng: Random, data: bytes) -> bytes:
    """Bytes cut, flipped, zeroed, doubled, or replaced by what a download leaves in their place."""
    if not data:
        return b"\x00"
    at = rng.randrange(len(data))
    how = rng.randrange(9)
    if how == 0:
        return data[:at]
    if how <= 3:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if how == 4:
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    if how == 5:
        return data + data[:at]
    if how == 6:
        return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\n")) + data
    if how == 7:
        return data[:at] + rng.choice((b"\xe9", b"\x00", b"\xc3\x28", b"\x1a", b"\xe2\x80\xa8")) + data[at:]
    return rng.choice(
        (
            b"",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167536\n",
            b"<!DOCTYPE html><html><body>Sign in</body></html>",
            rng.randbytes(rng.choice((1, 8, 400))),
            rng.choice((b"[", b'{"a":')) * 100_000,
        )
    )


def json_text(tree: Any) -> str:
    """JSON as lax programs write it: NaN, Infinity and lone surrogates included."""
    return json.dumps(tree, ensure_ascii=True)


def as_bytes(text: str) -> bytes:
    """UTF-8, where a lone surrogate becomes three bytes that are not."""
    return text.encode("utf-8", "surrogatepass")
