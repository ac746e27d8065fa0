"""Accuracy and speed of language identification on the translations of a free book, by passage length.

    python benchmarks/language_id.py [FOLDER] [--peers]    # FOLDER: debian-handbook unpacked; left out: fetched by apt-get

The Debian Administrator's Handbook (GPL-2+ or CC-BY-SA-3.0) comes in 26 translations, some of them unfinished: their
untranslated English paragraphs are left out by comparison with the English edition, and so is what holds code.
"""

import html
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from jaxllm.data.language import Language, LanguageConfig

SAME = {"nb": {"nb", "no", "da"}, "hr": {"hr", "sh", "sr", "bs"}, "id": {"id", "ms"}}  # answers that are no mistakes
PEERS = "--peers"


def main(argv: list[str]) -> None:
    folder = next((pathlib.Path(a) for a in argv if a != PEERS), None)
    with tempfile.TemporaryDirectory() as scratch:
        texts = paragraphs(folder or fetch(pathlib.Path(scratch)))
    names = {"jaxllm": Language(LanguageConfig()).identify}
    if PEERS in argv:
        import py3langid

        names["py3langid"] = py3langid.classify
    for length in (60, 120, 300, 2000):
        cases = [(code, text) for code, joined in texts.items() for text in cut(joined, length)[:300]]
        for name, identify in names.items():
            begun = time.process_time()
            answers = [identify(text)[0] for _, text in cases]
            seconds = time.process_time() - begun
            right, wrong = {}, {}
            for (code, _), answer in zip(cases, answers, strict=True):
                ok = answer in SAME.get(code, {code})
                right.setdefault(code, []).append(ok)
                if not ok:
                    wrong[code, answer] = wrong.get((code, answer), 0) + 1
            shares = {code: sum(oks) / len(oks) for code, oks in right.items()}
            size = sum(len(text.encode()) for _, text in cases) / 1e6
            print(f"{name} {length} characters: {len(cases)} passages, {len(shares)} languages, accuracy "
                  f"{sum(shares.values()) / len(shares):.4f}, {size / seconds:.1f} MB/s, "
                  f"{seconds / len(cases) * 1e6:.0f} us a passage")
            print("   lowest:", ", ".join(f"{c} {s:.3f}" for c, s in sorted(shares.items(), key=lambda x: x[1])[:5]),
                  "| most frequent mistakes:", sorted(wrong.items(), key=lambda x: -x[1])[:4])


def fetch(folder: pathlib.Path) -> pathlib.Path:
    subprocess.run(["apt-get", "download", "-q", "debian-handbook"], cwd=folder, check=True)
    subprocess.run(["dpkg-deb", "-x", str(next(folder.glob("*.deb"))), "x"], cwd=folder, check=True)
    return folder / "x"


def paragraphs(root: pathlib.Path) -> dict[str, str]:
    """Returns {language: its translated paragraphs, joined}."""
    books = {f.name: list(read(f)) for f in sorted((root / "usr/share/doc/debian-handbook/html").iterdir())}
    english = set(books["en-US"])
    out: dict[str, list] = {}
    for name, found in books.items():
        own = found if name == "en-US" else [p for p in found if p not in english and not mostly_english(p, name)]
        out.setdefault(name[:2], []).extend(own)
    return {code: " ".join(found) for code, found in out.items() if sum(map(len, found)) > 20_000}


def mostly_english(text: str, name: str) -> bool:
    """Returns whether a paragraph of a translation is English that was edited: its most frequent words are."""
    words = re.findall(r"[a-z]+", text.lower())
    return len(words) > 4 and sum(w in {"the", "of", "and", "is", "to"} for w in words) > 0.12 * len(words)


def read(folder: pathlib.Path):
    for page in sorted(folder.glob("*.html")):
        for found in re.findall(r'<div class="para">(.*?)</div>', page.read_text(encoding="utf-8"), re.S):
            if "<div" not in found and "<pre" not in found and "<code" not in found:
                text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", found)).split())
                if len(text) > 60:
                    yield text


def cut(text: str, length: int) -> list[str]:
    starts = range(0, len(text) - length, max(length, len(text) // 300))
    return [text[i:i + length] for i in starts]


if __name__ == "__main__":
    main(sys.argv[1:])
