"""Filters decide as their papers say: each rule has a text just inside its threshold and one just outside."""

import collections
import dataclasses
import random

import pytest

from jaxllm import config
from jaxllm.data.document import Document
from jaxllm.data.filters import FilterConfig, Filters
from jaxllm.data.quality import C4, C4Config, FineWeb, FineWebConfig, Gopher, GopherConfig, n_sentences
from jaxllm.data.repetition import duplicated_share, repeated_lines, top_share
from jaxllm.data.words import between_spaces, hash_of, spoken


def word(i: int, length: int = 5) -> str:
    """Returns the i-th made-up word of a length; all differ."""
    letters = ""
    for _ in range(length):
        letters += "bcdfghjklmnpqrstvwxz"[i % 20]
        i //= 20
    return letters


def plain(n: int, length: int = 5) -> list[str]:
    """Returns n different words, with two stop words of 4 letters and others so long that the mean is `length`."""
    return ["that", "with", word(0, 2 * length - 4), word(1, 2 * length - 4), *(word(i, length) for i in range(4, n))][:n]


def decide(stage, text: str, **meta):
    doc = Document("1", "web", text, dict(meta))
    removal = stage(doc)
    return removal.rule if removal else None


def lines(words: list[str], per_line: int) -> list[str]:
    return [" ".join(words[i:i + per_line]) for i in range(0, len(words), per_line)]


def phrases(length: int, times: int, n: int) -> str:
    """Returns n words, in which `times` phrases of `length` words are said twice, not one after the other."""
    fresh = iter(plain(n))
    said = [[next(fresh) for _ in range(length)] for _ in range(times)]
    text = [w for phrase in said for w in [*phrase, next(fresh)]] + [w for phrase in said for w in [*phrase, next(fresh)]]
    return " ".join(text + [next(fresh) for _ in range(n - len(text))])


def often(length: int, times: int, n: int = 100) -> str:
    """Returns n words, in which one phrase is said again and again with other words between."""
    fresh = iter(plain(n))
    phrase = [next(fresh) for _ in range(length + 4)][4:]
    text = ["that", "with", word(0, 6), word(1, 6)]
    for _ in range(times):
        text += [*phrase, next(fresh)]
    return " ".join(text + [next(fresh) for _ in range(n - len(text))])


