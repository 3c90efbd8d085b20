"""Trained tokenizers: reproducible, loaded by plain AutoTokenizer; a decoder's restores any text."""

import json
import re
import unicodedata

import pytest
import sentencepiece
from pydantic import ValidationError
from transformers import AutoTokenizer

from data_pipeline.records import DataError
from data_pipeline.text.tokenizer import (
    ENCODER_TOKENS,
    SPECIAL_TOKENS,
    TokenizerTrainingConfig,
    tokenizer_hash,
    train_tokenizer,
)

TEXTS = {
    "en": "Anna has 12 apples and buys 30 more. How many apples does she have now?",
    "de": "Anna hat 12 Äpfel und kauft 30 weitere. Wie viele Äpfel hat sie nun? Größe, Übung, süß.",
    "es": "Ana tiene 12 manzanas y compra 30 más. ¿Cuántas manzanas tiene ahora el niño?",
    "fr": "Anne a 12 pommes et en achète 30 de plus. Combien de pommes a-t-elle à présent, où ça ?",
    "ru": "У Анны 12 яблок, и она покупает ещё 30. Сколько яблок у неё теперь?",
    "zh": "安娜有12个苹果,又买了30个。她现在有多少个苹果?",
    "ja": "アンナはりんごを12個持っていて、さらに30個買いました。今、りんごは何個ありますか。",
    "th": "แอนนามีแอปเปิล 12 ผล และซื้ออีก 30 ผล ตอนนี้เธอมีแอปเปิลกี่ผล",
    "sw": "Anna ana tufaha 12 na ananunua 30 zaidi. Sasa ana tufaha ngapi kwa jumla?",
    "bn": "আনার কাছে ১২টি আপেল আছে এবং সে আরও ৩০টি কেনে। এখন তার কাছে কয়টি আপেল আছে?",
}
HARD = [
    "a\nb\n\n\nc\r\nd", "\ttab\t\there", "two  spaces   three", " one in front", "   three in front", "behind   ",
    "\n", " ", "emoji 😀👩‍👩‍👧 and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "decomposed é, য়, ﬁ, Å", "<0x0A> <unk >", "zero\u200bwidth \u3000 wide",
]  # fmt: skip
CONFIG = TokenizerTrainingConfig(vocab_size=900, character_coverage=1.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS.values(), path, CONFIG)
    return path


@pytest.fixture(scope="module")
def tokenizer(trained):
    return AutoTokenizer.from_pretrained(trained)


def plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", [*TEXTS.values(), *HARD])
def test_every_text_is_restored_whole_and_in_parts(tokenizer, text):
    assert decode(tokenizer, plain_ids(tokenizer, text)) == text
    for cut in range(0, len(text), 3):
        parts = plain_ids(tokenizer, text[:cut]) + plain_ids(tokenizer, text[cut:])
        assert decode(tokenizer, parts) == text


def test_the_hash_depends_on_the_tokenizer_and_not_on_its_path(trained, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    found = tokenizer_hash(AutoTokenizer.from_pretrained(trained))
    copy = AutoTokenizer.from_pretrained(tmp_path / "elsewhere")
    assert tokenizer_hash(copy) == found
    copy.chat_template = "{{ messages }}"
    templated = tokenizer_hash(copy)
    copy.chat_template = None
    copy.add_tokens(["<new>"])
    assert len({found, templated, tokenizer_hash(copy)}) == 3


def test_no_text_has_unknown_tokens(tokenizer):
    ids = plain_ids(tokenizer, " ".join([*TEXTS.values(), *HARD]))
    assert not set(ids) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("text", [*TEXTS.values(), "  x😀\n\ty"])
def test_offsets_name_the_characters_of_each_token(tokenizer, text):
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    covered = set()
    for token, (start, stop) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        piece = tokenizer.convert_ids_to_tokens(token)
        assert piece.replace("▁", " ") == text[start:stop] or (piece.startswith("<0x") and stop == start + 1)
        covered.update(range(start, stop))
    assert covered == set(range(len(text)))


def test_special_tokens_and_shape(tokenizer):
    assert tokenizer.is_fast
    assert len(tokenizer) == CONFIG.vocab_size
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == list(SPECIAL_TOKENS)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("x")["input_ids"][-1] != tokenizer.eos_token_id


def test_each_digit_is_a_token(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(plain_ids(tokenizer, "1230 and 456"))
    assert [p for p in pieces if any(c.isdigit() for c in p)] == list("1230456")


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt_neox", "bloom", "mistral"])
def test_a_trained_tokenizer_loads_beside_the_config_of_any_model(trained, tmp_path, model_type):
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = " ".join([*TEXTS.values(), *HARD])
    assert decode(loaded, plain_ids(loaded, text)) == text
    assert loaded("x")["input_ids"] == AutoTokenizer.from_pretrained(trained)("x")["input_ids"]


def test_the_same_texts_give_the_same_tokenizer(trained, tmp_path):
    train_tokenizer(iter(TEXTS.values()), tmp_path, CONFIG)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


def test_tokens_are_those_of_sentencepiece(tokenizer, monkeypatch, tmp_path):
    models = []
    processor = sentencepiece.SentencePieceProcessor

    def recorded(model_proto):
        models.append(processor(model_proto=model_proto))
        return models[-1]

    monkeypatch.setattr(sentencepiece, "SentencePieceProcessor", recorded)
    train_tokenizer(TEXTS.values(), tmp_path, CONFIG)
    for text in [*TEXTS.values(), *HARD]:
        assert plain_ids(tokenizer, text) == models[0].encode(text)


def test_long_lines_are_used_for_training(tmp_path):
    word = "quokkas "
    tokenizer = train_tokenizer([word * 2000], tmp_path, TokenizerTrainingConfig(vocab_size=284))
    assert len(plain_ids(tokenizer, word * 10)) < len(word) * 3


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (TEXTS.values(), 50_000, r"vocab_size: 50000 is too large for the text; it can be at most \d+"),
        (TEXTS.values(), 310, r"vocab_size: 310 is too small: characters and bytes alone need \d+"),
        ([" ", "\n"], 300, "there is no text"),
    ],
)
def test_an_impossible_vocabulary_size_is_a_one_line_error(tmp_path, texts, size, message):
    with pytest.raises(DataError, match=message) as caught:
        train_tokenizer(texts, tmp_path, TokenizerTrainingConfig(vocab_size=size, character_coverage=1.0))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2
    assert not list(tmp_path.iterdir())


