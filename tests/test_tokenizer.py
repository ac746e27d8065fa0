"""Tokenizers give any text back, never make control tokens of typed text, and train the same way twice."""

import dataclasses
import io
import itertools
import json
import pathlib
import pickle
import pydoc_data.topics
import random

import numpy as np
import pytest
import sentencepiece

from jaxllm.data import tokenizer_training
from jaxllm.data.config import Source, TokenizerConfig
from jaxllm.data.tokenizer import SPECIALS, ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from jaxllm.data.tokenizer_training import Reservoir, draw, table, train
from jaxllm.errors import RunError, UserError

NASTY = ["", " ", "  a  b ", "\ta\t", "\n\n", "a\r\nb\r", "\0", "\u2581", "a\u2581 \u2581b", " \u2581", "e\u0301\u0323",
         "👩‍👩‍👧", "\ue000", "\ufeff", "\ufffd", "\u2585", "\u2047", "日本語", "<bos>", "<|user|> hi<eos>", "<0x0A>",
         "x" * 9000, "12345", "\U0010ffff", "a" + " " * 50 + "b"]
NAMES = ("bytes", "bpe", "unigram")


@pytest.fixture(scope="session")
def text():
    topics = pydoc_data.topics.topics
    return "".join(topics[name] for name in sorted(topics))[:200_000] + "in 2024, not 1984, some 1000 of 2024\n" * 200


@pytest.fixture(scope="session")
def source(text, tmp_path_factory):
    """A file of 40 documents, each 5 kB."""
    path = tmp_path_factory.mktemp("text") / "topics.jsonl"
    documents = [text[i : i + 5000] for i in range(0, len(text), 5000)]
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    return Source(path=str(path))


@pytest.fixture(scope="session")
def reports(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    cfg = {kind: TokenizerConfig(kind=kind, vocab_size=600, output=str(folder / f"{kind}.model"), held_out=0.1)
           for kind in ("bpe", "unigram")}
    return {kind: train({"topics": source}, cfg[kind], seed=0, overwrite=False) for kind in cfg}


@pytest.fixture(scope="session")
def tokenizers(reports):
    return {name: load_tokenizer(reports[name]["output"] if name in reports else name) for name in NAMES}


def random_texts(n: int):
    pick = random.Random(0)
    common = [*NASTY[1:], " the", "\n", "of"]

    def some():
        if pick.random() < 0.7:
            return pick.choice(common)[:5]
        return chr(pick.choice([pick.randrange(0x300), pick.randrange(0xD800), pick.randrange(0xE000, 0x110000)]))

    for _ in range(n):
        yield "".join(some() for _ in range(pick.randrange(12)))


@pytest.mark.parametrize("name", NAMES)
def test_any_text_comes_back(tokenizers, name, text):
    tokenizer = tokenizers[name]
    bytes_V = tokenizer.token_bytes()
    for one in [*NASTY, *random_texts(3000), text[:20_000]]:
        ids = tokenizer.encode(one)
        assert tokenizer.decode(ids) == one
        assert bytes_V[ids].sum() == len(one.encode())  # so that bits per byte is exact
        assert not ids or min(ids) >= len(SPECIALS)  # plain text has no control token, whatever it says
    assert tokenizer.encode_batch(NASTY) == [tokenizer.encode(one) for one in NASTY]


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_words_apart_are_encoded_like_the_whole_text(tokenizers, name, text):
    tokenizer = tokenizers[name]
    assert tokenizer.by_words
    for one in [text[:3000], text[100_000:103_000], *(t for t in random_texts(500) if "\u2581" not in t)]:
        apart, whole = tokenizer.encode(one), tokenizer.sp.encode(one)
        if name == "bpe":
            assert apart == whole
        else:  # SentencePiece adds the scores of a whole text up in float32, and so chooses among near equals by chance
            assert sum(map(tokenizer.sp.get_score, apart)) == pytest.approx(sum(map(tokenizer.sp.get_score, whole)), abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_decoded_early_stays_true(tokenizers, name):
    tokenizer = tokenizers[name]
    for one in ["añ日本👩‍👩‍👧 z", *random_texts(100)]:
        ids = tokenizer.encode(one)
        early = [tokenizer.decode(ids[:n], final=False) for n in range(len(ids) + 1)]
        assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(early))
        assert early[-1] == one
    half = ByteTokenizer().encode("日")[:2]
    assert ByteTokenizer().decode(half, final=False) == ""
    assert ByteTokenizer().decode(half) == "\ufffd"


@pytest.mark.parametrize("name", NAMES)
def test_control_tokens(tokenizers, name):
    tokenizer = tokenizers[name]
    assert [tokenizer.special_id(s) for s in SPECIALS] == list(range(len(SPECIALS)))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert not tokenizer.token_bytes()[: len(SPECIALS)].any() and tokenizer.token_bytes()[len(SPECIALS) :].all()
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("a b"), tokenizer.eos_id]) == "a b"
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.vocab_size + 5]) == "a"  # a padded vocabulary
    with pytest.raises(UserError, match=r"no control token '<\|usr\|>'; did you mean '<\|user\|>'"):
        tokenizer.special_id("<|usr|>")


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_digits_are_apart(tokenizers, name):
    assert max(sum(48 <= b < 58 for b in piece) for piece in tokenizers[name].bytes_V) == 1


