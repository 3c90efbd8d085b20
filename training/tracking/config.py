"""The `tracking:` section, and which MLflow store and experiment follow from it, the environment and earlier starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, field_validator

from data_pipeline.secrets import without_login
from data_pipeline.settings import Section
from training.errors import ConfigError
from training.tracking.mlflow_store import checked_address, default_store, on_shared_disk
from training.tracking.run_record import RECORD_NAME, latest_start

URI_VARIABLE, EXPERIMENT_VARIABLE = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
# Never read: an id is valid in one store only, and a record may be sent to several.
EXPERIMENT_ID_VARIABLE = "MLFLOW_EXPERIMENT_ID"
DEFAULT_EXPERIMENT = "crosslift"
MAX_EXPERIMENT = 500  # characters, MLflow's own limit


class TrackingConfig(Section):
    """The `tracking:` section of the run file."""

    enabled: bool = Field(default=True, description="Send the run to MLflow. If false, only record.jsonl is written.")
    uri: str | None = Field(
        default=None,
        description="Address of the MLflow store, such as http://host:5000 or sqlite:////path/mlflow.db. "
        "Default: MLFLOW_TRACKING_URI, else what an earlier start of the run used, else mlflow.db in the run folder; "
        "none if that is on a network disk, where SQLite does not work (`crosslift ui` builds the store from the "
        "records).",
    )
    experiment: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_EXPERIMENT,
        description="MLflow's experiment. Default: MLFLOW_EXPERIMENT_NAME, else crosslift.",
    )
    run_name: str | None = Field(default=None, description="The run's name in MLflow. Default: the run folder's name.")
    sync_seconds: float = Field(default=5.0, gt=0, le=86400, description="Seconds between two batches to the store.")
    log_every: int = Field(
        default=10,
        ge=1,
        description="Steps between two logged ones, whose metrics are those of all steps since the last logged one. "
        "Reading them waits for the device. The first and the last step, and those that evaluate or save, log too. "
        "With more than 100 languages, every second (third, ...) of these lines has values by language.",
    )
    parent: str | None = Field(
        default=None, description="Record id of the parent run; `crosslift xtreme run` sets it for its training."
    )

    @field_validator("uri")
    @classmethod
    def _valid_address(cls, uri: str | None) -> str | None:
        return None if uri is None else checked_address(uri)


@dataclass(frozen=True, slots=True)
class TrackingTarget:
    """An MLflow store and an experiment, and where each of them was configured."""

    uri: str | None  # may contain a login; None: there is no store
    is_default: bool  # the store in the run folder, or none
    experiment: str
    uri_source: str
    experiment_source: str

    def __str__(self) -> str:
        """One line, without a login."""
        store = without_login(self.uri) if self.uri else "no store"
        hint = f"; {EXPERIMENT_ID_VARIABLE} is not read" if os.environ.get(EXPERIMENT_ID_VARIABLE) else ""
        return f"MLflow: {store} ({self.uri_source}), experiment {self.experiment!r} ({self.experiment_source}){hint}"


def tracking_target(config: TrackingConfig, output_dir: Path) -> TrackingTarget:
    """The store and experiment of the run in a folder. A resume continues with the store of the earlier start.

    Raises:
        ConfigError: an environment variable holds an invalid value.
    """
    experiment, experiment_source = _experiment(config)
    if config.uri is not None:
        return TrackingTarget(config.uri, False, experiment, "run file", experiment_source)
    if variable := os.environ.get(URI_VARIABLE):
        try:
            return TrackingTarget(checked_address(variable), False, experiment, URI_VARIABLE, experiment_source)
        except ValueError as error:
            raise ConfigError(f"{URI_VARIABLE}: {error}; or unset the variable") from None
    start = latest_start(output_dir / RECORD_NAME)
    if start is not None and (earlier := start.get("uri")) is not None:
        return TrackingTarget(earlier, False, experiment, "as when the run started", experiment_source)
    if on_shared_disk(output_dir):
        return TrackingTarget(None, True, experiment, "the run folder is on a network disk", experiment_source)
    return TrackingTarget(default_store(output_dir), True, experiment, "default: in the run folder", experiment_source)


def _experiment(config: TrackingConfig) -> tuple[str, str]:
    """Name of the experiment, and where it was configured."""
    if config.experiment is not None:
        return config.experiment, "run file"
    if variable := os.environ.get(EXPERIMENT_VARIABLE):
        if len(variable) > MAX_EXPERIMENT:
            raise ConfigError(f"{EXPERIMENT_VARIABLE}: {len(variable)} characters; MLflow allows {MAX_EXPERIMENT}")
        return variable, EXPERIMENT_VARIABLE
    return DEFAULT_EXPERIMENT, "default"
