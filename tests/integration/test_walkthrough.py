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
from unittest import mock

import pytest
from pages import Page, PlainEngine, Walk, files_below, listed_files, named, numbers, of_each, unwrapped
from ranks import run_command
from steps import exchanged, load_on_ranks

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

    from data_pipeline.loader import ThisRank, fixed_batches
    from modeling.lm_head import chunked_losses
    from modeling.loading import load_pretrained
    from training.assembly import build_objective
    from training.run_folder.prepare import sample_rows

    config, data, languages = walk.config, walk.data, range(len(walk.config.data.languages))
    rows = [row for n in languages for row in sample_rows(data.index, n, config.objective.probe_size(), config.seed)]
    probe = fixed_batches(data.reader.readable(rows).samples, data.packer, ThisRank())
    model = load_pretrained(walk.prepared.model_dir, torch.float32, "auto", "cpu")
    objective: Any = build_objective(config.data, config.objective, model, data.tokenizer, probe)
    engine: Any = PlainEngine(model)
    before = objective.before_step(engine, 0)
    shapes: dict[str, list[int]] = {}

    def look_at(*_: Any) -> None:
        found = {"located": objective.shift._index_BT}
        found |= {f"pooled {number}": each for number, each in enumerate(objective.pooling._pooled)}
        shapes.update({name: list(each.shape) for name, each in found.items() if name not in shapes})

    def look_at_logits(*arguments: Any) -> Any:
        logits = make_logits(*arguments)
        shapes.setdefault("logits", list(logits.shape))
        return logits

    model.register_forward_hook(look_at)
    make_logits = chunked_losses._logits
    with mock.patch.object(chunked_losses, "_logits", look_at_logits):
        terms = [objective.loss_terms(engine, each) for each in walk.step.micro_batches]
    return Forward(objective, before, terms, shapes)


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

    plan, index = walk.plan, walk.data.index
    shown = PAGE.table("position", "`rows`")
    assert [int(each["position"]) for each in shown] == list(range(len(plan)))
    for each, row in zip(shown, plan.rows.tolist(), strict=True):
        for name in ("rows", "languages", "costs"):
            assert numbers(each[f"`{name}`"]) == [getattr(plan, name)[int(each["position"])]]
        remark = {SW: ", ours in Swahili", EN: ", ours in English"}.get(row, "")
        assert each["item"] == index.record(row).id + remark
    (pairs,) = plan.sets
    assert ast.literal_eval(*re.findall(r"one set of three: (\[\[.*?\]\])", PAGE.words)) == pairs.tolist()
    assert PAGE.quoted("cut into sets of `set_size` {}") == [walk.config.objective.contrastive.set_size]
    ours = plan.slot(1)
    said = PAGE.quoted("`StepPlan.slot({})` is the `Slot`~`number` {}, `row` {}, `language` {}")
    assert said == [ours.number, ours.number, ours.row, ours.language]
    PAGE.says(f"`labelled` {ours.labelled}.")
    cursors = walk.data.planner._quotas.between(0, 2)[1]
    assert PAGE.quoted("Slot 1~(sw, cursor {})~row {}") == [cursors[1], plan.rows[1]]
    alone = row_at(index.rows(0), 0, walk.config.seed, "en")
    assert PAGE.quoted("Slot 0~(en, cursor {})~row {}") == [cursors[0], alone]
    assert PAGE.quoted("slot 0~row {}") == [plan.rows[0]]
    german, single = PAGE.quoted("slot {} stays unpaired~slot {}")
    assert PAGE.quoted("Slot {}~German translation of the same item") == [german]
    assert sorted(set(range(len(plan))) - set(pairs.ravel().tolist())) == [single, german]
    assert (plan.languages[german], plan.groups[german]) == (1, index.group[SW])
    size = int(index.n_bytes[SW])
    said = PAGE.quoted("({} x {} = {}~{} tokens)")
    assert said == [size, plan.costs[1] / size, plan.costs[1], len(sample_of(walk, SW))]


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


