"""MLflow gets the whole record once, and never delays the training loop. `test_run_record.py` tests the record."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from waiting import wait_for

from training.checks.metric_names import metric_names
from training.errors import ConfigError
from training.objectives.contrast import ContrastiveConfig
from training.objectives.shifcon import ShifConConfig
from training.provenance import git_state, source_tags, versions
from training.tracking.config import TrackingConfig, tracking_target
from training.tracking.mlflow_feed import STATE_NAME, RecordFeeder, sync_record
from training.tracking.mlflow_store import (
    MAX_KEY,
    MAX_PARAM,
    artifact_root,
    checked_address,
    default_store,
    metric_name,
    missing_folder,
    mlflow_key,
    on_shared_disk,
    open_client,
)
from training.tracking.run_record import RECORD_NAME, read_events
from training.tracking.tracker import Tracker
from training.tracking.ui import _serve, serve_ui

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, which MLflow takes seconds to create."""
    folder = tmp_path_factory.mktemp("store")
    open_client(default_store(folder)).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def run(tmp_path: Path, migrated: Path) -> Path:
    """A run folder with an empty store in it."""
    folder = tmp_path / "my run"
    folder.mkdir()
    shutil.copy(migrated, folder / "mlflow.db")
    return folder


def tracked(folder: Path, resumed_step: int | None = None, params: Any = None, **config: Any) -> Tracker:
    tracker = Tracker(folder, TrackingConfig(sync_seconds=0.05, **config))
    tracker.start(params or {"lr": 1e-4}, {"host": "here"}, resumed_step)
    return tracker


def stored(folder: Path) -> tuple[Any, Any]:
    """The client of the folder's store and its only run."""
    client = open_client(default_store(folder))
    (experiment,) = [e for e in client.search_experiments() if e.name == "crosslift"]
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found


def history(folder: Path, name: str) -> list[tuple[int, float]]:
    client, found = stored(folder)
    return sorted((m.step, m.value) for m in client.get_metric_history(found.info.run_id, name))


