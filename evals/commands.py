"""The commands `generate`, `eval`, `score` and `xtreme ...`; `xtreme run`, which trains, is in `crosslift.py`.

Heavy imports happen inside commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from data_pipeline.sources.paths import expanded

if TYPE_CHECKING:
    from modeling.generation import Sampling

xtreme_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="XTREME: data, runs, retrieval, analysis.")


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the app of `crosslift.py`."""
    for command in (generate, eval, score, probe):
        app.command()(command)
    app.add_typer(xtreme_app, name="xtreme")


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="run's folder, export, directory or hub name")],
    prompt: Annotated[str | None, typer.Option(help="one question")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="JSONL: prompt, or messages; optionally system, language, response_language; others are kept"
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="system message, if --file gives none")] = None,
    language: Annotated[
        str, typer.Option(help="of the questions, if --file gives none; auto: nearest vector; none: no shift")
    ] = "auto",
    response_language: Annotated[
        str | None, typer.Option(help="of the answers, if --file gives none; default: the model's, else the question's")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    num_beams: Annotated[int, typer.Option(min=1)] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="above 0: sample; 0: most likely token")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="sample from the likeliest tokens of this probability")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="sample from this many most likely tokens")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="seed of the samples")] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON line per answer")] = False,
) -> None:
    """Answer questions with the shift on. Example: crosslift generate runs/a --language sw --prompt "..." """
    from evals.errors import EvalError
    from evals.opening import Question, answer, open_model, read_questions, system_message, without_vector

    if (prompt is None) == (file is None):
        raise EvalError("give exactly one of --prompt and --file")
    sampling = _sampling(temperature, top_p, top_k, seed, num_beams)
    if file:
        questions = read_questions(file, language, response_language, system)
    else:
        questions = [Question(prompt or "", language, response_language, before=system_message(system))]
    generator, chat = open_model(expanded(model))
    rows = list(
        answer(
            generator, chat, questions, max_new_tokens=max_new_tokens, num_beams=num_beams, batch_size=batch_size,
            sampling=sampling,
        )
    )  # fmt: skip
    for row in rows:
        print(json.dumps(row, ensure_ascii=False) if as_json else row["output"])
    if unshifted := without_vector(generator, rows):
        print(f"no language vector: {', '.join(unshifted)} ran unshifted", file=sys.stderr)


def probe(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="export, directory or hub name")],
    data: Annotated[list[Path], typer.Option(help="CODE.txt (a sentence a line) or JSONL; may be repeated")],
    output: Annotated[Path, typer.Option(help="folder for JSON, vectors and plots")],
    dominant: Annotated[str, typer.Option(help="language that the others are compared with")] = "en",
    limit: Annotated[int | None, typer.Option(min=16, help="sentences of each language")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="most tokens of a sentence")] = 128,
    dtype: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="auto: bf16 on a GPU")] = "auto",
) -> None:
    """Compare languages at every layer. Example: crosslift probe DIR --data en.txt --data sw.txt --output OUT"""
    from evals.probe import probe as measure
    from evals.probe import probe_table, read_sentences, write_probe
    from training.distributed import evaluation_group, rank

    with evaluation_group():
        sentences = read_sentences(data, limit)
        report = measure(expanded(model), sentences, dominant=dominant, max_length=max_length, dtype=dtype)
        if rank() == 0:
            print(probe_table(report))
            print("  ".join(map(str, write_probe(report, output))))


def eval(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="run's folder, export, directory or hub name")],
    output: Annotated[Path, typer.Option(help="folder for results.json and all raw outputs")],
    data_dir: Annotated[Path, typer.Option(help="folder with mgsm_XX.tsv")],
    tasks: Annotated[str, typer.Option(help="mgsm")] = "mgsm",
    languages: Annotated[str | None, typer.Option(help="comma-separated; default: all in the folder")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="problems of each language")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 600,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    template: Annotated[
        Literal["alpaca", "model"], typer.Option(help="alpaca: the published protocol; model: the model's own")
    ] = "alpaca",
    as_json: Annotated[bool, typer.Option("--json", help="print results.json instead of the table")] = False,
) -> None:
    """Score a model. Example: crosslift eval runs/a/model --tasks mgsm --data-dir mgsm --output runs/a/mgsm"""
    from evals.errors import EvalError
    from evals.mgsm.mgsm import MgsmSettings, evaluate_mgsm, find_files, read_problems
    from evals.mgsm.report import mgsm_table, track_results
    from evals.opening import open_model

    if tasks != "mgsm":
        raise EvalError(f"--tasks {tasks}: known tasks: mgsm")
    settings = MgsmSettings(_listed(languages), limit=limit, max_new_tokens=max_new_tokens, batch_size=batch_size)
    for file in find_files(data_dir, ".tsv", settings.languages).values():
        read_problems(file)  # its mistakes are reported before the model is loaded
    generator, chat = open_model(expanded(model), template=None if template == "model" else template)
    results = evaluate_mgsm(generator, chat, data_dir, output, settings)
    print(json.dumps(results, ensure_ascii=False, indent=1) if as_json else mgsm_table({_model_name(model): results}))
    print(f"{output / 'results.json'}; every output: {output / 'predictions'}", file=sys.stderr)
    for line in track_results(results, output, "mgsm"):
        print(line, file=sys.stderr)


