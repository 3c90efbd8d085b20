"""The command line. Each command is a few lines that call functions of the top-level packages.

Heavy imports happen inside commands, so that `--help` answers at once. Mistakes of the user are exceptions with
`exit_status = 2`, printed as one line.
"""

from __future__ import annotations

import functools
import importlib
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from data_pipeline.sources.paths import check_folder, expanded_path
from evals.commands import add_commands as add_evaluation
from evals.commands import xtreme_app
from slurm.commands import add_commands as add_slurm_commands

if TYPE_CHECKING:
    from modeling.shifted_model import load_shifted

__all__ = ["load_shifted"]  # of Python code; imported when it is used, since it needs torch


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("modeling.shifted_model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="crosslift improves the weaker languages of multilingual models.",
)  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Show a run's data and its order.")
app.add_typer(data_app, name="data")

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="run file, YAML")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="override keys of CONFIG")]
Output = Annotated[Path, typer.Option("--output", help="folder to create; must not exist")]


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="ranks; default: visible GPUs, or 1")] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or the folder of a checkpoint or run")] = "auto",
    accept_changes: Annotated[bool, typer.Option(help="resume even if data or config changed")] = False,
    profile: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="steps of which rank 0 writes a torch profiler trace")
    ] = None,
) -> None:
    """Train on this machine. Example: crosslift train configs/gsm8k-parallel.yaml data_dir=DIR --nproc 2"""
    from training.start import train as train_here

    raise SystemExit(train_here(config, overrides or (), nproc, resume, accept_changes, profile))


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="number of nodes of the planned run")] = 1,
    gpus_per_node: Annotated[
        str | None, typer.Option(metavar="[TYPE:]N", help="GPUs of each node; default: visible GPUs, or 1; 0: CPUs")
    ] = None,
    nproc_per_node: Annotated[int | None, typer.Option(min=1, help="ranks of each node, if not one per GPU")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GiB of a GPU; fails if the run does not fit")] = None,
    accept_changes: Annotated[bool, typer.Option(help="as for train: even if data or config changed")] = False,
    all_rows: Annotated[bool, typer.Option("--all-rows", help="read and tokenise every row")] = False,
    measured: Annotated[
        Path | None, typer.Option(metavar="RUN", help="run folder whose speed gives the time; default: the run's own")
    ] = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="speed of all ranks, instead of --measured")] = None,
) -> None:
    """Check data, model and memory before a run. Example: crosslift check CONFIG data_dir=DIR --gpus-per-node 8"""
    from slurm.site import load_settings
    from training.errors import ConfigError
    from training.run_file import load_config

    settings = load_config(config, overrides or [])  # errors are reported before heavy imports
    job = load_settings({"gpus_per_node": gpus_per_node, "nproc_per_node": nproc_per_node}, files=())
    from training.check import check_run
    from training.checks.forecast import GivenSpeed

    gpus = None if gpus_per_node is None else job.gpus
    if gpus == 0 and gpu_memory is not None:
        raise ConfigError("--gpu-memory: ranks on CPUs (--gpus-per-node 0) have no GPU; leave the option out")
    lines = check_run(
        settings, nodes=nodes, gpus_per_node=gpus, nproc_per_node=nproc_per_node, gpu_memory_gib=gpu_memory,
        accept_changes=accept_changes, all_rows=all_rows, speed=GivenSpeed(measured, tokens_per_second),
    )  # fmt: skip
    for line in lines:
        print(line)


@app.command()
def prefetch(
    config: Config,
    overrides: Overrides = None,
    hf_home: Annotated[
        Path | None, typer.Option(help="shared cache; default: HF_HOME of slurm.yaml's environment, or the shell's")
    ] = None,
    tasks_dir: Annotated[Path | None, typer.Option(help="folder with mgsm_XX.tsv files to check as well")] = None,
    build_ops: Annotated[bool, typer.Option("--build-ops", help="compile the DeepSpeed ops that it needs")] = False,
) -> None:
    """Download model, tokenizer and data for offline nodes. Example: crosslift prefetch CONFIG --hf-home /shared/hf"""
    from slurm.site import load_settings
    from training.prefetch import use_caches, use_hf_home
    from training.run_file import load_config

    settings = load_config(config, overrides or [])
    if hf_home is not None:
        use_hf_home(hf_home)
    else:
        use_caches(load_settings({}).environment)
    from training.engine import ops
    from training.prefetch import prefetch as fetch

    for line in fetch(settings):
        print(line, flush=True)
    if tasks_dir is not None:
        from evals.mgsm.mgsm import find_files, read_problems

        problems = [len(read_problems(file)) for file in find_files(tasks_dir, ".tsv", None).values()]
        print(f"tasks: {len(problems)} languages, {sum(problems):,} problems, local, in {tasks_dir}")
    if build_ops:
        for line in ops.build_ops(settings.deepspeed, settings.optimizer.name):
            print(line, flush=True)
    elif needed := ops.required_ops(settings.deepspeed, settings.optimizer.name):
        print(f"DeepSpeed ops to be compiled: {', '.join(needed)} (--build-ops compiles them before the job)")


