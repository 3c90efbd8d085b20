"""`crosslift prefetch` from a fake hub, and a run that trains offline from the fetched files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import SHA, Hub, serving
from fake_slurm import FakeSlurm
from tiny_run import LANGUAGES, PreparedRun, run_values, write_config
from warm import Warm

from training.config import RunConfig
from training.engine.ops import build_ops, prebuilt, required_ops
from training.errors import ConfigError
from training.run_file import validate

ROOT = Path(__file__).resolve().parents[2]
MODEL, DATA = "tiny/llama", "tiny/problems"
# What a command imports, without the libraries that read HF_HOME and HF_HUB_OFFLINE when they are imported.
WARM = Warm(
    "torch", "torch._dynamo.aot_compile", "torch._inductor.test_operators", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "torch.distributed.tensor", "scipy.optimize", "pandas", "pyarrow.parquet", "tokenizers",
    "sentencepiece", "regex", "httpx2", "fsspec", "dill", "multiprocess", "training.prefetch",
)  # fmt: skip
READ_WHEN_IMPORTED = ("huggingface_hub", "transformers", "datasets", "accelerate")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, prepared_run: PreparedRun, corpus: Path) -> Iterator[Hub]:
    """A model with additional files that loading does not need, and a data set of JSON lines."""
    root = tmp_path_factory.mktemp("hub")
    model, data = root / "models" / MODEL, root / "datasets" / DATA
    shutil.copytree(prepared_run.prepared.model_dir, model)
    for name in ("consolidated.safetensors", "onnx/weights.safetensors", "pytorch_model.bin", "README.md"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"not needed")
    data.mkdir(parents=True)
    (data / "train.jsonl").write_text("".join((corpus / f"{each}.jsonl").read_text() for each in LANGUAGES))
    with serving(root) as hub:
        yield hub


def run_file(folder: Path, corpus: Path, model: str = MODEL, data: str | None = DATA, **changes: Any) -> Path:
    values = run_values(
        corpus, folder / "run", **{"model": {"path": model}, "tokenizer": {}, "max_steps": 2, **changes}
    )
    source = values["data"]["sources"][0]
    values["data"]["sources"] = [source if data is None else {"name": "p", "hub": data, "columns": source["columns"]}]
    return write_config(folder / "run.yaml", values)


def variables(**given: str) -> dict[str, str]:
    """This process's environment without the hub's variables, and the given ones."""
    return {**{k: v for k, v in os.environ.items() if not k.startswith("HF_")}, "PYTHONPATH": str(ROOT), **given}


def crosslift(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `crosslift` in a new process."""
    return subprocess.run(
        [sys.executable, str(ROOT / "crosslift.py"), *arguments],
        env=variables(**environment), cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def crosslift_warm(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same command, started by a process that has torch imported."""
    return WARM.run([str(ROOT / "crosslift.py"), *arguments], variables(**environment), timeout=300)


def site_file(folder: Path, cache: Path) -> dict[str, str]:
    """Variables with which `crosslift` finds a site's file that gives jobs this HF_HOME."""
    (folder / "crosslift").mkdir()
    (folder / "crosslift" / "slurm.yaml").write_text(f"gpus_per_node: 0\nenvironment: {{HF_HOME: '{cache}'}}\n")
    return {"XDG_CONFIG_HOME": str(folder)}


def submit_offline(config: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """With an unreachable hub, from a shell with an empty cache."""
    slurm = FakeSlurm(folder / "fake")
    return crosslift_warm("submit", str(config), "--offline", HF_ENDPOINT="http://127.0.0.1:9",
                          PATH=slurm.search_path, HF_HOME=str(folder / "mine"), **environment)  # fmt: skip


def test_warm_commands_have_imported_nothing_that_reads_the_variables_of_the_hub() -> None:
    code = f"import sys; print([name for name in {READ_WHEN_IMPORTED} if name in sys.modules])"
    assert WARM.run(["-c", code]).stdout == "[]\n"


def test_a_run_trains_from_the_cache_without_the_hub(hub: Hub, corpus: Path, tmp_path: Path) -> None:
    """The cache is the one that the site's file sets for jobs, not the shell's."""
    config, cache = run_file(tmp_path, corpus), tmp_path / "shared cache"
    site = site_file(tmp_path, cache)
    hub.requests.clear()
    done = crosslift("prefetch", str(config), HF_ENDPOINT=hub.address, HF_HOME=str(tmp_path / "mine"), **site)
    assert (done.returncode, done.stderr) == (0, "")
    snapshot = cache / "hub" / f"models--{MODEL.replace('/', '--')}" / "snapshots" / SHA
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"model: {MODEL}, hub, ")
    assert lines[0].endswith(f"in {snapshot}")
    assert lines[1].startswith(f"data 'p': {DATA}[train], hub, ")
    assert lines[2:] == [
        "opened again with HF_HUB_OFFLINE=1: model, tokenizer, data",
        f"jobs need: HF_HOME={cache} HF_HUB_OFFLINE=1",
    ]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in snapshot.iterdir()}
    fetched = " ".join(path for method, path, _ in hub.requests if method == "GET")
    assert not any(name in fetched for name in ("consolidated", "onnx", "pytorch_model.bin", "README.md"))

    submitted = submit_offline(config, tmp_path, **site)
    assert submitted.returncode == 0, submitted.stderr
    assert "ready to train" in submitted.stdout
    assert not (tmp_path / "mine").exists()

    # At another address there is no server, and the job sends no request.
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    trained = crosslift("train", str(config), "--nproc", "1", **offline)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_files_that_were_not_fetched_are_named_before_an_offline_job_is_queued(corpus: Path, tmp_path: Path) -> None:
    refused = submit_offline(run_file(tmp_path, corpus), tmp_path, **site_file(tmp_path, tmp_path / "empty"))
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    reason = "the download from the hub failed: Cannot find an appropriate cached snapshot"
    assert f"model {MODEL!r}: not a local directory, and {reason}" in refused.stderr
    assert not (tmp_path / "fake" / "sbatch.calls").exists()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nothing there", "model.path 'tiny/none': no directory here, and no such repository at http://127.0.0.1"),
        ("no data", "data.sources 'p': tiny/none: "),
        ("gated", "model.path 'tiny/llama': gated: accept its terms on its page, then set HF_TOKEN"),
        ("too large", "are to be fetched, but"),
        ("no network", "model.path 'tiny/llama': http://127.0.0.1:9 cannot be reached"),
        ("damaged", "fetched, but with HF_HUB_OFFLINE=1: "),
        ("offline", "HF_HUB_OFFLINE is set, so nothing can be fetched; unset it"),
    ],
)
def test_an_error_is_one_line_without_the_token(
    hub: Hub, corpus: Path, tmp_path: Path, case: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_file(
        tmp_path, corpus, "tiny/none" if case == "nothing there" else MODEL, "tiny/none" if case == "no data" else DATA
    )
    if case == "gated":
        monkeypatch.setattr(hub, "gated", {MODEL})
    if case == "too large":
        monkeypatch.setattr(hub, "sizes", {"model.safetensors": 10**16})
    if case == "damaged":
        weights = hub.root / "models" / MODEL / "model.safetensors"
        shutil.copytree(weights.parent, hub.root / "models" / "tiny" / "damaged")
        (hub.root / "models" / "tiny" / "damaged" / weights.name).write_bytes(weights.read_bytes()[:-9])
        config = run_file(tmp_path, corpus, "tiny/damaged")
    address = "http://127.0.0.1:9" if case == "no network" else hub.address
    start = crosslift if case == "nothing there" else crosslift_warm
    done = start(
        "prefetch", str(config), "--hf-home", str(tmp_path / "hf"), HF_ENDPOINT=address, HF_TOKEN="hf_verysecretvalue",
        HF_HUB_OFFLINE=str(int(case == "offline")),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert "verysecret" not in done.stdout + done.stderr
    if case == "gated":  # the right token is accepted, and written to no file
        again = crosslift_warm("prefetch", str(config), "--hf-home", str(tmp_path / "hf"), HF_ENDPOINT=hub.address,
                               HF_TOKEN="hf_right")  # fmt: skip
        assert again.returncode == 0, again.stderr
        assert "hf_right" not in again.stdout + again.stderr
        assert not any(b"hf_right" in path.read_bytes() for path in (tmp_path / "hf").rglob("*") if path.is_file())


def test_a_full_disk_is_one_line(hub: Hub, corpus: Path, small_disk: Path, tmp_path: Path) -> None:
    """By the reported sizes, the model fits; the data set fills the disk."""
    config = run_file(tmp_path, corpus)
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 250_000))
    done = crosslift_warm("prefetch", str(config), "--hf-home", str(small_disk / "hf"), HF_ENDPOINT=hub.address)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"no space left in {small_disk / 'hf'}" in done.stderr


