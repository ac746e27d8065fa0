"""A page's text out of its markup: navigation, banners and scripts go; code stays code, tables stay tables.

Resiliparse parses and drops what looks like boilerplate. Before it does, the tree is prepared: page furniture that its rules
miss is taken out, a landmark (`<main>`, …) is trusted where it holds most of the text, and code and tables are written out as
Markdown inside `<pre>`, the one element whose lines it leaves alone. `precise` lets trafilatura do it all instead.
"""

import math
import re
from dataclasses import dataclass
from html import unescape

from jaxllm.data.document import Document, Removal
from jaxllm.errors import UserError

# Never text, and in the way of measuring it.
UNSEEN = "script, style, noscript, template, svg, iframe, object, canvas, .linenos, .lineno, .line-numbers, .gutter"
# Page furniture by names that documentation generators and site engines share, beyond what Resiliparse knows.
FURNITURE = [
    ".headerlink, .anchorjs-link, a.anchor, .permalink, .navheader, .navfooter, .navigation, .docnav, .nav-panel, .breadcrumb",
    ".breadcrumbs, .sphinxsidebar, .related, .toplang, .bottomlang, .mw-editsection, .mw-jump-link, .noprint, .srclink",
    ".skip-link, .skip-nav, .visually-hidden, .screen-reader-text, .share, .sharing, .sharedaddy, .social-share, .newsletter",
    ".cookie-banner, .cookie-notice, .footer, .site-footer, .subNav, .topNav, .bottomNav, #page-header, #quickview, #path",
    "#jump-to-nav, #siteSub, #catlinks, #leftnav, [role=navigation], [role=search], [role=banner], [role=contentinfo]",
    "[role=complementary], body > header, body > footer, body > nav, .top > a, div.header > p",
]
NOT_PROSE = "nav, header, footer, aside, form, select, button, a, ul, dialog"
CONTENTS = "div.toc, #toc, div.contents.topic, div.contents.local, nav.contents, #table-of-contents, .table-of-contents"
LANDMARKS = (("main, [role=main]", 0.2), ("article, #content, #page-content, #main-content, #bodyContent", 0.5))
LANGUAGE = re.compile(r"\b(?:language|lang|highlight|brush:?|src|sourceCode)[- ]([a-z0-9+#]{1,20})\b", re.IGNORECASE)
TELLS_LANGUAGE = "[class*='language-'], [class*='lang-'], [class*='highlight-'], " \
    "[class*='brush'], [class*='sourceCode'], [class*='src-']"
NO_LANGUAGE = {"default", "none", "notranslate", "text", "plain", "plaintext", "source"}
# what stays open until it is closed
TAG = re.compile(r"<(/?)(?:div|span|section|article|ul|ol|table|font|b|i|em|strong|u|blockquote|center)\b", re.IGNORECASE)
LONG_TAG = re.compile(r"<[a-zA-Z][^<>]{20000,}")
OPEN = r"""[^<>"]*(?:"[^"]*"[^<>"]*)*>"""  # the rest of a tag
ROW, CELL = re.compile(r"<tr\b" + OPEN), re.compile(r"<t[dh]\b" + OPEN)
INLINE = re.compile(r"</?(?:a|b|i|em|strong|code|tt|span|sub|sup|var|kbd|samp|font|small|big|u|s|wbr|img)\b" + OPEN)
OTHER_TAG = re.compile(r"<!--.*?-->|</?[a-z]" + OPEN, re.DOTALL)
BLOCK_IN_TABLE = re.compile(r"<(?:pre|form|ul|ol|dl|h[1-4])\b")
DEEPEST, MOST_ATTRIBUTES = 2000, 5000  # a parser's time grows with their square; browsers stop at a depth of 512


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    precise: bool = False  # let trafilatura extract: drops more of what is not the article, at about a tenth of the speed
    markdown: bool = True  # code between ``` lines, tables as | rows |; false: code as it stands, cells apart by tabs
    # a page with less main text than this share of its text outside links and lists is taken whole, as it was misjudged
    least_main: float = 0.1

    def __post_init__(self):
        if not 0 <= self.least_main <= 1:
            raise ValueError(f"extract.least_main={self.least_main}: should be in [0, 1]")


