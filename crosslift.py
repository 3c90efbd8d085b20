"""The front door: the command line. Each command is a few lines that call a room.

Heavy imports happen inside commands, so that `--help` answers at once. Errors that the user can mend carry
`exit_status = 2` and are printed as one line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="crosslift lifts the languages that a language model is weak in.",
)  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at a run's data and its order.")
app.add_typer(data_app, name="data")

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="the run file, YAML")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="override its keys")]
Output = Annotated[Path, typer.Option("--output", help="folder to write; must not exist")]


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="ranks; default: visible GPUs, or 1")] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint's or run's folder")] = "auto",
    accept_changes: Annotated[bool, typer.Option(help="resume although data or config differ")] = False,
) -> None:
    """Train on this machine. Example: crosslift train configs/gsm8k-parallel.yaml data_dir=DIR --nproc 2"""
    from training.launch import launch, visible_gpus
    from training.prepare import prepare
    from training.run_file import load_config

    prepare(load_config(config, overrides or []))  # its errors come before any rank starts
    options = ["--resume", resume, *(["--accept-changes"] if accept_changes else [])]
    raise SystemExit(launch(config, overrides or [], nproc or visible_gpus() or 1, options))


@app.command()
def check(config: Config, overrides: Overrides = None) -> None:
    """All that can be known before a run. Example: crosslift check configs/gsm8k-parallel.yaml data_dir=DIR"""
    from training.run_file import load_config

    settings = load_config(config, overrides or [])  # its errors come before heavy imports
    from training.check import check_run

    for line in check_run(settings):
        print(line)


@data_app.command()
def inspect(
    config: Config,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="samples a language")] = 1,
) -> None:
    """A decoded sample a language, its label mask marked. Example: crosslift data inspect CONFIG --samples 2"""
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
) -> None:
    """What every rank reads, a JSON line a micro-batch. Example: crosslift data plan CONFIG --steps 100:102"""
    from training.errors import ConfigError
    from training.run_file import load_config

    first, colon, last = steps.partition(":")
    if not (colon and first.isdigit() and last.isdigit()):
        raise ConfigError(f"--steps {steps!r}: must be A:B, such as 0:10")
    settings = load_config(config, overrides or [])
    from training.check import plan_lines

    for line in plan_lines(settings, range(int(first), int(last)), world_size):
        print(json.dumps(line, ensure_ascii=False))


@app.command()
def tokenizer(config: Config, output: Output, overrides: Overrides = None) -> None:
    """Train the tokenizer that `tokenizer.train` describes. Example: crosslift tokenizer CONFIG --output DIR"""
    from training.errors import ConfigError
    from training.prepare import open_index, train_tokenizer_of
    from training.run_file import load_config

    if output.exists():
        raise ConfigError(f"--output {output}: exists already; give a new folder")
    settings = load_config(config, overrides or [])
    train_tokenizer_of(settings, open_index(settings), output)
    print(output)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="a complete checkpoint, or a run's folder for its newest")],
    output: Output,
) -> None:
    """A checkpoint as a Hugging Face directory. Example: crosslift export runs/a --output runs/a/model-200"""
    from training.checkpoint import at

    found = at(checkpoint)
    from training.export import export_checkpoint

    print(export_checkpoint(found, output))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="export, Hugging Face directory or hub name")],
    prompt: Annotated[str | None, typer.Option(help="one question")] = None,
    file: Annotated[Path | None, typer.Option(help="JSONL: prompt, and optionally language")] = None,
    language: Annotated[
        str, typer.Option(help="the questions' language; auto: nearest vector; none: no shift")
    ] = "auto",
    response_language: Annotated[
        str | None, typer.Option(help="the answers'; default: the model's, else the same")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    num_beams: Annotated[int, typer.Option(min=1)] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON line an answer")] = False,
) -> None:
    """Answer questions, the shift on. Example: crosslift generate runs/a/model --language sw --prompt "..." """
    from evals.errors import EvalError
    from evals.opening import Question, answer, open_model, read_questions

    if (prompt is None) == (file is None):
        raise EvalError("give exactly one of --prompt and --file")
    questions = read_questions(file, language) if file else [Question(prompt or "", language, None)]
    if response_language:
        questions = [Question(each.text, each.language, response_language) for each in questions]
    generator, chat = open_model(model)
    bar = _progress(len(questions), "answers")
    for row in answer(generator, chat, questions, max_new_tokens=max_new_tokens, num_beams=num_beams,
                      batch_size=batch_size, progress=bar):  # fmt: skip
        print(json.dumps(row, ensure_ascii=False) if as_json else row["output"])


@app.command()
def eval(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="export, Hugging Face directory or hub name")],
    output: Annotated[Path, typer.Option(help="folder for results.json and all raw outputs")],
    data_dir: Annotated[Path, typer.Option(help="folder with mgsm_XX.tsv")],
    tasks: Annotated[str, typer.Option(help="mgsm")] = "mgsm",
    languages: Annotated[str | None, typer.Option(help="comma-separated; default: all in the folder")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="problems a language")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 600,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    template: Annotated[
        Literal["alpaca", "model"], typer.Option(help="alpaca: the published protocol; model: the model's own")
    ] = "alpaca",
    as_json: Annotated[bool, typer.Option("--json", help="print results.json instead of the table")] = False,
) -> None:
    """Score a model. Example: crosslift eval runs/a/model --tasks mgsm --data-dir mgsm --output runs/a/mgsm"""
    from evals.errors import EvalError
    from evals.mgsm import evaluate_mgsm, find_files, mgsm_table, read_problems
    from evals.opening import open_model

    if tasks != "mgsm":
        raise EvalError(f"--tasks {tasks}: known tasks: mgsm")
    chosen = languages.split(",") if languages else None
    total = sum(len(read_problems(file)[:limit]) for file in find_files(data_dir, ".tsv", chosen).values())
    generator, chat = open_model(model, template=None if template == "model" else template)
    results = evaluate_mgsm(
        generator, chat, data_dir, output, languages=chosen, limit=limit, max_new_tokens=max_new_tokens,
        batch_size=batch_size, progress=_progress(total, "problems"),
    )  # fmt: skip
    print(json.dumps(results, ensure_ascii=False, indent=1) if as_json else mgsm_table({_model_name(model): results}))
    print(f"{output / 'results.json'}; every output: {output / 'predictions'}", file=sys.stderr)


@app.command()
def score(
    task: Annotated[str, typer.Argument(help="mgsm")],
    predictions: Annotated[Path, typer.Option(help="an evaluation's folder, or its predictions")],
    labels: Annotated[Path, typer.Option(help="folder with mgsm_XX.tsv")],
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Judge kept outputs anew. Example: crosslift score mgsm --predictions runs/a/mgsm --labels mgsm"""
    from evals.errors import EvalError
    from evals.mgsm import mgsm_table, score_mgsm
    from evals.numbers import RULES

    if task != "mgsm":
        raise EvalError(f"{task}: known tasks: mgsm")
    results = score_mgsm(predictions, labels)
    print(json.dumps(results, ensure_ascii=False, indent=1) if as_json else mgsm_table({"": results}, list(RULES)))


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="folder for data, runs and results")] = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option(help="of data, weights and order")] = 0,
) -> None:
    """The whole story at toy scale, on CPU, in minutes. Example: crosslift quickstart --output runs/quickstart"""
    from evals.quickstart import run_quickstart

    run_quickstart(output, seed)


@app.command()
def ui(
    runs: Annotated[Path, typer.Argument(metavar="[DIR]", help="folder that holds run folders")] = Path("runs"),
    port: Annotated[int, typer.Option(help="port on localhost")] = 5000,
) -> None:
    """Open MLflow's page on the runs. Example: crosslift ui runs --port 5001"""
    from training.tracking import serve_ui

    raise SystemExit(serve_ui(runs, port))


def main() -> None:
    """Entry point: one line and status 2 for what the user can mend."""
    try:
        app()
    except Exception as error:
        if getattr(error, "exit_status", None) != 2:
            raise
        print(f"crosslift: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _model_name(path: str) -> str:
    """What a table calls a model: the run's folder where it is a run's `model`."""
    here = Path(path)
    return here.resolve().parent.name if here.name == "model" else here.name


def _progress(total: int, unit: str) -> Callable[[int], object] | None:
    """A progress bar when a person watches, nothing when piped."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    return tqdm(total=total, unit=f" {unit}", dynamic_ncols=True).update


if __name__ == "__main__":
    main()
