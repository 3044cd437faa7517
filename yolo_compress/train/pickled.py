"""Check that a checkpoint file is safe to load, without loading it.

A `.pt` file is a zip archive of tensors and one pickle. A pickle is a program: it can call any function. This module reads the
program instruction by instruction. It makes a `Note` in place of each object that the program would create.

A program may create modules of Ultralytics and torch, tensors that lie within the bytes of their own storage, and
plain data. Everything else is refused. A program that needs more memory than the file has bytes is refused too.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yolo_compress.errors import CorruptArtifact

MAX_BYTES = 2**32 - 1  # larger zip files store sizes in another way; YOLOv8x with its optimizer has 1.1 GB
MAX_MEMBERS = 20_000  # files in the archive, one a tensor; YOLOv8x with EMA and optimizer has 2,000
MAX_INSTRUCTIONS = 1_000_000  # a YOLOv8 detector has 40,000
MAX_DEPTH = 150  # nesting of data; a YOLOv8 detector has 40. Copies are recursive, and Python allows 1,000 nested calls
MAX_VALUE = 2**63

ITEM_BYTES = {
    f"torch.{name}Storage": size
    for name, size in {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1,
                       "Byte": 1, "Bool": 1}.items()
}  # fmt: skip
DTYPES = {
    f"torch.{name}"
    for name in ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
}
NAMESPACES = {"ultralytics.utils.IterableSimpleNamespace", "ultralytics.yolo.utils.IterableSimpleNamespace"}
MODULES = re.compile(
    r"torch\.nn\.modules(\.\w+)?\.\w+|ultralytics\.nn\.modules(\.\w+)?\.\w+|ultralytics\.nn\.tasks\.\w+"
    r"|ultralytics\.utils\.(loss|tal)\.\w+|torchvision\.transforms\.transforms\.\w+"
)
ENUM = "torchvision.transforms.functional.InterpolationMode"
METHOD = "builtins.getattr"
WRAPPERS = re.compile(
    r"torch\.nn\.parallel\.(\w+\.)?((?:Distributed)?DataParallel)"
)  # they prefix the names of tensors with "module."
PATHS = {f"{module}.{name}Path" for module in ("pathlib", "pathlib._local") for name in ("Posix", "Windows")}


@dataclass(eq=False, slots=True)
class Note:
    """Placeholder for an object that the program would create.

    Attributes:
        kind: "global", "object", "dict", "list", "set", "tuple", "storage", "tensor", "method", "dtype", "data" or "spent".
            "spent" marks the arguments of a call that may not be used again.
        content: Name of a global, items of a tuple or list, entries of a dict, or number of elements of a storage or tensor.
        depth: Levels of data inside.
        item_bytes: Bytes per element of a storage.
        done: True once the note is inside another object. It may then not change any more. So no object can contain itself.
    """

    kind: str
    content: Any = None
    depth: int = 0
    item_bytes: int = 0
    done: bool = False


class _Refused(Exception):
    """The checkpoint is not safe to load. The message has the reason, and `remedy` has the remedy."""

    remedy = "Download or export it again"


class _Wrapped(_Refused):
    """The model was saved inside DataParallel or DistributedDataParallel."""

    remedy = 'Where it was trained, save the model inside: torch.save({"model": model.module}, "FILE.pt")'


@dataclass
class _Reading:
    """State while the pickle's program is read: stored tensors, memory so far, and names that the program refers to."""

    members: dict[str, int]  # name of a stored tensor -> bytes in the archive
    tensor_bytes: int = 0  # of all tensors that the program creates
    names: set[str] = field(default_factory=set)  # classes and functions that the program refers to


def check(path: Path) -> set[str]:
    """Check that a checkpoint is safe to load.

    Returns:
        The names of classes and functions (`module.name`) that the file refers to. All are allowed.

    Raises:
        CorruptArtifact: The file is not a complete archive of `torch.save`, or its program does something that no YOLO checkpoint
            does.
        OSError: The file cannot be read.
    """
    try:
        program, members = _open(path)
        root, names = _interpret(program, members)
        _check_root(root)
        return names
    except (_Refused, zipfile.BadZipFile, ValueError, IndexError, KeyError, struct.error) as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        remedy = error.remedy if isinstance(error, _Refused) else _Refused.remedy
        raise CorruptArtifact(
            f"{path}: not a loadable YOLO checkpoint ({first}); nothing in it was run. {remedy}"
        ) from error


