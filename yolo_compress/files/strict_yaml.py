"""Read YAML strictly: one document of limited size, no duplicate keys, tags or aliases. Also return the line of every key.

PyYAML uses the last of duplicate keys, reads `1e-4` as text and `no` as false, and expands aliases without limit.
Here plain scalars follow the YAML 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema): `1e-4` is a number,
`no`, `12:30` and `2026-01-02` are text, only `true` and `false` are booleans. Tags, anchors and aliases are errors:
no file of this project needs them, and each has been used in attacks.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..errors import CompressError, RecipeError, StorageError

MAX_BYTES = 256 << 10  # 10,000 class names are 0.2 MB; PyYAML takes up to 2 s a MB, and a bad file must fail within 1 s
MAX_NODES = 20_000  # 10,000 class names as `number: name`; limits the time (1 s) and memory of PyYAML's node graph
MAX_DEPTH = 16  # a recipe has 3 levels; limits the recursion
MAX_DIGITS = 400  # of an integer; the largest float has 309

_INT = re.compile(r"[-+]?[0-9]+\Z")
_BASED = re.compile(r"0o[0-7]+\Z|0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z")
_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None,
          "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}  # fmt: skip
_UTF16_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A mapping that was read from a YAML file, with the line of every key.

    Attributes:
        source: Name of the file in messages.
        data: The mapping, with nested mappings, lists and scalars.
        lines: 1-based line of each key or list item by its path, such as `("prune", "keep_flops")`.
        blank: Paths of keys that have nothing after the colon. Their value is None.
    """

    source: str
    data: dict[Any, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    blank: set[KeyPath] = field(default_factory=set)

    def where(self, path: KeyPath) -> str:
        """Return `file:line` of a key, or of its nearest known parent."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.source}:{self.lines[path]}" if path else self.source


def shown(path: object) -> str:
    """Return a path as text that can be printed in any locale, on one line."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def load(path: str | os.PathLike[str], error: type[CompressError] = RecipeError) -> Document:
    """Read a YAML file whose top level is a mapping.

    Args:
        path: The file.
        error: Class to raise for a missing or invalid file, such as `DataError` for a data yaml.

    Raises:
        error: The file is missing, not a regular file, too large, not UTF-8 or not YAML. Or it has something that this module
            refuses.
        StorageError: The file exists but cannot be read.
    """
    return parse(_decode(_read(path, error), shown(path), error), shown(path), error)


def parse(text: str, source: str, error: type[CompressError] = RecipeError) -> Document:
    """Read YAML text whose top level is a mapping; see `load`."""
    with _short_errors(text, source, error):
        root = _Composer(text).get_single_node()
        if root is None or (isinstance(root, yaml.ScalarNode) and not root.value):
            raise error(f"{source}: is empty; expected a mapping (key: value)")
        if not isinstance(root, yaml.MappingNode):
            kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
            raise error(f"{source}:{root.start_mark.line + 1}: top level is {kind}; expected a mapping (key: value)")
        document = Document(source, {})
        document.data.update(_mapping(root, (), document))
    return document


def value(text: str, source: str, error: type[CompressError] = RecipeError) -> Any:
    """Read the value of a `section.key=value` on the command line: `0.6`, `true`, `null`, `[fp32, int8]`, `384,640`.

    Text that does not start with a bracket, brace or quote is one plain scalar.
    """
    text = text.strip()
    if not text.startswith(("[", "{", '"', "'")):
        return resolve(text)
    with _short_errors(text, source, error):
        return _value(_Composer(text).get_single_node(), (), Document(source, {}))


def resolve(text: str) -> Any:
    """Return the value of a plain scalar by the YAML 1.2 core schema."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.match(text) and len(text) <= MAX_DIGITS:
        return int(text)
    if _BASED.match(text) and len(text) <= MAX_DIGITS:
        return int(text, 0)
    if _FLOAT.match(text):
        return float(text)
    if special := _SPECIAL.match(text):
        return float("nan") if special[3] else float(f"{special[1]}inf")
    return text


def dump(data: dict[str, Any]) -> str:
    """Return a mapping as YAML text. `parse` turns the text back into an equal mapping."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)


class _Composer(yaml.SafeLoader):
    """Parser that builds PyYAML's graph of nodes, and raises for tags, anchors, aliases and too large files.

    It never turns nodes into Python objects.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self._nodes += 1
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, f"alias *{event.anchor} is not allowed; write the value out")
        if event.anchor is not None:
            self._refuse(event, f"anchor &{event.anchor} is not allowed")
        if getattr(event, "tag", None) is not None:
            self._refuse(event, f"tag {event.tag.replace('tag:yaml.org,2002:', '!!')} is not allowed")
        if self._depth >= MAX_DEPTH:
            self._refuse(event, f"nested deeper than {MAX_DEPTH} levels")
        if self._nodes > MAX_NODES:
            self._refuse(event, f"more than {MAX_NODES} values")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    @staticmethod
    def _refuse(event: Any, problem: str) -> None:
        raise yaml.composer.ComposerError(None, None, problem, event.start_mark)


class _Dumper(yaml.SafeDumper):
    """YAML writer with quotes around text that `resolve` would otherwise read as another type. PyYAML itself follows YAML 1.1."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, data: str) -> yaml.ScalarNode:
        style = "'" if resolve(data) != data else None
        if not data.isprintable():
            style = '"'  # escapes the text, because PyYAML reads its own unescaped U+0085 back as a space
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.text)


