"""How much of real pages' text is kept and how much furniture goes: `python benchmarks/extract_pages.py [--web FOLDER]`.

The truth was read off the pages by hand: for each page, snippets of its text that have to be there (beginning, middle, end,
code, cells, boxes) and snippets of navigation, footers, teasers and links to itself that must not. Recall is the share of the
first found, whitespace aside; precision counts a snippet of the second kind as a wrong one. Documentation pages come
out of Debian packages (by `apt-get download`, into --folder); web pages, where --web is given, out of a checkout of
github.com/mozilla/readability at ab4027a. Compared: `extract` as it comes, `extract.precise`, Resiliparse and trafilatura by
themselves, and all tags stripped. CPU seconds include parsing; the first page is not timed.
"""

import argparse
import collections
import glob
import html
import pathlib
import re
import subprocess
import time

from jaxllm.data.charset import page_text
from jaxllm.data.document import Document
from jaxllm.data.extract import Extract, ExtractConfig

# (package, the end of the file's path): (must be there, must not)
DOCUMENTATION = {
    ("python3.11-doc", "html/library/json.html"): (
        ["JSON (JavaScript Object Notation), specified by RFC 7159", ">>> json.dumps(['foo', {'bar': ('baz', None, 1.0, 2)}])",
         "A malicious JSON string may cause the decoder to", "Extensible JSON encoder for Python data structures.",
         "class json.JSONEncoder(*, skipkeys=False, ensure_ascii=True", "This can be used to decode a JSON document from a string that",
         "--indent, --tab, --no-indent, --compact", "Mutually exclusive options for whitespace control."],
        ["JSONEncoder.iterencode()\n", "Table of Contents", "© Copyright 2001", "Last updated on", "Created using Sphinx", "3.11.2 Documentation »",
         "Please donate", "¶"]),
    ("debian-handbook", "html/en-US/sect.apt-get.html"): (
        ["6.2. aptitude, apt-get, and apt Commands", "APT is a vast project, whose original plans included a graphical interface.",
         "TIP Incremental updates", '$ sudo apt -o "Acquire::PDiffs=false" update', "ALTERNATIVE deborphan and debfoster",
         "APT will never install an older version of a package", "p   apt-xapian-index Depends  python3-debian (>= 0.1.14)",
         "Patterns allow you to specify complex search queries"],
        ["Download the ebook", "Documentation Site", "Next6.3.", "PrevChapter 6."]),
    ("debian-handbook", "html/ru-RU/sect.apt-get.html"): (
        ["6.2. Команды aptitude, apt-get и apt", "6.2.1. Инициализация", "debfoster имеет более тщательно продуманный подход"],
        ["Download the ebook", "Наверх", "Documentation Site"]),
    ("git-doc", "html/MyFirstContribution.html"): (
        ["My First Contribution to the Git Project", "This is a tutorial demonstrating the end-to-end workflow of creating a change",
         "$ git clone https://github.com/git/git git", "Documentation/howto/new-command.txt", "#git-devel on Libera Chat",
         "The tests in Git live in t/ and are named with a 4-digit decimal number", "The Git project has four integration branches"],
        ["Last updated 2024"]),
    ("sqlite3-doc", "34to35.html"): (
        ["Moving From SQLite 3.4.2 to 3.5.0", "The OS interface layer has been completely reworked:", "const struct sqlite3_io_methods *pMethods;",
         "SQLITE_MUTEX_STATIC_LRU", "The transition from SQLite version 3.4.2 to 3.5.0 is a major change."],
        ["Small. Fast. Reliable.", "Choose any three.", "Purchase", "This page last modified on"]),
    ("apache2-doc", "manual/en/howto/auth.html"): (
        ["Authentication and Authorization", "Authentication is any process by which you verify that someone is who they claim they are.",
         "GroupName: rbowen dpitts sungo rshersey", "htpasswd -c /usr/local/apache/passwd/passwords rbowen",
         "This may offer a substantial performance boost to some users.", "the Access Control howto, which discusses a number of related topics."],
        ["Report a bug", "Available Languages", "Copyright 2026", "Sitemap", "Licensed under the Apache License"]),
    ("apache2-doc", "manual/ja/howto/auth.html"): (
        ["認証、承認、アクセス制御", "「認証」とは、誰かが自分は誰であるかを主張した場合に、", "Require valid-user", "関連するトピックがたくさん記載されていますので、ご覧ください。"],
        ["翻訳済み言語", "サイトマップ", "Copyright 2026"]),
    ("postgresql-doc-15", "html/backup-dump.html"): (
        ["26.1. SQL Dump", "The idea behind this dump method is to generate a file with SQL commands", "pg_dump dbname > dumpfile",
         "psql -X --set ON_ERROR_STOP=on dbname < dumpfile", "pg_dump dbname | split -b 2G --filter='gzip > $FILE.gz'",
         "You can use pg_restore -j to restore a dump in parallel."],
        ["Prev", "26.2. File System Level Backup", "26.1.3. Handling Large Databases\n26."]),
    ("libeigen3-doc", "html/group__TutorialArrayClass.html"): (
        ["The Array class and coefficient-wise operations", "This page aims to provide an overview and explanations on how to use Eigen's Array class.",
         "Array<typename Scalar, int RowsAtCompileTime, int ColsAtCompileTime>", "ArrayXf a = ArrayXf::Random(5);", "-- Combination 2: --"],
        ["Generated by doxygen", "answering the following short survey", "Dense matrix and array manipulation"]),
    ("libcommons-lang3-java-doc", "lang3/BooleanUtils.html"): (
        ["Class BooleanUtils", "Operations on boolean primitives and Boolean objects.", "This class tries to handle null input gracefully.",
         "static final String", "BooleanUtils instances should NOT be constructed in standard programming.", "the result of the xor operations"],
        ["Skip navigation links", "Summary:", "Deprecated\nIndex", "SEARCH"]),
    ("libgtk-4-doc", "gtk4/class.Button.html"): (
        ["The GtkButton widget is generally used to trigger a callback function", "class Gtk.Button : Gtk.Widget {", "CSS nodes",
         "GtkButton has a single CSS node with name button.", "Creates a new button containing an icon from the current icon theme.",
         "Whether the widget should grab focus when it is clicked with the mouse."],
        ["API Version: 4.0", "Library Version"]),
    ("libglib2.0-doc", "glib/glib-Hash-Tables.html"): (
        ["Hash Tables — associations between keys and values", "g_hash_table_new_full ()", "the function to call for each key/value pair",
         "typedef struct _GHashTable GHashTable;", "A GHashTableIter structure represents an iterator"],
        ["Generated by GTK-Doc", "Top  |  Description"]),
    ("erlang-doc", "stdlib-4.2/doc/html/lists.html"): (
        ["List processing functions.", "Unless otherwise stated, all functions assume that position numbering starts at 1.",
         "> lists:uniq(fun({X, _}) -> X end, [{b, 2}, {a, 1}, {c, 3}, {a, 2}]).", "Returns a list containing the elements of List1 without the elements"],
        ["Expand All", "Copyright © 1997", "string_to_handle/2\n", "User's Guide"]),
    ("bash-doc", "bash-doc/bashref.html"): (
        ["This text is a brief description of the features that are present in the Bash shell",
         "Aliases allow a string to be substituted for a word", "Operators are evaluated in order of precedence."],
        ["Next: Introduction, Previous: (dir)", "1.2 What is a shell?\n2", "Up: Bash Features"]),
    ("debian-reference-de", "ch02.de.html"): (
        ["Kapitel 2. Debian-Paketmanagement", 'Führen Sie "apt-get autoremove|less" als root aus', "2.3.5. Systemweite Hochrüstung",
         "Beim Wechsel auf einen neue Veröffentlichung sollten Sie eine Neuinstallation"],
        ["Zurück", "Kapitel 3. Die Systeminitialisierung", "Zum Anfang", "Inhaltsverzeichnis"]),
    ("maint-guide-ja", "first.ja.html"): (
        ["第2章 はじめの一歩", "$ tar xvzf gentoo-0.9.12.tar.gz", "という別のサブディレクトリーができました。"], ["戻る", "次へ", "第3章 ソースコードの変更"]),
    ("rust-doc", "book/ch04-01-what-is-ownership.html"): (
        ["The memory must be requested from the memory allocator at runtime.", "let (s2, len) = calculate_length(s1);",
         "Listing 4-5: Returning ownership of parameters", "But this is too much ceremony and a lot of work"],
        ["Programming a Guessing Game", "Foreword", "5.3. Control Flow"]),
}
WEB = {
    "heise": (["1Password für Mac generiert Einmal-Passwörter", "Das in der iOS-Version bereits enthaltene TOTP-Feature",
               "Zur TOTP-Nutzung muss zunächst ein Startwert", "1Password kostet aktuell knapp 50 Euro im Mac App Store"],
              ["heise Open Source", "Nerd-Shirts für Informatiker", "Datenschutzhinweis", "Version zum Drucken", "Die besseren Mac minis", "Einloggen"]),
    "lemonde-1": (["Ont voté contre : 10 députés socialistes (sur 288)", "Les « boîtes noires »", "En pratique, les services de renseignement pourraient installer",
                   "Renseignement pénitentiaire", "La loi prévoit également une forme de protection pour les agents"],
                  ["l’utilisation de cookies", "S'abonner au Monde", "Comparateur de banques", "Boutique culture", "Mentions légales", "Recevez nos newsletters"]),
    "bbc-1": (["President Barack Obama has admitted that his failure to pass", "Hours after the interview, a gunman opened fire at a cinema",
               "The presidential body swerve", '"One of my strengths is I have a pretty even temperament.',
               "ce and open up space for civil society."],
              ["Accessibility Help", "Recommended by Outbrain", "16% Annuity Return", "Technology of Business", "WWE terminates Hulk", "Copyright © 2015 BBC"]),
    "folha": (["Tite diz que errou ao levar taça da Libertadores a Lula em 2012", "Após rechaçar um encontro da seleção brasileira",
               "Na ocasião, Tite e outros representantes do Corinthians", "Apesar disso, Tite não questionou a ação de Palmeiras e CBF"],
              ["Ir para o conteúdo", "Ícone Facebook", "trabalhe na folha", "Todos os direitos reservados", "Páginas vistas", "Banco do Brasil lança app"]),
    "guardian-1": (["Whale whisperer Hori Parata was just seven years old", "Then the tribe moves in en masse and holds a karakia",
                    "Climate change is to blame too, scientists think", "‘We need to listen’", "Our ancestors tell us the strandings are a sign from"],
                   ["Skip to main content", "Share on WhatsApp", "Complaints & corrections", "Reuse this content", "Make a contribution",
                    "Nearly 30 whales stranded on remote Victorian beach"]),
    "lwn-1": (["The Arduino branding was not formally registered as a trademark", "Development activity in LibreOffice and OpenOffice",
               "Kay Schenk", "OpenOffice, instead, is driven by four developers", "Anything can happen in the free-software development world"],
              ["Log in now", "Create an account", "Copyright © 2015, Eklektix", "Write for LWN", "Next page"]),
    "dropbox-blog": (["I joined Dropbox not long after graduating", "Lambda: A callback implementing business logic.",
                      "Worker processes which execute tasks might die at any point", "heartbeat_timestamp + heartbeat_timeout",
                      "We hope this post helps engineers elsewhere"],
                     ["Press enter to search", "Share on Linkedin", "Type your email address", "subscription__success"]),
    "wikipedia-3": (["In mathematics, a Hermitian matrix (or self-adjoint matrix)", "Hermitian matrices are named after Charles Hermite",
                     "The finite-dimensional spectral theorem says that any Hermitian matrix", "together with the set of matrices of the form",
                     "Skew-Hermitian matrix (anti-Hermitian matrix)"],
                    ["[edit]", "Jump to navigation", "Printable version", "Powered by MediaWiki", "Articles with short description",
                     "Text is available under the Creative Commons"]),
    "v8-blog": (["Outside the web: standalone WebAssembly binaries using Emscripten", "Emscripten has always focused first and foremost on compiling to the Web",
                 "emcc -O3 add.c -o add.wasm", "(func $add (param $0 i32) (param $1 i32) (result i32)", "You may also find APIs that do have a non-JS replacement"],
                ["Retweet this article!", "Branding", "Edit this page on GitHub"]),
    "gitlab-blog": (["3 surprising findings from our 2024 Global DevSecOps Survey", "This year, our survey revealed changes in organizations' investment priorit",
                     "3. The cloud becomes table stakes", "Our take is that the value of AI lies in its ability", "According to RedMonk’s Stephens"],
                    ["Sign up for GitLab’s newsletter", "View all blog posts", "Ready to get started?", "How we overhauled GitLab navigation", "All fields required"]),
}


