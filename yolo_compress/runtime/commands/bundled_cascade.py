"""The cascade of a bundle: its files, and the policy folders that `build.py` makes from them in `engines/`, one for each runtime.

The bundle has `cascade/policy.json`, `cascade/golden/` and the ONNX files of both models. A policy is of these two files: engines
that this robot builds from them are accepted, engines of other files are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional, Tuple

from ..backends.base import POLICY
from ..detect.cascade import Policy, read_policy
from ..engine import takes
from ..secure.signed_manifest import MANIFEST, BundleRefused, Manifest

FOLDER = "cascade"


class BundledCascade(NamedTuple):
    """The cascade of a bundle.

    Attributes:
        directory: folder with `policy.json` and the golden images of the cascade.
        onnx: ONNX file of the small and of the large model, relative to the bundle.
        kept: share of the validation images that only the small model sees.
    """

    directory: Path
    policy: Policy
    onnx: Tuple[str, str]
    kept: float

    @property
    def precisions(self) -> Tuple[str, str]:
        """Precision of the small and of the large model."""
        return self.policy.small.precision, self.policy.large.precision

    def misfit(self, runtime: str) -> Optional[str]:
        """Return the ONNX file that is not for this runtime. None: both are."""
        for file, precision in zip(self.onnx, self.precisions):
            if not takes(Path(file).stem, runtime, precision):
                return file
        return None

    def made(self, folder: Path) -> bool:
        """Return whether a policy folder has the policy of this cascade."""
        return (folder / POLICY).read_bytes() == (self.directory / POLICY).read_bytes()


def read_cascade(directory: Path, manifest: Manifest) -> BundledCascade:
    """Read the cascade of a verified bundle.

    Raises:
        BundleRefused: the manifest's entry is malformed, or the policy is not of the ONNX files and class names of the bundle.
        EngineError: `policy.json` is damaged.
    """
    where, policy = directory / MANIFEST, read_policy(directory / FOLDER)
    try:
        about = manifest["cascade"]
        small, large = about["small"], about["large"]
        digests = [str(manifest["files"][file]["sha256"]) for file in (small, large)]
        kept = about["kept"]
        if type(kept) is not float or not 0 <= kept <= 1:
            raise ValueError(f"kept {kept!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleRefused(f"{where}: does not describe a cascade ({error!r}); make the bundle again") from error
    if digests != [policy.small.onnx_sha256, policy.large.onnx_sha256] or list(policy.names) != manifest["names"]:
        raise BundleRefused(f"{directory / FOLDER / POLICY}: not of the models in {MANIFEST}; make the bundle again")
    return BundledCascade(directory / FOLDER, policy, (small, large), kept)
