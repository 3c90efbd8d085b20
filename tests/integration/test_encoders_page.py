"""docs/encoders.md quotes what the code computes: its run file is trained, and every quoted value is compared."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pages import Page, PlainEngine, Walk, files_below, listed_files, numbers, unwrapped
from ranks import run_command

from data_pipeline.records import Example, Record

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.order.plan import Slot
    from data_pipeline.tasks.sample import TaskSample
    from data_pipeline.tasks.stage import TaskStage
    from training.objectives.base import LossTerms
    from training.objectives.xmixup import XMixup

PAGE = Page("encoders.md")
DE, EN = 72, 16  # entries of the German sentence and of its translation
OURS = 1  # position of the German sentence in step 0
PAIR = 0  # place of its pair in the second micro-batch


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    from data_pipeline.toy_problems.labelled import write_labelled_task

    with PAGE.walk(write_labelled_task, tmp_path_factory.mktemp("walk")) as walk:
        yield walk


@dataclass
class Forward:
    """Step 0 once more, outside of the run: what the mixed layer computes, and the terms of its micro-batches."""

    objective: XMixup
    terms: list[LossTerms] = field(default_factory=list)
    # of the second micro-batch:
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    entropies: list[Tensor] = field(default_factory=list)  # of target over source, of source over target
    targets: list[Tensor] = field(default_factory=list)  # after the attention block, before and after mixing
    last: list[Tensor] = field(default_factory=list)  # h[3], mixed and without mixing
    logits: list[Tensor] = field(default_factory=list)  # mixed and without mixing


@pytest.fixture(scope="module")
def forward(walk: Walk) -> Forward:
    import torch

    from modeling.architectures import ARCHITECTURE_OF
    from modeling.loading import load_pretrained
    from modeling.xmixup import cross_attention, mixup
    from training.assembly import build_objective

    config, model_dir = walk.config, walk.prepared.model_dir
    model = load_pretrained(model_dir, torch.float32, "auto", "cpu", ARCHITECTURE_OF["classification"])
    objective: Any = build_objective(config.data, config.objective, model, walk.data.tokenizer, [])
    engine: Any = PlainEngine(model)
    found = Forward(objective)
    scaled_scores, mixed = mixup.scaled_scores, objective.mixup._mixed

    def noted_scores(query: Tensor, key: Tensor) -> Tensor:
        scores = scaled_scores(query, key)
        found.shapes |= {"query": query.shape, "scores": scores.shape}
        target, source = (second.padding_mask != 0).split(second.targets.n_pairs)
        for each, queries, keys in ((scores, target, source), (scores.mT, source, target)):
            weights = cross_attention.attention_weights(each, keys)
            found.entropies.append(cross_attention._true_entropy(*weights, queries))
        return scores

    def noted_mixture(target: Tensor, source: Tensor, pairs: Any) -> Tensor:
        output: Tensor = mixed(target, source, pairs)
        found.shapes |= {"side": source.shape, "lam": objective.mixup.last_ratio.shape}
        found.targets += [target, output]
        return output

    def noted_state(_: Any, __: Any, output: Any) -> None:
        found.last.append(output[0] if isinstance(output, tuple) else output)

    first, second = walk.step.micro_batches
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        found.terms.append(objective.loss_terms(engine, first))
        patch.setattr(mixup, "scaled_scores", noted_scores)
        patch.setattr(objective.mixup, "_mixed", noted_mixture)
        mixup.encoder_layers(model)[-1].register_forward_hook(noted_state)
        model.register_forward_hook(lambda _, __, output: found.logits.append(output.logits))
        found.terms.append(objective.loss_terms(engine, second))
        with objective.mixup.batch(second.padding_mask, second.targets.n_pairs, mix=False):
            model(**second.model_inputs())
    return found


def read(walk: Walk, step: int) -> TaskSample:
    sample: Any = walk.data.reader.read(walk.data.reader.alone(DE, step))
    return sample


def test_rows(walk: Walk) -> None:
    places = PAGE.quoted("Line {} of `train/de.jsonl`, and line {} of `train/en.jsonl`")
    lines = unwrapped(PAGE.block('{"id": "orange_bags'))
    for code, row, place, line in zip(("de", "en"), (DE, EN), places, lines, strict=True):
        file = walk.config.data_dir / "train" / f"{code}.jsonl"
        assert file.read_text().splitlines()[place - 1] == line
        shown, record = json.loads(line), walk.data.index.record(row)
        assert (record.id, record.group, record.language) == (shown["id"], shown["group"], shown["language"])
        assert record.origin == f"{file}:{place}"
        assert record.content == Example((shown["text_a"],), label=shown["label"])
        assert (record.back is None) == ("back_text_a" not in shown)
        assert record.back is None or record.back.texts == (shown["back_text_a"],)


def test_index_and_plan(walk: Walk) -> None:
    index, codes = walk.data.index, walk.config.data.languages
    assert PAGE.quoted("en is {}, de {}, sw {}") == [*map(codes.index, ("en", "de", "sw"))]
    ends = [end for language in range(3) for end in (index.rows(language)[0], index.rows(language)[-1])]
    assert PAGE.quoted("{} entries: {}-{} en, {}-{} de, {}-{} sw") == [len(index), *ends]
    said = PAGE.quoted("entry {} ({} bytes of text, at byte {}) and entry {}; both have `group` {}")
    assert said == [DE, index.n_bytes[DE], index._place(DE).offset, EN, index.group[DE]]
    assert index.group[DE] == index.group[EN]
    assert PAGE.quoted(f"`DataIndex.translation({DE}, 0)`~{{}}") == [index.translation(DE, 0)]
    PAGE.says(f"(`mixture.pairing` is `{walk.config.data.mixture.pairing}`)")
    assert not walk.plan.sets
    languages = ", ".join(codes[language] for language in walk.plan.languages)
    said = PAGE.quoted(f"`Planner.step(0)`: rows {{}}, {{}}, {{}}, {{}}, {{}}, {{}}, of {languages}")
    assert said == walk.plan.rows.tolist()


def test_partners(walk: Walk) -> None:
    from data_pipeline.order.pairing import gold_probability
    from data_pipeline.records import stable_hash

    partners, seed, steps = walk.data.reader.partners, walk.config.seed, range(4)
    assert partners is not None
    k = walk.config.objective.source_schedule
    said = PAGE.quoted("`source_schedule` of {}~{}, {}, {}, {} in steps 0 to 3")
    assert said == [k, *[gold_probability(step, k) for step in steps]]
    drawn = [stable_hash(seed, "source", step) / 2**63 for step in steps]
    assert PAGE.quoted("drawn from (seed, step)~{}, {}, {}, {}") == drawn
    PAGE.says("steps 0 and 1 are gold and those of steps 2 and 3 back-translations")
    assert [partners.gold(step) for step in steps] == [True, True, False, False]
    first, third = partners.of(DE, 1, 0), partners.of(DE, 1, 2)
    shown = f'("{first.kind}", row={first.row}, language={first.language}, gold_step={first.gold_step})'
    PAGE.says(f"row {DE} `Partner{shown}` in step 0, and kind `{third.kind}` in step 2")
    assert walk.plan.slot(OURS).partner == first


def test_tokens(walk: Walk) -> None:
    samples = {step: read(walk, step) for step in (0, 2)}
    target, sources = samples[0].target, {step: sample.source for step, sample in samples.items()}
    assert (target.input_ids == samples[2].target.input_ids).all()
    sides = [target, *[source.side for source in sources.values() if source is not None]]
    assert PAGE.quoted("its source in step {} and {}") == list(sources)
    heads = ["target", *[f"step {step}" for step in sources]]
    for head, line, side in zip(heads, PAGE.block("target  ").splitlines(), sides, strict=True):
        assert line.startswith(f"{head}  ")
        length, shown = line.removeprefix(head).strip().split("  ", 1)
        begin, _, end = shown.partition(" ... ")
        tokens = " ".join(walk.data.tokenizer.convert_ids_to_tokens(side.input_ids.tolist()))
        assert int(length) == len(side)
        assert tokens.startswith(begin)
        assert tokens.endswith(end) if end else tokens == begin
    said = PAGE.quoted("`input_ids` ({},) int32 {}, {}, {}, {}, ..., {}, {}; `token_type_ids` ({},) int8, all {}")
    assert said == [
        len(target), *target.input_ids[:4], *target.input_ids[-2:], len(target.token_type_ids),
        *set(target.token_type_ids.tolist()),
    ]  # fmt: skip
    types = [str(each.dtype) for each in (target.input_ids, target.token_type_ids, target.content)]
    assert types == ["int32", "int8", "bool"]
    assert PAGE.quoted("`content` ({},) bool, all but `<s>` and `</s>`") == [len(target.content)]
    assert target.content.tolist() == [False, *[True] * (len(target) - 2), False]
    classes = samples[0].target_labels.classes
    assert classes is not None
    said = PAGE.quoted("`classes` ({}, {}) float32: {}, {}, {}, {}, {}, {}, {}")
    assert said == [*classes.shape, *classes[0].tolist()]
    PAGE.says("`language` is 0, `is_gold` true in step 0 and false in step 2; `counts` is true in both")
    facts = [attrgetter("language", "is_gold", "counts")(source) for source in sources.values()]
    assert facts == [(0, True, True), (0, False, True)]


def test_micro_steps(walk: Walk) -> None:
    from data_pipeline.loader import ThisRank

    loader = walk.data.loader()
    table = loader.table(loader.scan(0).measures)
    said = PAGE.quoted("`tokens` {}, `partner_tokens` {} and `row_length` {}")
    assert said == [table[name][OURS] for name in ("tokens", "partner_tokens", "row_length")]
    PAGE.says(f"in the `{loader.packer.layout}` layout")
    assert PAGE.quoted("at most `micro_batch_tokens` ({})") == [walk.config.data.micro_batch_tokens]
    found = []
    for ranks in (1, 2):
        spread = walk.data.loader().spread(table, ThisRank(0, ranks, ranks))
        for number, micro_step in enumerate(spread.micro_steps([])):
            for rank, share in enumerate(micro_step.shares(ranks)):
                longest = int(max(table["row_length"][share]))
                found.append([ranks, number, rank, *share.tolist(), 2, len(share), longest, 2 * len(share) * longest])
    assert [numbers(" ".join(row.values())) for row in PAGE.table("ranks", "micro-step")] == found


def test_batches(walk: Walk) -> None:
    second = walk.step.micro_batches[1]
    record, n, targets = walk.data.index.record, second.targets.n_pairs, second.targets
    assert list(second.sample_ids) == [record(int(walk.plan.rows[position])).id for position in (OURS, 2, 4)]
    lengths = second.padding_mask.sum(dim=1).tolist()
    assert PAGE.quoted("rows {} to {} are targets") + PAGE.quoted("rows {} to {} are their sources") == [
        0, n - 1, n, 2 * n - 1
    ]  # fmt: skip
    said = PAGE.quoted("ours ({} tokens), and `rope_pieces` in Swahili ({}) and German ({})")
    assert said == lengths[:n]
    assert [walk.config.data.languages[each.language] for each in second.samples] == ["de", "sw", "de"]
    assert [each.id.split("-")[0] for each in second.samples[1:]] == ["rope_pieces"] * 2
    assert PAGE.quoted("in the same order ({}, {}, {})") == lengths[n:]
    said = PAGE.quoted("`input_ids` and `attention_mask` are ({}, {}) int64")
    assert said == [*second.input_ids.shape] == [*second.padding_mask.shape]
    assert {str(each.dtype) for each in (second.input_ids, second.padding_mask)} == {"torch.int64"}
    said = PAGE.quoted("`label_languages` {}, {}, {}, {}, {}, {}")
    assert said == second.label_languages.tolist()
    assert PAGE.quoted("`label_weights` all {}") * 2 * n == second.label_weights.tolist()
    PAGE.says(f"`n_pairs` {targets.n_pairs}; `gold` true")
    assert targets.gold
    assert PAGE.quoted("`classes` ({}, {}) one-hot") == list(targets.labels.classes.shape)
    assert PAGE.quoted("`label_rows` {} to {}, `label_is_source` false for the first {}") == [0, 2 * n - 1, n]
    assert targets.label_rows.tolist() == list(range(2 * n))
    assert targets.label_is_source.tolist() == [False] * n + [True] * n


def test_loader(walk: Walk) -> None:
    step = walk.step
    said = PAGE.quoted(
        "`counts` (`target_labels` {}, `source_labels` {}, `pairs` {}), `tokens` [{}, {}, {}] by language"
    )
    assert said == [*step.counts.values(), *step.tokens]
    assert list(step.counts) == ["target_labels", "source_labels", "pairs"]
    assert PAGE.quoted("fingerprint ({})") == [step.fingerprint] == [walk.metrics[0]["data/step_fingerprint"]]


def test_mixed_layer(walk: Walk, forward: Forward) -> None:
    second, mixup, shapes = walk.step.micro_batches[1], forward.objective.mixup, forward.shapes
    block = forward.last[0].shape
    sizes = [
        second.padding_mask.shape, None, block, shapes["side"], shapes["query"], shapes["scores"], shapes["lam"], block,
        block,
    ]  # fmt: skip
    shown = [row["shapes"].removesuffix(" each") for row in PAGE.table("where", "what")]
    assert shown == ["" if size is None else str(tuple(size)) for size in sizes]
    valid, n = second.padding_mask != 0, second.targets.n_pairs
    n_target, n_source = int(valid[PAIR].sum()), int(valid[n + PAIR].sum())
    over_source, over_target = (float(each[PAIR]) for each in forward.entropies)
    said = PAGE.quoted("target over source is {} nats~{} tokens")
    assert said == [over_source, n_target]
    assert PAGE.quoted("({} equal weights~{})") == [n_source, math.log(n_source)]
    assert PAGE.quoted("source over target {} ({})") == [over_target, math.log(n_target)]
    state, ratio = mixup.state(), mixup.last_ratio
    said = PAGE.quoted("hooks on layer {}~`mixup_ratio` (`w` {}, `b` {})")
    assert said == [state.layer, state.w, state.b]
    assert PAGE.quoted("`mixup.batch(attention_mask, {})`") == PAGE.quoted("valid tokens and n = {}") == [n]
    assert PAGE.quoted("rows {}-{} are `Z_t`, rows {}-{} `Z_s`") == [0, n - 1, n, 2 * n - 1]
    assert PAGE.quoted("key and value of `Z_s`, {} heads") == [shapes["query"][1]]
    layers = walk.config.model.init["num_hidden_layers"]
    assert PAGE.quoted("feed-forward, layer {} |~`EncoderStates`~`h[{}]`") == [layers - 1, layers]
    assert forward.objective.states.last == layers
    assert ratio is not None
    said = PAGE.quoted("`lam` is {} x sigmoid({} x {} + {}) = {}")
    assert said == [state.lam0, state.w, over_source + over_target, state.b, float(ratio[PAIR])]
    before, mixed = (target[PAIR][valid[PAIR]] for target in forward.targets)
    moved = float((mixed - before).norm() / before.norm())
    assert PAGE.quoted("differs from `Z_t` by {} of its length") == [moved]
    apart = (forward.logits[0] - forward.logits[1]).abs()
    said = PAGE.quoted("target's logits differ by up to {}~sources by {}")
    assert said == [float(apart[PAIR].max()), float(apart[n:].max())]


def test_loss(walk: Walk, forward: Forward) -> None:
    from modeling.tasks.task_losses import classification_losses
    from modeling.xmixup.consistency import consistency, representations
    from training.objectives.scaling import denominator, step_loss_share

    second, counts = walk.step.micro_batches[1], walk.step.counts
    logits, metrics, n = forward.logits[0], walk.metrics[0], second.targets.n_pairs
    losses = classification_losses(logits, second.targets.labels.classes, second.targets.label_rows)
    assert PAGE.quoted("Logits are ({}, {})") == list(logits.shape)
    said = PAGE.quoted("`classification_losses`~{} for our target, {} for its source")
    assert said == [float(losses[PAIR]), float(losses[n + PAIR])]
    states = representations(forward.last[0])
    square, both = consistency(states, n)[PAIR], consistency(states, n, logits)[PAIR]
    said = PAGE.quoted("in `h[3]`, {}, plus KL(source || target), {}")
    assert said == [float(square), float(both - square)]
    for row in PAGE.table("term", "`denominator`"):
        name = row["term"].strip("`")
        terms = [each.terms[name] for each in forward.terms]
        ((count, size),) = re.findall(r"^`(\w+)`, (\d+)$", row["`denominator`"])
        assert {(each.denominator, denominator(counts, each.denominator)) for each in terms} == {(count, int(size))}
        assert numbers(row["`weight`"])[-1] == terms[0].weight
        assert numbers(row["micro-batch 1"]) + numbers(row["micro-batch 2"]) == [float(each.sum) for each in terms]
        total = sum(float(each.sum) for each in terms) / int(size)
        assert numbers(row["metric"]) == [total]
        assert metrics[f"train/{name}"] == pytest.approx(total, rel=1e-4)
    shares = [float(step_loss_share(each.terms, counts)) for each in forward.terms]
    target, source, apart, _ = forward.terms[1].terms.values()
    said = PAGE.quoted("Micro-batch 2~{} x {} / {} + {} x {} / {} + {} / {} = {}")
    assert said == [
        target.weight, float(target.sum), 6, source.weight, float(source.sum), 6, float(apart.sum), 6, shares[1]
    ]  # fmt: skip
    said = PAGE.quoted("micro-batch 1~{}. The step's loss is {}")
    assert said == [shares[0], sum(shares)]
    german = forward.terms[1].label_losses[forward.terms[1].label_languages == 1]
    assert PAGE.quoted("`train/loss`~{}~({} + {}) / {} = {}") == [
        metrics["train/loss"], *german.tolist(), len(german), metrics["train/loss/de"]
    ]  # fmt: skip
    assert PAGE.quoted("next steps~{}, {} and {}") == [each["train/loss"] for each in walk.metrics[1:]]
    classes = len(walk.config.data.task.labels)
    assert PAGE.quoted("ln {} = {}") == [classes, math.log(classes)]


def test_checkpoint_and_export(walk: Walk) -> None:
    from modeling.xmixup.mixup_state import MixupState

    run = walk.config.output_dir
    of_decoder = listed_files(Page("walkthrough.md").block("run/checkpoints/step-00000002/"))
    own = {"language_vectors.safetensors": "xmixup.safetensors"}
    absent = ("generation_config.json", "pooled_moments.safetensors")
    files = {own.get(file, file) for file in of_decoder if not file.endswith(absent)}
    PAGE.says("without `{}` and `{}`".format(*absent))
    assert files == files_below(run / "checkpoints" / "step-00000004")
    listing = PAGE.block("run/model/")
    assert listed_files(listing) == files_below(run / "model")
    description = json.loads((run / "model" / "crosslift.json").read_text())
    (described,) = re.findall(r"crosslift\.json +(.*)", listing)
    assert set(described.split(", ")) == description.keys() - {"format"}
    PAGE.rounding("reference logits, unmixed, to {}", description["check"]["difference"])
    (shown,) = re.findall(r"xmixup\.safetensors +(layer .*), the weights' hash", listing)
    state = MixupState.load(run / "model" / "xmixup.safetensors")
    for name, value in (part.split() for part in shown.split(", ")):
        found = getattr(state, name)
        assert value == found if isinstance(found, str) else numbers(value) == [found]
    assert state.model_hash


def test_prediction(walk: Walk) -> None:
    from data_pipeline.tasks.rows import read_task_file
    from evals.xtreme.predict import EncoderPredictor

    predictor = EncoderPredictor.open(walk.config.output_dir / "model")
    records = list(read_task_file(walk.config.data_dir / "test_seen" / "de.jsonl", "classification"))
    block = PAGE.block("David füllt")
    (place,) = PAGE.quoted("line {} of `test_seen/de.jsonl`")
    record = records[place - 1]
    assert record.back is not None
    assert block.splitlines()[:2] == [*record.example.texts, *record.back.texts]
    heads, *lines = block.splitlines()[3:]
    assert heads.split() == ["logits", *predictor.labels]
    units = predictor._units([record], [record.back])
    ((_, target, source),) = predictor._run(units)
    assert source is not None
    mixup = predictor.mixup
    assert mixup is not None
    assert mixup.last_ratio is not None
    assert units[0].source is not None
    remarks = [[len(units[0].target), float(mixup.last_ratio[0])], [len(units[0].source)], []]
    means = predictor.class_logits([record])[0]
    for line, logits, remark in zip(lines, (target[0], source[0], means), remarks, strict=True):
        assert numbers(line) == [*logits.tolist(), *remark]
    assert lines[2].endswith(f"-> {predictor.labels[int(means.argmax())]}")
    predictions = predictor.predict(records)
    right = sum(value == each.example.label for value, each in zip(predictions.values, records, strict=True))
    assert PAGE.quoted("All {} German rows are mixed and {} are right") == [len(records), right]
    assert predictions.mixed == len(records)
    PAGE.says("in four steps the model learned one label")
    assert len(set(predictions.values)) == 1


def test_score_of_a_task_that_is_not_xtremes(walk: Walk, tmp_path: Path) -> None:
    from evals.xtreme.predict import write_predictions

    records = [walk.data.index.record(int(row)) for row in walk.data.index.rows(1)]
    for folder, label in (("own", "remainder"), ("gold", "neutral")):
        (tmp_path / folder / "xnli").mkdir(parents=True)
        file = tmp_path / folder / "xnli" / "test-de.tsv"
        write_predictions(file, "classification", records, [label] * len(records))
        assert file.read_text().splitlines() == [label] * len(records)
    done = run_command("score", "xtreme", "--predictions", tmp_path / "own", "--labels", tmp_path / "gold")
    ((status, message),) = re.findall(r"is refused with status (\d): `(.*?)`", PAGE.words)
    assert done.returncode == int(status)
    assert message in done.stderr


def stage(walk: Walk, length: int, **task: Any) -> TaskStage:
    """Reads the rows of another task with the page's tokenizer."""
    from data_pipeline.tasks.config import TaskConfig
    from data_pipeline.tasks.stage import TaskStage
    from data_pipeline.tasks.tokenize import TaskTokenizer

    return TaskStage(TaskTokenizer(walk.data.tokenizer, TaskConfig(**task), length))