def _mapping(node: yaml.MappingNode, path: KeyPath, document: Document) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = _value(key_node, path, document) if isinstance(key_node, yaml.ScalarNode) else None
        if isinstance(key, bool) or not isinstance(key, str | int):
            problem = "a key must be text or a whole number"
            raise yaml.composer.ComposerError(None, None, problem, key_node.start_mark)
        here = (*path, key)
        if key in result:
            problem = f"duplicate key {shown(key)} (first on line {document.lines[here]})"
            raise yaml.composer.ComposerError(None, None, problem, key_node.start_mark)
        document.lines[here] = line
        if isinstance(value_node, yaml.ScalarNode) and not value_node.value and value_node.style is None:
            document.blank.add(here)
        result[key] = _value(value_node, here, document)
    return result


def _value(node: yaml.Node, path: KeyPath, document: Document) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, index), document) for index, item in enumerate(node.value)]
    return resolve(node.value) if node.style is None else node.value


@contextmanager
def _short_errors(text: str, source: str, error: type[CompressError]) -> Iterator[None]:
    """Turn PyYAML's errors inside the block into `error`, with the one-line message `file:line: problem`."""
    try:
        yield
    except yaml.MarkedYAMLError as found:
        mark = found.problem_mark or found.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = found.problem or found.context or "not YAML"
        if "'\\t'" in problem:
            problem += "; indent with spaces, not tabs"
        raise error(f"{source}{line}: {problem}") from None
    except yaml.reader.ReaderError as found:
        line = f":{text.count(chr(10), 0, found.position) + 1}"
        raise error(f"{source}{line}: character U+{int(found.character):04X} is not allowed in YAML") from None
    except (ValueError, OverflowError) as found:  # PyYAML raises them for escapes such as "\UFFFFFFFF"
        raise error(f"{source}: {found}") from None


def _read(path: str | os.PathLike[str], error: type[CompressError]) -> bytes:
    name = shown(path)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise error(
                f"{name}: is {'a directory' if stat.S_ISDIR(mode) else 'not a regular file'}; expected a YAML file"
            )
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise error(f"{name}: is a link to {shown(os.readlink(path))}, which does not exist") from None
        raise error(f"{name}: no such file") from None
    except ValueError as found:  # a NUL in the path
        raise error(f"{name}: {found}") from None
    except OSError as found:
        if found.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise error(f"{name}: {found.strerror}") from None
        raise StorageError(f"{name}: cannot be read: {found.strerror}") from None
    if len(data) > MAX_BYTES:
        raise error(f"{name}: larger than {MAX_BYTES >> 10} KiB; expected a recipe or data yaml")
    return data


def _decode(data: bytes, name: str, error: type[CompressError]) -> str:
    if data.startswith(_UTF16_32):
        raise error(f"{name}: is UTF-16 or UTF-32; save it as UTF-8")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as found:
        line = data.count(b"\n", 0, found.start) + 1
        raise error(f"{name}:{line}: is not UTF-8 text (byte 0x{data[found.start]:02x} at {found.start})") from None