# --- encoders

ENCODER = TokenizerTrainingConfig(style="encoder", vocab_size=200, character_coverage=1.0)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    train_tokenizer(TEXTS.values(), path, ENCODER)
    return path


@pytest.fixture(scope="module")
def encoder(encoder_folder):
    return AutoTokenizer.from_pretrained(encoder_folder)


def test_special_tokens_of_an_encoder_have_the_ids_of_xlmr(encoder):
    assert encoder.is_fast
    assert len(encoder) == ENCODER.vocab_size
    assert encoder.convert_ids_to_tokens([0, 1, 2, 3]) == list(ENCODER_TOKENS)
    names = ("cls", "bos", "pad", "sep", "eos", "unk", "mask")
    assert [getattr(encoder, f"{name}_token_id") for name in names] == [0, 0, 1, 2, 2, 3, 199]
    assert encoder("x <mask> y")["input_ids"].count(199) == 1


def test_an_encoder_adds_special_tokens_like_xlmr(encoder):
    one, two = (plain_ids(encoder, TEXTS[code]) for code in ("en", "th"))
    assert encoder(TEXTS["en"])["input_ids"] == [0, *one, 2]
    assert encoder(TEXTS["en"], TEXTS["th"])["input_ids"] == [0, *one, 2, 2, *two, 2]
    assert "token_type_ids" not in encoder(TEXTS["en"])
    assert plain_ids(encoder, "apples") == plain_ids(encoder, " apples "), "each word begins with a space"
    assert encoder.convert_ids_to_tokens(one[:1])[0].startswith("▁")


@pytest.mark.parametrize("text", TEXTS.values())
def test_an_encoder_restores_its_training_texts_up_to_nfkc(encoder, text):
    ids = plain_ids(encoder, text)
    assert not set(ids) & {0, 1, 2, 3, 199}
    assert decode(encoder, ids) == " ".join(unicodedata.normalize("NFKC", text).split())


def test_an_encoders_tokens_are_those_of_sentencepiece(encoder, monkeypatch, tmp_path):
    models = []
    train = sentencepiece.SentencePieceTrainer.train

    def recorded(**settings):
        train(**settings)
        models.append(sentencepiece.SentencePieceProcessor(model_proto=settings["model_writer"].getvalue()))

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", recorded)
    train_tokenizer(TEXTS.values(), tmp_path, ENCODER)
    for text in [*TEXTS.values(), *HARD]:
        assert plain_ids(encoder, text) == models[0].encode(text)


@pytest.mark.parametrize("model_type", [None, "xlm-roberta", "bert"])
def test_a_reloaded_encoder_gives_the_same_ids(encoder_folder, tmp_path, encoder, model_type):
    for file in encoder_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    trained = train_tokenizer(TEXTS.values(), tmp_path / "anew", ENCODER)
    for folder in (tmp_path, tmp_path / "again"):
        opened = AutoTokenizer.from_pretrained(folder)
        assert opened.mask_token_id == 199
        for text in [*TEXTS.values(), *HARD, "half <mask> known"]:
            expected = encoder(text, text[::-1])
            assert opened(text, text[::-1])["input_ids"] == expected["input_ids"]
            assert trained(text, text[::-1])["input_ids"] == expected["input_ids"]
            assert (
                opened(text, return_offsets_mapping=True)["offset_mapping"]
                == encoder(text, return_offsets_mapping=True)["offset_mapping"]
            )


def test_the_same_texts_give_the_same_encoder(encoder_folder, tmp_path):
    train_tokenizer(iter(TEXTS.values()), tmp_path, ENCODER)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (encoder_folder / name).read_bytes()


def test_an_encoders_size_must_fit_the_text(tmp_path):
    def size(vocab_size):
        return ENCODER.model_copy(update={"vocab_size": vocab_size})

    with pytest.raises(
        DataError, match=r"vocab_size: 9000 is too large for the text; it can be at most (\d+)"
    ) as large:
        train_tokenizer(TEXTS.values(), tmp_path, size(9000))
    with pytest.raises(DataError, match=r"vocab_size: 20 is too small: characters alone need (\d+); or lower") as small:
        train_tokenizer(TEXTS.values(), tmp_path, size(20))
    for error in (large, small):
        fitting = int(re.search(r"(?:at most|need) (\d+)", str(error.value))[1])
        assert len(train_tokenizer(TEXTS.values(), tmp_path, size(fitting))) == fitting


def test_the_vocabulary_of_a_decoder_must_exceed_the_byte_tokens():
    with pytest.raises(ValidationError, match="'vocab_size' must be greater than 260"):
        TokenizerTrainingConfig(vocab_size=260)
    assert TokenizerTrainingConfig(vocab_size=261).style == "decoder"
