"""Valid inputs, altered: bytes flipped, cut, spliced and repeated, numbers at their extremes, values of another kind."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
NUMBERS = (
    b"0", b"-0.0", b"-1", b"1e-400", b"1e308", b"1e400", b"-1e400", b"NaN", b"Infinity", b".inf", b"2147483648", b"9" * 18,
    b"9" * 19, b"1" + b"0" * 400, b"9" * 5000, b"0x10", b"1_0", b"true", b"null", b'"1"', b"", b"[]",
)  # fmt: skip
BYTES = (
    b"\0",
    b"\xff",
    b"\r\n",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"%s",
    b"../",
    b"\x1b[2J",
    b"'",
)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**64, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x", "0", "\0",
    "\ud800", "a\nb", "\x1b[2J", "/", "../x", "x" * 300, "图" * 300, [], [[]], [0], ["a", "a"], {}, {"a": 1}, [1e308] * 9,
)  # fmt: skip
WORD = st.integers(0, 2**16 - 1)  # a place in what has any length


@st.composite
def altered(draw: DrawFn, samples: Sequence[bytes]) -> bytes:
    """Bytes of a sample after one to four changes."""
    data = draw(st.sampled_from(samples))
    for _ in range(draw(st.integers(1, 4))):
        data = draw(st.sampled_from(CHANGES))(draw, data, samples)
    return data


def _at(draw: DrawFn, data: bytes) -> int:
    return draw(WORD) * (len(data) + 1) >> 16


def _flip(draw: DrawFn, data: bytes, samples: Sequence[bytes]) -> bytes:
    place = _at(draw, data)
    return (
        data[:place]
        + bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in data[place : place + 1])
        + data[place + 1 :]
    )


def _cut(draw: DrawFn, data: bytes, samples: Sequence[bytes]) -> bytes:
    first, last = sorted((_at(draw, data), _at(draw, data)))
    return data[:first] if draw(st.booleans()) else data[:first] + data[last:]


def _splice(draw: DrawFn, data: bytes, samples: Sequence[bytes]) -> bytes:
    other = draw(st.sampled_from(samples))
    return data[: _at(draw, data)] + other[_at(draw, other) :]


def _repeat(draw: DrawFn, data: bytes, samples: Sequence[bytes]) -> bytes:
    first, last = sorted((_at(draw, data), _at(draw, data)))
    return data[:first] + data[first : min(last, first + 4000)] * draw(st.sampled_from((2, 3, 50))) + data[last:]


def _insert(draw: DrawFn, data: bytes, samples: Sequence[bytes]) -> bytes:
    place = _at(draw, data)
    return data[:place] + draw(st.sampled_from(BYTES)) + data[place:]


def _number(draw: DrawFn, data: bytes, samples: Sequence[bytes]) -> bytes:
    found = list(NUMBER.finditer(data, 0, 1 << 20))
    if not found:
        return _flip(draw, data, samples)
    one = found[draw(WORD) * len(found) >> 16]
    return data[: one.start()] + draw(st.sampled_from(NUMBERS)) + data[one.end() :]


CHANGES = (_flip, _cut, _splice, _repeat, _insert, _number)


@st.composite
def other_values(draw: DrawFn, trees: Sequence[Any]) -> Any:
    """A JSON value after one to three changes: a value of another kind, one that is missing, or one in another's place."""
    tree = copy.deepcopy(draw(st.sampled_from(trees)))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            return copy.deepcopy(draw(st.sampled_from(VALUES)))
        holder, key = places[draw(WORD) * len(places) >> 16]
        what = draw(st.integers(0, 9))
        if what == 0:
            del holder[key]
        elif what == 1:
            other, place = places[draw(WORD) * len(places) >> 16]
            holder[key] = copy.deepcopy(other[place])
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def json_bytes(*trees: Any) -> SearchStrategy[bytes]:
    """JSON documents altered as values and as bytes."""
    texts = [json.dumps(tree).encode() for tree in trees]
    return other_values(trees).map(lambda tree: json.dumps(tree).encode()) | altered(texts)


def json_lines(*lines: Any) -> SearchStrategy[bytes]:
    """Files of a JSON document a line, altered as values and as bytes."""
    texts = [json.dumps(line) for line in lines]
    whole = ("\n".join(texts) + "\n").encode()

    def with_line(tree: Any) -> bytes:
        return ("\n".join([json.dumps(tree), *texts[1:]]) + "\n").encode()

    return (
        other_values(lines).map(with_line)
        | other_values([list(lines)]).map(
            lambda trees: "".join(
                json.dumps(tree) + "\n" for tree in (trees if isinstance(trees, list) else [trees])
            ).encode()
        )
        | altered([whole])
    )