def fetched(package: str, folder: pathlib.Path) -> pathlib.Path:
    """Returns where a Debian package lies unpacked, downloading it once."""
    place = folder / package
    if not place.exists():
        subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        [archive] = folder.glob(f"{package}_*.deb")
        subprocess.run(["dpkg", "-x", archive, place], check=True)
    return place


def pages(folder: pathlib.Path, web: pathlib.Path | None):
    """Yields (name, bytes, what must be there, what must not)."""
    for (package, end), (must, must_not) in DOCUMENTATION.items():
        pattern = f"{fetched(package, folder)}/**/{end}"
        found = sorted(pathlib.Path(path) for path in glob.glob(pattern, recursive=True))  # noqa: PTH207 (follows links)
        if not found:
            raise SystemExit(f"{package} holds no {end}: the truth was read off the Debian 12 packages")
        yield f"{package}: {end}", found[0].read_bytes(), must, must_not
    for name, (must, must_not) in WEB.items() if web else ():
        yield f"web: {name}", (web / "test/test-pages" / name / "source.html").read_bytes(), must, must_not


def plain(text: str) -> str:
    """Returns text as it is compared: Markdown's own marks and all whitespace aside."""
    return re.sub(r"[\s|`*_\\]|<!--.*?-->", "", text.replace("•", ""))