# --- names, addresses, config -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train/loss/zh", "a//b", "/a", "../a", "a/../b", "a,b", "损失", "", ".", "x" * 400])
def test_mlflow_accepts_every_cleaned_name(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    key = mlflow_key(name)
    _validate_metric_name(key)
    assert 0 < len(key) <= MAX_KEY
    if name == "train/loss/zh":
        assert key == name


def test_artifacts_are_beside_the_database(tmp_path: Path) -> None:
    assert artifact_root(tmp_path, default_store(tmp_path / "a b")) == (tmp_path / "a b/mlartifacts").as_uri()
    assert artifact_root(tmp_path, "https://host") is None


@pytest.mark.parametrize("name", ["a?b", "a?b=c", "100%", "%41", "a#b", "[v1] a*{b}?#é"])
def test_the_store_is_in_the_run_folder_whatever_its_name(tmp_path: Path, name: str) -> None:
    """`?` begins the options of an address: unescaped, the database would be outside the run folder."""
    from sqlalchemy import make_url

    folder = tmp_path / name
    address = default_store(folder)
    assert make_url(address).database == str(folder / "mlflow.db")
    assert not make_url(address).query
    assert missing_folder(address) == folder
    folder.mkdir()
    assert missing_folder(address) is None
    assert artifact_root(tmp_path, address) == (folder / "mlartifacts").as_uri()
    assert checked_address(address) == address


def test_a_new_store_is_in_the_run_folder_whatever_its_name(
    tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both while it is created under a temporary name and when it is opened."""
    folder = tmp_path / "a?b%41#c"
    folder.mkdir()
    shutil.copy(migrated, folder / ".incomplete-mlflow.db")
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # MLflow would take seconds to create the tables
    open_client(default_store(folder)).create_experiment("mine")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert {"mlflow.db"} == {path.name for path in folder.glob("*.db")}
    with sqlite3.connect(folder / "mlflow.db") as store:
        assert store.execute("select name from experiments where name = 'mine'").fetchall() == [("mine",)]


def test_the_server_of_ui_leaves_no_misread_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a?b"
    folder.mkdir()

    class Server:
        """MLflow's server, which creates the folder of its store."""

        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            Path(command[command.index("--backend-store-uri") + 1].removeprefix("sqlite:///")).parent.mkdir()

        def poll(self) -> None: ...

        def wait(self) -> int:
            return 0

    monkeypatch.setattr("training.tracking.ui.subprocess.Popen", Server)
    monkeypatch.setattr("training.tracking.ui.signal.signal", lambda *_: None)
    monkeypatch.setattr("training.tracking.ui.server_answers", lambda *_, **__: True)
    assert _serve(default_store(folder), folder, 5000, "127.0.0.1", [], False) == 0
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_network_disks_are_recognised(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    lines = [
        "tmp /shared\\040disk/own tmpfs rw 0 0",
        "server:/x /shared\\040disk nfs4 rw 0 0",
        "root / ext4 rw 0 0",
    ]
    mounts.write_text("\n".join(lines))
    assert not on_shared_disk(Path("/home/run"), mounts)
    assert on_shared_disk(Path("/shared disk/run"), mounts)
    assert not on_shared_disk(Path("/shared disk/own/run"), mounts)
    assert not on_shared_disk(Path("/shared disk"), tmp_path / "missing")


def test_a_network_disk_gets_a_record_and_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("training.tracking.config.on_shared_disk", lambda folder: True)
    tracker = tracked(tmp_path)
    tracker.log(1, {"loss": 1.0})
    tracker.finish("FINISHED")
    assert "no store (the run folder is on a network disk)" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_NAME]


def test_invalid_config_is_refused() -> None:
    with pytest.raises(ValidationError, match="does not support such an address"):
        TrackingConfig(uri="localhost:5000")
    with pytest.raises(ValidationError, match="extra"):
        TrackingConfig(url="http://x")  # type: ignore[call-arg]


def test_creating_a_tracker_imports_neither_mlflow_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from training.tracking.tracker import *\n"
        f"Tracker(Path({str(tmp_path)!r}), TrackingConfig())\n"
        "print(sorted({'mlflow', 'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- feeding the store ----------------------------------------------------------------------------------------


def test_mlflow_is_imported_by_one_thread_at_a_time(run: Path) -> None:
    """Two threads that import parts of it break it for the process, so a feeder imports all of it first."""
    tracker = tracked(run)
    tracker.finish("FINISHED")  # the next feeder finds its run and does not create one
    code = f"""if True:
        import sys
        from pathlib import Path
        from training.tracking import mlflow_store
        from training.tracking.mlflow_feed import RecordFeeder
        class FirstImport:
            def find_spec(self, name, *_):
                if name.partition(".")[0] == "mlflow":
                    sys.meta_path.remove(self)
                    print(mlflow_store._importing.locked())
        sys.meta_path.insert(0, FirstImport())
        RecordFeeder(Path({str(run)!r}), {default_store(run)!r}).feed()
    """
    for known in (True, False):
        if not known:
            (run / STATE_NAME).unlink()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_a_run_is_sent_completely(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")  # as a strict server has it
    params = {f"p{i}": i for i in range(150)} | {"long": "x" * 7000}
    tracker = tracked(run, params=params)
    tracker.log(0, {f"train/loss/l{i}": float(i) for i in range(2500)})  # more than one log_batch accepts
    tracker.log(1, {"x": math.nan, "y": math.inf, "a,b": 1.0})
    (run / "plots").mkdir()
    (run / "plots" / "areas.txt").write_text("seen")
    tracker.artifact(run / "plots" / "areas.txt", "pictures")
    tracker.artifact(run / "plots")
    with pytest.raises(ValueError, match="subpath"):
        tracker.artifact(run.parent / "secret")
    tracker.finish("FINISHED")

    client, found = stored(run)
    first = next(read_events(run / RECORD_NAME))[1]
    assert (found.info.status, found.info.run_name, found.info.start_time) == (
        "FINISHED",
        "my run",
        first["time"],
    )
    assert found.info.end_time >= found.info.start_time
    assert len(found.data.params) == 151
    assert len(found.data.params["long"]) == MAX_PARAM
    assert found.data.params["long"].endswith("xxx ... [cut; whole in the artifact params.json]")
    whole = client.download_artifacts(found.info.run_id, "params.json")
    assert json.loads(Path(whole).read_text())["long"] == "x" * 7000
    assert found.data.tags["host"] == "here"
    assert history(run, "train/loss/l2499") == [(0, 2499.0)]
    assert math.isnan(history(run, "x")[0][1])
    assert history(run, "y")[0][1] > 1e308
    assert history(run, "a_b") == [(1, 1.0)]
    assert [f.path for f in client.list_artifacts(found.info.run_id, "pictures")] == ["pictures/areas.txt"]
    assert [f.path for f in client.list_artifacts(found.info.run_id)] == ["areas.txt", "params.json", "pictures"]
    assert (run / "mlartifacts").is_dir()
    result = sync_record(run)
    assert (result.fed, result.left, result.refused, result.error) == (0, 0, {}, None)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")  # nothing to report


def test_a_resume_continues_the_same_run_and_sends_only_what_differs(run: Path) -> None:
    tracker = tracked(run, params={"lr": 1, "seed": 0})
    for step in range(1, 6):
        tracker.log(step, {"loss": float(step), "nan": math.nan})
    tracker.finish("KILLED")
    first_id = stored(run)[1].info.run_id

    tracker = tracked(run, resumed_step=3, params={"lr": 2, "seed": 0})
    wait_for(lambda: stored(run)[1].info.status == "RUNNING")
    for step in range(4, 8):
        tracker.log(step, {"loss": 50.0 if step == 5 else float(step), "nan": math.nan})
    tracker.finish("FINISHED")

    _, found = stored(run)
    assert found.info.run_id == first_id
    assert found.info.status == "FINISHED"
    assert history(run, "loss") == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (5, 50), (6, 6), (7, 7)]
    assert [step for step, _ in history(run, "nan")] == list(range(1, 8))
    assert (found.data.params, found.data.tags["resumed.lr"]) == ({"lr": "1", "seed": "0"}, "2")
    assert "resumed.seed" not in found.data.tags
    assert len({e["id"] for _, e in read_events(run / RECORD_NAME) if e["kind"] == "start"}) == 1


def test_a_run_that_waits_for_its_next_job_is_scheduled_and_then_running_again(run: Path) -> None:
    tracker = tracked(run)
    tracker.log(1, {"loss": 1.0})
    tracker.finish("SCHEDULED")
    _, waiting = stored(run)
    assert (waiting.info.status, waiting.info.end_time) == ("SCHEDULED", None)

    tracker = tracked(run, resumed_step=1)
    wait_for(lambda: stored(run)[1].info.status == "RUNNING")
    tracker.log(2, {"loss": 2.0})
    tracker.finish("FINISHED")
    _, found = stored(run)
    assert (found.info.run_id, found.info.status) == (waiting.info.run_id, "FINISHED")
    assert found.info.end_time >= found.info.start_time
    assert history(run, "loss") == [(1, 1.0), (2, 2.0)]


def test_an_interrupted_replay_is_not_sent_twice(run: Path) -> None:
    """A feeder that starts in the middle of a replay still finds what was recorded before the resume."""
    first = tracked(run, enabled=False)
    for step in range(1, 5):
        first.log(step, {"loss": float(step)})
    first.finish("KILLED")
    second = tracked(run, resumed_step=2, enabled=False)
    second.log(3, {"loss": 3.0})
    sync_record(run)
    second.log(4, {"loss": 4.0})
    second.log(5, {"loss": 5.0})
    sync_record(run)
    assert history(run, "loss") == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]


@pytest.mark.parametrize("damage", ["missing", "garbage", "cursor behind the end"])
def test_after_the_loss_of_tracking_json_nothing_is_sent_twice(run: Path, damage: str) -> None:
    tracker = tracked(run)
    tracker.log(1, {"loss": 1.0, "bad": math.nan})
    tracker.finish("FINISHED")
    state = run / STATE_NAME
    if damage == "missing":
        state.unlink()
    elif damage == "garbage":
        state.write_text("{")
    else:
        content = json.loads(state.read_text())
        content["stores"][default_store(run)]["cursor"] = 10**6
        state.write_text(json.dumps(content))
    tracked(run, resumed_step=1, enabled=False).log(2, {"loss": 2.0})
    result = sync_record(run)
    assert (result.left, result.error, result.refused) == (0, None, {})
    assert history(run, "loss") == [(1, 1.0), (2, 2.0)]  # `stored` asserts that there is one run
    assert len(history(run, "bad")) == 1


def test_a_deleted_store_is_filled_again(run: Path, migrated: Path) -> None:
    tracker = tracked(run)
    tracker.log(1, {"loss": 1.0})
    tracker.finish("FINISHED")
    shutil.copy(migrated, run / "mlflow.db")
    assert sync_record(run).error is None
    assert history(run, "loss") == [(1, 1.0)]


def test_a_run_deleted_in_mlflow_is_restored_only_when_it_resumes(run: Path) -> None:
    tracker = tracked(run)
    tracker.finish("FAILED")
    client, found = stored(run)
    client.delete_run(found.info.run_id)
    assert sync_record(run).error is None
    assert client.get_run(found.info.run_id).info.lifecycle_stage == "deleted"
    tracker = tracked(run)
    tracker.log(1, {"loss": 1.0})
    tracker.finish("FINISHED")
    assert history(run, "loss") == [(1, 1.0)]


def test_values_refused_by_mlflow_do_not_block_the_rest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = tracked(run, enabled=False)
    tracker.log(1, {"loss": 1.0})
    with (run / RECORD_NAME).open("a") as file:
        file.write('{"time": -5, "kind": "metrics", "step": 2, "values": {"loss": 2.0}}\n')
        file.write("not json\n")
        file.write('{"time": 5, "kind": "artifact", "path": "../outside.txt", "folder": ""}\n')
    (run.parent / "outside.txt").write_text("")
    tracker = tracked(run)
    tracker.artifact(run / "never-written.png")
    tracker.log(3, {"loss": 3.0})
    tracker.finish("FINISHED")
    assert history(run, "loss") == [(1, 1.0), (3, 3.0)]
    assert stored(run)[1].info.status == "FINISHED"
    assert "4 items" in capsys.readouterr().err


def test_an_artifact_that_fails_blocks_neither_metrics_nor_the_next_artifact(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = tracked(run, enabled=False)
    for name in ("first", "second"):
        (run / name).write_text(name)
        tracker.artifact(run / name)
    tracker.log(1, {"loss": 1.0})
    client = open_client(default_store(run))
    upload = type(client).log_artifact

    def failing(self: Any, run_id: str, path: str, folder: str | None) -> None:
        if path.endswith("first"):
            raise OSError("no space there")
        upload(self, run_id, path, folder)

    with monkeypatch.context() as patch:
        patch.setattr(type(client), "log_artifact", failing)
        feeder = RecordFeeder(run, default_store(run))
        for _ in range(2):
            with pytest.raises(OSError, match="no space there"):
                feeder.feed()
    assert history(run, "loss") == [(1, 1.0)]
    client, found = stored(run)
    assert [f.path for f in client.list_artifacts(found.info.run_id)] == ["second"]
    result = sync_record(run)
    assert (result.left, result.error) == (0, None)
    assert [f.path for f in client.list_artifacts(found.info.run_id)] == ["first", "second"]


def test_each_store_has_its_own_cursor(run: Path, tmp_path: Path, migrated: Path) -> None:
    tracker = tracked(run)
    tracker.log(1, {"loss": 1.0})
    tracker.finish("FINISHED")
    shutil.copy(migrated, tmp_path / "mlflow.db")
    assert sync_record(run, default_store(tmp_path)).fed == 5
    assert sync_record(run, default_store(tmp_path)).fed == 0
    assert sync_record(run).fed == 0
    assert history(tmp_path, "loss") == [(1, 1.0)]


# --- MLflow never delays the training loop ---------------------------------------------------------------------


def test_a_server_that_never_responds_delays_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        tracker = tracked(tmp_path, uri=f"http://me:secret@127.0.0.1:{silent.getsockname()[1]}")
        longest = 0.0
        for step in range(200):
            at = time.monotonic()
            tracker.log(step, {"loss": 1.0})
            longest = max(longest, time.monotonic() - at)
            time.sleep(0.01)
        tracker.finish("FINISHED", timeout=5)
        took = time.monotonic() - began
    assert longest < 0.5
    assert took < 20
    err = capsys.readouterr().err
    assert "crosslift ui" in err
    assert "204 lines" in err  # start, params, tags, 200 metrics, finish
    assert "secret" not in err + (tmp_path / RECORD_NAME).read_text()
    assert err.count("\n") == 2


def test_log_takes_less_than_a_millisecond(tmp_path: Path) -> None:
    tracker = tracked(tmp_path, enabled=False)
    metrics = {f"train/loss/{i}": float(i) for i in range(50)}
    began = time.process_time()
    for step in range(500):
        tracker.log(step, metrics)
    assert (time.process_time() - began) / 500 < 1e-3


# --- how a run looks in MLflow ---------------------------------------------------------------------------------


def test_an_experiment_has_the_kind_of_model_training(run: Path) -> None:
    """Without the tag, MLflow 3 opens an experiment as an application's, with traces and without runs."""
    tracked(run).finish("FINISHED")
    client, found = stored(run)
    tags = client.get_experiment(found.info.experiment_id).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"


@pytest.mark.parametrize("kind", [None, "genai_development"])
def test_an_existing_experiment_gets_the_kind_unless_it_has_one(run: Path, kind: str | None) -> None:
    client = open_client(default_store(run))
    number = client.create_experiment("crosslift", tags={"mlflow.experimentKind": kind} if kind else None)
    tracked(run).finish("FINISHED")
    assert client.get_experiment(number).tags["mlflow.experimentKind"] == (kind or "custom_model_development")


def test_the_loss_is_charted_first_and_the_hash_is_not_sent(run: Path) -> None:
    """MLflow sorts charts by the part before the last slash."""
    metrics = (
        "data/overlong", "data/step_fingerprint", "eval/loss", "eval/loss/sw", "guard/skipped", "memory/host_peak_gib",
        "score/mgsm/accuracy/sw", "shift/norm/sw", "train/loss", "train/loss/sw", "train/learning_rate",
    )  # fmt: skip
    tracker = tracked(run)
    tracker.log(1, dict.fromkeys(metrics, 7.0))
    tracker.finish("FINISHED")
    sent = stored(run)[1].data.metrics
    sections = sorted({name.rpartition("/")[0] for name in sent})
    assert sections[0] == "train"
    assert {"train/loss", "train/learning_rate", "train/loss/sw"} <= set(sent)
    assert len(sent) == len(metrics) - 1
    assert not [name for name in sent if "fingerprint" in name]


def test_no_metric_of_a_run_is_charted_before_its_loss() -> None:
    objective = ShifConConfig(name="shifcon", layers=(1, 3), contrastive=ContrastiveConfig(weight=0.1, scale=10))
    names = metric_names(objective, ["en", "sw"], swapped_prompts=True)
    names += ["shift/norm/sw", "guard/skipped", "ranks/slowest", "score/mgsm/n/sw"]
    sent = [sent for name in names if (sent := metric_name(name)) is not None]
    assert min(name.rpartition("/")[0] for name in sent) == "train"


@pytest.mark.parametrize("names", [("বাংলা", "বিংলি"), ("हिन्दी", "ไทย"), ("中文", "日本語"), ("a,b", "a b")])
def test_languages_of_any_script_have_different_names_in_mlflow(names: tuple[str, str]) -> None:
    first, second = (mlflow_key(f"train/loss/{name}") for name in names)
    assert first != second
    assert "__" not in first + second


def test_user_run_file_and_commit_are_tags(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/src/training/__main__.py", "configs/mine.yaml", "model.path=x.yaml"])
    monkeypatch.setattr("getpass.getuser", lambda: "kim")
    tracker = Tracker(run, TrackingConfig())
    tracker.start({}, {"commit": "abc"}, None)
    tracker.finish("FINISHED")
    tags = stored(run)[1].data.tags
    assert tags["mlflow.user"] == "kim"
    assert (tags["mlflow.source.name"], tags["mlflow.source.type"]) == ("configs/mine.yaml", "LOCAL")
    assert tags["mlflow.source.git.commit"] == "abc"


def test_a_user_without_a_name_is_given_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert source_tags()["mlflow.user"] == str(os.getuid())


def test_a_deleted_experiment_is_reported_and_used_once_restored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = open_client(default_store(run))
    number = client.create_experiment("deleted once")
    client.delete_experiment(number)
    tracker = tracked(run, experiment="deleted once")
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish("FINISHED")
    printed = capsys.readouterr().err
    assert "the experiment 'deleted once' is deleted there" in printed
    assert f"mlflow experiments restore -x {number}" in printed
    assert "tracking.experiment" in printed
    assert "'deleted once' is deleted" in (sync_record(run).error or "")
    client.restore_experiment(number)
    assert sync_record(run).error is None
    (found,) = client.search_runs([number])
    assert found.data.metrics == {"train/loss": 1.0}
    client.delete_experiment(number)  # with the run in it
    tracker = tracked(run, resumed_step=1, experiment="deleted once")
    tracker.finish("FINISHED")
    assert "'deleted once' is deleted" in capsys.readouterr().err


# --- store and experiment ---------------------------------------------------------------------------------------


def test_store_and_experiment_from_the_environment(
    run: Path, tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    shutil.copy(migrated, tmp_path / "shared.db")
    store = f"sqlite:///{tmp_path}/shared.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the team")
    tracked(run).finish("FINISHED")
    assert f"MLflow: {store} (MLFLOW_TRACKING_URI), experiment 'of the team' (MLFLOW_EXPERIMENT_NAME)" in caplog.text
    client = open_client(store)
    (found,) = client.search_runs([client.get_experiment_by_name("of the team").experiment_id])
    assert found.info.run_name == "my run"
    assert list(json.loads((run / STATE_NAME).read_text())["stores"]) == [store]

    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # a resume from another shell continues the same MLflow run
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    tracked(run, resumed_step=1).finish("FINISHED")
    assert "(as when the run started)" in caplog.text
    assert list(json.loads((run / STATE_NAME).read_text())["stores"]) == [store]
    assert len(client.search_runs([found.info.experiment_id])) == 1


def test_the_run_file_takes_precedence_over_the_environment(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush77@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the team")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "3")
    config = TrackingConfig(uri=default_store(run), experiment="mine")
    assert str(tracking_target(config, run)) == (
        f"MLflow: {default_store(run)} (run file), experiment 'mine' (run file); MLFLOW_EXPERIMENT_ID is not read"
    )
    assert str(tracking_target(TrackingConfig(), run)).startswith("MLflow: http://127.0.0.1:9 (MLFLOW_TRACKING_URI)")
    off = Tracker(run, TrackingConfig(enabled=False))
    off.start({}, {}, None)
    off.finish("FINISHED")
    assert "hush77" not in (run / RECORD_NAME).read_text() + capsys.readouterr().err
    assert next(read_events(run / RECORD_NAME))[1]["uri"] is None


@pytest.mark.parametrize("value", ["localhost:5000", "./mlruns", "htp://host"])
def test_a_variable_with_an_invalid_address_is_named(run: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
    with pytest.raises(ConfigError, match=r"^MLFLOW_TRACKING_URI: .*; write http://.*; or unset the variable$"):
        tracked(run)
    assert not (run / RECORD_NAME).exists()
    Tracker(run, TrackingConfig(enabled=False)).start({}, {}, None)  # nothing is sent, so it does not matter


def test_mlflow_variables_of_the_shell_do_not_reach_tests() -> None:
    code = "import conftest, os; print([name for name in os.environ if name.startswith('MLFLOW_')])"
    shell = {"MLFLOW_TRACKING_URI": "http://x", "MLFLOW_EXPERIMENT_NAME": "x", "PYTHONPATH": f"{ROOT}/tests:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | shell, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- crosslift ui, versions and git state -----------------------------------------------------------------


def test_ui_needs_runs_and_a_free_port(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=RECORD_NAME):
        serve_ui(tmp_path)
    with pytest.raises(ConfigError, match="holds no run"):
        sync_record(tmp_path)
    tracked(tmp_path / "run", enabled=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="in use"):
            serve_ui(tmp_path, port=taken.getsockname()[1])


def test_git_state_is_clean_dirty_or_absent(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {}

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    assert git_state(tmp_path) == {}  # a checkout without a commit
    (tmp_path / "a.py").write_text("")
    git("add", ".")
    git("commit", "-m", "first")
    clean = git_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] == "false"
    (tmp_path / "a.py").write_text("changed")
    assert git_state(tmp_path) == {"commit": clean["commit"], "dirty": "true"}
    (tmp_path / "package").mkdir()
    assert git_state(tmp_path / "package") == {}


def test_versions_are_those_installed() -> None:
    import transformers

    found = versions()
    assert found["transformers"] == transformers.__version__
    assert found["python"].count(".") == 2