@data_app.command()
def inspect(
    config: Config,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="samples of each language")] = 1,
) -> None:
    """Show decoded samples with their label masks. Example: crosslift data inspect CONFIG --samples 2"""
    from training.run_file import load_config

    settings = load_config(config, overrides or [])
    from training.check import inspect_data

    for line in inspect_data(settings, samples):
        print(line)


@data_app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    steps: Annotated[str, typer.Option(metavar="A:B", help="steps A to B-1")] = "0:1",
    world_size: Annotated[int, typer.Option(min=1, help="ranks")] = 1,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="by default all are on one node")] = None,
) -> None:
    """Print what every rank reads, as JSON lines. Example: crosslift data plan CONFIG --steps 100:102"""
    from training.errors import ConfigError
    from training.run_file import load_config

    first, colon, last = steps.partition(":")
    if not (colon and first.isdigit() and last.isdigit()):
        raise ConfigError(f"--steps {steps!r}: must be A:B, such as 0:10")
    settings = load_config(config, overrides or [])
    from training.check import plan_lines

    for line in plan_lines(settings, range(int(first), int(last)), world_size, ranks_per_node):
        print(json.dumps(line, ensure_ascii=False))


@app.command()
def tokenizer(config: Config, output: Output, overrides: Overrides = None) -> None:
    """Train the tokenizer described in `tokenizer.train`. Example: crosslift tokenizer CONFIG --output DIR"""
    from training.errors import ConfigError
    from training.run_file import load_config
    from training.run_folder.prepare import cache_folder, open_index, train_tokenizer_of

    if output.exists():
        raise ConfigError(f"--output {output}: exists already; give a new folder")
    settings = load_config(config, overrides or [])
    with cache_folder(settings.output_dir) as cache:
        train_tokenizer_of(settings.tokenizer.train, open_index(settings, cache), output, settings.seed)
    print(output)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="complete checkpoint, or a run folder for its newest")],
    output: Annotated[
        Path | None, typer.Option(help="folder to create; without it --push-to-hub uploads the export at CHECKPOINT")
    ] = None,
    bake: Annotated[
        str | None, typer.Option(metavar="CODE", help="one language's shift in the weights; also of an export")
    ] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="repository to upload to")] = None,
    private: Annotated[bool, typer.Option("--private", help="a new repository is private")] = False,
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="branch of the repository; made if new")] = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder. Example: crosslift export runs/a --output runs/a/model-200"""
    from training.errors import ConfigError

    if push_to_hub is None and (private or revision is not None):
        raise ConfigError(f"{'--private' if private else '--revision'}: goes with --push-to-hub, which is not given")
    if output is None and (push_to_hub is None or bake is not None):
        raise ConfigError("--output: missing; name a new folder")
    if push_to_hub is not None:
        from training.checkpoints.push import check_push

        check_push(push_to_hub)
    if output is None:
        from training.checkpoints.push import export_at

        made = export_at(checkpoint)
    elif bake is not None:
        from training.checkpoints.export import export_baked

        made = export_baked(checkpoint, bake, output)
    else:
        from training.checkpoints.export import export_checkpoint
        from training.checkpoints.search import checkpoint_at

        made = export_checkpoint(checkpoint_at(checkpoint, content=False), output)
    print(made)
    if push_to_hub is not None:
        from training.checkpoints.push import push

        print(push(made, push_to_hub, private=private, revision=revision))


@xtreme_app.command("run")
def xtreme_run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="composed run file, such as configs/xtreme.yaml")],
    task: Annotated[str, typer.Option(help="a name in CONFIG's tasks")],
    model: Annotated[str, typer.Option(help="a name in CONFIG's models")],
    method: Annotated[str, typer.Option(help="a name in CONFIG's methods")],
    data_dir: Annotated[Path, typer.Option(help="XTREME's files, or a folder that `xtreme prepare` wrote")],
    output: Annotated[Path, typer.Option(help="folder of the run; a second call resumes it")],
    overrides: Overrides = None,
    translations: Annotated[Path | None, typer.Option(help="folder of translation files")] = None,
    soft_labels: Annotated[Path | None, typer.Option(help="taggers: folder that `xtreme soft-labels` wrote")] = None,
    layout: Annotated[str, typer.Option(help="layout of the data: auto, download, hub, conllu, xmixup")] = "auto",
    baseline: Annotated[Path | None, typer.Option(help="output of another run, to compare the transfer gap")] = None,
    mixup: Annotated[Literal["auto", "on", "off"], typer.Option(help="mixing in prediction")] = "auto",
    unlabelled: Annotated[bool, typer.Option(help="test labels are erased: only predict")] = False,
    max_bad_rows: Annotated[int, typer.Option(min=0, help="questions per file whose answers may be misplaced")] = 0,
    nproc: Annotated[int | None, typer.Option(min=1, help="ranks; default: visible GPUs, or 1")] = None,
) -> None:
    """Fine-tune, select, predict, score. Example: crosslift xtreme run configs/xtreme.yaml --task xnli ..."""
    from evals.xtreme.run import run_xtreme
    from evals.xtreme.run_file import XtremeRun
    from training.run_folder.lock import held

    run = XtremeRun(
        config, task, model, method, data_dir, output, translations=translations, layout=layout,
        soft_labels=soft_labels, nproc=nproc, overrides=tuple(overrides or ()), mixup=mixup, baseline=baseline,
        unlabelled=unlabelled, max_bad_rows=max_bad_rows,
    )  # fmt: skip
    with held(output):
        run_xtreme(run)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="folder for data, runs and results")] = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="seed of data, weights and order")] = 0,
) -> None:
    """Run the method end to end at toy scale on CPUs. Example: crosslift quickstart --output runs/quickstart"""
    from evals.quickstart import run_quickstart
    from training.run_folder.lock import held

    with held(output):
        run_quickstart(output, seed)


@app.command()
def ui(
    runs: Annotated[Path, typer.Argument(metavar="[DIR]", help="folder with run folders")] = Path("runs"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 5000,
    host: Annotated[str, typer.Option(help="address to listen on; any but 127.0.0.1 is open to others")] = "127.0.0.1",
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="open a browser, if there is a display")
    ] = True,
) -> None:
    """Open the runs in MLflow. Example: crosslift ui runs --port 5001"""
    from training.tracking.ui import has_display, serve_ui

    raise SystemExit(serve_ui(runs, port, host, open_browser and has_display()))


def _with_expanded_paths(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command so that `~` and variables in its path options are expanded; no shell expands `--output=~/a`.

    An `--output` where no folder can be created is refused before the command starts.
    """

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> Any:
        for name, value in arguments.items():
            option = f"--{name.replace('_', '-')}"
            if isinstance(value, Path):
                arguments[name] = expanded_path(value, option)
            elif isinstance(value, list):
                arguments[name] = [expanded_path(each, option) if isinstance(each, Path) else each for each in value]
            if name == "output" and isinstance(value, Path):
                check_folder(arguments[name], option)
        return command(**arguments)

    return wrapped


def _expand_paths_in(group: typer.Typer) -> None:
    """Wrap all commands of a group and its subgroups."""
    for command in group.registered_commands:
        assert command.callback is not None
        command.callback = _with_expanded_paths(command.callback)
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        _expand_paths_in(inner.typer_instance)


add_evaluation(app)
add_slurm_commands(app)
_expand_paths_in(app)


def main() -> None:
    """Entry point. An exception with an `exit_status` (2: a mistake of the user) is printed as one line."""
    try:
        status = app(standalone_mode=False)
    except typer.Abort:  # Ctrl-C
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            raise SystemExit(2) from None
        if hasattr(error, "format_message"):  # a mistake in the command line
            print(f"crosslift: {' '.join(error.format_message().split())}", file=sys.stderr)
            raise SystemExit(2) from None
        if (status := getattr(error, "exit_status", None)) is None:
            raise
        print(f"crosslift: {error}", file=sys.stderr)
        raise SystemExit(status) from None
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