THREE = ["that", "the", word(0, 3), word(1, 2), *(word(i, 3) for i in range(4, 100))]  # mean length 3
GOPHER = [  # rule, text inside, text outside, knobs that turn off what would drop it first
    ("min_words", " ".join(plain(50)), " ".join(plain(49)), {}),
    ("max_words", " ".join(plain(100_000)), " ".join(plain(100_001)), {}),
    ("min_word_length", " ".join(THREE), " ".join([*THREE[:-1], "to"]), {}),
    ("max_word_length", " ".join(plain(60, 10)), " ".join(plain(60, 10)) + "s", {}),
    ("max_symbols", " ".join([*plain(90), *("#" + word(i) for i in range(500, 510))]),
     " ".join([*plain(89), *("#" + word(i) for i in range(500, 511))]), {}),
    ("max_symbols", " ".join([*(word(i) + "…" for i in range(500, 510)), *plain(90)]),
     " ".join([*(word(i) + "..." for i in range(500, 511)), *plain(89)]), {}),
    ("max_bullet_lines", "\n•".join(lines(plain(100), 10)), "•" + "\n- ".join(lines(plain(100), 10)), {}),
    ("max_ellipsis_lines", "...\n".join([*lines(plain(30), 10), "\n".join(lines(plain(170)[100:], 10))]),
     "...\n".join([*lines(plain(40), 10), "\n".join(lines(plain(160)[100:], 10))]), {}),
    ("min_alpha_words", " ".join([*plain(80), *map(str, range(10_000, 10_020))]),
     " ".join([*plain(79), *map(str, range(10_000, 10_021))]), {}),
    ("min_stop_words", " ".join(plain(60)), " ".join(["that", *plain(60)[2:], "that"]), {}),
    ("max_duplicate_lines", "\nyes\n".join([*lines(plain(40), 10), "\n".join(lines(plain(60)[40:], 10))]),
     "\nyes\n".join([*lines(plain(50), 10), word(777)]), {}),
    ("max_duplicate_paragraphs", "\n\nyes\n\n".join([*lines(plain(40), 10), "\n\n".join(lines(plain(60)[40:], 10))]),
     "\n\nyes\n\n".join([*lines(plain(50), 10), word(777)]),
     {"max_duplicate_lines": None}),
    ("max_duplicate_line_characters", "\n".join([*lines(plain(80), 10), *lines(plain(80), 10)[4:6]]),
     "\n".join([*lines(plain(70), 10), *lines(plain(70), 10)[4:6], word(777)]), {"max_duplicate_n_grams": [], "max_duplicate_lines": None}),
    ("max_duplicate_paragraph_characters", "\n\n".join([*lines(plain(80), 10), *lines(plain(80), 10)[4:6]]),
     "\n\n".join([*lines(plain(70), 10), *lines(plain(70), 10)[4:6], word(777)]),
     {"max_duplicate_n_grams": [], "max_duplicate_lines": None, "max_duplicate_line_characters": None, "max_duplicate_paragraphs": None}),
    ("top_2_gram", often(2, 10), often(2, 11), {}),
    ("top_3_gram", often(3, 6), often(3, 7), {}),
    ("top_4_gram", often(4, 4), often(4, 5), {}),
    ("duplicate_5_grams", phrases(5, 3, 100), phrases(5, 3, 99), {}),
    ("duplicate_6_grams", phrases(6, 2, 86), phrases(6, 2, 85), {}),
    ("duplicate_7_grams", phrases(7, 2, 108), phrases(7, 2, 107), {}),
    ("duplicate_8_grams", phrases(8, 2, 134), phrases(8, 2, 133), {}),
    ("duplicate_9_grams", phrases(9, 2, 164), phrases(9, 2, 163), {}),
    ("duplicate_10_grams", phrases(10, 2, 200), phrases(10, 2, 199), {}),
]


@pytest.mark.parametrize("rule, inside, outside, off", GOPHER, ids=[f"{r[0]}-{i}" for i, r in enumerate(GOPHER)])
def test_gopher(rule, inside, outside, off):
    stage = Gopher(GopherConfig(**off))
    assert decide(stage, inside) is None
    assert decide(stage, outside) == f"gopher.{rule}"
    if not rule.startswith(("top", "duplicate")):
        assert decide(Gopher(GopherConfig(**off, **{rule: None})), outside) != f"gopher.{rule}"


def naive(words: list[str], n: int) -> tuple[float, float]:
    """Returns (share of the most frequent n-gram, share within n-grams that occurred before), as the paper words it."""
    total = sum(map(len, words))
    grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    count = collections.Counter(grams)
    top = max(count.values(), default=1)
    top_characters = max((top * len("".join(g)) for g, c in count.items() if c == top), default=0) if top > 1 else 0
    seen, covered = set(), set()
    for i, gram in enumerate(grams):
        covered |= set(range(i, i + n)) if gram in seen else set()
        seen.add(gram)
    return top_characters / total, sum(len(words[i]) for i in covered) / total


@pytest.mark.parametrize("vocabulary, size", [(3, 40), (8, 200), (40, 300), (300, 300), (2, 3)])
def test_repetition_is_that_of_counting_one_by_one(vocabulary, size):
    draw = random.Random(vocabulary)
    for _ in range(5):
        words = []
        while len(words) < size:
            first = draw.randrange(len(words) + 1)
            words += words[first:first + draw.randrange(20)] if draw.random() < 0.1 else [
                word(draw.randrange(vocabulary), draw.choice([3, 5]))]
        found, before = between_spaces(" ".join(words)), None
        total = sum(map(len, words))
        for n in range(2, 11):
            top, repeated = naive(words, n)
            assert top_share(found.hash_W, found.length_W, n, total) == pytest.approx(top)
            if n >= 5:
                share, before = duplicated_share(found.hash_W, found.length_W, n, total, before)
                assert share == pytest.approx(repeated)


def test_repeated_lines_count_after_the_first():
    assert repeated_lines(["aa", "b", "aa", "aa"]) == (0.5, 4 / 7)
    assert repeated_lines([]) == repeated_lines(["x"]) == (0, 0)


