"""Deduplication: signatures against plain sets, decisions on planted duplicates, earlier runs."""

import random

import numpy as np
import pytest
from planted import planted, shingle_set, similarity, words_of

from jaxllm.data import minhash, signatures, substrings, units
from jaxllm.data.dedup import decide
from jaxllm.data.document import Document, Removal
from jaxllm.data.minhash import DedupConfig
from jaxllm.data.repeats import LineCounts, Repeats, RepeatsConfig, line_hashes
from jaxllm.data.substrings import SubstringsConfig
from jaxllm.errors import UserError

CFG = DedupConfig()


def decided(texts, cfg=CFG, **settings):
    return decide(minhash.signatures(texts, cfg), lambda i: minhash.shingles(texts[i], cfg), cfg, **settings)


def clusters(decision, n) -> set[frozenset]:
    kept = np.where(decision.duplicate_of_N < 0, np.arange(n), decision.duplicate_of_N)
    groups = {}
    for i, k in enumerate(kept.tolist()):
        groups.setdefault(k, set()).add(i)
    return {frozenset(g) for g in groups.values()}


def components(pairs, n) -> list[int]:
    """Returns a label for each document, the same for those that `pairs` connect."""
    label = list(range(n))
    for a, b in pairs:
        old, new = label[a], label[b]
        if old != new:
            label = [new if x == old else x for x in label]
    return label


@pytest.fixture(scope="module")
def made():
    return planted(400)


# ---------------------------------------------------------------- words and signatures


def test_words_are_those_of_plain_python():
    text = "The Quick  brown-fox’s\tÄpfel 日本語,テキスト x_y 42! " + "".join(map(chr, range(0xC0, 0x250)))
    found = units.units(text)
    assert "|".join(text[a:b].lower() for a, b in zip(found.start_W, found.end_W, strict=True)) .startswith(
        "the|quick|brown|fox|s|äpfel|日|本|語|テ|キ|ス|ト|x|y|42|")
    one, other = (units.units(t).hash_W for t in ("THE brown", "a brown the"))
    assert one[0] == other[2] and one[1] == other[1] and one[0] != one[1]
    np.testing.assert_array_equal(units.units("THE ÄPFEL Straße").hash_W, units.units("the äpfel (STRAßE)").hash_W)
    assert units.units("THE é").hash_W[0] == one[0]  # a text of ASCII alone goes another way


def test_long_texts_are_cut_without_a_trace(monkeypatch):
    """Pieces are an inner matter: words, windows and signatures are those of the text as a whole."""
    pick = random.Random(0)
    text = " ".join(pick.choice(("word", "längeres", "日本", "x" * 300, "\n\n")) for _ in range(3000))
    whole = [*units.units(text), units.windows(units.units(text).hash_W, 5), units.characters(text)]
    row = minhash.signature(text, CFG)
    units._powers.cache_clear()
    monkeypatch.setattr(units, "PIECE", 1000)
    monkeypatch.setattr(minhash, "BLOCK", 64)
    parts = [*units.units(text), units.windows(units.units(text).hash_W, 5), units.characters(text)]
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(minhash.signature(text, CFG), row)
    units._powers.cache_clear()


@pytest.mark.parametrize("cfg", [CFG, DedupConfig(unit="character", n=12), DedupConfig(n=1)], ids=lambda c: f"{c.unit}-{c.n}")
def test_documents_together_are_as_each_alone(made, cfg):
    texts = [*made.texts[:60], "", "!?", "two words", "日本", made.texts[0] * 30]
    np.testing.assert_array_equal(minhash.signatures(texts, cfg), np.stack([minhash.signature(t, cfg) for t in texts]))


def test_shingles_have_the_jaccard_of_plain_sets(made):
    for a, b in made.similar(0.3)[:200]:
        ours = minhash.jaccard(*(minhash.shingles(made.texts[i], CFG) for i in (a, b)))
        assert ours == pytest.approx(similarity(*(shingle_set(made.texts[i], 5) for i in (a, b))), abs=1e-12)


