"""Repairs of text: what they mend, what they leave, and that they leave clean text quickly."""

import sys
import time
import unicodedata

import pytest

from jaxllm.data.document import Document, Removal

pytest.importorskip("ftfy")
from jaxllm.data.clean import Clean, CleanConfig
from jaxllm.errors import UserError

STAGE = Clean(CleanConfig())


def cleaned(text: str, **settings) -> tuple[str, dict]:
    doc = Document("1", "web", text)
    stage = Clean(CleanConfig(**settings)) if settings else STAGE
    assert stage(doc) is None
    return doc.text, doc.counts


MENDED = [
    ("★☆☆☆☆ bad", "1 of 5 stars bad", "symbol.star"), ("good: ★★★★★", "good: 5 stars", "symbol.star"), ("⭐⭐⭐👍", "3 stars thumbs up", "symbol.star"), ("a ★ b", "a star b", "symbol.star"),
    ("C♯ and B♭", "C sharp and B flat", "symbol.sharp"), ("❄\n```py\ns = '❄'\n```\n❄", "snowflake\n```py\ns = '❄'\n```\nsnowflake", "symbol.snowflake"),
    ("so ❄:\n\n    s = '❄'\n    t = '★★'\n\n❄", "so snowflake:\n\n    s = '❄'\n    t = '★★'\n\nsnowflake", "symbol.snowflake"),
    ("schÃ¶n und gut", "schön und gut", "encoding"), ("itâ€™s here", "it’s here", "encoding"), ("РџСЂРёРІРµС‚, РјРёСЂ!", "Привет, мир!", "encoding"),
    ("a\r\nb\rc\u2028d", "a\nb\nc\nd", "line_ends"), ("a\x00b\x07c\x7f", "abc", "control"), ("\x1b[31mred\x1b[0m text", "red text", "escapes"),
    ("\ufeffco\xadop\u200beration\u202e", "cooperation", "invisible"), ("a\u200db", "ab", "invisible"), ("e\u0301te\u0301", "été", "normalized"),
    ("ﬁnd ｆｕｌｌ １２", "find full 12", "styled_letters"), ("𝐁𝐨𝐥𝐝 𝒎𝒐𝒗𝒆", "Bold move", "styled_letters"), ("a\xa0b\u2009c", "a b c", "spaces"),
    ("pаypаl login", "paypal login", "lookalikes"), ("мocквa слoво", "москва слово", "lookalikes"), ("Let it ❄!", "Let it snowflake!", "symbol.snowflake"),
    ("ok👍🏽done", "ok thumbs up done", "symbol.thumbs up"), ("ha 😂😂😂.", "ha face with tears of joy.", "symbol.face with tears of joy"),
    ("I ❤️ you", "I heart you", "symbol.heart"), ("🇩🇪 team", "flag DE team", "symbol.flag DE"), ("press 1️⃣ now ✅", "press 1 now check mark", "symbol.check mark"),
    ("👩‍🔬 at work", "woman microscope at work", "symbol.woman microscope"), ("line  \nnext\t\n\n\n\n\n\nend ", "line\nnext\n\n\nend", "documents_changed"),
]


@pytest.mark.parametrize(("text", "becomes", "counted"), MENDED)
def test_what_is_mended_and_counted(text, becomes, counted):
    found, counts = cleaned(text)
    assert found == becomes
    assert counts[f"clean.{counted}"] >= 1
    assert cleaned(found) == (found, {})  # and once is enough


def test_pictures_without_a_name_stay():
    unknown = "\U0001faff"  # not assigned in Unicode 17
    assert cleaned(f"a{unknown}{unknown} b")[0] == f"a{unknown}{unknown} b"
    assert cleaned(f"a {unknown} b", symbols="remove")[0] == "a  b"


