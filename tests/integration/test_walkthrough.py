"""docs/walkthrough.md quotes what the code computes: its run file is trained, and every quoted value is compared."""

from __future__ import annotations

import ast
import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pages import Page, PlainEngine, Walk, files_below, listed_files, named, numbers, of_each, unwrapped
from ranks import run_command

from data_pipeline.records import NO_LANGUAGE

if TYPE_CHECKING:
    from data_pipeline.records import ChatSample
    from training.objectives.base import LossTerms
    from training.objectives.shifcon import ShifCon

PAGE = Page("walkthrough.md")
SW, EN = 152, 32  # entries of the Swahili problem and of its translation


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    from data_pipeline.toy_problems.corpus import write_corpus

    with PAGE.walk(write_corpus, tmp_path_factory.mktemp("walk")) as walk:
        yield walk


def sample_of(walk: Walk, row: int) -> ChatSample:
    sample: Any = walk.data.reader.read(walk.data.reader.alone(row))
    return sample


@dataclass(frozen=True)
class Forward:
    """Step 0 once more, outside of the run: the objective after `before_step`, and the terms of its micro-batches."""

    objective: ShifCon
    before: dict[str, float]
    terms: list[LossTerms]
    shapes: dict[str, list[int]]  # of the first micro-batch's tensors inside the model


@pytest.fixture(scope="module")
def forward(walk: Walk) -> Forward:
    import torch

    from data_pipeline.loader import fixed_batches
    from modeling.loading import load_pretrained
    from training.assembly import build_objective
    from training.run_folder.prepare import sample_rows

    config, data, languages = walk.config, walk.data, range(len(walk.config.data.languages))
    rows = [row for n in languages for row in sample_rows(data.index, n, config.objective.probe_size(), config.seed)]
    probe = fixed_batches(data.reader.readable(rows).samples, data.packer, 0, 1)
    model = load_pretrained(walk.prepared.model_dir, torch.float32, "auto", "cpu")
    objective: Any = build_objective(config.data, config.objective, model, data.tokenizer, probe)
    engine: Any = PlainEngine(model)
    before = objective.before_step(engine, 0)
    shapes: dict[str, list[int]] = {}

    def look_at(_: Any, __: Any, output: Any) -> None:
        found = {"located": objective.shift._index_BT, "logits": output.logits}
        found |= {f"pooled {number}": each for number, each in enumerate(objective.pooling._pooled)}
        shapes.update({name: list(each.shape) for name, each in found.items() if name not in shapes})

    model.register_forward_hook(look_at)
    return Forward(objective, before, [objective.loss_terms(engine, each) for each in walk.step.micro_batches], shapes)


def test_records(walk: Walk) -> None:
    record, index = walk.data.index.record(SW), walk.data.index
    places = PAGE.quoted("Line {} of `finetune/sw.jsonl`, and line {} of `finetune/en.jsonl`")
    lines = unwrapped(PAGE.block('{"id": "ribbon_gifts'))
    for code, row, place, line in zip(("sw", "en"), (SW, EN), places, lines, strict=True):
        file = walk.config.data_dir / "finetune" / f"{code}.jsonl"
        assert file.read_text().splitlines()[place - 1] == line
        shown = json.loads(line)
        read = index.record(row)
        assert [message.content for message in read.conversation.messages] == [shown["question"], shown["answer"]]
        assert (read.id, read.group, read.language) == (shown["id"], shown["id"], shown["language"])
    assert [message.role for message in record.conversation.messages] == ["user", "assistant"]
    PAGE.says(f"`origin` (`{Path(record.origin).relative_to(walk.folder)}`,")


def test_index(walk: Walk) -> None:
    index = walk.data.index
    said = PAGE.quoted("`data.languages`: en {}, de {}, sw {}; {} is")
    assert said == [*map(walk.config.data.languages.index, ("en", "de", "sw")), NO_LANGUAGE]
    ends = [end for language in range(3) for end in (index.rows(language)[0], index.rows(language)[-1])]
    assert PAGE.quoted("has {} entries: {}-{} en, {}-{} de, {}-{} sw.") == [len(index), *ends]
    assert PAGE.quoted("entry {} (Swahili)~entry {}") == [SW, EN]
    for shown in PAGE.table("entry", "`language`"):
        row = int(shown.pop("entry"))
        found = {f"`{name}`": getattr(index, name)[row] for name in ("language", "group", "content", "n_bytes")}
        found |= dict(zip(("line", "offset", "length"), index._place(row), strict=True))
        assert shown == {name: shown[name] if shown[name] == "-" else str(value) for name, value in found.items()}
    assert PAGE.quoted(f"`DataIndex.translation({SW}, 0)`~{{}}") == [index.translation(SW, 0)]
    assert PAGE.quoted(f"`DataIndex.record({SW})`~byte {{}}~{{}} bytes") == [*index._place(SW)][1:]