def test_signatures_estimate_jaccard_without_bias(made):
    """The mean error of many pairs is within four standard errors of none, and single ones spread as binomials do."""
    rows, errors = minhash.signatures(made.texts, CFG), []
    for a, b in made.similar(0.3):
        true = similarity(shingle_set(made.texts[a], 5), shingle_set(made.texts[b], 5))
        if true < 1:
            estimate = (rows[a, minhash.EXACT:] == rows[b, minhash.EXACT:]).mean()
            errors.append((estimate - true) / (true * (1 - true) / 100) ** 0.5)
    assert len(errors) > 200
    assert abs(np.mean(errors)) < 4 / len(errors) ** 0.5 * 1.5  # pairs of one family are not independent
    assert 0.8 < np.std(errors) < 1.2


# ---------------------------------------------------------------- decisions


def test_planted_duplicates_are_found_and_nothing_else(made):
    """Recall at least .99 of pairs at Jaccard .8 or more, at most .1 % of documents removed without such a pair."""
    decision, n = decided(made.texts), len(made.texts)
    pairs = made.similar(CFG.threshold)
    kept = np.where(decision.duplicate_of_N < 0, np.arange(n), decision.duplicate_of_N)
    assert len(pairs) > 200
    for spaced in (True, False):
        for long in (True, False):
            some = [(a, b) for a, b in pairs if (" " in made.texts[a]) == spaced and (len(words_of(made.texts[a])) > 100) == long]
            assert len(some) > 30
            assert np.mean([kept[a] == kept[b] for a, b in some]) >= 0.99
    label = components(pairs, n)
    false = [i for i in range(n) if label[i] != label[kept[i]]]
    assert len(false) <= 0.001 * n
    assert sum(size * count for size, count in decision.cluster_sizes.items()) == n
    gone = np.flatnonzero(decision.duplicate_of_N >= 0)  # what is told of each: how similar it is to the document that stays
    truth = [minhash.jaccard(*(minhash.shingles(made.texts[j], CFG) for j in (i, kept[i]))) for i in gone]
    assert np.abs(decision.similarity_N[gone] - truth).max() < 0.2 and abs(np.mean(decision.similarity_N[gone] - truth)) < 0.02
    assert (decision.similarity_N[decision.exact_N] == 1).all() and np.isnan(np.delete(decision.similarity_N, gone)).all()


def test_clusters_do_not_depend_on_the_order_of_documents(made):
    n, order = len(made.texts), np.random.default_rng(1).permutation(len(made.texts))
    straight = clusters(decided(made.texts), n)
    shuffled = clusters(decided([made.texts[i] for i in order]), n)
    assert {frozenset(int(order[i]) for i in g) for g in shuffled} == straight


def test_a_crowd_of_similar_documents_is_one_cluster():
    """More documents in a group than are compared with each other, and a pair each that LSH alone would join wrongly."""
    pick = random.Random(0)
    base = [f"w{pick.randrange(10**6)}" for _ in range(200)]
    crowd = [" ".join([*base[:i], "other", *base[i + 1 :]]) for i in range(0, 200, 2)]
    half = [" ".join(base[:100] + [f"v{pick.randrange(10**6)}" for _ in range(60)]) for _ in range(40)]  # Jaccard .45 among them
    decision = decided([*crowd, *half], DedupConfig(window=8, bands=50, rows=2))
    assert clusters(decision, 140) == {frozenset(range(100)), *(frozenset([i]) for i in range(100, 140))}


def test_the_best_then_the_earliest_is_kept():
    text = "one two three four five six seven eight nine ten"
    texts = ["something else entirely, of other words", text, text + "  ", text.upper(), text + "\n"]
    assert decided(texts).duplicate_of_N.tolist() == [-1, -1, 1, 1, 1]
    assert decided(texts).exact_N.tolist() == [False, False, True, False, True]
    assert decided(texts, quality_N=np.array([0, 0.1, 0.5, 0.9, 0.9])).duplicate_of_N.tolist() == [-1, 3, 3, -1, 3]
    assert decided(texts, order_N=np.array([4, 3, 2, 1, 0])).duplicate_of_N.tolist() == [-1, 4, 4, 4, -1]
    assert decided(texts, DedupConfig(near=False)).duplicate_of_N.tolist() == [-1, -1, 1, -1, 1]
    assert decided(texts).cluster_sizes == {1: 1, 4: 1}


def test_texts_without_a_word_are_equal_only_where_they_are():
    assert decided(["!!!", "???", "! !!", "", "", "—"]).duplicate_of_N.tolist() == [-1, -1, 0, -1, 3, -1]


