"""The text of a page out of its bytes: the encoding that the page, its transport or its bytes tell."""

import codecs
import re

# What browsers read where a page says the name on the left (WHATWG Encoding Standard): the larger set, which holds it.
READ_AS = {
    "iso8859-1": "cp1252", "ascii": "cp1252", "latin-1": "cp1252", "iso8859-9": "cp1254",
    "iso8859-11": "cp874", "tis-620": "cp874",
    "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs",
    "utf-16": "utf-16-le", "utf-7": "cp1252",
}
MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
DECLARED = re.compile(rb"""<(?:meta|\?xml)[^>]{0,400}?(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]{2,40})""", re.IGNORECASE)


def page_text(raw: bytes, declared: str | None = None) -> tuple[str, str]:
    """Returns a page's text and the encoding it was read in.

    In this order: a byte order mark, UTF-8 where the bytes are valid UTF-8 (a wrong `declared` is far more frequent than a
    text of another encoding that happens to be valid UTF-8), `declared` by the transport's Content-Type, what the page itself
    declares in its first 2 kB, and last Windows-1252. Bytes that stand for nothing become U+FFFD.
    """
    for mark, name in MARKS:
        if raw.startswith(mark):
            return raw[len(mark):].decode(name, "replace"), name
    try:
        return raw.decode(), "utf-8"
    except UnicodeDecodeError as e:
        # a page cut within its last character
        cut_short = e.reason == "unexpected end of data" and not raw[:e.start].isascii()
    if cut_short:
        return raw.decode(errors="replace"), "utf-8"
    found = DECLARED.search(raw, 0, 2048)
    name = _codec(declared) or _codec(found[1].decode("ascii", "replace") if found else None)
    return raw.decode(name or "cp1252", "replace"), name or "cp1252"


def _codec(label: str | None) -> str | None:
    """Returns Python's name of the encoding that a browser would read `label` as; None for unknown names."""
    try:
        info = codecs.lookup((label or "").strip().strip("\"'").lower())
    except (LookupError, ValueError):
        return None
    name = READ_AS.get(info.name, info.name)
    return name if getattr(info, "_is_text_encoding", True) else None
