"""A document's language is named, or named unknown, and what is not to be kept is dropped with its reason."""

import pytest

from jaxllm.data.document import Document
from jaxllm.data.language import Language, LanguageConfig, pieces
from jaxllm.errors import UserError

SENTENCES = {
    "en": "The weather was fine this morning, so we walked along the river to the old mill.",
    "de": "Das Wetter war heute Morgen schön, darum gingen wir am Fluss entlang zur alten Mühle.",
    "fr": "Il faisait beau ce matin, alors nous avons marché le long de la rivière jusqu'au vieux moulin.",
    "es": "Hacía buen tiempo esta mañana, así que caminamos junto al río hasta el viejo molino.",
    "it": "Stamattina il tempo era bello, perciò abbiamo camminato lungo il fiume fino al vecchio mulino.",
    "pt": "O tempo estava bom esta manhã, por isso caminhámos ao longo do rio até ao velho moinho.",
    "nl": "Het weer was vanmorgen mooi, dus liepen we langs de rivier naar de oude molen.",
    "sv": "Vädret var fint i morse, så vi gick längs floden till den gamla kvarnen.",
    "pl": "Dziś rano była ładna pogoda, więc poszliśmy wzdłuż rzeki do starego młyna.",
    "ru": "Сегодня утром была хорошая погода, и мы пошли вдоль реки к старой мельнице.",
    "uk": "Сьогодні вранці була гарна погода, тож ми пішли вздовж річки до старого млина.",
    "el": "Ο καιρός ήταν καλός σήμερα το πρωί, γι' αυτό περπατήσαμε δίπλα στο ποτάμι ως τον παλιό μύλο.",
    "tr": "Bu sabah hava güzeldi, bu yüzden nehir boyunca eski değirmene kadar yürüdük.",
    "vi": "Sáng nay thời tiết đẹp nên chúng tôi đi bộ dọc bờ sông đến cối xay cũ.",
    "ar": "كان الطقس جميلا هذا الصباح، فمشينا على طول النهر إلى الطاحونة القديمة.",
    "he": "מזג האוויר היה נעים הבוקר, ולכן הלכנו לאורך הנהר אל הטחנה הישנה.",
    "hi": "आज सुबह मौसम अच्छा था, इसलिए हम नदी के किनारे पुरानी चक्की तक पैदल गए।",
    "th": "เช้านี้อากาศดี เราจึงเดินเลียบแม่น้ำไปยังโรงสีเก่า",
    "zh": "今天早上天气很好，所以我们沿着河走到了老磨坊。",
    "ja": "今朝は天気がよかったので、私たちは川に沿って古い水車小屋まで歩きました。",
    "ko": "오늘 아침은 날씨가 좋아서 우리는 강을 따라 오래된 방앗간까지 걸었다.",
}


def stage(**knobs) -> Language:
    pytest.importorskip("fasttext")
    return Language(LanguageConfig(**knobs))


def document(text: str) -> Document:
    return Document("1", "web", text)


def test_twenty_one_languages_are_named():
    named = stage()
    found = {}
    for code, sentence in SENTENCES.items():
        doc = document(sentence)
        assert named(doc) is None
        assert 0 < doc.meta["language_score"] <= 1
        assert doc.counts == {f"language.{doc.meta['language']}": 1}
        found[code] = doc.meta["language"]
    assert found == {code: code for code in SENTENCES}


@pytest.mark.parametrize("text", ["", "  \n\n ", "12 345 — 67,8 %", "•••• ++ 9"])
def test_a_text_without_letters_has_no_language(text):
    doc = document(text)
    assert stage()(doc) is None
    assert (doc.meta["language"], doc.meta["language_score"]) == ("und", 0.0)


def test_lines_capitals_and_half_characters_change_nothing():
    named = stage()
    for code in ("en", "de", "ru"):
        sentence = SENTENCES[code]
        for changed in (sentence.replace(" ", "\n"), sentence.upper(), sentence + "\ud800", "\x00" + sentence):
            assert named.identify(changed)[0] == code


def test_a_long_document_is_what_its_start_middle_and_end_are():
    named = stage(sample=300)
    assert named.identify(SENTENCES["fr"] * 5 + SENTENCES["de"] * 200)[0] == "de"
    text = "".join(map(chr, range(1000)))
    assert pieces(text, 1000) == text
    assert pieces(text, 300) == f"{text[:100]} {text[450:550]} {text[-100:]}"


def test_what_is_not_to_be_kept_is_dropped_and_the_reason_told():
    english = stage(keep=["en"], min_score=0.65)
    assert english(document(SENTENCES["en"])) is None
    assert english(document(SENTENCES["fr"]))[:2] == ("language.keep", "fr")
    doubtful = document(" ".join(w for pair in zip(SENTENCES["en"].split(), SENTENCES["sv"].split(), strict=False) for w in pair))
    rule, score, _ = stage(min_score=0.99)(doubtful)
    assert rule == "language.min_score" and score == doubtful.meta["language_score"] < 0.99
    exact = doubtful.meta["language_score"]
    assert stage(min_score=exact)(doubtful) is None  # at the threshold: kept


@pytest.mark.parametrize("knobs, part", [
    (dict(keep=["english"]), "language.keep=english: should be codes"), (dict(min_score=1.5), "language.min_score=1.5"),
    (dict(sample=5), "language.sample=5"),
])
def test_a_setting_that_cannot_be_is_named(knobs, part):
    with pytest.raises(ValueError, match=part):
        LanguageConfig(**knobs)


def test_a_language_that_the_model_lacks_is_named():
    with pytest.raises(UserError, match=r"keep=xx: is not among the 176 languages"):
        stage(keep=["en", "xx"])
