"""An encoder on real text: trained from scratch, fine-tuned, and scored on three tasks of XTREME.

    python -m benchmarks.encoder_real --data DIR --output runs/encoder-real [--json FILE]

DIR holds `ud/` (CoNLL-U), `tatoeba/` (LASER's pairs) and `xquad/` (xquad.XX.json). The scores of so small a model are
low; the benchmark shows that the pipeline works. Every step is a `crosslift` command. A second call resumes an
interrupted one.

- text: UD's dev sentences, Tatoeba's sentences of both sides unpaired, XQuAD's training paragraphs
- UDPOS: tagging, trained on English dev (the treebanks' train files are not used), tested on every language's test
- Tatoeba: retrieval with the untrained and the trained encoder
- XQuAD: three quarters of the paragraphs are for training and one for the test, the same in all languages. Its
  translations are human, parallel and have marked answers: zero-shot trains on English, X-Mixup on pairs, for the same
  number of steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.ranks import SOURCE, machine
from data_pipeline.records import stable_hash
from data_pipeline.xtreme.prepare import PrepareOptions, prepare_task

TEST_SHARE = 4  # one paragraph in this many is for the test
CONFIGS = SOURCE / "configs"
SMALL = ("precision=fp32", "data.workers=1", "checkpoints=2")


def crosslift(*arguments: object) -> None:
    """Run one command; its failure ends the benchmark."""
    print(f"\n--- crosslift {' '.join(map(str, arguments))}", flush=True)
    subprocess.run([sys.executable, str(SOURCE / "crosslift.py"), *map(str, arguments)], check=True)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def in_test(row: Mapping[str, Any], english: Mapping[str, str]) -> bool:
    """Decided by the English paragraph of the row's item, so a paragraph is in one split in all languages."""
    return stable_hash("xquad paragraph", english[row["group"]]) % TEST_SHARE == 0


def write_xquad(prepared: Path, folder: Path) -> None:
    """`train/` and `test/` of the prepared test rows."""
    english = {row["group"]: row["context"] for row in rows(prepared / "test" / "en.jsonl")}
    for file in sorted((prepared / "test").glob("*.jsonl")):
        for split, wanted in (("train", False), ("test", True)):
            write_rows(folder / split / file.name, (row for row in rows(file) if in_test(row, english) is wanted))


def write_text(ud: Path, tatoeba: Path, xquad: Path, folder: Path) -> dict[str, int]:
    """Write `<language>.jsonl` of distinct sentences and paragraphs; their number by language."""
    texts: dict[str, dict[str, None]] = {}
    for file in sorted((ud / "dev").glob("*.jsonl")):
        texts.setdefault(file.stem, {}).update(dict.fromkeys(row["text"] for row in rows(file)))
    for file in sorted((tatoeba / "test").glob("*.jsonl")):
        texts.setdefault(file.stem, {}).update(dict.fromkeys(row["text"] for row in rows(file)))
        texts.setdefault("en", {}).update(dict.fromkeys(row["translation"] for row in rows(file)))
    for file in sorted((xquad / "train").glob("*.jsonl")):
        texts.setdefault(file.stem, {}).update(dict.fromkeys(row["context"] for row in rows(file)))
    for language, found in texts.items():
        lines = [
            {"id": f"{language}-{number}", "language": language, "text": text} for number, text in enumerate(found)
        ]
        write_rows(folder / f"{language}.jsonl", lines)
    return {language: len(found) for language, found in sorted(texts.items())}


def prepare(data: Path, output: Path) -> dict[str, int]:
    """Make every file that the runs read, once; rows of text by language."""
    for task, splits in (
        ("udpos", {"train": "dev", "test": "test"}), ("tatoeba", None), ("xquad", None),
    ):  # fmt: skip
        prepare_task(task, data / task.replace("udpos", "ud"), output / "rows" / task, PrepareOptions(splits=splits))
    prepare_task("udpos", data / "ud", output / "rows" / "ud-dev", PrepareOptions(splits={"dev": "dev"}))
    write_xquad(output / "rows" / "xquad", output / "rows" / "xquad-split")
    folders = (output / "rows" / name for name in ("ud-dev", "tatoeba", "xquad-split"))
    return write_text(*folders, output / "rows" / "text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with ud/, tatoeba/ and xquad/")
    parser.add_argument("--output", type=Path, default=Path("runs/encoder-real"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--nproc", type=int, default=2)
    arguments = parser.parse_args()
    output = arguments.output
    n_texts = prepare(arguments.data, output)
    ranks = ("--nproc", arguments.nproc)
    encoder, text = output / "encoder", output / "rows" / "text"
    languages = f"data.languages=[{', '.join(sorted(n_texts, key=lambda each: each != 'en'))}]"
    crosslift(
        "train", CONFIGS / "encoder-mlm.yaml", f"data_dir={text}", f"output_dir={encoder}",
        languages, *ranks,
    )  # fmt: skip
    run = ("xtreme", "run", CONFIGS / "xtreme.yaml", "--model", "own", *ranks)
    start = (*SMALL, f"model.path={encoder / 'model'}")
    crosslift(
        *run, "--task", "udpos", "--method", "zero-shot", "--data-dir", output / "rows" / "udpos",
        "--output", output / "udpos", *start, "epochs=5", "optimizer.learning_rate=5.0e-4",
    )  # fmt: skip
    for method, more in (
        ("zero-shot", ()), ("x-mixup", ("objective.layer=2", "objective.source_schedule=null", "max_steps=60")),
    ):  # fmt: skip
        crosslift(
            *run, "--task", "xquad", "--method", method,
            "--data-dir", output / "rows" / "xquad-split", "--output", output / f"xquad-{method}", *start,
            "optimizer.learning_rate=5.0e-4", *more,
        )  # fmt: skip
    for name, model in (("start", encoder / "initial_model"), ("trained", encoder / "model")):
        crosslift(
            "xtreme", "retrieve", model, "--data-dir", arguments.data / "tatoeba",
            "--output", output / f"tatoeba-{name}",
        )  # fmt: skip
    crosslift(
        "xtreme", "analyse", "--model", f"start={encoder / 'initial_model'}",
        "--model", f"trained={encoder / 'model'}", "--texts", arguments.data / "tatoeba",
        "--output", output / "analysis", "--limit", 500,
    )  # fmt: skip
    if arguments.json is not None:
        files = [output / name / "scores.json" for name in ("udpos", "xquad-zero-shot", "xquad-x-mixup")]
        files += [output / name / "results.json" for name in ("tatoeba-start", "tatoeba-trained")]
        found = {file.parent.name: json.loads(file.read_bytes()) for file in files}
        content = {"machine": machine(arguments.nproc), "texts": n_texts, "scores": found}
        arguments.json.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
