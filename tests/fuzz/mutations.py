"""Byte strings that are almost sound: mutations of a corpus, a function of a seed alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
#: Pieces of the languages that the readers know.
_WORDS = (
    b"null", b"true", b"NaN", b"Infinity", b"-1", b"0", b"1e400", b'""', b"[]", b"{}", b"[[", b"}}",
    b'"\\ud800"', b"\\u0000",
    b'"F32"', b'"data_offsets"', b'"__metadata__"', b"PK\x03\x04", b"\x80\x02", b"R", b".", b"c__builtin__\neval\n",
    b"\xff", b"\x00", b"\n", b"9" * 25, b"../", b"\x1b[2J",
)  # fmt: skip
#: Values for places in JSON.
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 10**18, 10**30, 1.5, float("inf"), float("nan"), "", "x",
    "\ud800", "\x1b[2J", "1", "inf",
    [], [[]], [None], [0, 0], {}, {"a": 1}, {"": None},
)  # fmt: skip


def mutations(corpus: Sequence[bytes], count: int, seed: int, largest: int) -> Iterator[bytes]:
    """`count` byte strings of at most `largest` bytes, each one to four mutations away from one of the corpus."""
    draw = random.Random(seed)
    for _ in range(count):
        data = draw.choice(corpus)
        for _ in range(draw.randint(1, 4)):
            data = draw.choice(_KINDS)(data, corpus, draw)
        yield data[:largest]


def _flip(data: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(data: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    start, stop = sorted((draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)))
    return data[:start] + data[stop:] if draw.random() < 0.5 else data[:start]


def _repeat(data: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    start, stop = sorted((draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)))
    return data[:stop] + data[start:stop] + data[stop:]


def _splice(data: bytes, corpus: Sequence[bytes], draw: random.Random) -> bytes:
    other = draw.choice(corpus)
    return data[: draw.randrange(len(data) + 1)] + other[draw.randrange(len(other) + 1) :]


def _insert(data: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    return data[:place] + draw.choice(_WORDS) + data[place + draw.choice((0, 1, 4)) :]


def _number(data: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    size = draw.choice((1, 2, 4, 8))
    place = draw.choice((0, draw.randrange(len(data) + 1)))
    number = draw.choice(_NUMBERS) % (1 << 8 * size)
    return data[:place] + number.to_bytes(size, "little") + data[place + size :]


def _value(data: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    """Another value, key or order somewhere in JSON: the whole content, or the header of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    is_header = 0 < length <= len(data) - 8
    start, stop = (8, 8 + length) if is_header else (0, len(data))
    try:
        tree = json.loads(data[start:stop])
    except (ValueError, RecursionError):
        return _flip(data, _, draw)
    raw = json.dumps(_changed(tree, draw)).encode()
    front = len(raw).to_bytes(8, "little") if is_header else b""
    return front + raw + data[stop:]


def _changed(tree: Any, draw: random.Random) -> Any:
    """A copy of nested JSON values with one place changed."""
    if not isinstance(tree, (dict, list)) or not tree or draw.random() < 0.1:
        return draw.choice(_VALUES)
    if isinstance(tree, list):
        place = draw.randrange(len(tree))
        kind = draw.random()
        if kind < 0.15:
            return tree[:place] + tree[place + 1 :]
        if kind < 0.3:
            return [*tree, tree[place]]
        return [*tree[:place], _changed(tree[place], draw), *tree[place + 1 :]]
    key = draw.choice(sorted(tree))
    kind = draw.random()
    if kind < 0.1:
        return {other: value for other, value in tree.items() if other != key}
    if kind < 0.2:
        return {**tree, draw.choice(("", "more", "\ud800", key.upper(), key + " ")): tree[key]}
    return {**tree, key: _changed(tree[key], draw)}


_KINDS: tuple[Callable[[bytes, Sequence[bytes], random.Random], bytes], ...] = (
    _flip, _cut, _repeat, _splice, _insert, _number, _value, _value, _value,
)  # fmt: skip