def test_stop_words_are_asked_of_english_only():
    text = " ".join(word(i) for i in range(60))
    stage = Gopher(GopherConfig())
    assert decide(stage, text) == decide(stage, text, language="en") == "gopher.min_stop_words"
    assert decide(stage, text, language="cy") is None


def test_a_stop_word_at_the_end_of_a_long_text_is_found():
    text = " ".join(word(i) for i in range(1000))
    assert decide(Gopher(GopherConfig()), f"The {text}") == "gopher.min_stop_words"
    assert decide(Gopher(GopherConfig()), f"The {text} AND") is None


def test_chinese_is_measured_in_characters():
    draw = random.Random(0)
    text = "".join(chr(0x4E00 + draw.randrange(3000)) + "，" * (i % 12 == 0) for i in range(100))
    stage = Gopher(GopherConfig())
    assert decide(stage, text) is None  # 100 characters: 50 words
    assert decide(stage, text[:-1]) == "gopher.min_words"
    assert decide(stage, text * 2).startswith("gopher.duplicate_")
    assert decide(stage, text[2:6] * 40).startswith("gopher.top_")
    kept = Document("1", "web", f"{text[:40]}。{text[40:70]}！{text[70:]}。")
    assert C4(C4Config())(kept) is None and FineWeb(FineWebConfig())(kept) is None


def fifth(n: int, end: str = ".") -> list[str]:
    return [f"{' '.join(word(10 * i + j) for j in range(8))}{end}" for i in range(n)]


FINEWEB = [
    ("min_ended_lines", [*fifth(4), *fifth(25, "")[4:]], [*fifth(3), *fifth(25, "")[3:]]),
    ("max_duplicate_line_characters", [*fifth(10), fifth(1)[0]], [*fifth(9), fifth(1)[0]]),
    ("max_short_lines", [*(word(i, 28) + "." for i in range(66)), *(word(i, 29) + "." for i in range(34))],
     [*(word(i, 28) + "." for i in range(67)), *(word(i, 29) + "." for i in range(33))]),
]


@pytest.mark.parametrize("rule, inside, outside", FINEWEB, ids=[r[0] for r in FINEWEB])
def test_fineweb(rule, inside, outside):
    assert decide(FineWeb(FineWebConfig()), "\n\n".join(inside)) is None
    assert decide(FineWeb(FineWebConfig()), "\n\n".join(outside)) == f"fineweb.{rule}"
    assert decide(FineWeb(FineWebConfig(**{rule: None})), "\n\n".join(outside)) is None


BODY = "One line of good text stands here. And a second one. A third one follows it."


def cleaned(line: str, **knobs) -> tuple[str | None, str]:
    """Returns (the rule that drops the document, its text) of good text with one more line."""
    doc = Document("1", "web", f"{BODY}\n{line}\n\n{BODY}")
    removal = C4(C4Config(**knobs))(doc)
    return (removal.rule if removal else None), doc.text


@pytest.mark.parametrize("line, stays, knobs", [
    ("These are five good words.", True, {}), ("These are four words.", False, {}),
    ("These are four words.", True, {"min_line_words": None}),
    ("今天天气很好。", True, {}),
    (f"A word that is long {'x' * 1000}", True, {}), (f"A word that is long {'x' * 1001}", False, {}),
    ("Please switch on Javascript in your browser", False, {}), ("Please switch on Java scripts in your browser", True, {}),
    ("Read our Privacy Policy before you go on", False, {}), ("We say that this site uses cookies", False, {}),
    ("Read our Privacy Policy before you go on", True, {"policies": False}),
    ("This line ends in no mark", True, {}), ("This line ends in no mark", False, {"terminal_punctuation": True}),
    ("This line ends in a mark!", True, {"terminal_punctuation": True}),
    ("This line ends in three dots...", False, {"terminal_punctuation": True}),
    ('He said it ends "in quotes"', True, {"terminal_punctuation": True}),
])
def test_c4_lines(line, stays, knobs):
    rule, text = cleaned(line, **knobs)
    assert rule is None
    assert text == (f"{BODY}\n{line}\n\n{BODY}" if stays else f"{BODY}\n\n{BODY}")