def score(
    task: Annotated[str, typer.Argument(help="mgsm or xtreme")],
    predictions: Annotated[Path, typer.Option(help="an evaluation's folder, or its predictions")],
    labels: Annotated[Path, typer.Option(help="folder with mgsm_XX.tsv; xtreme: TASK/test-XX.tsv or .json")],
    tasks: Annotated[str | None, typer.Option(help="xtreme: comma-separated; default: all with predictions")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Score saved outputs. Example: crosslift score xtreme --predictions runs/a/predictions --labels xtreme-labels"""
    if task == "xtreme":
        from evals.xtreme.score import score_directory, score_table

        scores = score_directory(predictions, labels, _listed(tasks))
        print(json.dumps(scores.to_json(), ensure_ascii=False, indent=1) if as_json else score_table(scores))
        return
    from evals.errors import EvalError
    from evals.mgsm.mgsm import score_mgsm
    from evals.mgsm.numbers import RULES
    from evals.mgsm.report import mgsm_table

    if task != "mgsm":
        raise EvalError(f"{task}: known tasks: mgsm, xtreme")
    results = score_mgsm(predictions, labels)
    print(json.dumps(results, ensure_ascii=False, indent=1) if as_json else mgsm_table({"": results}, list(RULES)))


@xtreme_app.command("prepare")
def xtreme_prepare(
    task: Annotated[str, typer.Argument(help="xnli, pawsx, udpos, panx, xquad, mlqa, tydiqa, tatoeba, bucc2018")],
    data_dir: Annotated[Path, typer.Option(help="XTREME's files")],
    output: Annotated[Path, typer.Option(help="folder for train/, dev/, test/ with XX.jsonl")],
    translations: Annotated[Path | None, typer.Option(help="folder of translation files")] = None,
    languages: Annotated[str | None, typer.Option(help="comma-separated; default: all available")] = None,
    layout: Annotated[str, typer.Option(help="auto, download, hub, conllu, xmixup")] = "auto",
    splits: Annotated[
        str | None, typer.Option(help="split to write=split to read, such as train=dev,test=test")
    ] = None,
    unlabelled: Annotated[bool, typer.Option(help="accept erased test labels")] = False,
    remake: Annotated[bool, typer.Option(help="replace an output made from other files or options")] = False,
    max_bad_rows: Annotated[
        int, typer.Option(min=0, help="questions per file with misplaced answers: left out, counted")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="counts as JSON")] = False,
) -> None:
    """XTREME's files as rows. Example: crosslift xtreme prepare xnli --data-dir xtreme --output rows/xnli"""
    from data_pipeline.xtreme.prepare import PrepareOptions, prepare_task

    chosen = dict(pair.partition("=")[::2] for pair in splits.split(",")) if splits else None
    options = PrepareOptions(
        languages=_listed(languages), layout=layout, splits=chosen, translations=translations,
        allow_unlabelled_test=unlabelled, remake=remake, max_bad_rows=max_bad_rows,
    )  # fmt: skip
    counts = prepare_task(task, data_dir, output, options)
    if as_json:
        print(json.dumps(counts, ensure_ascii=False, indent=1))
        return
    for split in ("train", "dev", "test"):
        rows = counts[split]
        print(f"{split:<6}{'  '.join(f'{language} {number:,}' for language, number in rows.items()) or '-'}")
    for name in ("skipped", "missing"):
        if any(counts[name].values()):
            print(f"{name}: {json.dumps(counts[name], ensure_ascii=False)}")


@xtreme_app.command("soft-labels")
def xtreme_soft_labels(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="export of a zero-shot or translate-train tagger")],
    task: Annotated[str, typer.Option(help="udpos or panx")],
    translations: Annotated[list[Path], typer.Option(help="rows to label: files or folders; may be repeated")],
    output: Annotated[Path, typer.Option(help="folder for the same files with soft_tags")],
) -> None:
    """A teacher's tag probabilities. Example: crosslift xtreme soft-labels M --task panx --translations D --output O"""
    from evals.xtreme.predict import EncoderPredictor
    from evals.xtreme.teacher import soft_labels

    for name, rows in soft_labels(EncoderPredictor.open(model), task, translations, output).items():
        print(f"{output / name}: {rows:,} rows")