def judged(text: str, must: list[str], must_not: list[str]) -> tuple[list[str], list[str]]:
    """Returns the snippets that are missing and those that should be."""
    lines, flat = "\n".join(line.strip(" •") for line in text.splitlines()), plain(text)
    missing = [m for m in must if plain(m) not in flat]
    there = [m for m in must_not if (m in lines if "\n" in m else plain(m) in flat)]
    return missing, there


def methods() -> dict:
    import trafilatura
    from resiliparse.extract.html2text import extract_plain_text

    def stage(cfg):
        extract = Extract(cfg)

        def text(page):
            doc = Document("", "", page, {"format": "html"})
            extract(doc)
            return doc.text
        return text

    return {
        "extract": stage(ExtractConfig()), "extract.precise": stage(ExtractConfig(precise=True)),
        "resiliparse": lambda page: extract_plain_text(page, main_content=True, preserve_formatting=True),
        "trafilatura": lambda page: trafilatura.extract(page) or "",
        "tags stripped": lambda page: re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", " ", page),
    }


def held_out(web: pathlib.Path) -> None:
    """Prints words in common with what that project's maintainers accepted as the article, on its pages that are not above."""
    found = sorted(p.parent for p in (web / "test/test-pages").glob("*/source.html") if p.parent.name not in WEB)
    print(f"\n{len(found)} other web pages, against their accepted article (words as a bag, mean over pages)\n")
    print("| method | recall | precision | F1 |\n| --- | --- | --- | --- |")
    articles = [bag(html.unescape(re.sub(r"<[^>]*>", " ", (p / "expected.html").read_text()))) for p in found]
    given = [page_text((p / "source.html").read_bytes())[0] for p in found]
    for method, text_of in methods().items():
        rows = []
        for page, article in zip(given, articles, strict=True):
            words = bag(text_of(page))
            common = (words & article).total()
            recall, precision = common / max(article.total(), 1), common / max(words.total(), 1)
            rows.append((recall, precision, 2 * recall * precision / max(recall + precision, 1e-9)))
        print(f"| {method} | " + " | ".join(f"{sum(column) / len(rows):.3f}" for column in zip(*rows, strict=True)) + " |")