def test_measures(walk: Walk) -> None:
    from data_pipeline.loader import OUTCOMES

    loader = walk.data.loader()
    table = loader.table(loader.scan(0).measures)
    rows = PAGE.table("position", "`outcome`")
    assert [walk.plan.rows[int(row["position"])] for row in rows] == [EN, SW]
    for row in rows:
        found = table[int(row.pop("position"))]
        assert row == {f"`{name}`": str(found[name]) for name in ("outcome", *table.dtype.names[1:5], "label_tokens")}
        assert not found["partner_tokens"], "a measure that the page leaves out"
    said = PAGE.quoted("`outcome` {} is a filled slot; {} is truncated, {} overlong, {} unusable")
    assert [OUTCOMES[each - 1] for each in said] == ["filled", "truncated", "overlong", "unusable"]


def test_micro_steps(walk: Walk) -> None:
    from data_pipeline.batching.micro_steps import Balance
    from data_pipeline.loader import ThisRank
    from training.check import plan_lines

    loader, found, n_steps = walk.data.loader(), [], []
    table = loader.table(loader.scan(0).measures)
    for ranks in (1, 2):
        spread = walk.data.loader().spread(table, ThisRank(0, ranks, ranks))
        micro_steps = spread.micro_steps(walk.plan.sets)
        n_steps.append(len(micro_steps))
        for number, micro_step in enumerate(micro_steps):
            for rank, share in enumerate(micro_step.shares(ranks)):
                found.append([ranks, number, rank, *share.tolist(), float(spread.costs[share].sum())])
    assert [numbers(" ".join(row.values())) for row in PAGE.table("ranks", "micro-step")] == found
    assert n_steps == [2, 1]
    said = PAGE.quoted(
        "The step's {} tokens take two micro-steps of up to {} tokens on one rank, and one of up to 2 x {}"
    )
    assert said == [table["tokens"].sum(), *[walk.config.data.micro_batch_tokens] * 2]
    cost, again = PAGE.quoted("plus {} a label~73 + {} x 15")
    assert cost == again == spread.grid.label_cost
    said = PAGE.quoted("the layers: {} + 0.5435 x {} = {} for ours")
    assert said == [table["row_length"][1], table["n_labels"][1], spread.costs[1]]
    scanned = range(0, len(walk.plan), 2)
    assert PAGE.quoted("Rank 0 scanned the positions {}, {}, {} and {}; it reads positions {} and {}") == [
        *scanned, *(each for each in micro_steps[0].share(0).tolist() if each not in scanned)
    ]  # fmt: skip
    members = micro_steps[0].positions
    by_costs = spread._evenly(members, 2)  # without rows of equal length
    shares = [*micro_steps[0].shares(2), *(members[by_costs == rank] for rank in range(2))]
    said = PAGE.quoted("have {} and {} tokens, where the first rule alone gives {} and {}")
    assert said == [spread.grid.tokens(table["row_length"][share].tolist()) for share in shares]
    ids = [walk.data.index.record(row).id for row in walk.plan.rows.tolist()]
    expected = [[ids[position] for position in share] for share in micro_steps[0].shares(2)]
    assert [line["ids"] for line in plan_lines(walk.config, range(1), world_size=2)] == expected
    balance = Balance.of(micro_steps, spread)
    said = PAGE.quoted("largest cost of a rank is {} times the mean, and {} % of the tokens are no padding")
    assert said == [balance.ratio, round(100 * balance.packing_efficiency)]


def test_loader(walk: Walk) -> None:
    step = walk.step
    said = PAGE.quoted("`counts` ({} `label_tokens`, {} `pairs`), `tokens` [{}, {}, {}] and `labels` [{}, {}, {}]")
    assert said == [step.counts["label_tokens"], step.counts["pairs"], *step.tokens, *step.labels]
    PAGE.says("no overlong or unusable samples")
    assert (step.overlong, step.unusable, step.bad_rows) == (0, 0, ())
    assert PAGE.quoted("fingerprint~({})") == [step.fingerprint]
    assert walk.metrics[0]["data/step_fingerprint"] == step.fingerprint