@pytest.mark.parametrize("cfg", [CFG, DedupConfig(unit="character", n=20), DedupConfig(near=False)], ids=["words", "characters", "exact"])
def test_odd_texts_are_no_trouble(cfg):
    texts = ["\ud800 lone", "\x00\x00", "a" * 100_000, "\U0010ffff x", "İstanbul ǅ ß", "\n" * 70_000, "x\n" * 3, "ก" * 40_000]
    assert decided(texts, cfg).duplicate_of_N.tolist() == [-1] * len(texts)
    assert decided([], cfg).duplicate_of_N.tolist() == [] and decided(["one"], cfg).cluster_sizes == {1: 1}
    assert substrings.repeated(texts[:2] + texts[:1], SubstringsConfig(min_bytes=16)) == [[], [], []]


def test_an_earlier_run_counts_as_kept(made, tmp_path):
    """Whatever an earlier run kept stays, and what is new is judged as if both had run as one."""
    texts, n = made.texts, len(made.texts) // 2
    old, new = texts[:n], texts[n:]
    first = decided(old)
    kept = np.flatnonzero(first.duplicate_of_N < 0)
    signatures.save(tmp_path / "first", minhash.signatures(old, CFG)[kept], [f"id-{i}" for i in kept], CFG)
    cfg = DedupConfig(earlier=(str(tmp_path / "first"),))
    earlier = signatures.load_earlier(cfg)
    true = decided(new, cfg, earlier=earlier, load_earlier=lambda i: minhash.shingles(old[kept[i]], cfg))
    assert true.estimated == 0 and true.compared > 0
    both = decided([old[i] for i in kept] + new)
    removed = {i for i in range(len(new)) if both.duplicate_of_N[len(kept) + i] >= 0}
    assert {i for i, d in enumerate(true.duplicate_of_N) if d >= 0} == removed
    of_earlier = [d for d in true.duplicate_of_N if d >= len(new)]
    assert len(of_earlier) > 50 and max(of_earlier) < len(new) + len(kept)
    for i, d in enumerate(true.duplicate_of_N):
        if d >= len(new):
            assert made.family[int(earlier.ids[d - len(new)].removeprefix("id-"))] == made.family[n + i]
    by_signature = decided(new, cfg, earlier=earlier)
    assert by_signature.estimated > 0
    for i, text in enumerate(new):  # an estimate of 100 values is off by at most .2, five standard deviations
        family = [t for t, f in zip([*old, *new], made.family, strict=True) if f == made.family[n + i] and t is not text]
        best = max((similarity(shingle_set(text, 5), shingle_set(t, 5)) for t in family), default=0)
        of_kept = max((similarity(shingle_set(text, 5), shingle_set(old[k], 5)) for k in kept if made.family[k] == made.family[n + i]), default=0)
        assert by_signature.duplicate_of_N[i] < 0 or best >= 0.6
        assert by_signature.duplicate_of_N[i] >= 0 or of_kept < 0.97


def test_mistakes_are_said(tmp_path):
    with pytest.raises(ValueError, match=r"dedup.bands=2, dedup.rows=20: would find 2% .* more bands"):
        DedupConfig(bands=2, rows=20)
    with pytest.raises(ValueError, match=r"dedup.threshold=0: should be in \(0, 1\]"):
        DedupConfig(threshold=0)
    with pytest.raises(UserError, match=r"has no signatures.json"):
        signatures.load_earlier(DedupConfig(earlier=(str(tmp_path),)))
    signatures.save(tmp_path, minhash.signatures(["a b"], CFG), ["x"], CFG)
    with pytest.raises(UserError, match=r"was made with dedup.n=5, this run has 4"):
        signatures.load_earlier(DedupConfig(n=4, earlier=(str(tmp_path),)))
    (tmp_path / "ids.txt").write_text("")
    with pytest.raises(UserError, match="has 0 ids and signatures"):
        signatures.load_earlier(DedupConfig(earlier=(str(tmp_path),)))
    with pytest.raises(ValueError, match="quality of document 1"):
        decided(["a", "b"], quality_N=np.array([1, np.nan]))


# ---------------------------------------------------------------- lines and passages


