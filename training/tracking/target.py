"""Which MLflow store and experiment a run goes to: what the run file says, else the environment, else a default.

In: the run file's values, the environment, what an earlier start of the run used. Out: TrackingTarget. Next:
`tracking/tracker.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from training.errors import ConfigError
from training.tracking.mlflow_store import checked_address, default_store, on_shared_disk, without_password

URI_VARIABLE, EXPERIMENT_VARIABLE = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
EXPERIMENT_ID_VARIABLE = "MLFLOW_EXPERIMENT_ID"  # of one store, and a record may go to several: never read
DEFAULT_EXPERIMENT = "crosslift"
LONGEST_EXPERIMENT = 500  # characters, MLflow's own limit


@dataclass(frozen=True, slots=True)
class TrackingTarget:
    """A store and an experiment, and where each of them was named."""

    uri: str | None  # may hold a login; None: the default store cannot be used here
    named: bool  # by the run file, the environment or an earlier start: not the default store
    experiment: str
    uri_from: str
    experiment_from: str

    def __str__(self) -> str:
        """One line, without a login."""
        store = without_password(self.uri) if self.uri else "no store"
        hint = f"; {EXPERIMENT_ID_VARIABLE} is not read" if os.environ.get(EXPERIMENT_ID_VARIABLE) else ""
        return f"MLflow: {store} ({self.uri_from}), experiment {self.experiment!r} ({self.experiment_from}){hint}"


def tracking_target(
    uri: str | None, experiment: str | None, output_dir: Path, earlier: str | None = None
) -> TrackingTarget:
    """The target of a run whose run file says `uri` and `experiment` (None: nothing).

    Args:
        earlier: the address that an earlier start of this run named, so that a resume continues the same MLflow run.

    Raises:
        ConfigError: a variable holds what cannot work.
    """
    name, name_from = experiment, "run file"
    if name is None:
        name, name_from = os.environ.get(EXPERIMENT_VARIABLE) or None, EXPERIMENT_VARIABLE
        if name is not None and len(name) > LONGEST_EXPERIMENT:
            raise ConfigError(f"{EXPERIMENT_VARIABLE}: {len(name)} characters; MLflow takes {LONGEST_EXPERIMENT}")
    if name is None:
        name, name_from = DEFAULT_EXPERIMENT, "default"
    if uri is not None:
        return TrackingTarget(uri, True, name, "run file", name_from)
    if variable := os.environ.get(URI_VARIABLE):
        try:
            return TrackingTarget(checked_address(variable), True, name, URI_VARIABLE, name_from)
        except ValueError as error:
            raise ConfigError(f"{URI_VARIABLE}: {error}; or unset the variable") from None
    if earlier is not None:
        return TrackingTarget(earlier, True, name, "as when the run started", name_from)
    if on_shared_disk(output_dir):
        return TrackingTarget(None, False, name, "the run folder is on a network disk", name_from)
    return TrackingTarget(default_store(output_dir), False, name, "default: in the run folder", name_from)