class Extract:
    """Replaces a page's markup by its main text; sets meta["title"]. Other documents pass untouched."""

    name = "extract"

    def __init__(self, cfg: ExtractConfig):
        try:
            if cfg.precise:
                import trafilatura  # noqa: F401
            from resiliparse.extract import html2text
            from resiliparse.parse import html
        except ModuleNotFoundError as e:
            raise UserError(f"extracting text from pages needs {e.name}: pip install 'jaxllm[data]'") from None
        self.cfg, self.parse, self.plain_text = cfg, html.HTMLTree.parse, html2text.extract_plain_text

    def __call__(self, doc: Document) -> Removal | None:
        if doc.meta.get("format") != "html":
            return None
        html = doc.text
        if refused := too_costly(html):
            return refused
        if not html.isascii():  # half characters cannot be handed on
            html = html.encode("utf-8", "replace").decode()
        doc.counts["extract.pages"] = 1
        doc.counts["extract.markup_characters"] = len(html)
        tree = self.parse(html)
        if title := " ".join((tree.title or "").split()):
            doc.meta["title"] = title
        heading = headline(tree, title)
        text = self._precise(html) if self.cfg.precise else self._main_text(tree, doc.counts)
        if heading and text and heading not in " ".join(text[:4000].split()):
            text = f"{heading}\n\n{text}"
        doc.text = re.sub(r"\n{3,}", "\n\n", text).strip("\n")
        doc.counts["extract.text_characters"] = len(doc.text)
        return None if doc.text.strip() else Removal("no_text", len(html))

    def _main_text(self, tree, counts: dict) -> str:
        if tree.body is None:
            return ""
        counts["extract.tables"], counts["extract.code_blocks"] = prepare(tree, markdown=self.cfg.markdown)
        settings = {"preserve_formatting": True, "alt_texts": False}
        text = self.plain_text(tree, main_content=True, skip_elements=FURNITURE, **settings)
        if len(text) < 2000:  # a short page, or a page misjudged?
            prose = self.plain_text(tree, skip_elements=[*FURNITURE, NOT_PROSE], **settings)
            if len(text.split()) < self.cfg.least_main * len(prose.split()):
                counts["extract.whole_page"] = 1
                text = self.plain_text(tree, skip_elements=[*FURNITURE, "nav, header, footer"], **settings)
        return text

    def _precise(self, html: str) -> str:
        import trafilatura

        return trafilatura.extract(html, favor_precision=True, include_comments=False, include_tables=True,
                                   output_format="markdown" if self.cfg.markdown else "txt") or ""


def too_costly(html: str) -> Removal | None:
    """Returns why a page is not parsed: elements nested, or attributes of a tag, by the thousand."""
    if html.count("<") > DEEPEST:
        depth = deepest = 0
        for found in TAG.finditer(html):
            if not found[1]:
                depth += 1
                if depth > deepest:
                    deepest = depth
            elif depth:
                depth -= 1
        if deepest > DEEPEST:
            return Removal("nesting", deepest)
    most = max((len(found[0].split()) for found in LONG_TAG.finditer(html)), default=0)
    return Removal("attributes", most) if most > MOST_ATTRIBUTES else None


# ---------------------------------------------------------------- the tree, before its text is taken


def headline(tree, title: str) -> str:
    """Returns the page's first <h1> where the title repeats it, and it so is not the site's name; extractors lose some."""
    element = tree.body.query_selector("h1") if title and tree.body is not None else None
    said = " ".join((element.inner_text or "").split()).rstrip(" ¶#") if element is not None else ""
    return said if len(said) > 0.3 * len(title) and said in title else ""


def prepare(tree, *, markdown: bool) -> tuple[int, int]:
    """Writes code and tables so that they survive, and undoes what would mislead; returns how many tables and code blocks.

    A node that reaches Python costs microseconds, and a list of nodes is made anew whenever it is indexed: hence few nodes
    are looked at, and `.values()` everywhere.
    """
    body = tree.body
    for element in body.query_selector_all(UNSEEN).values():
        element.remove()
    for element in body.query_selector_all(CONTENTS).values():
        if characters_per_link(element) < 70:
            element.remove()
    keep_landmark(body)
    for element in body.query_selector_all("div.sidebar, aside.sidebar, div.note, aside.note, aside.admonition").values():
        if characters_per_link(element) > 150:  # a box of text, which is not a page's side bar
            become_plain(tree, element)
    for element in body.query_selector_all("figure:has(figcaption), figcaption").values():  # which Resiliparse drops
        become_plain(tree, element)
    keep_shallow_lists(tree)
    n_code = code_blocks(tree) if markdown else len(body.query_selector_all("pre"))
    tables = body.query_selector_all("table:not(:has(table))").values() if markdown else []
    return sum(table_to_rows(tree, table) for table in tables), n_code