def test_a_tokenizer_travels_between_processes(tokenizers):
    copy = pickle.loads(pickle.dumps(tokenizers["bpe"]))
    assert copy.hash == tokenizers["bpe"].hash
    assert copy.encode("in the beginning") == tokenizers["bpe"].encode("in the beginning")


def test_report(reports, tokenizers, source):
    report = reports["bpe"]
    written = json.loads(pathlib.Path(f"{report['output']}.report.json").read_text())
    assert written == report
    _, held_out = draw({"topics": source}, TokenizerConfig(held_out=0.1), 0)
    assert 1 <= len(held_out) == report["documents"] < 12
    n = sum(len(tokenizers["bpe"].encode(one.text)) for one in held_out)
    assert report["tokens"] == n and report["bytes_per_token"] == pytest.approx(report["bytes"] / n, abs=1e-3)
    assert report["bytes_per_token"] > 2 and report["unknown_rate"] == 0 and report["round_trip_errors"] == 0
    assert 0 < report["pieces_used"] <= report["pieces"] == 600 - len(SPECIALS) - 256
    assert f"{report['bytes_per_token']:.3f}" in table(report)


def test_round_trip_errors_are_counted(tokenizers, monkeypatch):
    monkeypatch.setattr(SentencePieceTokenizer, "decode", lambda self, ids: "nothing")
    one = tokenizer_training.Drawn("a", "some text")
    assert tokenizer_training.measure(tokenizers["bpe"], [], [one])["round_trip_errors"] == 1


def test_training_again_gives_the_same_model(source, reports, tmp_path):
    cfg = TokenizerConfig(vocab_size=600, output=str(tmp_path / "again.model"), held_out=0.1)
    assert train({"topics": source}, cfg, seed=0, overwrite=False)["hash"] == reports["bpe"]["hash"]


def test_a_large_corpus_is_sampled(source):
    cfg = TokenizerConfig(sample_bytes=50_000, held_out=0.1)
    seen, held_out = draw({"topics": source}, cfg, 0)
    assert 40_000 < sum(len(d.text.encode()) for d in seen) <= 50_000
    assert {d.text for d in seen}.isdisjoint(d.text for d in held_out)
    assert seen == draw({"topics": source}, cfg, 0)[0] != draw({"topics": source}, cfg, 1)[0]
    by_weight, _ = draw({"a": source, "b": dataclasses.replace(source, weight=3)}, cfg, 0)
    n_bytes = {name: sum(len(d.text) for d in by_weight if d.source == name) for name in "ab"}
    assert n_bytes["b"] > 2 * n_bytes["a"]