def _open(path: Path) -> tuple[bytes, dict[str, int]]:
    """Return the pickle of the archive, and the size in bytes of each tensor by name."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise _Refused(f"{size} bytes, expected {MAX_BYTES} at most")
    with path.open("rb") as file:
        _check_directory(file, size)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if len({entry.filename for entry in entries}) < len(entries):
                raise _Refused("two members of its archive have the same name")
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
                raise _Refused("its archive is compressed or encrypted, which torch.save never does")
            if any(entry.compress_size != entry.file_size for entry in entries) or (
                sum(entry.file_size for entry in entries) > size
            ):
                raise _Refused("its archive states more bytes than it has")
            programs = [entry for entry in entries if entry.filename.partition("/")[2] == "data.pkl"]
            if len(programs) != 1 or any(entry.filename.partition("/")[2] == "constants.pkl" for entry in entries):
                raise _Refused("expected an archive with one data.pkl; this is TorchScript or another format")
            folder = programs[0].filename.partition("/")[0] + "/"
            if any(not entry.filename.startswith(folder) for entry in entries):
                raise _Refused("its archive has more than one folder")
            data = folder + "data/"
            members = {e.filename.removeprefix(data): e.file_size for e in entries if e.filename.startswith(data)}
            return archive.read(programs[0]), members


def _check_directory(file: io.BufferedReader, size: int) -> None:
    """Check that the archive has exactly one list of members, at its end. All zip readers then find the same list."""
    if size < 22:
        raise _Refused("empty or cut short")
    file.seek(max(0, size - 98))
    tail = file.read()
    if tail[-22:-18] != b"PK\x05\x06":
        file.seek(0)
        old = file.read(2) == b"\x80\x02"
        raise _Refused(
            "the format of PyTorch before 1.6; load it there and save it again"
            if old
            else "not an archive of torch.save, or cut short"
        )
    *disks, here, count, length, start, comment = struct.unpack("<4x4H2IH", tail[-22:])
    end = size - 22
    if tail[-42:-38] == b"PK\x06\x07":  # the ZIP64 form, which PyTorch writes too
        end = size - 98
        long = struct.unpack("<4s20x4Q4xIQI", tail[:76])
        if long != (b"PK\x06\x06", here, count, length, start, 0, end, 1):
            raise _Refused("its archive has two lists of members")
    if any(disks) or here != count or comment or start + length != end:
        raise _Refused("the list of members is not at the end of its archive")
    if count > MAX_MEMBERS or length > MAX_MEMBERS * 256:
        raise _Refused(f"{count} members, expected {MAX_MEMBERS} at most")


def _interpret(program: bytes, members: dict[str, int]) -> tuple[Any, set[str]]:
    """Read a pickle's program without running it. Return the note of its final object, and the names that it refers to."""
    reading = _Reading(members)
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    argument: Any
    for number, (instruction, argument, _) in enumerate(pickletools.genops(program)):
        if number >= MAX_INSTRUCTIONS:
            raise _Refused(f"more than {MAX_INSTRUCTIONS} instructions")
        match instruction.name:
            case "PROTO":
                pass
            case "STOP":
                if len(stack) != 1 or marks:
                    raise _Refused("its program ends too early")
                return stack[0], reading.names
            case "MARK":
                marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[instruction.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(argument)
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                kind = instruction.name[6:].lower()
                stack.append(Note(kind, {} if kind == "dict" else () if kind == "tuple" else []))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = _pop(stack, marks, int(instruction.name[5:]))
                stack.append(_tuple(items))
            case "TUPLE":
                items = _pop(stack, marks)
                stack.append(_tuple(items))
            case "APPEND" | "APPENDS":
                items = _pop(stack, marks, 1 if instruction.name == "APPEND" else None)
                _put(stack[-1], "list", items)
            case "SETITEM" | "SETITEMS":
                items = _pop(stack, marks, 2 if instruction.name == "SETITEM" else None)
                _put(stack[-1], "dict", items)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_global(argument, reading))
            case "BINPERSID":
                stack.append(_storage(stack.pop(), reading))
            case "NEWOBJ":
                name, arguments = _call(stack)
                if arguments or not MODULES.fullmatch(name):
                    raise _Refused(f"{name} is created with arguments of the file")
                stack.append(Note("object"))
            case "REDUCE":
                stack.append(_called(*_call(stack), reading))
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case other:
                raise _Refused(f"instruction {other}, which torch.save does not write")
    raise _Refused("its program has no end")


