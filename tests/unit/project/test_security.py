"""Untrusted files: opening them runs no code, and what is wrong with them is reported in one line.

Each test plants code that would create a file, the canary, if it were run. DeepSpeed's pickles are tested in
`test_saving.py`.
"""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import LANGUAGES, PreparedRun, run_values

from data_pipeline.config import SourceConfig
from data_pipeline.records import DataError
from data_pipeline.sources.index import build_index
from data_pipeline.text.chat import Chat
from data_pipeline.text.templates import TemplateConfig
from evals.xtreme.run_file import read_plan
from modeling.errors import ModelError
from modeling.loading import load_config, load_pretrained
from modeling.shifcon.language_vectors import LanguageVectors
from modeling.weights.untrusted import read_tokenizer
from modeling.weights.weight_files import stored_tensors
from modeling.xmixup.mixup_state import MixupState
from training.errors import ConfigError
from training.run_file import load_config as load_run_file
from training.run_file import resolved, validate
from training.run_folder.prepare import prepare

ROOT = Path(__file__).resolve().parents[3]
ROOMS = ("training", "modeling", "data_pipeline", "evals", "slurm")
CODE = "open({canary!r}, 'w').close()\n"


class Evil:
    """Creates the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return open, (self.canary, "w")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def evil(canary: Path) -> bytes:
    """A pickle that creates the canary when it is loaded, which is checked first."""
    content = pickle.dumps(Evil(canary))
    pickle.loads(content).close()
    assert canary.exists()
    canary.unlink()
    return content


@pytest.fixture
def model(tmp_path: Path, prepared_run: PreparedRun) -> Path:
    """A copy of a small model, which tests may damage."""
    return Path(shutil.copytree(prepared_run.prepared.model_dir, tmp_path / "model"))


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- pickles where weights and arrays are expected -----------------------------------------------------------


@pytest.mark.parametrize("load", [LanguageVectors.load, MixupState.load])
def test_a_pickle_in_place_of_vectors_is_refused(tmp_path: Path, evil: bytes, canary: Path, load: Any) -> None:
    file = tmp_path / "file.safetensors"
    file.write_bytes(evil)
    with pytest.raises(ModelError) as error:
        load(file)
    assert one_line(error).startswith(f"{file}: ")
    assert not canary.exists()


def test_a_pickle_in_place_of_weights_is_refused(model: Path, evil: bytes, canary: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(evil)
    with pytest.raises(ModelError, match="not a readable safetensors file") as error:
        stored_tensors(model)
    one_line(error)
    weights.unlink()
    (model / "pytorch_model.bin").write_bytes(evil)
    for load in (stored_tensors, lambda path: load_pretrained(path, None, "sdpa", "cpu")):  # type: ignore[arg-type]
        with pytest.raises(ModelError, match=r"only pytorch_model\.bin weights .*; convert once") as error:
            load(model)
        one_line(error)
    assert not canary.exists()


def test_a_pickle_beside_safetensors_is_not_read(model: Path, evil: bytes, canary: Path) -> None:
    import torch

    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (model / name).write_bytes(evil)
    load_pretrained(model, torch.float32, "sdpa", "cpu")
    assert not canary.exists()


@pytest.mark.parametrize("array", ["language", "by_language", "split"])
def test_pickled_arrays_of_an_index_are_rebuilt(tmp_path: Path, corpus: Path, canary: Path, array: str) -> None:
    source = SourceConfig.model_validate(run_values(corpus, tmp_path)["data"]["sources"][0])
    before = build_index([source], LANGUAGES, corpus, tmp_path / "index")
    (file,) = (tmp_path / "index").glob(f"*/{array}.npy")
    np.save(file, np.array([Evil(canary)], dtype=object), allow_pickle=True)
    after = build_index([source], LANGUAGES, corpus, tmp_path / "index")
    assert len(after) == len(before)
    assert after.record(3).id == before.record(3).id
    assert not canary.exists()


# --- models with custom code --------------------------------------------------------------------------------


def test_a_model_that_needs_its_own_code_is_refused(model: Path, canary: Path) -> None:
    (model / "evil.py").write_text(CODE.format(canary=str(canary)))
    config = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": own}))
    with pytest.raises(ModelError) as error:
        load_config(model)
    assert one_line(error).startswith(f"{model}: needs custom code, which is never run; use a model of a type")
    assert not canary.exists()


def test_a_known_model_is_opened_without_the_code_beside_it(model: Path, canary: Path) -> None:
    import torch

    (model / "evil.py").write_text(CODE.format(canary=str(canary)))
    config = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (model / "config.json").write_text(json.dumps({**config, "auto_map": own}))
    assert type(load_pretrained(model, torch.float32, "sdpa", "cpu")).__name__ == "LlamaForCausalLM"
    assert not canary.exists()


def test_a_kernel_that_a_config_names_is_not_fetched(model: Path) -> None:
    """transformers takes `attn_implementation` from config.json, and gets kernels, which are code, from the hub."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attn_implementation": "someone/evil-kernel"}))
    assert load_config(model)._attn_implementation is None