def test_local_paths_are_reported_as_local(prepared_run: PreparedRun, corpus: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "mgsm"
    tasks.mkdir()
    (tasks / "mgsm_en.tsv").write_text("How many?\t3\nAnd now?\t4\n")
    config = run_file(tmp_path, corpus, prepared_run.prepared.model_dir, None)
    done = crosslift_warm("prefetch", str(config), "--tasks-dir", str(tasks), HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"model: {prepared_run.prepared.model_dir}, local, ")
    assert lines[1].startswith("data 'problems': 4 files, local, ")
    assert lines[-1] == f"tasks: 1 languages, 2 problems, local, in {tasks}"


@pytest.mark.parametrize(
    ("deepspeed", "ops"),
    [
        ({}, []),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["cpu_adam"]),
        (
            {
                "optimizer": {"params": {"torch_adam": True}},  # PyTorch's AdamW needs no op
                "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
            },
            [],
        ),
        (
            {
                "optimizer": {"params": {"torch_adam": False}},
                "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
            },
            ["cpu_adam"],
        ),
        ({"optimizer": {"params": {"torch_adam": False}}}, ["fused_adam"]),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, ["async_io"]),
        (
            {
                "optimizer": {"params": {"torch_adam": False}},
                "zero_optimization": {"offload_optimizer": {"device": "nvme"}},
            },
            ["cpu_adam", "async_io"],
        ),
    ],
)
def test_the_ops_that_settings_need(deepspeed: dict[str, Any], ops: list[str]) -> None:
    assert list(required_ops(config_with(deepspeed).deepspeed)) == ops


def test_an_optimizer_that_deepspeed_has_no_op_for_needs_none() -> None:
    offloaded = config_with({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}).deepspeed
    assert list(required_ops(offloaded, "radam")) == []


def test_a_missing_compiler_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with({"zero_optimization": {"offload_param": {"device": "nvme"}}})
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"--build-ops: async_io must be compiled, and there is no c\+\+ here; load"):
        list(build_ops(config.deepspeed))
    assert list(build_ops(config_with({}).deepspeed)) == ["DeepSpeed ops: none needed"]


def test_the_lock_of_a_killed_build_is_reported_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tool in ("c++", "ninja"):
        (tmp_path / tool).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(prebuilt()))
    lock = prebuilt() / "pin_memory" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    config = config_with({"zero_optimization": {"offload_param": {"device": "nvme"}}})
    with pytest.raises(ConfigError, match=f"--build-ops: {lock}: another build is running; if it was killed, remo"):
        list(build_ops(config.deepspeed))


def config_with(deepspeed: dict[str, Any]) -> RunConfig:
    return validate(run_values(Path("data"), Path("run"), deepspeed=deepspeed), "test")