def test_repeated_lines_go(made):
    """A document's second copy of a line, and lines of more documents than `max_documents`; nothing else."""
    cfg = RepeatsConfig(max_documents=3, table_bits=12, min_words=3)
    menu, often = "Home | News | About | Log in\n", "The end of the story.\n"
    texts = [f"{menu if i < 4 else ''}line {i} of its own\n{often if i < 3 else ''}ok\nok\nline {i} of its own\nlast {i} is here" for i in range(6)]
    halves = [LineCounts(cfg), LineCounts(cfg)]
    for i, text in enumerate(texts):
        halves[i % 2].add(line_hashes(text, cfg))
    halves[0].merge(halves[1])
    stage = Repeats(cfg, halves[0])
    for i, text in enumerate(texts):
        doc = Document(str(i), "a", text)
        assert stage(doc) is None
        assert doc.text == f"line {i} of its own\n{often if i < 3 else ''}ok\nok\nlast {i} is here"
        assert doc.counts == {"repeats.lines_within": 1} | ({"repeats.lines_across": 1} if i < 4 else {})
    assert stage(Document("x", "a", menu * 3)) == Removal("repeats.removed_share", 1.0)
    assert stage(doc := Document("x", "a", made.texts[0])) is None and doc.text == made.texts[0]


def test_repeated_paragraphs_go():
    """Paragraphs are compared as a whole: lines that they share stay."""
    cfg = RepeatsConfig(unit="paragraph", max_documents=None, min_words=2)
    doc = Document("1", "a", "one line here\nand another\n\none line here\n  \n\nOne line here\nand another\n\nlast words\n")
    assert Repeats(cfg)(doc) is None
    assert doc.text == "one line here\nand another\n\none line here\n  \n\nlast words\n"
    assert doc.counts == {"repeats.lines_within": 1}


def test_counts_of_lines_are_never_too_low():
    """Workers' tables add up to the table of all, counters stop at their largest, and few counts are too high."""
    cfg, pick = RepeatsConfig(table_bits=12), np.random.default_rng(0)
    line = pick.integers(0, 1 << 63, 2000, dtype=np.uint64) * np.uint64(2)
    counts, whole = [LineCounts(cfg) for _ in range(3)], LineCounts(cfg)
    for i in range(30):
        some = line[: 2000 if i < 3 else 20]
        counts[i % 3].add(some)
        whole.add(some)
    for other in counts[1:]:
        counts[0].merge(other)
    np.testing.assert_array_equal(counts[0].table_2C, whole.table_2C)
    true = np.where(np.arange(2000) < 20, 30, 3)
    assert (whole.count(line) >= true).all() and (whole.count(line) > true).mean() < 0.25  # (1 - e^(-2000/4096))^2 = .15
    whole.add(np.full(70_000, line[0]))
    whole.add(line[:1])
    assert whole.count(line[:1]) == 65535
    whole.merge(counts[0])
    assert whole.count(line[:1]) == 65535


def test_long_passages_go_where_they_occur_again(monkeypatch):
    """What is cut is what plain Python finds: bytes of windows that occurred before; whatever the parts of the sort."""
    pick, n = random.Random(0), 16
    passage = ["".join(pick.choices("abcä日", k=k)) for k in (15, 20, 40)]
    texts = ["".join(pick.choices([*passage, "xyz", "12345678"], k=6)) for _ in range(30)] + ["", "kurz"]
    seen, expected = set(), []
    for text in texts:
        raw = text.encode()
        marked = [False] * len(raw)
        for i in range(len(raw) - n + 1):
            if raw[i : i + n] in seen:
                marked[i : i + n] = [True] * n
            seen.add(raw[i : i + n])
        at, left = 0, ""
        for c in text:
            left += "" if all(marked[at : at + len(c.encode())]) else c
            at += len(c.encode())
        expected.append(left)
    cfg = SubstringsConfig(min_bytes=n)
    cut = [substrings.without(t, r) for t, r in zip(texts, substrings.repeated(texts, cfg), strict=True)]
    assert cut == expected and sum(map(len, cut)) < 0.5 * sum(map(len, texts))
    monkeypatch.setattr(substrings, "PART", 100)
    assert [substrings.without(t, r) for t, r in zip(texts, substrings.repeated(texts, cfg), strict=True)] == expected
    assert substrings.repeated([], cfg) == []
    with pytest.raises(UserError, match=r"substrings.max_shard_mb=1: the shard has 2 MB"):
        substrings.repeated(["a" * 2_000_000], SubstringsConfig(max_shard_mb=1))