def test_packed_rows(walk: Walk) -> None:
    grid, first = walk.data.packer.grid, walk.step.micro_batches[0]
    budget, row = grid.micro_batch_tokens, grid.longest_row
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
    targets = first.targets
    (segment,) = (n for n, each in enumerate(first.samples) if each.language == 2 and each.id == "ribbon_gifts-36-6-6")
    ours = targets.segment_ids == segment
    (row,) = {int(each) for each in ours.nonzero()[:, 0]}
    columns, positions = ours.nonzero()[[0, -1], 1].tolist(), first.position_ids[ours][[0, -1]].tolist()
    assert PAGE.quoted("row {}, columns {}-{}: positions {}-{}") == [row, *columns, *positions]
    said = PAGE.quoted("row {}, columns {}-{}: segment {}, language {} |")
    assert said == [row, *columns, segment, *targets.languages[ours].unique()]
    predicting = ours.flatten()[targets.tokens.positions]
    ids, places = targets.tokens.ids[predicting].tolist(), targets.tokens.positions[predicting].tolist()
    said = PAGE.quoted("positions {}-{} of {} x {} predict ids {}, {}, ..., {}, {}")
    assert said == [places[0], places[-1], *ours.shape, *ids[:2], *ids[-2:]]
    assert places == list(range(places[0], places[-1] + 1))
    counted, content = int((targets.vector_languages[ours] == 2).sum()), int(targets.content[ours].sum())
    said = PAGE.quoted("2 on {} tokens ({} content + {} answer), -1")
    assert said == [counted, content, counted - content]
    assert PAGE.quoted("| {} true |") == [content]
    weights = [*first.label_weights.unique(), *walk.data.packer.idle().label_weights]
    assert PAGE.quoted("| {}; a micro-batch without labels~weight {} |") == weights
    single = sorted(set(range(len(walk.plan))) - set(walk.plan.sets[0].ravel().tolist()))
    assert PAGE.quoted("holds slots {} and {} in one row") == single
    assert [each.id for each in second.samples] == [walk.data.index.record(walk.plan.rows[n]).id for n in single]
    said = PAGE.quoted("in one row: ({}, {}), {} labels, `contrast` None")
    assert said == [*second.input_ids.shape, len(second.label_weights)]
    assert second.targets.contrast is None


def test_contrast_sets(walk: Walk) -> None:
    """On one rank and on two."""
    first = walk.step.micro_batches[0]
    alone = first.targets.contrast
    said = PAGE.quoted("[{}, {}, {}, {}, {}, {}]: member {} is segment {} (English), member {} segment {} (Swahili)")
    own, (dominant, of_dominant, other, of_other) = said[:6], said[6:]
    assert own == alone.own.tolist()
    assert (own[dominant], own[other]) == (of_dominant, of_other)
    members = [first.samples[segment] for segment in own]
    assert [(members[each].id, members[each].language) for each in (dominant, other)] == [
        ("ribbon_gifts-36-6-6", 0), ("ribbon_gifts-36-6-6", 2)
    ]  # fmt: skip
    assert PAGE.quoted("[{}, {}] in the one set") == alone.pairs[0, 0].tolist() == [dominant, other]
    assert not alone.excluded.any()
    assert alone.is_reported.all()
    PAGE.says("| (0,) int64 | empty: one rank has all members |")
    steps = load_on_ranks(walk.data.loader, 2, 0)
    one, two = (step.micro_batches[0].targets.contrast for step in steps)
    assert all(step.fingerprint == walk.step.fingerprint and step.counts == walk.step.counts for step in steps)
    said = PAGE.quoted("positions {}, {}, {} as members 0 to 2 and gets {}, {} and {} as members 3 to 5")
    index = walk.data.index
    names = {(index.record(row).id, index.language[row]): n for n, row in enumerate(walk.plan.rows.tolist())}
    batches = [step.micro_batches[0] for step in steps]
    positions = [[names[each.id, each.language] for each in batch.samples] for batch in batches]
    assert said == exchanged(batches, positions)[0]
    said = PAGE.quoted("`sent_to` ({}, {}) states to the ranks, receives `received_from` ({}, {})")
    assert said == [*one.sent_to, *one.received_from]
    said = PAGE.quoted("has the pairs [{}, {}], [{}, {}], [{}, {}]. Rank 1~[{}, {}], [{}, {}], [{}, {}]")
    assert said == one.pairs.flatten().tolist() + two.pairs.flatten().tolist()
    PAGE.says("Rank 0, the first with a sample of the set, reports its loss.")
    assert (one.is_reported.tolist(), two.is_reported.tolist()) == ([True], [False])


