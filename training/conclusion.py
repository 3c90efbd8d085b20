"""The end of a run after its last step: its export, and the state in the record and in MLflow.

Rank 0 calls `conclude` after the other ranks have ended. The record ends as FINISHED only with an export that passed
its check, otherwise as FAILED, with tags that state that training finished and what happened to the export. A process
that is killed during its export leaves a record without an end; the same command then makes the export.
"""

from __future__ import annotations

import traceback
from pathlib import Path

from modeling.export_info import RUN_EXPORT
from training.checkpoints.export import export_newest
from training.checkpoints.run_state import RunState
from training.config import RunConfig
from training.errors import ExportCheckFailed, NotExported
from training.launch import logs
from training.provenance import description
from training.run_file import resolved
from training.tracking.run_record import RECORD_NAME, read_events
from training.tracking.tracker import Tracker

TRAINING_TAG, EXPORT_TAG = "crosslift.training", "crosslift.export"


def conclude(config: RunConfig, last: Path, tracker: Tracker | None) -> None:
    """Export the checkpoint `last` to `model/` in the run folder, then end the record.

    Args:
        tracker: the run's open record; None if this start found all steps done. The record is then reopened if the
            export was made now or the record does not end as finished.

    Raises:
        ExportCheckFailed: training finished and the export is kept, but it failed its check.
        NotExported: training finished, but there is no export.
    """
    try:
        made = export_newest(last, config.output_dir / RUN_EXPORT)
    except KeyboardInterrupt:
        if tracker is not None:
            tracker.finish("KILLED")
        raise
    except ExportCheckFailed as error:
        _end(config, last, tracker, f"kept, but its check failed: {str(error).partition('failed: ')[2]}")
        raise ExportCheckFailed(f"training finished, all steps are saved; {error}") from error
    except Exception as error:
        if getattr(error, "exit_status", None) is None and not isinstance(error, OSError):
            logs.report_failure(traceback.format_exc().rstrip())
        reason = " ".join(str(error).split()) or type(error).__name__
        _end(config, last, tracker, f"none: {reason}")
        raise NotExported(
            f"training finished, but there is no export: {reason}; all steps are saved in {last}, and the same command "
            "exports them"
        ) from error
    if made or tracker is not None or not _ends_as_finished(config.output_dir):
        _end(config, last, tracker, None)


def _end(config: RunConfig, last: Path, tracker: Tracker | None, trouble: str | None) -> None:
    if tracker is None:
        tracker = Tracker(config.output_dir, config.tracking)
        tracker.start(resolved(config), description(), resumed_step=RunState.read(last).step)
    tracker.tags({TRAINING_TAG: "finished", EXPORT_TAG: trouble or "passed its check"})
    tracker.finish("FAILED" if trouble else "FINISHED")


def _ends_as_finished(output_dir: Path) -> bool:
    record = output_dir / RECORD_NAME
    ends = [event["status"] for _, event in read_events(record) if event["kind"] == "finish"] if record.exists() else []
    return not record.exists() or ends[-1:] == ["FINISHED"]