def test_order_and_mixture(walk: Walk) -> None:
    from data_pipeline.order.mixture import Quotas, language_weights
    from data_pipeline.order.order import row_at

    index, data = walk.data.index, walk.config.data
    found = {
        code: [row_at(index.rows(number), cursor, walk.config.seed, code) for cursor in range(4)]
        for number, code in enumerate(data.languages)
    }
    assert PAGE.quoted("Cursors 0-3~sw {}, {}, {}, {}; en {}, {}, {}, {}") == found["sw"] + found["en"]
    quotas = Quotas(language_weights(data.mixture, dict.fromkeys(data.languages, 60)), data.languages, 65536)
    assert PAGE.quoted("period: {}, {}, {} of {}") == [*quotas.counts, data.mixture.period]
    languages, cursors = quotas.between(*PAGE.quoted("`Quotas.between({}, {})`"))
    slots, codes, places = (line.split()[1:] for line in PAGE.block("slot ").splitlines())
    assert codes == [data.languages[number] for number in languages]
    assert (slots, places) == ([str(slot) for slot in range(8)], [str(cursor) for cursor in cursors])


def test_plan(walk: Walk) -> None:
    from data_pipeline.order.order import row_at
    from data_pipeline.order.plan import assign

    _, *shown = PAGE.block("Unit ").split("Unit ")
    assert len(shown) == len(walk.plan.units)
    for text, unit in zip(shown, walk.plan.units, strict=True):
        ((pairs, cost),) = re.findall(r"pairs (\(.*?\))  .*?(?<!,) cost (\S+)", text, re.DOTALL)
        assert ast.literal_eval(pairs) == unit.pairs
        assert numbers(cost) == [unit.cost]
        slots = [
            (values, item)
            for line in text.splitlines()
            for item in re.findall(r"\w+-\d+-\d+-\d+", line)
            for values in re.findall(r"Slot\(([^)]*)\)", line)
        ]
        for (values, item), slot in zip(slots, unit.slots, strict=True):
            assert item == walk.data.index.record(slot.row).id
            for name, value in re.findall(r"(\w+)=([\w.]+)", values):
                found = getattr(slot, name)
                assert value == str(found) if isinstance(found, bool) else numbers(value) == [found]
    slots, rows = walk.plan.slots, [slot.row for slot in walk.plan.slots]
    cursors = walk.data.planner._quotas.between(0, 2)[1]
    assert PAGE.quoted("slot 1~(sw, cursor {})~row {}") == [cursors[1], rows[1]]
    alone = row_at(walk.data.index.rows(0), 0, walk.config.seed, "en")
    assert PAGE.quoted("Slot 0~(en, cursor {})~row {}") == [cursors[0], alone]
    assert PAGE.quoted("slot 0~row {}") == [rows[0]]
    german, single = PAGE.quoted("slot {} stays unpaired~slot {}")
    assert PAGE.quoted("Slot {}~German translation of the same item") == [german]
    assert [single, german] == [slot.number for unit in walk.plan.units[1:] for slot in unit.slots]
    groups = walk.data.index.group
    assert (slots[german].language, groups[rows[german]]) == (1, groups[SW])
    assert PAGE.quoted("contrast sets of `set_size` {}") == [walk.config.objective.contrastive.set_size]
    ours, size = slots[1], int(walk.data.index.n_bytes[SW])
    said = PAGE.quoted("({} x {} = {}~{} tokens)")
    assert said == [size, ours.cost / size, ours.cost, len(sample_of(walk, SW))]
    PAGE.says("on two ranks the contrast set goes to rank 0 and both single slots to rank 1")
    assert [[bool(unit.pairs) for unit in share] for share in assign(walk.plan, 2)] == [[True], [False, False]]