@xtreme_app.command("retrieve")
def xtreme_retrieve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="directory or hub name of an encoder")],
    data_dir: Annotated[Path, typer.Option(help="Tatoeba's files")],
    output: Annotated[Path, typer.Option(help="folder for predictions and scores")],
    layer: Annotated[int | None, typer.Option(min=0, help="layer whose states are compared; default: XTREME's")] = None,
    languages: Annotated[str | None, typer.Option(help="comma-separated; default: all available")] = None,
    layout: Annotated[str, typer.Option(help="auto, download, hub")] = "auto",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Tatoeba by nearest sentences. Example: crosslift xtreme retrieve M --data-dir tatoeba --output runs/retrieval"""
    from evals.results import by_reason
    from evals.xtreme.retrieval import SentenceEncoder, retrieve_tatoeba
    from evals.xtreme.score import score_table

    results, scores = retrieve_tatoeba(
        SentenceEncoder.open(expanded(model), layer), data_dir, output, languages=_listed(languages), layout=layout
    )
    if as_json:
        print(json.dumps(results, ensure_ascii=False, indent=1))
    elif scores is not None:
        print(score_table(scores))
    else:
        print(f"{output}: predictions; the files contain no gold order\nmissing: {by_reason(results['missing'])}")
    for language, sentences in results["without_tokens"].items():
        for sentence in sentences:
            print(f"{language}: {sentence} has no tokens, so it has no nearest sentence", file=sys.stderr)


@xtreme_app.command("analyse")
def xtreme_analyse(
    model: Annotated[list[str], typer.Option(help="LABEL=DIR, such as before=DIR; may be repeated")],
    texts: Annotated[Path, typer.Option(help="folder of parallel texts: XX.jsonl rows, or Tatoeba's files")],
    output: Annotated[Path, typer.Option(help="folder for JSON and plot")],
    dominant: Annotated[str, typer.Option()] = "en",
    languages: Annotated[str | None, typer.Option(help="comma-separated; default: all available")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="sentences of each language")] = None,
) -> None:
    """CKA and centroids by layer. Example: crosslift xtreme analyse --model a=DIR --texts tatoeba --output OUT"""
    from evals.errors import EvalError
    from evals.parallel_texts import parallel_texts, text_files
    from evals.representation_plots import write_report
    from evals.representations import analyse, representation_table

    models = dict(each.partition("=")[::2] for each in model)
    if not all(models.values()):
        raise EvalError(f"--model {' '.join(model)}: must be LABEL=DIR, such as before=runs/a/model")
    pairs = parallel_texts(text_files(texts, _listed(languages)), dominant, limit)
    report = analyse({label: expanded(path) for label, path in models.items()}, pairs, dominant=dominant, limit=limit)
    print(representation_table(report))
    print("  ".join(map(str, write_report(report, output))))


def _sampling(temperature: float, top_p: float | None, top_k: int | None, seed: int, num_beams: int) -> Sampling | None:
    """The sampling options; None: no sampling. Raises EvalError if they contradict each other."""
    from evals.errors import EvalError

    if not temperature:
        for name, value in (("--top-p", top_p), ("--top-k", top_k)):
            if value is not None:
                raise EvalError(f"{name} {value}: needs sampling; give --temperature above 0, such as 1")
        return None
    if num_beams > 1:
        raise EvalError(f"--num-beams {num_beams}: beam search does not sample; leave it or --temperature out")
    if not math.isfinite(temperature):
        raise EvalError(f"--temperature {temperature}: must be a finite number")
    if top_p is not None and not 0 < top_p <= 1:
        raise EvalError(f"--top-p {top_p}: must be above 0 and at most 1")
    from modeling.generation import Sampling

    return Sampling(temperature, 1.0 if top_p is None else top_p, top_k or 0, seed)


def _listed(text: str | None) -> list[str] | None:
    """The names in a comma-separated option."""
    return text.split(",") if text else None


def _model_name(path: str) -> str:
    """A model's name in tables: its run folder if it is a run's `model`."""
    here = Path(path)
    return here.resolve().parent.name if here.name == "model" else here.name