def slot(language: int, step: int, kind: Any, gold_step: bool) -> Slot:
    from data_pipeline.order.pairing import Partner
    from data_pipeline.order.plan import Slot

    return Slot(0, 0, language, True, Partner(kind, 0, 0, gold_step), (0, step))


def test_tagging(walk: Walk) -> None:
    from data_pipeline.batching.grid import Grid
    from data_pipeline.batching.packer import Packer
    from data_pipeline.batching.tasks import TaskCollator
    from data_pipeline.reader import SlotRecord
    from data_pipeline.tasks.sample import TaskSample

    tokens, words_of, soft = PAGE.block("tokens  ").splitlines()
    pieces = tokens.split()[1:]
    tags = tuple(tuple(map(float, pair)) for pair in re.findall(r"\(([\d.]+), ([\d.]+)\)", soft))
    words = tuple("".join(pieces[1:-1]).replace("▁", " ").split())
    tagging = stage(walk, 64, kind="tagging", labels=tuple(soft.split("labels ")[1].split(", ")))
    english = Example(("Lina", "buys", "9", "bags", "."), tags=("OTHER", "OTHER", "NUM", "OTHER", "OTHER"))
    german = Record("lina", "lina", "de", "de:1", Example(words, soft_tags=tags), back=Example(english.texts))
    source = Record("lina", "lina", "en", "en:1", english)
    counts = []
    for kind, gold_step in (("translation", True), ("back-translation", False)):
        of_german = SlotRecord(slot(1, 0, kind, gold_step), german, source if gold_step else None)
        ours, itself = tagging.samples([of_german, SlotRecord(slot(0, 0, "itself", gold_step), source)])
        assert isinstance(ours, TaskSample)
        assert isinstance(itself, TaskSample)
        assert walk.data.tokenizer.convert_ids_to_tokens(ours.target.input_ids.tolist()) == pieces
        assert ours.target.word_of_token.tolist() == list(map(int, words_of.split()[1:]))
        assert ours.target_labels.classes is not None
        assert ours.target_labels.classes.flatten().tolist() == pytest.approx(list(chain(*tags)))
        collator = TaskCollator(walk.data.tokenizer.pad_token_id, tagging.tokenizer.config, True, False)
        batch = Packer(Grid("padded", 512, 64, collator.sides), collator).batch([ours, itself])
        of_targets, of_sources = (batch.targets.label_is_source == side for side in (False, True))
        found = [int(batch.label_weights[side].sum()) for side in (of_targets, of_sources)]
        assert found == [sum(sample.counts()[name] for sample in (ours, itself)) for name in collator.counts[:2]]
        counts += found
    assert PAGE.quoted("{} `target_labels` and {} `source_labels`; with back-translations~{} and {}") == counts