LEFT = [
    "plain ASCII text:\n\n    indented = [1, 2]\n", "“Quotes” – dashes… été à Noël, straße, ÅÄÖ, ¿qué?", "Привет, мир! Это СССР, 5 км.", "日本語の文章、「引用」（全角）！，。",
    "नमस्ते क्‍ष", "می‌خواهم", "مرحبا بالعالم", "Δx = 3 μm, 5 Ω, π ≈ 3.14, x² ½ ≤ ∞ → y", "© 2020 ® ™ ° € £ ¥ № §", "┌──┐\n│ab│ █ ▓ ▶ ●", "Яndex и USBшина", "𝑥 + 𝑦",
    "Ελλάδα και Ευρώπη", "« été » – À bientôt ! «é»", "ñandú ÃO NÃO Ã", "tab\tseparated\tvalues", "한국어 문장", "ไทย", "Việt Nam tiếng",
]


@pytest.mark.parametrize("text", LEFT)
def test_what_is_meant_stays(text):
    text = unicodedata.normalize("NFC", text)
    assert cleaned(text) == (text, {})


PROSE = "It is the custom of the house that a guest will "


@pytest.mark.parametrize(("text", "becomes"), [
    (PROSE + "recieve teh key, and it occured often.", PROSE + "receive the key, and it occurred often."), ("Teh, Adress and RECIEVE are names of it.", None),
    (PROSE + "`recieve` it, in recieve() or /usr/adress/teh.txt, recieve_all, teh-x.", None), (PROSE + "say:\n\n```\nit is teh key of the house\n```\n", None),
    (PROSE + "write “recieve”, with \"teh\" wrong.", None), (PROSE + "lenght lenght lenght of it and the length.", None), ("Die Adresse, adress lenght wierd.", None),
    (PROSE + "lenght lenght of it and the length.", PROSE + "length length of it and the length."),
])
def test_spelling_is_put_right_only_where_that_is_safe(text, becomes):
    assert cleaned(text, spelling=True)[0] == (becomes or text)
    assert cleaned(text) == (text, {})


def test_each_repair_can_be_left_out():
    text = "schÃ¶n e\u0301 ❄ pаypаl a\xa0b"
    off = {"encoding": False, "normalize": "none", "symbols": "keep", "lookalikes": False, "whitespace": False}
    assert cleaned(text, **off) == (text, {})
    assert cleaned("ab❄cd ❄.", symbols="remove")[0] == "ab cd ."
    assert cleaned("x² ½ ！", normalize="NFKC")[0] == "x2 1⁄2 !"


def test_without_ftfy_the_rest_still_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UserError, match=r"clean.encoding=true needs ftfy: pip install 'jaxllm\[data\]'"):
        Clean(CleanConfig())
    assert cleaned("schÃ¶n ❄", encoding=False)[0] == "schÃ¶n snowflake"


def test_what_was_only_control_characters_is_removed():
    assert STAGE(Document("1", "web", "\x00\x01 \n\ufeff")) == Removal("no_text", 1)


def test_clean_text_passes_quickly():
    """Relative to one pass of Python's own normalisation check and a copy: no absolute speed of this machine."""
    ascii_text = "The quick brown fox jumps over the lazy dog, again and again.\n" * 20_000
    seconds = []
    for _ in range(3):
        doc, began = Document("1", "web", ascii_text), time.process_time()
        STAGE(doc)
        seconds.append(time.process_time() - began)
    began = time.process_time()
    ascii_text.split()
    assert min(seconds) < 3 * (time.process_time() - began)


@pytest.mark.parametrize("unit", [" ", "\t a", "\n", "Ã©", "❄", "❄ ", "\u200d", "aа", "\x1b]", "\x1b[", "e\u0301", "𝐚"])
def test_no_text_takes_long(unit):
    def seconds(n):
        doc, began = Document("1", "web", "b \nb" + unit * (n // len(unit)) + "b"), time.process_time()
        STAGE(doc)
        return time.process_time() - began
    assert seconds(40_000) < 20 * max(min(seconds(4_000), seconds(4_000)), 0.005)
