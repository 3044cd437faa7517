"""The door to Optuna: which point the next trial gets. Optuna keeps only points and objectives, so its dashboard works on the study.

Everything else about a trial is in the study's folder (`study.py`). Optuna is an optional package and is imported when it is used.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from yolo_compress.errors import EnvironmentLacks
from yolo_compress.search.space import Axis, Point

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage

JOURNAL = "optuna.journal"
INSTALL = "pip install 'yolo-compress[search]'"
RANDOM_SHARE = 3  # one trial in three is random, at least 4 and at most 10: then TPE takes over


class Sampler(Protocol):
    """Chooses the points of a study. Several processes may use one study at a time."""

    def ask(self) -> tuple[int, Point]:
        """Return the number of a new trial and its point."""

    def tell(self, number: int, values: tuple[float, float] | None, failed: bool = False) -> None:
        """Say how a trial ended. Nothing happens if this was said before.

        Args:
            number: Number of the trial.
            values: (lower end of the retention, cost) of the trial's best engine. None: the trial ended early or failed.
            failed: Whether the trial failed.
        """

    def waiting(self) -> dict[int, Point | None]:
        """Return the trials that were asked for and not told. None: the process that asked was killed before it had the whole point."""


def require() -> None:
    """Check that Optuna is installed.

    Raises:
        EnvironmentLacks: It is not. The message has the command that installs it.
    """
    if importlib.util.find_spec("optuna") is None:
        raise EnvironmentLacks(f"optuna is not installed, and search needs it: {INSTALL}")


class OptunaSampler:
    """A study of Optuna with two objectives: the lower end of the retention (maximised) and the cost (minimised).

    The sampler is TPE. Its seed is `seed` plus the number of trials so far: a study that is continued, and a second worker, draw new
    points, and a study of one worker is reproducible.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        space: Mapping[str, Axis],
        own: Point,
        *,
        seed: int,
        trials: int,
        storage: str | None,
    ) -> None:
        """Open the study, or create it. A new one has to be claimed.

        Args:
            folder: Folder of the study. Without `storage`, Optuna's journal file is in it.
            name: Name of the study.
            space: Axes of the points.
            own: The recipe's own point.
            seed: Seed of the first point.
            trials: Number of trials that are planned. It decides how many are random.
            storage: Address of a database. None: the journal file.

        Raises:
            EnvironmentLacks: Optuna, or the driver of the database, is missing, or the database cannot be reached.
        """
        require()
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space = {knob: axis for knob, axis in space.items() if not axis.fixed}
        self._fixed: Point = {knob: axis.nearest(own[knob]) for knob, axis in space.items() if axis.fixed}
        self._seed, self._random = seed, min(10, max(4, trials // RANDOM_SHARE))
        self._study = optuna.create_study(
            storage=_storage(folder, storage), study_name=name, directions=["maximize", "minimize"], load_if_exists=True
        )
        self._own = own

    @property
    def owner(self) -> str | None:
        """Id of the study's folder that the study in the storage belongs to. None: it is new."""
        owner: str | None = self._study.user_attrs.get("folder")
        return owner

    def claim(self, folder: str) -> None:
        """Record the id of the study's folder in a new study, and make the recipe's own point the first one."""
        self._study.enqueue_trial({knob: self._own[knob] for knob in self._space}, skip_if_exists=True)
        self._study.set_user_attr("folder", folder)  # last: a study with an owner has its first point

    def ask(self) -> tuple[int, Point]:
        import optuna

        count = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = optuna.samplers.TPESampler(n_startup_trials=self._random, seed=self._seed + count)
        trial = self._study.ask({knob: _distribution(axis) for knob, axis in self._space.items()})
        return trial.number, self._whole(trial.params)

    def tell(self, number: int, values: tuple[float, float] | None, failed: bool = False) -> None:
        from optuna.trial import TrialState

        state = TrialState.FAIL if failed else TrialState.COMPLETE if values is not None else TrialState.PRUNED
        self._study.tell(number, values if state == TrialState.COMPLETE else None, state, skip_if_finished=True)

    def waiting(self) -> dict[int, Point | None]:
        from optuna.trial import TrialState

        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return {
            one.number: self._whole(one.params) if one.params.keys() >= self._space.keys() else None for one in running
        }

    def _whole(self, params: Mapping[str, float | int | str]) -> Point:
        return {**{knob: params[knob] for knob in self._space}, **self._fixed}


def _distribution(axis: Axis) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return (
        CategoricalDistribution(axis.choices) if axis.choices else FloatDistribution(axis.low, axis.high, log=axis.log)
    )


def _storage(folder: Path, address: str | None) -> BaseStorage:
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if address is None:
        return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    try:
        return RDBStorage(address)
    except Exception as error:  # of the database's driver, which Optuna and SQLAlchemy choose by the address
        first = str(error).strip().partition("\n")[0]
        address = re.sub("//[^@/]*@", "//", address)  # without user and password
        raise EnvironmentLacks(f"search.storage={address}: the database cannot be used: {first}") from error