def test_tokens(walk: Walk) -> None:
    from data_pipeline.text.chat import describe

    sample, chat = sample_of(walk, SW), walk.data.reader.stage.chat
    assert PAGE.block("ribbon_gifts-36-6-6: ") == describe(sample, walk.data.tokenizer) + "\n"
    rows = {row.pop("token"): row for row in PAGE.table("token", "0", "1")}
    assert list(rows) == ["id", "piece", "`content`", "`answer`", "`labels`"]
    for place in (int(each) for each in rows["id"] if each != "..."):
        token = int(sample.input_ids[place])
        assert rows["id"][str(place)] == str(token)
        assert rows["piece"][str(place)] == f"`{walk.data.tokenizer.convert_ids_to_tokens(token)}`"
        for mask in ("content", "answer", "labels"):
            assert rows[f"`{mask}`"][str(place)] == ("x" if getattr(sample, mask)[place] else ""), (mask, place)
    first, last = PAGE.quoted("tokens {}-{} are~`Chat.prompt_ids`")
    prompt, _ = chat.prompt_ids(walk.data.index.record(SW).conversation.messages[:-1], "sw", "sw")
    assert sample.input_ids[first : last + 1].tolist() == prompt.tolist()
    arrays = (sample.input_ids, sample.labels, sample.content, sample.answer)
    assert PAGE.quoted("of shape ({},); `language` {}, `response_language` {}") == [
        *{len(array) for array in arrays}, sample.language, sample.response_language
    ]  # fmt: skip
    english = sample_of(walk, EN)
    counts = [len(english), english.content.sum(), english.labels.sum()]
    assert PAGE.quoted("English sample has {} tokens, {} content, {} label") == counts


