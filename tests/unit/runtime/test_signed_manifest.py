"""A bundle whose bytes, names, signature or age are not what was vouched for is refused, and nothing of it was touched before."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from yolo_compress.runtime.errors import EngineError
from yolo_compress.runtime.secure import ed25519
from yolo_compress.runtime.secure import signed_manifest as sealed
from yolo_compress.runtime.secure.signed_manifest import MANIFEST, SIGNATURE, BundleRefused, pinned_key, seal, verify

SEED, OTHER = bytes(range(32)), bytes(32)
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    (root / "onnx").mkdir(parents=True)
    (root / "onnx" / "fp32.onnx").write_bytes(b"x" * 5000)
    (root / "labels.txt").write_text("bolt\nnut\n")
    seal(root, {"name": "a", "target": "plain"}, 7, SEED)
    return root


def rewritten(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((root / MANIFEST).read_text())
    change(manifest)
    (root / MANIFEST).write_text(json.dumps(manifest))


def test_what_was_sealed_is_vouched_for(bundle: Path) -> None:
    manifest = verify(bundle, ed25519.public_key(SEED), at_least=7)
    assert manifest == verify(bundle) == json.loads((bundle / MANIFEST).read_text())
    assert (manifest["schema"], manifest["version"], manifest["name"]) == (1, 7, "a")
    assert set(manifest["files"]) == {"labels.txt", "onnx/fp32.onnx"}
    digest = hashlib.sha256(b"x" * 5000).hexdigest()
    assert manifest["files"]["onnx/fp32.onnx"] == {"sha256": digest, "size": 5000}


def test_what_the_robot_makes_and_a_link_to_the_bundle_are_no_objection(bundle: Path) -> None:
    (bundle / "engines" / "onnxruntime-fp32").mkdir(parents=True)
    (bundle / "engines" / "onnxruntime-fp32" / "engine.onnx").write_bytes(b"x")
    (bundle / "device.json").write_text("{}")
    (bundle.parent / "current").symlink_to(bundle)
    assert verify(bundle.parent / "current")["version"] == 7


def test_the_same_files_give_the_same_manifest(bundle: Path) -> None:
    first = (bundle / MANIFEST).read_bytes()
    seal(bundle, {"target": "plain", "name": "a"}, 7, SEED)
    assert (bundle / MANIFEST).read_bytes() == first
    seal(bundle, {"name": "a"}, 8, None)
    assert not (bundle / SIGNATURE).exists(), "a signature of other bytes does not stay"


def escape(name: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        rewritten(root, lambda m: m["files"].update({name: m["files"]["labels.txt"]}))

    return apply


def entry(value: Any) -> Callable[[Path], None]:
    return lambda root: rewritten(root, lambda m: m["files"].update({"labels.txt": value}))


def linked(root: Path) -> None:
    (root.parent / "elsewhere.txt").write_bytes((root / "labels.txt").read_bytes())
    (root / "labels.txt").unlink()
    (root / "labels.txt").symlink_to(root.parent / "elsewhere.txt")


def linked_folder(root: Path) -> None:
    (root / "onnx").rename(root.parent / "onnx")
    (root / "onnx").symlink_to(root.parent / "onnx")


def linked_manifest(root: Path) -> None:
    (root / MANIFEST).rename(root.parent / MANIFEST)
    (root / MANIFEST).symlink_to(root.parent / MANIFEST)


def twice(root: Path) -> None:
    text = (root / MANIFEST).read_text()
    (root / MANIFEST).write_text(text.replace('"labels.txt": {', '"labels.txt": {}, "labels.txt": {'))


def flipped(name: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        content = bytearray((root / name).read_bytes())
        content[4] ^= 1
        (root / name).write_bytes(content)

    return apply


def piped(root: Path) -> None:
    (root / MANIFEST).unlink()
    os.mkfifo(root / MANIFEST)


VOUCHED = {"sha256": "0" * 64, "size": 9}
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda root: (root / MANIFEST).unlink(), "No such file"),
    "no folder": (lambda root: root.rename(root.parent / "gone"), "No such file"),
    "cut manifest": (lambda root: os.truncate(root / MANIFEST, 200), "damaged"),
    "empty manifest": (lambda root: os.truncate(root / MANIFEST, 0), "damaged"),
    "manifest that is no text": (lambda root: (root / MANIFEST).write_bytes(b"\xff\xfe{}"), "damaged"),
    "manifest of no end": (lambda root: (root / MANIFEST).write_bytes(b"[" * 100_000), "damaged"),
    "huge manifest": (lambda root: os.truncate(root / MANIFEST, 9 << 20), "over 8388608 bytes"),
    "manifest that is a list": (lambda root: (root / MANIFEST).write_text("[]"), "schema 'list'"),
    "duplicate key": (twice, "'labels.txt' is there twice"),
    "NaN": (lambda root: (root / MANIFEST).write_text('{"schema": NaN}'), "NaN is no number"),
    "other schema": (lambda root: rewritten(root, lambda m: m.update(schema=2)), "schema 2, expected 1"),
    "schema true": (lambda root: rewritten(root, lambda m: m.update(schema=True)), "schema True"),
    "version of text": (lambda root: rewritten(root, lambda m: m.update(version="7")), "version '7'"),
    "version below 0": (lambda root: rewritten(root, lambda m: m.update(version=-1)), "version -1"),
    "no files": (lambda root: rewritten(root, lambda m: m.update(files={})), "lists no files"),
    "files of a list": (lambda root: rewritten(root, lambda m: m.update(files=["labels.txt"])), "lists no files"),
    "no size": (entry({"sha256": "0" * 64}), "expected its sha256 and size"),
    "size of text": (entry({**VOUCHED, "size": "9"}), "expected its sha256 and size"),
    "short sha256": (entry({**VOUCHED, "sha256": "0" * 63}), "expected its sha256 and size"),
    "absolute path": (escape("/etc/passwd"), "'/etc/passwd' is no plain path"),
    "path upwards": (escape("../elsewhere.txt"), "is no plain path"),
    "path upwards inside": (escape("onnx/../../elsewhere.txt"), "is no plain path"),
    "dot": (escape("./labels.txt"), "is no plain path"),
    "empty part": (escape("onnx//fp32.onnx"), "is no plain path"),
    "empty name": (escape(""), "is no plain path"),
    "backslash": (escape("onnx\\fp32.onnx"), "is no plain path"),
    "drive": (escape("C:labels.txt"), "is no plain path"),
    "control character": (escape("labels\u0000.txt"), "is no plain path"),
    "manifest in itself": (escape(MANIFEST), "must not be listed"),
    "vouched engine": (escape("engines/a/engine.plan"), "must not be listed"),
    "missing file": (lambda root: (root / "labels.txt").unlink(), "labels.txt: missing"),
    "altered file": (flipped("onnx/fp32.onnx"), "fp32.onnx: sha256 is not the one"),
    "truncated file": (lambda root: os.truncate(root / "onnx" / "fp32.onnx", 4999), "4999 bytes, expected 5000"),
    "longer file": (lambda root: os.truncate(root / "onnx" / "fp32.onnx", 5001), "5001 bytes, expected 5000"),
    "extra file": (lambda root: (root / "onnx" / "more.onnx").write_bytes(b""), "more.onnx: not in manifest.json"),
    "extra module": (lambda root: (root / "numpy.py").write_bytes(b""), "numpy.py: not in manifest.json"),
    "link": (linked, "labels.txt: a link"),
    "linked folder": (linked_folder, "onnx: a link"),
    "linked manifest": (linked_manifest, "manifest.json: "),
    "dangling link": (lambda root: (root / "more").symlink_to("nowhere"), "more: a link"),
    "pipe": (lambda root: os.mkfifo(root / "more"), "more: no plain file"),
    "manifest is a pipe": (piped, "no plain file"),
}


@pytest.mark.fault(31)
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, bundle: Path) -> None:
    harm, message = REFUSED[case]
    harm(bundle)
    with pytest.raises(BundleRefused) as refusal:
        verify(bundle)
    assert message in str(refusal.value)
    assert isinstance(refusal.value, EngineError), "exit code 5"


@pytest.mark.fault(30)
def test_with_a_key_only_its_signature_counts(bundle: Path) -> None:
    key = ed25519.public_key(SEED)
    signature = (bundle / SIGNATURE).read_text()
    seal(bundle, {"name": "a"}, 7, OTHER)
    with pytest.raises(BundleRefused, match="not signed by the pinned key"):
        verify(bundle, key)
    seal(bundle, {"name": "a"}, 8, SEED)
    (bundle / SIGNATURE).write_text(signature)
    with pytest.raises(BundleRefused, match="not signed by the pinned key"):
        verify(bundle, key)
    for text in ("", "00", "zz" * 64, signature.strip() + "00"):
        (bundle / SIGNATURE).write_text(text)
        with pytest.raises(BundleRefused, match="no signature"):
            verify(bundle, key)
    (bundle / SIGNATURE).unlink()
    with pytest.raises(BundleRefused, match="unsigned, and this machine has a pinned key"):
        verify(bundle, key)
    assert verify(bundle)["version"] == 8, "without a key the hashes decide"


def test_of_an_unsigned_manifest_nothing_is_parsed(bundle: Path) -> None:
    (bundle / MANIFEST).write_text("{")
    with pytest.raises(BundleRefused, match="not signed"):
        verify(bundle, ed25519.public_key(SEED))


@pytest.mark.fault(30)
def test_an_older_version_is_refused(bundle: Path) -> None:
    with pytest.raises(BundleRefused, match="version 7, but 8 ran on this robot already"):
        verify(bundle, at_least=8)


def test_seal_takes_no_links(bundle: Path) -> None:
    (bundle / "link").symlink_to("labels.txt")
    with pytest.raises(BundleRefused, match="link: a link"):
        seal(bundle, {}, 8, None)


def test_the_pinned_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bundle.pub"
    monkeypatch.delenv(sealed.KEY_VARIABLE, raising=False)
    monkeypatch.setattr(sealed, "KEY_FILE", str(file))
    assert pinned_key() is None
    for text in (SEED.hex() + "\n", SEED.hex().upper(), "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="):
        file.write_text(text)
        assert pinned_key() == SEED
    for text in ("", "no key", SEED.hex()[:-1], "AAEC"):
        file.write_text(text)
        with pytest.raises(BundleRefused, match="no Ed25519 key"):
            pinned_key()
    monkeypatch.setenv(sealed.KEY_VARIABLE, str(tmp_path / "gone.pub"))
    with pytest.raises(BundleRefused, match="No such file"):
        pinned_key()
    (tmp_path / "gone.pub").write_text(OTHER.hex())
    assert pinned_key() == OTHER, "before the machine's"


def test_a_key_that_cannot_be_reached_does_not_read_as_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sealed.KEY_VARIABLE, raising=False)
    monkeypatch.setattr(sealed, "KEY_FILE", str(tmp_path / "etc" / "bundle.pub"))
    assert pinned_key() is None

    def closed(*_: object, **__: object) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:  # chmod does not keep root out
        patch.setattr(os, "lstat", closed)
        patch.setattr(Path, "read_text", closed)
        with pytest.raises(BundleRefused, match="Permission denied"):
            pinned_key()


def test_verifying_imports_no_engine_library_and_not_even_numpy(bundle: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'yolo_compress')!r})\n"
        f"from runtime.secure.signed_manifest import verify\nverify({str(bundle)!r})\n"
        "print(sorted({'numpy', 'onnxruntime', 'openvino', 'tensorrt', 'pickle', 'ctypes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