def test_step(walk: Walk) -> None:
    step = walk.step
    said = PAGE.quoted("here {} label tokens and {} pairs")
    assert said == [step.counts["label_tokens"], step.counts["pairs"]]
    assert PAGE.quoted("each micro-batch, {} here, equally many on all ranks") == [len(step.micro_batches)]
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
    moments = forward.objective.normalisation
    assert moments is not None
    assert PAGE.quoted("`Normalisation.mean` is ({}, {}, {})") == list(moments.mean.shape)
    assert PAGE.quoted("`deviation` ({}, {}, {})") == list(moments.deviation.shape)
    assert moments.sentences.tolist() == [walk.config.objective.probe_items] * 3


def test_forward_pass(walk: Walk, forward: Forward) -> None:
    first, shapes = walk.step.micro_batches[0], forward.shapes
    assert PAGE.quoted("each of the ({}, {}) tokens") == shapes["located"]
    ours, area = first.targets.segment_ids == 2, walk.config.objective.layers
    said = PAGE.quoted("`v[en,{}] - v[sw,{}]`~{} tokens~{} content tokens")
    assert said == [area[0], area[0], ours.sum(), first.targets.content[ours].sum()]
    assert PAGE.quoted("| `h[{}]` | shift toward") == [area[0]]
    assert PAGE.quoted("| `h[{}]` | `ContentPooling._pool` |") == [area[0] + 1]
    assert PAGE.quoted("| `h[{}]` | shift back |~`v[sw,{}] - v[en,{}]`") == [area[1]] * 3
    assert PAGE.quoted("lets only the {} label positions through") == [len(first.label_weights)]
    assert PAGE.quoted("here one: logits ({}, {})") == shapes["logits"]
    assert PAGE.quoted("Pooling~two tensors ({}, {}), one a layer") == shapes["pooled 0"]
    assert shapes["pooled 0"] == shapes["pooled 1"]
    assert "pooled 2" not in shapes
    said = PAGE.quoted("member {} with {}, {} with {} and {} with {}")
    assert said == first.targets.contrast.pairs.flatten().tolist()


def test_loss(walk: Walk, forward: Forward) -> None:
    import torch

    from training.loop.metric_window import MetricWindow
    from training.loop.step_sums import StepSums
    from training.objectives.scaling import denominator, step_loss_share

    counts = walk.step.counts
    sums = StepSums.zeros(3, 3, torch.device("cpu"))
    *lines, whole = PAGE.block("micro-batch 1 ").splitlines()
    for number, (line, each) in enumerate(zip(lines, forward.terms, strict=True), 1):
        sums.add(each, share := step_loss_share(each.terms, counts))
        found: list[float] = [number]
        parts = []
        for term in (each.terms["sft"], each.terms["contrastive"]):
            found += [term.weight, term.sum.item(), denominator(counts, term.denominator)]
            parts += [term.weight * term.sum.item() / denominator(counts, term.denominator)]
        assert numbers(line) == [*found, *filter(None, parts), share.item()]
    window = MetricWindow(walk.config.data.languages, 3, 1, torch.device("cpu"))
    window.add(1, sums, walk.step)
    window.applied(torch.tensor(1.0))
    window.read()
    metrics = {name: v for name, v in window.take(True).items() if name.startswith(("train/loss", "train/contrastive"))}
    assert metrics == pytest.approx({name: walk.metrics[0][name] for name in metrics}, rel=1e-4)
    sft, contrastive, retrieval = forward.terms[0].terms.values()
    said = PAGE.quoted("`retrieval`, is only reported: {} of the {} pairs")
    assert said == [retrieval.sum.item(), contrastive_pairs := denominator(counts, retrieval.denominator)]
    assert (retrieval.weight, contrastive_pairs) == (0, 3)
    said = PAGE.quoted("over all ranks, {} and {},")
    assert said == [denominator(counts, term.denominator) for term in (sft, contrastive)]
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