def _pop(stack: list[Any], marks: list[int], count: int | None = None) -> list[Any]:
    """Remove and return the last `count` items of the stack, or the items above the last mark."""
    start = marks.pop() if count is None else len(stack) - count
    if start < (marks[-1] if marks else 0):
        raise _Refused("its program takes more items than it made")
    items = stack[start:]
    del stack[start:]
    return items


def _tuple(items: list[Any]) -> Note:
    """Return the note (placeholder) of a tuple with these items."""
    note = Note("tuple", tuple(items))
    note.depth = _depth(items)
    return note


def _depth(items: list[Any]) -> int:
    """Return the depth of a container of these items, and mark the items as done."""
    deepest = 0
    for item in items:
        if isinstance(item, Note):
            if item.kind == "spent":
                raise _Refused("arguments of getattr that are data too")
            item.done, deepest = True, max(deepest, item.depth)
    if deepest >= MAX_DEPTH:
        raise _Refused(f"data nested deeper than {MAX_DEPTH} levels")
    return deepest + 1


def _put(target: Any, kind: str, items: list[Any]) -> None:
    """Add items to a list, or alternating keys and values to a dict."""
    depth = _depth(items)
    if not isinstance(target, Note) or target.kind != kind or target.done:
        raise _Refused(f"its program adds items to something that is not a {kind}, or that is inside other data")
    if any(isinstance(item, Note) and item.kind == "global" for item in items):
        raise _Refused("a class in place of data")
    target.depth = max(target.depth, depth)
    if kind == "list":
        target.content += items
        return
    keys = items[::2]
    if len(items) % 2 or not all(key is None or isinstance(key, str | int | float | bytes) for key in keys):
        raise _Refused("a dictionary key that is neither text nor a number")
    target.content.update(zip(keys, items[1::2], strict=True))


def _global(argument: str, reading: _Reading) -> Note:
    """Return the note of a class or function, given as "module name", and record its name."""
    module, _, name = argument.partition(" ")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    full = f"{module}.{name}"
    known = full in ITEM_BYTES or full in DTYPES or full in CALLS or MODULES.fullmatch(full)
    if wrapper := WRAPPERS.fullmatch(full):
        raise _Wrapped(f"its model is inside {wrapper[2]}")
    if not known:
        raise _Refused(f"{full!a}, which no YOLO checkpoint holds")
    reading.names.add(full)
    return Note("data" if full in DTYPES else "global", full)


def _call(stack: list[Any]) -> tuple[str, tuple[Any, ...]]:
    """Remove a function call from the stack. Return the name of the function and the arguments."""
    arguments, called = stack.pop(), stack.pop()
    if not isinstance(called, Note) or called.kind != "global":
        raise _Refused("a call of something that is not a known name")
    if not isinstance(arguments, Note) or arguments.kind != "tuple":
        raise _Refused("a call without a list of arguments")
    if called.content == METHOD:
        if arguments.done:
            raise _Refused("arguments of getattr that are data too")
        arguments.kind = "spent"
    return called.content, arguments.content


def _called(name: str, arguments: tuple[Any, ...], reading: _Reading) -> Note:
    """Check a function call, and return the note (placeholder) of its result."""
    if name not in CALLS:
        raise _Refused(f"{name} is called, which no YOLO checkpoint does")
    return CALLS[name](arguments, reading)


def _build(target: Any, state: Any) -> None:
    """Set the state of an object: the attributes of a module, or the byte order of a numpy type."""
    depth = _depth([state])
    if not isinstance(target, Note) or target.done or target.kind not in ("object", "dict", "dtype"):
        raise _Refused("its program sets attributes of something that is not a module, or that is inside other data")
    if target.kind == "dtype":
        items = state.content if isinstance(state, Note) and state.kind == "tuple" else (state,)
        if any(item not in (None, "<", "|", "=", 3, 0, -1) for item in items):
            raise _Refused("a numpy type of an unknown kind")
        return
    if not isinstance(state, Note) or state.kind != "dict" or not all(isinstance(key, str) for key in state.content):
        raise _Refused("attributes that are not a dictionary by name")
    for key, value in state.content.items():
        if "hook" in key and isinstance(value, Note) and not (value.kind in ("dict", "list") and not value.content):
            raise _Refused(f"a module with hooks: {key!a}")
    target.depth = max(target.depth, depth)
    if target.kind == "object":
        target.content = state.content