def characters_per_link(element) -> float:
    """Returns how much text an element has for each of its links: about 20 in navigation, hundreds in prose."""
    n_links = len(element.query_selector_all("a"))
    return len((element.text or "").strip()) / n_links if n_links else math.inf


def keep_landmark(body) -> None:
    """Leaves in the body only the element that says it is the main part, where it holds enough of the text."""
    total = len((body.text or "").strip())
    for names, least in LANDMARKS:
        element = body.query_selector(names)
        if element is not None and len((element.text or "").strip()) > max(least * total, 200):
            body.replace_children(element)
            return


def become_plain(tree, element) -> None:
    """Puts an element's children into a plain <div>, so that its class or name condemns them no more."""
    plain = tree.create_element("div")
    for child in element.child_nodes.values():
        plain.append_child(child)
    element.replace_with(plain)


def keep_shallow_lists(tree) -> None:
    """Wraps lists close to the body, all of which Resiliparse takes for navigation, unless they are mostly links."""
    for element in tree.body.query_selector_all("body > ul, body > * > ul, body > * > * > ul").values():
        if characters_per_link(element) > 60:
            place = inner = tree.create_element("div")
            for _ in range(3):
                inner = inner.append_child(tree.create_element("div"))
            element.replace_with(place)
            inner.append_child(element)


def code_blocks(tree) -> int:
    """Puts the lines of every <pre> between ``` lines with the language where a class tells it; returns how many."""
    body, n = tree.body, 0
    for line in body.query_selector_all("pre br").values():
        line.replace_with(tree.create_text_node("\n"))
    for block in body.query_selector_all("div.fragment").values():  # Doxygen's
        if lines := block.query_selector_all("div.line").values():
            written = tree.create_element("pre")
            written.class_name = "fragment"
            written.text = "\n".join(line.text or "" for line in lines)
            block.replace_with(written)
    total = len((body.text or "").strip())
    for block in body.query_selector_all("pre").values():
        code = (block.text or "").strip("\n").rstrip()
        if not code or (len(code) > 0.8 * total and len(code) > 2000 and not block.class_name):  # a plain text as a page
            continue
        fence = "````" if "```" in code else "```"
        block.text = f"{fence}{language_of(block)}\n{code}\n{fence}\n"
        n += 1
    return n


def language_of(block) -> str:
    for element in (block.closest(TELLS_LANGUAGE), block.first_element_child):
        if element is not None and (found := LANGUAGE.search(element.class_name or "")) and found[1].lower() not in NO_LANGUAGE:
            return found[1].lower().removesuffix("3")  # python3
    return ""


def table_to_rows(tree, table) -> bool:
    """Replaces a table of data by lines "| cell | cell |"; a table that only lays out the page stays what it is."""
    html = table.html  # as the parser writes it: every tag closed, attributes between double quotes
    if BLOCK_IN_TABLE.search(html):
        return False
    rows = [[cell_text(cell) for cell in CELL.split(row)[1:]] for row in ROW.split(html)[1:]]
    rows = [row for row in rows if any(row)]
    columns, cells = max(map(len, rows), default=0), sum(map(len, rows))
    if len(rows) < 2 or columns < 2 or sum(len(cell) for row in rows for cell in row) > 300 * cells:
        return False
    lines = ["| " + " | ".join(row + [""] * (columns - len(row))) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * columns)
    written = tree.create_element("pre")
    written.text = "\n".join(lines) + "\n"
    caption = table.query_selector("caption")
    if caption is not None and (caption.text or "").strip():
        said = tree.create_element("p")
        said.text = " ".join(caption.text.split())
        table.before(said)
    table.replace_with(written)
    return True


def cell_text(html: str) -> str:
    if "<" in html:
        html = OTHER_TAG.sub(" ", INLINE.sub("", html))
    return " ".join(unescape(html).replace("|", "\\|").split())