def bag(text: str) -> collections.Counter:
    return collections.Counter(re.findall(r"\w+", text.lower()))


def main(folder: pathlib.Path, web: pathlib.Path | None, show: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    given = [(name, page_text(raw)[0], must, must_not) for name, raw, must, must_not in pages(folder, web)]
    n_bytes = sum(len(page.encode()) for _, page, _, _ in given)
    print(f"{len(given)} pages, {n_bytes / 1e6:.1f} MB, {sum(len(m) for *_, m, _ in given)} + {sum(len(m) for *_, m in given)} snippets\n")
    print("| method | recall | precision | furniture kept | MB/s |\n| --- | --- | --- | --- | --- |")
    for method, text_of in methods().items():
        text_of(given[0][1])
        found = wanted = wrong = unwanted = 0
        began, texts = time.process_time(), [text_of(page) for _, page, _, _ in given]
        seconds = time.process_time() - began
        for (name, _, must, must_not), text in zip(given, texts, strict=True):
            missing, there = judged(text, must, must_not)
            found, wanted = found + len(must) - len(missing), wanted + len(must)
            wrong, unwanted = wrong + len(there), unwanted + len(must_not)
            if show and method.startswith("extract"):
                print(f"    {method} {name}: missing {missing}, kept {there}") if missing or there else None
        print(f"| {method} | {found / wanted:.3f} | {found / max(found + wrong, 1):.3f} | {wrong / unwanted:.3f} | {n_bytes / 1e6 / seconds:.1f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp/jaxllm-pages"), help="where packages are kept")
    parser.add_argument("--web", type=pathlib.Path, help="a checkout of github.com/mozilla/readability")
    parser.add_argument("--show", action="store_true", help="name the snippets that went wrong")
    args = parser.parse_args()
    main(args.folder, args.web, args.show)
    if args.web:
        held_out(args.web)