def _storage(saved: Any, reading: _Reading) -> Note:
    """Return the note of a storage, given as ("storage", type, member, device, elements)."""
    items: tuple[Any, ...] = saved.content if isinstance(saved, Note) and saved.kind == "tuple" else ()
    if len(items) != 5 or items[0] != "storage" or not isinstance(items[1], Note) or items[1].content not in ITEM_BYTES:
        raise _Refused("a tensor that is stored in an unknown way")
    item_bytes, name, elements = ITEM_BYTES[items[1].content], items[2], _count(items[4])
    if not isinstance(name, str) or not isinstance(items[3], str) or name not in reading.members:
        raise _Refused(f"a tensor whose bytes {name!a} are not in the archive")
    if elements * item_bytes > reading.members[name]:
        raise _Refused(f"a tensor of {elements * item_bytes} bytes, of which the archive has {reading.members[name]}")
    return Note("storage", elements, item_bytes=item_bytes)


def _count(value: Any) -> int:
    """Check that a value is a size, an integer from 0, and return it."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_VALUE:
        raise _Refused(f"a size of {ascii(value)[:40]}")
    return value


def _counts(value: Any) -> list[int]:
    """Check that a value is a shape or strides, a tuple of sizes, and return it."""
    if not isinstance(value, Note) or value.kind != "tuple" or len(value.content) > 64:
        raise _Refused("a tensor without a shape")
    return [_count(item) for item in value.content]


# --- allowed calls: each function checks the arguments and returns the note of the result ----------------------------


def _tensor(arguments: tuple[Any, ...], reading: _Reading) -> Note:
    """Check `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`.

    The tensor must lie inside its storage and have no more elements than it.
    """
    if len(arguments) != 6 or not isinstance(arguments[0], Note) or arguments[0].kind != "storage":
        raise _Refused("a tensor of an unknown form")
    storage, offset, size, stride = arguments[0], _count(arguments[1]), _counts(arguments[2]), _counts(arguments[3])
    if len(size) != len(stride) or not isinstance(arguments[4], bool):
        raise _Refused("a tensor whose shape and strides do not fit")
    _no_hooks(arguments[5])
    elements = 1
    for side in size:
        elements *= side
    last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True)) if elements else 0
    if last >= max(storage.content, 1) or elements > storage.content:
        raise _Refused(f"a tensor of shape {size} that goes beyond its {storage.content} stored elements")
    reading.tensor_bytes += elements * storage.item_bytes
    if reading.tensor_bytes > 2 * sum(reading.members.values()) + 2**20:  # .float() copies each
        raise _Refused("many tensors that share the same stored bytes")
    return Note("tensor", elements)


def _parameter(arguments: tuple[Any, ...], reading: _Reading) -> Note:
    if len(arguments) != 3 or getattr(arguments[0], "kind", "") != "tensor" or not isinstance(arguments[1], bool):
        raise _Refused("a parameter that is not a tensor")
    _no_hooks(arguments[2])
    return Note("tensor", arguments[0].content)


def _no_hooks(value: Any) -> None:
    if value is not None and not (isinstance(value, Note) and value.kind == "dict" and not value.content):
        raise _Refused("a tensor with hooks")


def _namespace(arguments: tuple[Any, ...], reading: _Reading) -> Note:
    if arguments:
        raise _Refused("settings with arguments")
    return Note("object", {})


def _ordered(arguments: tuple[Any, ...], reading: _Reading) -> Note:
    if arguments:
        raise _Refused("a dictionary with arguments")
    return Note("dict", {})


def _set(arguments: tuple[Any, ...], reading: _Reading) -> Note:
    items = arguments[0].content if len(arguments) == 1 and getattr(arguments[0], "kind", "") == "list" else None
    if items is None or not all(item is None or isinstance(item, str | int | float) for item in items):
        raise _Refused("a set with something other than text and numbers")
    return Note("set", items, depth=1)


def _size(arguments: tuple[Any, ...], reading: _Reading) -> Note:
    if len(arguments) != 1:
        raise _Refused("a torch.Size of an unknown form")
    _counts(arguments[0])
    return Note("data")


def _texts(pattern: str) -> Callable[[tuple[Any, ...], _Reading], Note]:
    """Return a check for calls. Their arguments must be booleans, or texts that match `pattern` completely."""

    def made(arguments: tuple[Any, ...], reading: _Reading) -> Note:
        for item in arguments:
            if not (isinstance(item, bool) or (isinstance(item, str) and re.fullmatch(pattern, item, re.DOTALL))):
                raise _Refused(f"an argument {ascii(item)[:40]}")
        return Note("data")

    return made


def _device(arguments: tuple[Any, ...], reading: _Reading) -> Note:
    if not arguments or arguments[0] not in ("cpu", "cuda", "mps", "cuda:0") or len(arguments) > 2:
        raise _Refused("a device of an unknown kind")
    for index in arguments[1:]:
        _count(index)
    return Note("data")


def _dtype(arguments: tuple[Any, ...], reading: _Reading) -> Note:
    _texts(r"[<>=|]?[fiub][1248]")(arguments, reading)
    return Note("dtype", arguments[0] if arguments else None)


def _scalar(arguments: tuple[Any, ...], reading: _Reading) -> Note:
    """Check `scalar(dtype, bytes)`. The bytes must be the bytes of one number."""
    if len(arguments) != 2 or getattr(arguments[0], "kind", "") != "dtype":
        raise _Refused("a numpy scalar of an unknown form")
    if not (getattr(arguments[1], "kind", "") == "data" or isinstance(arguments[1], str)):
        raise _Refused("a numpy scalar without a value")
    return Note("data")


def _encode(arguments: tuple[Any, ...], reading: _Reading) -> Note:
    if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] != "latin1":
        raise _Refused("bytes in another encoding than latin1")
    return Note("data")


def _method(arguments: tuple[Any, ...], reading: _Reading) -> Note:
    """Check `getattr(Detect, "forward")`, which segmentation and pose heads contain.

    In a fused model, the owner is the layer itself instead of its class.
    """
    if len(arguments) != 2 or not isinstance(arguments[0], Note) or not isinstance(arguments[1], str):
        raise _Refused("getattr of an unknown form")
    owner, name = arguments
    enum = owner.kind == "global" and owner.content == ENUM and name.isupper()
    block = owner.kind == "global" and MODULES.fullmatch(owner.content) and name == "forward"
    fused = owner.kind == "object" and owner.content is None and name in ("forward", "forward_fuse")
    if not (enum or block or fused):
        raise _Refused(f"getattr of {ascii(name)[:40]}")
    owner.done = False  # the layer gets its attributes later; `_call` ensures that its arguments are used nowhere else
    return Note("data" if enum else "method")


CALLS: dict[str, Callable[[tuple[Any, ...], _Reading], Note]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _ordered,
    "builtins.set": _set,
    "_codecs.encode": _encode,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    METHOD: _method,
    ENUM: _texts("[a-z]+"),
    **dict.fromkeys(NAMESPACES, _namespace),
    **dict.fromkeys(PATHS, _texts(r"[^\0]*")),
}


def _check_root(root: Any) -> None:
    """Check that the final object is a dictionary with a module under `ema` or `model`."""
    if not isinstance(root, Note) or root.kind != "dict":
        raise _Refused("it contains no dictionary; save it with Ultralytics' model.save()")
    if root.content.get("modelopt"):
        raise _Refused("its weights belong to a model that modelopt quantised; give the checkpoint before quantisation")
    model = root.content.get("ema") or root.content.get("model")
    if any(_is_data_parallel(one) for one in (root, model, root.content.get("state_dict"))):
        raise _Wrapped("it contains no model, only tensors named module.NAME, as in DataParallel")
    if not isinstance(model, Note) or model.kind != "object":
        raise _Refused("it contains no model, only tensors or settings; give the file that Ultralytics' training wrote")


def _is_data_parallel(value: Any) -> bool:
    """Return whether a value is a state dict of a model inside DataParallel."""
    if not isinstance(value, Note) or value.kind != "dict" or not value.content:
        return False
    return all(isinstance(key, str) and key.startswith("module.") for key in value.content)
