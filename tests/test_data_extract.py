"""Pages become text: what stays, what goes, and what no page can do to a run."""

import re
import sys
import time

import pytest

from jaxllm.data.charset import page_text
from jaxllm.data.document import Document, Removal

pytest.importorskip("resiliparse")
from jaxllm.data.extract import Extract, ExtractConfig
from jaxllm.errors import UserError

PROSE = "<p>" + "Snow falls on the harbour while the boats wait for the morning tide to turn. " * 12 + "</p>"
PAGE = f"""<!DOCTYPE html><html><head><title>Tides &amp;
 Boats</title><style>p {{ color: red }}</style><script>var secret = 1;</script></head><body>
<header><a href="/">Harbour site</a></header>
<nav><ul><li><a href="/a">Home</a><li><a href="/b">Prices</a></ul></nav>
<div class="sidebar"><ul><li><a href="/c">Latest news</a></li><li><a href="/d">Archive</a></li></ul></div>
<main><h1>Tides &amp; Boats<a class="headerlink" href="#x">¶</a></h1>{PROSE}
<p>Caf&eacute; &lt;b&gt; &#8364; 5 <b>bold</b><code>call()</code>.</p>
<div class="highlight-python3"><table><tr><td class="linenos"><pre>1
2</pre></td><td><pre><span>def</span> f(x):
    return "a  |  b"
</pre></td></tr></table></div>
<ul><li>one<ul><li>inner first<li>inner second</ul><li>two</ul>
<table><caption>Heights</caption><tr><th>place<th>metres<tr><td>Pier<br>east<td>4.5<tr><td title="a>b">Bay|<em>s</em><td>3</table>
<div class="sidebar"><p>A box of {"many words about the tide table of the north bay and its use " * 4}</p></div>
<!-- a comment nobody reads --></main>
<footer>Copyright 2024 <a href="/p">Privacy</a></footer></body></html>"""


def extracted(html: str, **settings) -> tuple[str, Document]:
    doc = Document("1", "web", html, {"format": "html"})
    assert Extract(ExtractConfig(**settings))(doc) is None
    return doc.text, doc


def test_the_text_stays_and_the_page_goes():
    text, doc = extracted(PAGE)
    assert doc.meta["title"] == "Tides & Boats"
    for there in ("Tides & Boats", "Snow falls on the harbour", "Café <b> € 5 boldcall().", "A box of many words", "Heights"):
        assert there in text, there
    for gone in ("Harbour site", "Prices", "Latest news", "secret", "color", "¶", "comment", "Copyright", "Privacy", "linenos", "1\n2"):
        assert gone not in text, gone
    assert doc.counts["extract.pages"] == doc.counts["extract.tables"] == doc.counts["extract.code_blocks"] == 1


def test_code_tables_and_lists_are_readable():
    text, _ = extracted(PAGE)
    assert '```python\ndef f(x):\n    return "a  |  b"\n```\n' in text
    assert "| place | metres |\n| --- | --- |\n| Pier east | 4.5 |\n| Bay\\|s | 3 |" in text
    assert [line.strip(" •") for line in text.splitlines() if "•" in line] == ["one", "inner first", "inner second", "two"]
    bare, _ = extracted(PAGE, markdown=False)
    assert "```" not in bare and "| ---" not in bare and '    return "a  |  b"' in bare


@pytest.mark.parametrize("figure", ["<figure><img src=a.png><figcaption>The caption of it.</figcaption></figure>",
                                    "<figure><pre>a = 1</pre><figcaption class=caption><p>The caption of it.</p></figcaption></figure>"])
def test_captions_of_figures_stay(figure):
    prose = "<p>The quick brown fox jumps over the lazy dog and goes home to sleep again in the evening.</p>" * 4
    doc = Document("1", "web", f"<html><body>{prose}{figure}{prose}</body></html>", {"format": "html"})
    Extract(ExtractConfig())(doc)
    assert "\nThe caption of it.\n" in doc.text


def test_text_that_is_no_page_passes_untouched():
    doc = Document("1", "books", "a < b > c &amp; <p>d", {"format": "text"})
    assert Extract(ExtractConfig())(doc) is None
    assert doc == Document("1", "books", "a < b > c &amp; <p>d", {"format": "text"})


@pytest.mark.parametrize("html", [
    PROSE, PAGE[:1900], re.sub("</(?!style|script|title)", "<", PAGE), "<table><tr><td>" * 50 + PROSE, "<div>" * 400 + PROSE, "\0" + PROSE, "\ud800" + PROSE,
    PROSE + "<a href='", "<p " + "class=a " * 300 + ">" + PROSE, "<html><body><body><html>" + PROSE + "</html></body></p></div>",
    "<pre>" + PROSE, "<title>" + "t" * 10 + "</title>" + PROSE + "&#0;&#x110000;&nosuch;", "<main></main>" + PROSE,
], ids=range(13))
def test_broken_markup_keeps_its_text(html):
    text, _ = extracted(html)
    assert "boats wait for the morning tide" in text