@pytest.mark.parametrize("where", ["auto_map", "tokenizer.json"])
def test_a_tokenizer_that_needs_its_own_code_is_refused(model: Path, evil: bytes, canary: Path, where: str) -> None:
    if where == "auto_map":
        (model / "evil.py").write_text(CODE.format(canary=str(canary)))
        config = json.loads((model / "tokenizer_config.json").read_text())
        config |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
        (model / "tokenizer_config.json").write_text(json.dumps(config))
        (model / "config.json").unlink()  # its model type would select a known tokenizer
    else:
        (model / "tokenizer.json").write_bytes(evil)
    with pytest.raises(ModelError, match="no usable tokenizer") as error:
        read_tokenizer(model)
    one_line(error)
    assert not canary.exists()


def test_a_chat_template_cannot_reach_python_objects(model: Path, canary: Path) -> None:
    tokenizer = read_tokenizer(model)
    tokenizer.chat_template = (
        "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    with pytest.raises(DataError) as error:
        Chat(tokenizer, TemplateConfig(name="chat"), ("en",))
    one_line(error)
    assert not canary.exists()


# --- data -----------------------------------------------------------------------------------------------------


def source_of(**values: Any) -> SourceConfig:
    columns = {"id": "id", "language": "language", "prompt": "question", "completion": "answer"}
    return SourceConfig.model_validate({"name": "planted", "columns": columns, **values})


@pytest.mark.parametrize(
    "values",
    [
        {"files": "rows.pkl"},
        {"files": "rows.parquet"},
        {"files": "rows.jsonl"},
        {"files": "rows.csv"},
        {"files": "rows.pkl", "format": "parquet"},
        {"hub": "pickled"},
        {"hub": "scripted"},
        {"hub": "saved"},
    ],
    ids=str,
)
def test_pickles_and_scripts_in_place_of_data_are_refused(
    tmp_path: Path, evil: bytes, canary: Path, values: dict[str, Any]
) -> None:
    data = tmp_path / "data"
    for folder in ("pickled", "scripted", "saved"):
        (data / folder).mkdir(parents=True)
    for name in ("rows.pkl", "rows.parquet", "rows.jsonl", "rows.csv", "pickled/train.pkl", "saved/data.arrow"):
        (data / name).write_bytes(evil)
    (data / "scripted" / "scripted.py").write_text(CODE.format(canary=str(canary)))
    (data / "saved" / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "0", "_split": "train"})
    )
    (data / "saved" / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError) as error:
        build_index([source_of(**values)], ("en",), data, tmp_path / "index")
    one_line(error)
    assert not canary.exists()


def test_a_column_of_pickled_objects_is_refused(tmp_path: Path, evil: bytes, canary: Path) -> None:
    rows = {"id": ["1"], "language": ["en"], "question": [evil], "answer": ["yes"]}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet:1: ") as error:
        build_index([source_of(files="rows.parquet")], ("en",), tmp_path, tmp_path / "index")
    one_line(error)
    assert not canary.exists()


# --- run files --------------------------------------------------------------------------------------------------

YAML_CODE = "!!python/object/apply:builtins.open [{canary}, w]"


def test_yaml_that_would_create_objects_is_refused(tmp_path: Path, canary: Path) -> None:
    code = YAML_CODE.format(canary=canary)
    file = tmp_path / "run.yaml"
    file.write_text(f"seed: {code}\n")
    with pytest.raises(ConfigError, match="not valid YAML") as error:
        load_run_file(file)
    one_line(error)
    file.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="the value is not valid YAML"):
        load_run_file(file, [f"seed={code}"])
    file.write_text(f"models: {code}\n")
    with pytest.raises(ConfigError, match="not valid YAML") as refused:
        read_plan(file, "xnli", "m", "zero-shot", ())
    one_line(refused)
    assert not canary.exists()