def test_a_sample_is_fair_and_bounded():
    chosen = np.zeros(50)
    for seed in range(400):
        reservoir, draws = Reservoir(100), random.Random(seed)
        for i in range(50):
            reservoir.add(draws.random(), f"{i:010d}")
            assert reservoir.n_bytes <= 100
        for one in reservoir.texts():
            chosen[int(one)] += 1
    assert chosen.sum() == 400 * 10
    assert abs(chosen - 80).max() < 5 * 80**0.5  # every document has the same chance: 10 of 50


# ---------------------------------------------------------------- what a user can do wrong


def test_vocabulary_that_the_text_cannot_give(source, tmp_path):
    cfg = TokenizerConfig(vocab_size=100_000, output=str(tmp_path / "t.model"))
    with pytest.raises(UserError, match=r"vocab_size=100000: too large for this text; the largest possible is \d+") as e:
        train({"topics": source}, cfg, seed=0, overwrite=False)
    assert list(tmp_path.iterdir()) == []
    largest = int(str(e.value).split()[-1])
    fits = dataclasses.replace(cfg, vocab_size=largest)
    assert train({"topics": source}, fits, seed=0, overwrite=False)["vocab_size"] == largest
    with pytest.raises(UserError, match=r"vocab_size=280: too small; .* need \d+"):
        train({"topics": source}, dataclasses.replace(cfg, vocab_size=280), seed=0, overwrite=True)


def test_messages(source, tmp_path):
    (tmp_path / "there.model").write_bytes(b"not a model")
    (tmp_path / "empty.txt").touch()
    cfg = TokenizerConfig(output=str(tmp_path / "there.model"))
    with pytest.raises(UserError, match=r"there.model: is there already; --overwrite=true"):
        train({"topics": source}, cfg, seed=0, overwrite=False)
    with pytest.raises(UserError, match="sources is empty"):
        train({}, cfg, seed=0, overwrite=True)
    with pytest.raises(UserError, match=r"no text to train on: e: .*empty.txt"):
        train({"e": Source(path=str(tmp_path / "empty.txt"))}, cfg, seed=0, overwrite=True)
    with pytest.raises(UserError, match=r"there.model: cannot be written: File exists"):
        train({"topics": source}, TokenizerConfig(output=str(tmp_path / "there.model" / "t.model")), seed=0, overwrite=True)
    with pytest.raises(UserError, match=r"there.model: not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "there.model"))
    with pytest.raises(UserError, match=r"their.model: no such file; did you mean .*there.model"):
        load_tokenizer(str(tmp_path / "their.model"))
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_tokenizer(str(tmp_path))
    assert (tmp_path / "there.model").read_bytes() == b"not a model"


def test_training_that_is_killed_says_so(source, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_training, "_watch", lambda process, *_: process.kill())
    with pytest.raises(RunError, match="killed by signal 9"):
        train({"topics": source}, TokenizerConfig(output=str(tmp_path / "t.model")), seed=0, overwrite=False)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- other people's models


def foreign(**settings) -> SentencePieceTokenizer:
    model = io.BytesIO()
    lines = ["the cat sat on the mat", "a dog and a cat", "the end of the day"] * 5
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, vocab_size=40, model_type="bpe",
                                             minloglevel=2, **settings)
    return SentencePieceTokenizer(model.getvalue(), "theirs")


def test_a_model_that_adds_a_space(text):
    tokenizer = foreign()
    assert tokenizer.adds_space and not tokenizer.by_words
    assert tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"
    assert tokenizer.pad_id == 0 != tokenizer.bos_id


def test_a_model_whose_pieces_go_over_spaces():
    tokenizer = foreign(split_by_whitespace=False, add_dummy_prefix=False)
    text = "the cat sat on the mat"
    apart = [i for word in ("the", " cat", " sat", " on", " the", " mat") for i in tokenizer.sp.encode(word)]
    assert len(tokenizer.encode(text)) < len(apart)
    assert tokenizer.encode(text) == tokenizer.sp.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text


def test_a_model_without_an_end_token():
    with pytest.raises(UserError, match="theirs: has no <bos> or no <eos>"):
        foreign(eos_id=-1)
