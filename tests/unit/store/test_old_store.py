"""A store of an earlier version is valid, and a run uses its artefacts."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

from tests.support.fake_chain import fake_chain, sound
from yolo_compress.chain import plan
from yolo_compress.preflight import prepare

OLD = Path(__file__).parents[2] / "support" / "store_of_november"  # by `fake_chain`, 29 November 2026
STAGES = ("baseline", "prune", "export")


def test_a_store_of_an_earlier_version_is_whole_and_up_to_date(tmp_path: Path) -> None:
    """Only stages with a higher version or a new knob run again, and the stages after them."""
    shutil.copytree(OLD, tmp_path / "weights", symlinks=True)
    with fake_chain(tmp_path) as chain:
        assert len(sound(chain.store)) == 3
        recipe, dataset = prepare(chain.recipe(), chain.store)
        planned = plan(recipe, dataset, "export")

        def unchanged(stage: str) -> bool:
            linked = chain.store.linked("r", stage)
            assert linked is not None
            old, new = linked.manifest.key, planned[stage].key
            return old["version"] == new["version"] and set(old["config"]) == set(new["config"])

        kept = list(itertools.takewhile(unchanged, STAGES))
        assert kept, "the first stage has changed since: keep a store of today instead of this one"
        chain.run(kept[-1])
        assert chain.ran == []