def test_c4_counts_the_lines_it_drops():
    doc = Document("1", "web", f"{BODY}\nHome\nNews\nOur privacy policy has changed again.")
    assert C4(C4Config())(doc) is None
    assert doc.counts == {"c4.lines.min_line_words": 2, "c4.lines.phrases": 1}


def test_c4_documents():
    assert cleaned("Lorem Ipsum dolor sit amet.")[0] == "c4.lorem_ipsum"
    assert cleaned("int main(void) { return 0; }")[0] == "c4.curly_bracket"
    assert cleaned("int main(void) { return 0; }", curly_bracket=False)[0] is None
    assert cleaned("A claim was made here.[12] And one there[citation needed].")[1].split("\n")[1] == "A claim was made here. And one there."
    two = "This is the first sentence. This is the second one."
    assert decide(C4(C4Config()), two) == "c4.min_sentences"
    assert decide(C4(C4Config()), two + " This is one more") is None
    assert decide(C4(C4Config(min_sentences=None)), two) is None


@pytest.mark.parametrize("line, n", [("A b. C d? E f!", 3), ("No mark at all", 1), ("Version 1.2 is out.", 1), ("今天很好。明天也很好。", 2),
                                     ('He said "yes." And left.', 2), ("First. And more", 2), ("'Quoted.'", 1)])
def test_sentences_are_counted(line, n):
    assert n_sentences(line) == n


@pytest.mark.parametrize("text, words", [
    ("The cat's mat, 'quoted' 今天 ok", "the|cat's|mat|quoted|今|天|ok"), ("", ""), ("…!", ""), ("naïve Straße x2", "naïve|straße|x2"),
    ("กินข้าว", "กิ|น|ข้|า|ว"), ("a\ud800b", "a|b"),
])
def test_words_and_their_hashes(text, words):
    found, low = spoken(text), text.lower()
    parts = [low[a:b] for a, b in zip(found.start_W, found.end_W, strict=True)]
    assert "|".join(parts) == words
    assert [hash_of(p) for p in parts] == found.hash_W.tolist()


def test_equal_words_have_equal_hashes_wherever_they_stand():
    draw = random.Random(1)
    words = [word(draw.randrange(500), draw.choice([1, 2, 6, 9])) for _ in range(100_000)]
    hashes = between_spaces(" ".join(words)).hash_W
    of = {}
    assert all(of.setdefault(w, h) == h for w, h in zip(words, hashes.tolist(), strict=True))
    assert len(set(of.values())) == len(of) > 1000


@pytest.mark.parametrize("make, part", [
    (lambda: GopherConfig(max_bullet_lines=90), r"filter\.gopher\.max_bullet_lines=90: should be in \[0, 1\]"),
    (lambda: GopherConfig(max_top_n_grams=[0.2, 18]), "max_top_n_grams=18"),
    (lambda: GopherConfig(characters_per_word=0), "characters_per_word=0"),
    (lambda: FineWebConfig(max_short_lines=-1), "max_short_lines=-1"),
])
def test_a_threshold_that_cannot_be_is_named(make, part):
    with pytest.raises(ValueError, match=part):
        make()


def test_thresholds_are_settings():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Verb:
        filter: FilterConfig = dataclasses.field(default_factory=FilterConfig)

    cfg = config.load(Verb, None, ["filter.gopher.min_words=10", "filter.gopher.min_stop_words=null", "filter.c4.min_sentences=1",
                                   "filter.fineweb.use=false", "filter.gopher.max_top_n_grams=[]"]).filter
    text = "Only ten words stand in this line, with no end"
    assert decide(Filters(FilterConfig()), text) == "gopher.min_words"
    assert decide(Filters(cfg), text) is None
    help_text = config.help_text(Verb, "usage")
    assert "--filter.gopher.max_duplicate_lines=float|null [0.3]" in help_text


def test_deciding_twice_gives_the_same_and_plain_values():
    for text in (GOPHER[0][2], GOPHER[4][2], often(2, 11), GOPHER[-1][2]):
        first, again = (Gopher(GopherConfig())(Document("1", "web", text)) for _ in range(2))
        assert first == again and type(first.value) in (int, float)
