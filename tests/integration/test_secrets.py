"""A whole run with secrets in its environment: none of them is in the run folder, in MLflow's store, or printed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from training.tracking.mlflow_feed import sync_record
from training.tracking.mlflow_store import default_store

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {
    "HF_TOKEN": "hf_canary1",
    "HUGGING_FACE_HUB_TOKEN": "hf_canary2",
    "MLFLOW_TRACKING_PASSWORD": "canary3",
    "MLFLOW_TRACKING_TOKEN": "canary4",
    "AWS_SECRET_ACCESS_KEY": "canary5",
    "WANDB_API_KEY": "canary6",
}


def test_a_run_writes_no_secret(tmp_path: Path, run_file: Callable[..., Path]) -> None:
    config = run_file(
        tmp_path,
        max_steps=2,
        tracking={"enabled": True, "uri": "http://me:canary7@127.0.0.1:9", "sync_seconds": 0.1},
    )
    environment = {**os.environ, **SECRETS, "PYTHONPATH": str(ROOT), "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "crosslift.py"), "train", str(config), "--nproc", "1"],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    assert sync_record(run, default_store(tmp_path)).error is None  # MLflow's store, with params, tags, artifacts
    assert "127.0.0.1:9" in (run / "config.yaml").read_text()
    written = [path for path in (*run.rglob("*"), *tmp_path.glob("mlflow.db*"), *(tmp_path / "mlartifacts").rglob("*"))
               if path.is_file()]  # fmt: skip
    assert {"record.jsonl", "config.yaml", "state.json", "mlflow.db"} <= {path.name for path in written}
    leaks = [path.relative_to(tmp_path).as_posix() for path in written if b"canary" in path.read_bytes()]
    assert leaks == []
    assert "canary" not in done.stdout + done.stderr