def test_names_in_a_run_file_reach_no_shell(tmp_path: Path, corpus: Path, canary: Path) -> None:
    """Folder names contain shell commands."""
    name = f"$(touch {canary.name}); `touch {canary.name}` 'x' \"y\""
    config = validate(run_values(corpus, tmp_path / name), "test")
    prepare(config)
    assert (tmp_path / name / "index").is_dir()
    assert not canary.exists()
    assert not (Path.cwd() / canary.name).exists()


# --- the source itself ------------------------------------------------------------------------------------------


def test_the_source_has_no_loader_that_runs_code() -> None:
    """A static check that no unsafe loader is called, which the tests above cannot show."""
    found = []
    files = [ROOT / "crosslift.py", *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [f"{file.name}:{node.lineno} {name}" for name in names if name in ("pickle", "dill", "joblib")]
            if isinstance(node, ast.Call):
                found += [f"{file.name}:{node.lineno} {problem}" for problem in _problems(node)]
    assert found == []


def _problems(call: ast.Call) -> list[str]:
    called = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    wrong = {"shell": "True", "trust_remote_code": "True", "allow_pickle": "True", "weights_only": "False"}
    problems = [f"{called}({name}={value})" for name, value in wrong.items() if given.get(name) == value]
    if called in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        problems.append(called)
    if called == "torch.load" and given.get("weights_only") != "True":
        problems.append("torch.load without weights_only=True")
    names = ("AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained", "AutoModel.from_pretrained")
    if called in names and given.get("trust_remote_code") != "False":
        problems.append(f"{called} without trust_remote_code=False")
    return problems


# --- secrets ------------------------------------------------------------------------------------------------------


def test_no_password_of_an_address_is_written(corpus: Path, tmp_path: Path) -> None:
    values = run_values(corpus, tmp_path / "run", **{"tracking.uri": "https://me:hunter2@host:5000/x"})
    values["data"]["sources"][0]["files"] = ["s3://key:hunter2@bucket/*.jsonl", "filecache::ftp://me:hunter2@host/a"]
    config = validate(values, "test")
    assert config.tracking.uri == "https://me:hunter2@host:5000/x"  # connecting needs the password
    written = resolved(config)
    assert "hunter2" not in json.dumps(written)
    assert written["tracking"]["uri"] == "https://host:5000/x"
    assert written["data"]["sources"][0]["files"] == ["s3://key@bucket/*.jsonl", "filecache::ftp://me@host/a"]
    assert written["data_dir"] == str(corpus)


def test_a_login_reaches_the_nested_run_through_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    from training.tracking.tracker import parent_run

    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # so that monkeypatch removes what the call sets
        monkeypatch.delenv(name)
    section = {"enabled": False, "uri": "http://me:hunter%402@127.0.0.1:9"}
    with parent_run(tmp_path / "run", section, {}) as (_, inside):
        assert inside["uri"] == "http://127.0.0.1:9"
        assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
        assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "hunter@2"
    assert "hunter" not in (tmp_path / "run" / "record.jsonl").read_text()
    database = {"enabled": False, "uri": "postgresql://me:hunter2@host/db"}
    with (
        pytest.raises(ConfigError, match=r"^tracking\.uri: holds a password") as error,
        parent_run(tmp_path / "other", database, {}),
    ):
        pass
    assert "hunter2" not in one_line(error)


@pytest.mark.parametrize(("arguments", "host"), [((), "127.0.0.1"), ((5001, "0.0.0.0"), "0.0.0.0")])
def test_the_mlflow_server_listens_on_localhost_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...], host: str
) -> None:
    from training.tracking import tracker as tracking
    from training.tracking import ui
    from training.tracking.config import TrackingConfig

    started: list[list[str]] = []

    class Server:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            started.append(command)

        def poll(self) -> int:
            return 0

        wait = poll

    tracker = tracking.Tracker(tmp_path / "run", TrackingConfig(enabled=False))
    tracker.start({}, {}, None)
    tracker.finish("FINISHED")
    monkeypatch.setattr(ui.subprocess, "Popen", Server)
    monkeypatch.setattr(ui, "_synced", lambda *_: None)
    monkeypatch.setattr(ui.signal, "signal", lambda *_: None)
    ui.serve_ui(tmp_path, *(arguments or (5999,)))
    (command,) = started
    assert command[command.index("--host") + 1] == host