def test_question_answering(walk: Walk) -> None:
    from data_pipeline.reader import SlotRecord
    from data_pipeline.tasks.sample import TaskSample
    from evals.xtreme.spans import MAX_TOKENS, N_BEST

    length, stride, asked, n_tokens = PAGE.quoted(
        "With {} tokens, a stride of {}, a German question of {} tokens and a context of {}"
    )
    qa = stage(walk, length, kind="qa", doc_stride=stride, max_question_length=12)

    def example(question: int, context: int, before: int, answer: int) -> Example:
        """Texts of so many tokens, each a word; so many of them are the answer."""
        words = ["Orangen"] * before + ["Beutel"] * answer + ["Orangen"] * (context - before - answer)
        span = " ".join(words[before : before + answer]), len(" ".join([*words[:before], ""]))
        return Example((" ".join(["Orangen"] * question), " ".join(words)), answers=(span,))

    first, last = PAGE.quoted("({}, {}), (18, 19) and (0, 0)")
    german = example(asked, n_tokens, first - asked - 3, last - first + 1)
    (name,) = re.findall(r"for the id `([\w-]+)` in steps 0 to 3", PAGE.words)
    record = Record(name, name, "de", "de:1", german)
    english = Record(name, name, "en", "en:1", example(12, 39, 13, 2))
    windows = list(qa.tokenizer.windows(german))
    ranges = [end for window in windows for end in (window.words[0], window.words[1] - 1)]
    assert PAGE.quoted("context tokens {}-{}, {}-{} and {}-{}") == ranges
    spans = [place for window in windows for place in window.span or ()]
    assert PAGE.quoted("first and last position~({}, {}), ({}, {}) and ({}, {})") == spans
    drawn = qa.samples([SlotRecord(slot(1, step, "translation", True), record, english) for step in range(4)])
    read = [each for each in drawn if isinstance(each, TaskSample)]
    found = [(each.target.words, each.source.side.words) for each in read if each.source]
    said = PAGE.quoted(f"for the id `{name}` in steps 0 to 3: {{}}-{{}}, {{}}-{{}}, {{}}-{{}}, {{}}-{{}}")
    assert said == [end for (start, stop), _ in found for end in (start, stop - 1)]
    said = PAGE.quoted("the source's window: {}-{}, {}-{}, {}-{}, {}-{}")
    assert said == [end for _, (start, stop) in found for end in (start, stop - 1)]
    said = PAGE.quoted("{} best starts~20 best ends, at most {} tokens")
    assert said == [N_BEST, MAX_TOKENS]