def test_packed_rows(walk: Walk) -> None:
    packer, first = walk.data.packer, walk.step.micro_batches[0]
    budget, row = packer.micro_batch_tokens, packer.row_tokens
    assert PAGE.quoted("`micro_batch_tokens` ({} = {} rows of {})") == [budget, budget // row, row]
    lines = PAGE.block("row 0 ").splitlines()
    assert len(lines) == len(first.input_ids)
    for number, line in enumerate(lines):
        places: dict[int, list[int]] = {}
        for column, segment in enumerate(first.targets.segment_ids[number].tolist()):
            places.setdefault(segment, []).append(column)
        found = f"row {number}"
        for segment, columns in places.items():
            code = walk.config.data.languages[first.targets.languages[number, columns[0]]]
            situation = first.sample_ids[segment].split("-")[0]
            found += f" segment {segment}: {code} {situation}, columns" if segment >= 0 else " padding"
            found += f" {columns[0]}-{columns[-1]}"
        assert " ".join(line.split()) == found
    log = (walk.config.output_dir / "logs" / "run.log").read_text()
    (difference,) = re.findall(r"packed logits of a tiny llama differ from single ones by (\S+);", log)
    PAGE.rounding("({} apart)", float(difference))


def test_fields_of_a_batch(walk: Walk) -> None:
    first, second = walk.step.micro_batches
    for field in PAGE.table("field", "shape, dtype"):
        names, cell = named(field["field"]), field["shape, dtype"]
        shapes, types = re.findall(r"\([\d, ]+\)", cell), re.findall(r"\b(?:float|int|bool)\d*", cell)
        if cell == "None":
            assert attrgetter(*names)(first) is None
            continue
        for name, shape, dtype in zip(names, of_each(shapes, len(names)), of_each(types, len(names)), strict=True):
            value = attrgetter(name)(first)
            assert (ast.literal_eval(shape), f"torch.{dtype}") == (tuple(value.shape), str(value.dtype)), name
    targets, ours = first.targets, first.targets.segment_ids == 0
    columns, positions = ours.nonzero()[[0, -1], 1].tolist(), first.position_ids[ours][[0, -1]].tolist()
    assert PAGE.quoted("row 0, columns {}-{}: positions {}-{}") == columns + positions
    assert PAGE.quoted("row 0, columns {}-{}: segment 0, language {}") == [*columns, *targets.languages[ours].unique()]
    ids, places = targets.tokens.ids[:15].tolist(), targets.tokens.positions[:15].tolist()
    said = PAGE.quoted("positions {}-{} predict ids {}, {}, ..., {}, {}")
    assert said == [places[0], places[-1], *ids[:2], *ids[-2:]]
    counted, content = int((targets.vector_languages[ours] == 2).sum()), int(targets.content[ours].sum())
    said = PAGE.quoted("2 on {} tokens ({} content + {} answer), -1")
    assert said == [counted, content, counted - content]
    assert PAGE.quoted("| {} true |") == [content]
    weights = [*first.label_weights.unique(), *walk.data.packer.idle().label_weights]
    assert PAGE.quoted("| {}; a micro-batch without labels~weight {} |") == weights
    assert PAGE.quoted("(3, 2) int64 | set {},") == [targets.pairs.sets[0]]
    assert PAGE.quoted("[{}, {}]: segment 2 (English)") == targets.pairs.segments[0].tolist()
    single = [slot.number for unit in walk.plan.units[1:] for slot in unit.slots]
    assert PAGE.quoted("holds slots {} and {} in one row") == single
    said = PAGE.quoted("in one row: ({}, {}), {} labels, `pairs.segments` ({}, {})")
    assert said == [*second.input_ids.shape, len(second.label_weights), *second.targets.pairs.segments.shape]


def test_loader(walk: Walk) -> None:
    step = walk.step
    said = PAGE.quoted("`counts` ({} `label_tokens`, {} `pairs`), `tokens` [{}, {}, {}] and `samples` [{}, {}, {}]")
    assert said == [step.counts["label_tokens"], step.counts["pairs"], *step.tokens, *step.samples]
    assert PAGE.quoted("fingerprint~({})") == [step.fingerprint]
    assert walk.metrics[0]["data/step_fingerprint"] == step.fingerprint


def test_step(walk: Walk) -> None:
    step = walk.step
    said = PAGE.quoted("{} label tokens, {} pairs, {} micro-batches")
    assert said == [step.counts["label_tokens"], step.counts["pairs"], len(step.micro_batches)]
    rates = [metrics["train/learning_rate"] for metrics in walk.metrics]
    assert PAGE.quoted("`scaling.learning_rate(step, ...)` ({}, then {})") == rates


def test_language_vectors(walk: Walk, forward: Forward) -> None:
    from modeling.shifcon.language_vectors import LanguageVectors

    vectors, metrics = forward.objective.vectors, walk.metrics[0]
    assert vectors is not None
    assert PAGE.quoted("probe set ({} items a language)") == [walk.config.objective.probe_items]
    said = PAGE.quoted("entering layers {} and {}~{}, {} and {} tokens of en, de, sw")
    assert said == [*vectors.layers, *vectors.tokens]
    assert PAGE.quoted("`LanguageVectors.mean` is ({}, {}, {})") == list(vectors.mean.shape)
    norms = [metrics[f"shift/norm/{code}"] for code in ("sw", "de", "en")]
    assert PAGE.quoted("at layer 1~length {}, German's {}, English's {}") == norms
    errors = [metrics[f"shift/restoration_error/{code}"] for code in ("sw", "de")]
    assert PAGE.quoted("restoration error: {} (sw), {} (de)") == errors
    assert {name: metrics[name] for name in forward.before} == pytest.approx(forward.before, rel=1e-4)
    saved = LanguageVectors.load(walk.config.output_dir / "checkpoints/step-00000002/language_vectors.safetensors")
    assert saved.tokens.tolist() == vectors.tokens.tolist()


def test_forward_pass(walk: Walk, forward: Forward) -> None:
    first, shapes = walk.step.micro_batches[0], forward.shapes
    assert PAGE.quoted("each of the ({}, {}) tokens") == shapes["located"]
    ours, area = first.targets.segment_ids == 0, walk.config.objective.layers
    said = PAGE.quoted("`v[en,{}] - v[sw,{}]`~{} tokens~{} content tokens")
    assert said == [area[0], area[0], ours.sum(), first.targets.content[ours].sum()]
    assert PAGE.quoted("| `h[{}]` | shift toward") == [area[0]]
    assert PAGE.quoted("| `h[{}]` | `ContentPooling._pool` |") == [area[0] + 1]
    assert PAGE.quoted("| `h[{}]` | shift back |~`v[sw,{}] - v[en,{}]`") == [area[1]] * 3
    said = PAGE.quoted("the {} label positions~logits ({}, {}, {})")
    assert said == [len(first.label_weights), *shapes["logits"]]
    assert PAGE.quoted("Pooling~two tensors ({}, {}), one a layer") == shapes["pooled 0"]
    assert shapes["pooled 0"] == shapes["pooled 1"]
    assert "pooled 2" not in shapes
    said = PAGE.quoted("segment {} with {}, {} with {} and {} with {}")
    assert sorted(zip(said[::2], said[1::2], strict=True)) == sorted(map(tuple, first.targets.pairs.segments.tolist()))


def test_loss(walk: Walk, forward: Forward) -> None:
    import torch

    from training.loop.metric_window import MetricWindow
    from training.loop.step_sums import StepRead, StepSums
    from training.objectives.scaling import StepTotals, step_loss_share

    totals = StepTotals(walk.step.counts, len(walk.step.micro_batches))
    sums = StepSums.zeros(3, 2, torch.device("cpu"))
    *lines, whole = PAGE.block("micro-batch 1 ").splitlines()
    for number, (line, each) in enumerate(zip(lines, forward.terms, strict=True), 1):
        sums.add(each, share := step_loss_share(each.terms, totals))
        found: list[float] = [number]
        parts = []
        for term in each.terms.values():
            found += [term.weight, term.sum.item(), totals.denominator(term.denominator)]
            parts += [term.weight * term.sum.item() / totals.denominator(term.denominator)]
        assert numbers(line) == [*found, *filter(None, parts), share.item()]
    window = MetricWindow(walk.config.data.languages, 2, 1, torch.device("cpu"))
    window.add(1, sums, totals, StepRead(walk.step.tokens, walk.step.slots, 0, 0, 0))
    window.applied(torch.tensor(1.0))
    window.read()
    metrics = {name: v for name, v in window.take(True).items() if name.startswith(("train/loss", "train/contrastive"))}
    assert metrics == pytest.approx({name: walk.metrics[0][name] for name in metrics}, rel=1e-4)
    sft, contrastive = forward.terms[0].terms.values()
    said = PAGE.quoted("over all ranks, {} and {},")
    assert said == [totals.denominator(term.denominator) for term in (sft, contrastive)]
    PAGE.says("`sft` per `label_tokens`, `contrastive` per `pairs`.")
    assert (sft.denominator, contrastive.denominator) == ("label_tokens", "pairs")
    loss = sum(each.item() for each in sums.shares)
    found = [sft.weight, metrics["train/loss"], contrastive.weight, metrics["train/contrastive"], loss]
    assert numbers(whole) == found
    said = PAGE.quoted("Swahili's~loss is {} over {} label tokens, {} each")
    assert said == [sums.losses[2].item(), sums.labels[2].item(), metrics["train/loss/sw"]]
    size = len(walk.data.tokenizer)
    assert PAGE.quoted("uniform guess over {} tokens~{}") == [size, math.log(size)]
    assert PAGE.quoted("second step's loss is {}") == [walk.metrics[1]["train/loss"]]


def test_checkpoint(walk: Walk) -> None:
    from safetensors.torch import load_file

    from training.checkpoints.disks import shared_disk
    from training.checkpoints.search import find_checkpoint
    from training.errors import ConfigError
    from training.loop.resume import permitted

    folder = walk.config.output_dir / "checkpoints" / "step-00000002"
    listing = PAGE.block(f"run/checkpoints/{folder.name}/")
    assert listed_files(listing) == files_below(folder)
    state = json.loads((folder / "state.json").read_text())
    ((*values, names),) = re.findall(
        r"state\.json +step (\d+), world_size (\d+), data_offset (\d+), (.*), \.\.\n", listing
    )
    assert list(map(int, values)) == [state["step"], state["world_size"], state["data_offset"]]
    assert set(names.split(", ")) <= set(state)
    reference = load_file(folder / "reference.safetensors")
    ((tokens, rows),) = re.findall(r"(\d+) tokens and the last (\d+) logits rows", listing)
    assert (int(tokens), int(rows)) == (reference["input_ids"].shape[1], len(reference["logits"]))
    assert find_checkpoint("auto", [shared_disk(walk.config.output_dir)]) == folder
    same = walk.config, walk.prepared, walk.data.fingerprint, False
    assert permitted(folder, *same).step == state["step"]
    with pytest.raises(ConfigError, match="config seed: was 0, now 1"):
        permitted(folder, walk.config.model_copy(update={"seed": 1}), *same[1:])
    with pytest.raises(ConfigError, match="data tokenizer: has changed"):
        permitted(folder, *same[:2], {**walk.data.fingerprint, "tokenizer": "another"}, False)


def test_export(walk: Walk) -> None:
    from training.checkpoints.export_check import BF16_STEP, FP32_TOLERANCE, NOISE_FACTOR

    folder, listing = walk.config.output_dir / "model", PAGE.block("run/model/")
    assert listed_files(listing) == files_below(folder)
    description = json.loads((folder / "crosslift.json").read_text())
    (described,) = re.findall(r"crosslift\.json +(.*?)\n  \w", listing, re.DOTALL)
    assert set(re.split(r",\s+", described)) == description.keys() - {"format"}
    assert description["check"]["passed"]
    assert PAGE.quoted("logits~the run's to {} of the largest") == [FP32_TOLERANCE]
    PAGE.rounding("(here {})", description["check"]["difference"])
    PAGE.says("one rounding step (2^-8)")
    PAGE.says("four times the difference between its bf16 and fp32 logits")
    assert (BF16_STEP, NOISE_FACTOR) == (2**-8, 4)


def test_generation(walk: Walk) -> None:
    import torch

    from data_pipeline.records import Message
    from evals.opening import open_model
    from modeling.generation import Prompt

    generator, chat = open_model(str(walk.config.output_dir / "model"))
    prompts = []
    for code in ("sw", "en"):
        line = (walk.config.data_dir / "test_seen" / f"{code}.jsonl").read_text().splitlines()[0]
        ids, _ = chat.prompt_ids([Message("user", json.loads(line)["question"])], code, code)
        prompts.append(Prompt(ids.tolist(), code, code))
    said = PAGE.quoted("Swahili ({} tokens) and English ({})")
    assert said == [len(prompt.ids) for prompt in prompts]
    shift, passes = generator.shift, []
    assert shift is not None
    watching = generator.model.register_forward_hook(lambda *_: passes.append(shift._index_BT))
    answers = generator.generate(prompts, max_new_tokens=12)
    watching.remove()
    prompt, *generated = passes
    assert PAGE.quoted("on the left, to ({}, {})") == list(prompt.shape)
    assert PAGE.quoted("row 0 language {} throughout") == prompt[0].unique().tolist()
    places = prompt[1].tolist()
    PAGE.says("row 1 three times -1 (padding)")
    assert places == [-1] * 3 + [2] * (len(places) - 3)
    assert PAGE.quoted("(padding) and {} times {}") == [places.count(2), 2]
    said = PAGE.quoted("response languages [[{}], [{}]], ({}, {})")
    assert all(said == [*each.flatten().tolist(), *each.shape] for each in generated)
    ids = torch.tensor([prompts[0].ids])
    with torch.no_grad():
        plain = generator.model(input_ids=ids).logits
        with generator.shifted(prompts[:1], torch.ones_like(ids)):
            shifted = generator.model(input_ids=ids).logits
    said = PAGE.quoted("Swahili prompt's logits differ by up to {} (~{})")
    assert said == [float((shifted - plain).abs().max()), float(shifted.abs().max())]
    PAGE.says("new lines, `finished` is False and `shifted` True")
    assert [(set(each.text), each.finished, each.shifted) for each in answers] == [({"\n"}, False, True)] * 2


def test_score(walk: Walk) -> None:
    (command,) = re.findall(r"`(crosslift eval .*?)`", PAGE.words)
    words = [str(walk.folder / each) if each.startswith(("run/", "toy/")) else each for each in shlex.split(command)]
    done = run_command(*words[1:])
    assert done.returncode == 0, done.stderr
    folder = walk.config.output_dir / "mgsm"
    row = json.loads((folder / "predictions" / "mgsm_sw.jsonl").read_text().splitlines()[0])
    line = "".join(unwrapped(PAGE.block('{"index": 0')))
    shown = json.loads(re.sub(r", \.\.\.(?=})", "", line))
    assert row["output"].startswith(shown.pop("output").removesuffix("..."))
    for name in ("extracted", "correct"):
        assert shown.pop(name).items() <= row[name].items()
    assert shown.items() <= row.items()
    results = json.loads((folder / "results.json").read_text())
    said = PAGE.quoted("95 % interval: {} of {}, [{}, {}] %")
    for scores in results["languages"].values():
        headline = scores["accuracy"][results["headline"]]
        assert said == [headline["correct"], scores["n"], 100 * headline["low"], 100 * headline["high"]]
        assert {"n", "available", "partial"} <= scores.keys()
    assert {"partial", "missing"} <= results.keys()
    assert done.stdout.count("%*") == 4