def test_a_page_whose_main_part_is_misjudged_is_taken_whole():
    text, doc = extracted(f'<div class="menu" id="nav"><b>x</b><a href="a">link</a>{PROSE}</div><p>Two words</p>', least_main=0.5)
    assert "morning tide" in text and doc.counts["extract.whole_page"] == 1
    text, doc = extracted(f'<div class="menu" id="nav"><b>x</b><a href="a">link</a>{PROSE}</div><p>Two words</p>', least_main=0)
    assert text == "Two words" and "extract.whole_page" not in doc.counts


def test_a_short_page_beside_a_long_menu_stays_short():
    menu = "<nav><ul>" + "".join(f'<li><a href="{i}">A page of the book, number {i}</a></li>' for i in range(300)) + "</ul></nav>"
    assert extracted(f"{menu}<main><h1>Seek</h1><p>The tracking issue is open.</p></main>")[0] == "Seek\n\nThe tracking issue is open."


def test_source_code_full_of_links_is_code():
    lines = "".join(f'<div class="line"><a href="l{i}">{i}</a> <a href="x">int</a> x{i} = <a href="f">f</a>({i});</div>' for i in range(200))
    text, doc = extracted(f'<div class="header">top</div><div class="contents"><div class="fragment">{lines}</div></div>')
    assert doc.counts["extract.code_blocks"] == 1 and text.count("\n") == 202 and "```\n0 int x0 = f(0);\n1 int x1 = f(1);\n" in text


def test_a_plain_text_as_a_page_is_no_code():
    text, doc = extracted("<pre>" + PROSE.replace("<p>", "").replace("</p>", "\n\n") * 4 + "</pre>")
    assert "```" not in text and doc.counts["extract.code_blocks"] == 0


@pytest.mark.parametrize(("html", "rule"), [
    ("<div>" * 100_000 + "x" + "</div>" * 100_000, "nesting"), ("<p " + " ".join(f"a{i}=1" for i in range(100_000)) + ">x", "attributes"),
    ("<b>" * 200_000, "nesting"), ("<script>var x = 1</script>", "no_text"), ("", "no_text"), ("<p> \n </p>", "no_text"),
])
def test_what_cannot_be_read_in_time_or_holds_nothing_is_removed(html, rule):
    began = time.process_time()
    assert Extract(ExtractConfig())(Document("1", "web", html, {"format": "html"})) == Removal(rule, pytest.approx(0, abs=1e9))
    assert time.process_time() - began < 2


def test_many_paragraphs_lists_and_tables_take_linear_time():
    def seconds(n):
        html = "<main>" + f"{PROSE}<ul><li><a href=a>b</a>c</ul><table><tr><td>a<td>b<tr><td>c<td>d</table><pre>x</pre>" * n
        began = time.process_time()
        extracted(html)
        return time.process_time() - began
    seconds(10)
    assert seconds(800) < 14 * min(seconds(100), seconds(100))


def test_precise_drops_what_the_default_keeps():
    pytest.importorskip("trafilatura")
    page = PAGE.replace("</main>", '<div id="comments"><p>A reader writes that this was useful.</p></div></main>')
    text, doc = extracted(page, precise=True)
    assert "boats wait for the morning tide" in text and "A reader writes" not in text and doc.meta["title"] == "Tides & Boats"
    assert "A reader writes" in extracted(page)[0]


@pytest.mark.parametrize(("module", "precise"), [("resiliparse", False), ("trafilatura", True)])
def test_a_missing_package_is_named_with_the_way_to_install_it(module, precise, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.extract", None)
    with pytest.raises(UserError, match=rf"needs {module}.*: pip install 'jaxllm\[data\]'"):
        Extract(ExtractConfig(precise=precise))


@pytest.mark.parametrize(("raw", "declared", "text", "name"), [
    ("é".encode(), None, "é", "utf-8"), ("é".encode(), "iso-8859-1", "é", "utf-8"), (b"\xef\xbb\xbfa", None, "a", "utf-8"),
    ("\ufeffé".encode("utf-16-le"), None, "é", "utf-16-le"), (b"\x93a\x94", None, "“a”", "cp1252"),
    ('<meta charset="iso-8859-1">\u201cé'.encode("cp1252"), None, '<meta charset="iso-8859-1">“é', "cp1252"),
    ('<meta http-equiv="Content-Type" content="text/html; charset=Shift_JIS">日本①'.encode("cp932"), None,
     '<meta http-equiv="Content-Type" content="text/html; charset=Shift_JIS">日本①', "cp932"),
    ("Привет".encode("koi8-r"), "KOI8-R", "Привет", "koi8-r"), ("中文".encode("gb18030"), "gb2312", "中文", "gb18030"),
    ("é".encode("latin-1"), "no-such-charset", "é", "cp1252"), (b"\xc3\xa9b\xe6\x97", None, "éb\ufffd", "utf-8"),
    (b'<meta charset="base64">\xe9', None, '<meta charset="base64">é', "cp1252"),
])
def test_a_page_is_read_in_the_encoding_it_was_written_in(raw, declared, text, name):
    assert page_text(raw, declared) == (text, name)
