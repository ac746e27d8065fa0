"""Raw input of every kind, some of it broken, and runs of `jaxllm data` over it."""

import gzip
import json
import pathlib
import random
import subprocess
import sys

import pytest
import zstandard

from jaxllm import config
from jaxllm.data.pipeline_config import DataVerb
from jaxllm.data.unit_files import read_lines

ROOT = pathlib.Path(__file__).parents[1]
UNIT_BYTES = 30_000  # of units, so that a small corpus has several
WORDS = """the cat sat on a mat and looked at rain over green hills while people of many towns walked home to eat sleep river
    stone bread winter garden letter market bridge window candle harbour meadow lantern orchard village mirror kettle saddle
    thunder pebble violin copper ribbon basket feather blanket chimney quarry""".split()
NOTICE = "This notice stands below every page of ours and says nothing about what the page is for."
ITEM = "Which metal do divers of the northern lakes prefer for lanterns that must not rust in brackish water?"


def prose(rng: random.Random, words: int = 120) -> str:
    out = []
    for _ in range(words // 12):
        out.append(" ".join(rng.choice(WORDS) for _ in range(12)).capitalize() + ".")
    return " ".join(out)


LONG = prose(random.Random(7), 60)


def page(title: str, *paragraphs: str) -> str:
    return f"<html><head><title>{title}</title></head><body>{''.join(f'<p>{p}</p>' for p in paragraphs)}</body></html>"


def warc(path: pathlib.Path, pages: list[str]) -> None:
    """Writes response records as crawlers do, each a gzip member of its own, and one of a kind that holds no text."""
    with path.open("wb") as file:
        for i, body in enumerate([*pages, "\x89PNG"]):
            kind = "image/png" if i == len(pages) else "text/html; charset=utf-8"
            http = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n\r\n{body}".encode()
            head = (f"WARC/1.1\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:{i}>\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
                    f"WARC-Target-URI: http://example.org/{i}\r\nContent-Type: application/http; msgtype=response\r\n"
                    f"Content-Length: {len(http)}\r\n\r\n")
            file.write(gzip.compress(head.encode() + http + b"\r\n\r\n"))


def corpus(folder: pathlib.Path, pages: int = 40, lines: int = 300) -> pathlib.Path:
    """Writes files of every kind, some broken, with copies, an evaluation item, repeated lines and a long passage."""
    import pyarrow
    from pyarrow import parquet

    rng = random.Random(0)
    (folder / "pages").mkdir(parents=True)
    texts = [[prose(rng) for _ in range(4)] for _ in range(pages)]
    for i, paragraphs in enumerate(texts):
        (folder / "pages" / f"{i:03}.html").write_text(page(f"Page {i}", *paragraphs, NOTICE))
    # near duplicates of the first ten, an evaluation item in the eleventh, and the long passage in five
    again = [page(f"Page {i} again", *texts[i][:3], texts[i][3] + " And the rest.", NOTICE) for i in range(10)]
    warc(folder / "crawl.warc.gz", [*again, page("Quiz", prose(rng), ITEM, prose(rng)),
                                    *(page(f"Quote {i}", prose(rng), LONG, prose(rng)) for i in range(5))])
    rows = [{"id": f"line-{i % (lines - 5)}", "text": prose(rng), "url": f"http://example.org/{i}"} for i in range(lines)]
    with gzip.open(folder / "lines.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.write('{"text": 5}\nnot json\n{"text": ""}\n')
    write(folder / "more.jsonl.zst", zstandard.compress(b"".join(json.dumps({"text": prose(rng)}).encode() + b"\n" for _ in range(50))))
    parquet.write_table(pyarrow.table({"text": [prose(rng) for _ in range(50)], "id": [f"row {i}" for i in range(50)]}),
                        folder / "rows.parquet")
    (folder / "prose.txt").write_text(prose(rng) + "\n" + rows[0]["text"])
    (folder / "z-copy.txt").write_text(rows[1]["text"])
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 10)
    return folder


INPUTS = 40 + 16 + 300 + 3 + 50 + 50 + 3


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus") / "raw")


@pytest.fixture(scope="session")
def everything(source, tmp_path_factory) -> pathlib.Path:
    """A config with every stage that can be on without a trained classifier, over two sources."""
    folder = tmp_path_factory.mktemp("everything")
    write(folder / "eval" / "quiz.jsonl", json.dumps({"question": ITEM}).encode())
    for i in range(20):
        write(folder / "more" / f"{i}.txt", prose(random.Random(i + 100)).encode())
    write(folder / "slurs.txt", b"dreadfulslur\n")
    (folder / "c.yaml").write_text(f"""
sources: {{web: {{path: {source}}}, other: {{path: {folder}/more, domain: notes}}}}
decontaminate: {{folder: {folder}/eval}}
harm: {{use: true, words: [{folder}/slurs.txt]}}
repeats: {{use: true, max_documents: 5, table_bits: 12}}
substrings: {{use: true}}
mix: {{method: temperature, alpha: 0.3, max_epochs: 3}}
homographs: {{use: true, min_count: 5, skip: 5}}
augment: {{use: true, shuffle: 0.5}}
""")
    return folder / "c.yaml"


def settings(source: pathlib.Path, out: pathlib.Path, **more):
    """Returns the settings of a run of one source."""
    return config.load(DataVerb, None, [f"sources.web.path={source}", f"run.dir={out}", "workers=1",
                                        *(f"{k}={v}" for k, v in more.items())])


def command(*words) -> list[str]:
    """Returns a command line of jaxllm with units as small as in this process."""
    code = (f"from jaxllm.data import raw; raw.UNIT_BYTES = {UNIT_BYTES}; from jaxllm.cli import main; import sys; "
            "sys.exit(main(sys.argv[1:]))")
    return [sys.executable, "-c", code, *map(str, words)]


def run(*words, **more) -> subprocess.CompletedProcess:
    return subprocess.run(command(*words), capture_output=True, text=True, check=False, cwd=ROOT, **more)


def manifest(folder: pathlib.Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def kept_of(folder: pathlib.Path) -> list[dict]:
    return [row for part in sorted((folder / "documents").iterdir()) for row in read_lines(part)]


def removed_of(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]


def hashes(folder: pathlib.Path) -> dict:
    """Returns what must not depend on kills or workers."""
    found = manifest(folder)
    del found["plan"]["settings"]
    return found | {name: (folder / name).read_bytes() for name in ("removed.jsonl", "card.md")} | {
        p.name: p.read_bytes() for p in sorted((folder / "documents").iterdir())}


def write(path: pathlib.Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture(scope="session")
def whole(everything, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    done = run("data", everything, f"--run.dir={out}", "--workers=1")
    assert done.returncode == 0, done.stderr
    return hashes(out)
