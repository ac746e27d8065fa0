"""From files to batches: what is read, kept, split, packed and fed, and in which order."""

import dataclasses
import errno
import gzip
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import zstandard

from jaxllm.data import progress, read, store, tokenize
from jaxllm.data.config import DataConfig, Source
from jaxllm.data.loader import TrainingInput, ValidationInput, prepare
from jaxllm.data.packing import n_rows, pack
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.errors import RunError, UserError, writing

SPECIALS = 16
BYTES = ByteTokenizer()


def texts_of(n: int, seed: int = 0) -> list[str]:
    """Returns n different documents of a few words."""
    pick = random.Random(seed)
    words = ["the", "cat", "sat\n", "on", "ä", "日本", "mat.", "\n\n"]
    return [f"{seed}-{i}: " + " ".join(pick.choices(words, k=pick.randrange(1, 40))) for i in range(n)]


def write_lines(path, texts, key="text"):
    raw = "".join(json.dumps({"id": 1, key: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)).encode()
    packed = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)(raw)
    path.write_bytes(packed)
    return path


def found(path, **source) -> list[str]:
    return list(read.documents(Source(path=str(path), **source), "sources.a.path"))


def config(tmp_path, sources: dict, **settings) -> DataConfig:
    sources = {name: s if isinstance(s, Source) else Source(path=str(s)) for name, s in sources.items()}
    settings = {"seq_len": 16, "validation": 0.2, "workers": 1} | settings
    return DataConfig(sources=sources, cache=str(tmp_path / "cache"), **settings)


def quiet(text):
    """Logs nothing."""


def decoded(one: store.Store) -> list[str]:
    """Returns a store's documents; each has to begin with <bos> and end with <eos>."""
    begins = np.concatenate([[0], one.ends[:-1]]).astype(int)
    documents = [one.tokens[a:b].tolist() for a, b in zip(begins, one.ends, strict=True)]
    assert all(d[0] == BYTES.bos_id and d[-1] == BYTES.eos_id and min(d[1:-1]) >= SPECIALS for d in documents)
    texts = [BYTES.decode(d) for d in documents]
    assert [len(t.encode()) for t in texts] == one.byte_counts.tolist()
    return texts


# ---------------------------------------------------------------- reading


def test_every_format_gives_the_same_documents(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = texts_of(300)
    for suffix in ("jsonl", "jsonl.gz", "jsonl.zst"):
        assert found(write_lines(tmp_path / f"a.{suffix}", texts)) == texts
    parquet.write_table(pyarrow.table({"id": range(300), "text": texts}), tmp_path / "a.parquet", row_group_size=70)
    assert found(tmp_path / "a.parquet") == texts
    parquet.write_table(pyarrow.table({"body": pyarrow.array(texts, pyarrow.large_string())}), tmp_path / "b.parquet")
    assert found(tmp_path / "b.parquet", text_key="body") == texts
    for i, text in enumerate(texts[:12]):
        (tmp_path / f"{i:03d}.txt").write_text(text, encoding="utf-8", newline="")
    assert found(tmp_path / "*.txt") == texts[:12]


def test_folders_and_globs_are_sorted(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "b/1.txt", "c.txt.gz", ".hidden.txt", "b/readme.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((gzip.compress if name.endswith("gz") else bytes)(name.encode()))
    assert found(tmp_path) == ["a/1.txt", "b/1.txt", "b/2.txt", "c.txt.gz"]
    assert found(tmp_path / "**" / "1.txt") == ["a/1.txt", "b/1.txt"]


@pytest.mark.parametrize("block", [1 << 12, 1 << 20])
def test_one_text_file_is_cut_at_blank_lines(tmp_path, monkeypatch, block):
    monkeypatch.setattr(read, "BLOCK", block)
    text = "\n\n".join(texts_of(400)) + "\r\n\r\n" + "x" * 5000 + "日" * 3000
    (tmp_path / "one.txt").write_text(text, encoding="utf-8", newline="")
    documents = found(tmp_path / "one.txt", document_bytes=512)
    assert "".join(documents) == text  # nothing lost, no character split
    assert max(len(d.encode()) for d in documents) <= 1024
    assert sum(d.endswith(("\n\n", "\n\r\n")) for d in documents) > 0.7 * len(documents)


def test_how_text_files_are_cut_unless_told(tmp_path):
    (tmp_path / "one.txt").write_text("\n\n".join(texts_of(400)), encoding="utf-8")
    assert len(found(tmp_path / "one.txt")) == pytest.approx((tmp_path / "one.txt").stat().st_size / 8192, abs=2)
    assert len(found(tmp_path)) == len(found(tmp_path / "one.txt", document_bytes=0)) == 1


def test_a_separator_ends_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "BLOCK", 64)
    for n in (1, 30, 64, 65, 200, 700):  # around, and far beyond, a block
        parts = ["a" * n, "", "b c " * n, "d"]
        (tmp_path / "s.txt").write_text("\n<|end|>\n".join(parts), encoding="utf-8")
        source = Source(path=str(tmp_path / "s.txt"), separator="\n<|end|>\n")
        whole, begun = [], ""
        for block in read.blocks(tmp_path / "s.txt", source):
            for raw in block.data:
                begun += raw.decode()
                if block.part in ("", "last"):
                    whole, begun = [*whole, begun], ""
        assert whole == parts


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n\n{"text": "last"}')
    assert found(tmp_path / "a.txt") == ["hello"]
    assert found(tmp_path / "a.jsonl") == ["hello", "last"]


def test_bytes_that_are_not_utf8(tmp_path):
    lines = b'{"text": "good"}', b'{"text": "b\xffd"}', b'{"text": "half \\ud800"}', b'{"text": null}', b'{"text": ""}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    counts, documents = {}, {}
    for invalid in ("replace", "drop"):
        cfg = config(tmp_path, {"a": tmp_path / "a.jsonl"}, invalid_utf8=invalid, validation=0)
        one = prepare(cfg, BYTES, log=quiet).sources[0]
        counts[invalid], documents[invalid] = one.counts, decoded(one.train)
    assert documents == {"replace": ["good", "b\ufffdd", "half \ufffd\ufffd\ufffd"], "drop": ["good"]}
    assert dataclasses.asdict(counts["replace"]) | {"tokens": 0, "bytes": 0} == {
        "documents": 3, "tokens": 0, "bytes": 0, "invalid": 2, "dropped": 0, "empty": 2}
    assert (counts["drop"].invalid, counts["drop"].dropped, counts["drop"].documents) == (2, 2, 1)
    with pytest.raises(UserError, match=r"a.jsonl:2: byte 0xff at 11 is not UTF-8; data.invalid_utf8=replace"):
        prepare(config(tmp_path, {"a": tmp_path / "a.jsonl"}, invalid_utf8="error"), BYTES, log=quiet)


def test_messages_about_files(tmp_path):
    good = b'{"text": "a"}\n' * 2000
    cases = {
        "cut.jsonl.gz": (gzip.compress(good)[:-20], "cut.jsonl.gz: ends early: the file is truncated"),
        "cut.jsonl.zst": (zstandard.ZstdCompressor().compress(good)[:-5], "cut.jsonl.zst: ends early: the file is truncated"),
        "not.jsonl.gz": (good, r"not.jsonl.gz: damaged, or not a .gz file"),
        "not.jsonl.zst": (good, r"not.jsonl.zst: damaged, or not a .zst file"),
        "wide.txt": ("hello".encode("utf-16"), "wide.txt: is UTF-16; should be UTF-8"),
        "bad.jsonl": (good + b'{"text": oh}\n', r"bad.jsonl:2001: not a JSON object"),
        "list.jsonl": (b"[1]\n", "list.jsonl:1: should be a JSON object, found list"),
        "key.jsonl": (b'{"texts": "a", "id": 1}\n', r"no field 'text'; did you mean text_key='texts'\? \(found: texts, id\)"),
        "type.jsonl": (b'{"text": ["a"]}\n', "type.jsonl:1: field 'text' holds list, should be a string"),
        "not.parquet": (b"PAR1", r"not.parquet: cannot be read as Parquet"),
        "what.csv": (b"a,b", r"what.csv: unknown kind of file; should end in one of .txt"),
        "empty.txt": (b"", r"no tokens to train on: no text in its files"),
        "blank.jsonl": (b'{"text": ""}\n', r"no tokens to train on: 1 documents, all empty"),
        "invalid.txt": (b"\xff\xff", r"no tokens to train on: 1 documents were dropped"),
    }
    if "pyarrow" not in sys.modules:
        pytest.importorskip("pyarrow")
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            prepare(config(tmp_path, {"a": tmp_path / name}, invalid_utf8="drop"), BYTES, log=quiet)
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.md").touch()
    for path, message in {"wied.txt": r"data.sources.a.path=.*wied.txt: no such file or folder; did you mean .*wide.txt",
                          "folder": "the folder is empty", "other": r"no file ends in one of .*found e.g. a.md"}.items():
        with pytest.raises(UserError, match=message):
            prepare(config(tmp_path, {"a": tmp_path / path}), BYTES, log=quiet)
    with pytest.raises(UserError, match="at least one source with a weight above 0"):
        prepare(config(tmp_path, {"a": Source(path="a", weight=0)}), BYTES, log=quiet)
    assert list((tmp_path / "cache" / "tokens").glob("*.tmp")) == []


def test_lines_are_counted_through_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "BLOCK", 1000)
    path = write_lines(tmp_path / "a.jsonl", texts_of(300))
    path.write_bytes(path.read_bytes() + b"oh\n")
    with pytest.raises(UserError, match=r"a.jsonl:301: not a JSON object"):
        found(path)


def test_archives_of_several_parts(tmp_path):
    texts = texts_of(30)
    for suffix in ("gz", "zst"):
        parts = [write_lines(tmp_path / f"{i}.jsonl.{suffix}", texts[i : i + 10]).read_bytes() for i in (0, 10, 20)]
        (tmp_path / f"a.jsonl.{suffix}").write_bytes(b"".join(parts))
        assert found(tmp_path / f"a.jsonl.{suffix}") == texts


def test_a_long_text_is_cut_before_words():
    text = "one  two   " * 50 + "x" * 30
    pieces = list(read.words_within(text, 16))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 16
    assert all(b[0] == " " and a[-1] != " " for a, b in itertools.pairwise(pieces[:-2]))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'jaxllm\[parquet\]'"):
        found(tmp_path / "a.parquet")


def test_a_line_too_long_to_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "BLOCK", 1000)
    monkeypatch.setattr(read, "MAX_LINE", 10_000)
    texts = [*texts_of(30), "x" * 8000]
    assert found(write_lines(tmp_path / "a.jsonl", texts)) == texts
    with pytest.raises(UserError, match=r"a.jsonl:2: a line of more than"):
        found(write_lines(tmp_path / "a.jsonl", ["a", "x" * 20_000]))


# ---------------------------------------------------------------- tokenised stores


def bytes_of(folder: pathlib.Path) -> dict[str, bytes]:
    kept = [p for p in sorted(folder.rglob("*")) if p.suffix in (".tokens", ".ends", ".bytes")]
    assert len(kept) == 6
    return {p.name: p.read_bytes() for p in kept}


def test_the_number_of_processes_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "SMALL", 0)
    monkeypatch.setattr(read, "BLOCK", 4096)
    texts = texts_of(1500)
    path = write_lines(tmp_path / "a.jsonl", texts)
    stores = {}
    for n in (1, 2):
        one = prepare(config(tmp_path / str(n), {"a": path}, workers=n), BYTES, log=quiet).sources[0]
        stores[n] = bytes_of(tmp_path / str(n))
    assert stores[1] == stores[2]
    train, held_out = decoded(one.train), decoded(one.validation)
    assert sorted(train + held_out) == sorted(texts)
    assert train == [t for t in texts if t in set(train)]  # in the order of the file
    assert len(held_out) == pytest.approx(300, rel=0.2)
    assert one.counts.documents == 1500
    assert one.counts.tokens == one.counts.bytes + 2 * 1500 == len(one.train.tokens) + len(one.validation.tokens)
    assert one.train.tokens.dtype == np.uint16


def test_a_held_out_document_is_held_out_everywhere(tmp_path):
    texts = texts_of(400)
    first = write_lines(tmp_path / "a.jsonl", texts)
    again = write_lines(tmp_path / "b.jsonl.gz", texts[::-1] + texts_of(100, seed=1))
    a, b = prepare(config(tmp_path, {"a": first, "b": again}), BYTES, log=quiet).sources
    assert set(decoded(a.validation)) == set(decoded(b.validation)) & set(texts)
    assert not set(decoded(a.train)) & set(decoded(b.validation))


def test_the_share_held_out_is_what_was_asked():
    alike = [f"{'x' * 60_000}{i}".encode() for i in range(300)]  # the whole beginning counts, not some of it
    assert sum(tokenize.is_held_out(raw, 0.3) for raw in alike) == pytest.approx(90, abs=30)
    assert len({tokenize.is_held_out(b"x" * (1 << 16) + bytes([i]), 0.3) for i in range(100)}) == 1  # and no more
    assert not any(tokenize.is_held_out(raw, 0.0) for raw in alike)


def test_the_same_input_is_tokenised_once(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", texts_of(50))
    made = []
    real = tokenize.in_order
    monkeypatch.setattr(tokenize, "in_order", lambda *a: made.append(1) or real(*a))

    def n_made(name="a", path=path, weight=1.0, **settings):
        made.clear()
        prepare(config(tmp_path, {name: Source(path=str(path), weight=weight)}, **settings), BYTES, log=quiet)
        return len(made)

    assert (n_made(), n_made()) == (1, 0)
    assert n_made(name="other", seq_len=99, weight=3.0, workers=2) == 0  # nothing of that is in the tokens
    os.utime(path, (1, 1))
    assert n_made() == 0  # another time, the same content
    path.rename(tmp_path / "moved.jsonl")
    assert n_made(path=tmp_path / "moved.jsonl") == 0
    assert n_made(path=tmp_path / "moved.jsonl", validation=0.3) == 1
    write_lines(tmp_path / "moved.jsonl", texts_of(50, seed=5))
    assert n_made(path=tmp_path / "moved.jsonl") == 1
    assert n_made(path=tmp_path / "moved.jsonl", invalid_utf8="drop") == 1


def test_a_damaged_store_is_made_again(tmp_path):
    cfg = config(tmp_path, {"a": write_lines(tmp_path / "a.jsonl", texts_of(50))})
    before = prepare(cfg, BYTES, log=quiet).sources[0].train.tokens.tolist()
    tokens, = (tmp_path / "cache").rglob("train.tokens")
    tokens.write_bytes(tokens.read_bytes()[:-2])
    said = []
    assert prepare(cfg, BYTES, log=said.append).sources[0].train.tokens.tolist() == before
    assert "damaged" in said[0]


SLOW = """
import sys, time
from jaxllm.data import read, tokenize
from jaxllm.data.config import DataConfig, Source
from jaxllm.data.tokenizer import ByteTokenizer
class Slow(ByteTokenizer):
    def encode_array(self, text):
        time.sleep(float(sys.argv[3]))
        return super().encode_array(text)
read.BLOCK = 4096
tokenize.prepare(DataConfig(sources={"a": Source(path=sys.argv[1])}, cache=sys.argv[2], workers=1, validation=0.2), Slow())
"""


def start_slow(path, cache, seconds):
    words = [sys.executable, "-c", SLOW, str(path), str(cache), str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_a_killed_tokenisation_leaves_nothing_behind(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", texts_of(2000))
    with start_slow(path, tmp_path / "cache", 0.01) as process:
        began = time.monotonic()
        while not list((tmp_path / "cache").glob("tokens/*.tmp/train.tokens")) and time.monotonic() < began + 20:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    left, = (tmp_path / "cache" / "tokens").glob("*.tmp")
    one = prepare(config(tmp_path, {"a": path}), BYTES, log=quiet).sources[0]
    assert not left.exists()
    assert sorted(decoded(one.train) + decoded(one.validation)) == sorted(texts_of(2000))


def test_two_processes_at_once_make_one_store(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", texts_of(300))
    both = [start_slow(path, tmp_path / "cache", 0.002) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("another process is tokenising the same text" in one for one in said) == 1
    one = prepare(config(tmp_path, {"a": path}), BYTES, log=quiet).sources[0]
    assert sorted(decoded(one.train) + decoded(one.validation)) == sorted(texts_of(300))


def test_a_full_disk(tmp_path, monkeypatch):
    path, real = write_lines(tmp_path / "a.jsonl", texts_of(5000)), pathlib.Path.open
    monkeypatch.setattr(pathlib.Path, "open", lambda self, *a, **k: real(
        pathlib.Path("/dev/full") if self.name == "train.tokens" else self, *a, **k))
    with pytest.raises(RunError, match=r"cannot be written: No space left on device; .* free some space"):
        prepare(config(tmp_path, {"a": path}), BYTES, log=quiet)
    assert list((tmp_path / "cache" / "tokens").glob("*.tmp")) == []
    monkeypatch.undo()
    assert prepare(config(tmp_path, {"a": path}), BYTES, log=quiet).sources[0].counts.documents == 5000


def test_a_cache_that_cannot_be(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"cache.*: cannot be written: (File exists|Not a directory)"):
        prepare(config(tmp_path, {"a": write_lines(tmp_path / "a.jsonl", ["a"])}), BYTES, log=quiet)
    with pytest.raises(RunError, match="a/b: cannot be written: No space left"), writing("a/b"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path, real = write_lines(tmp_path / "a.jsonl", texts_of(50)), tokenize._write

    def meanwhile(*args):
        real(*args)
        write_lines(path, texts_of(51))

    monkeypatch.setattr(tokenize, "_write", meanwhile)
    with pytest.raises(RunError, match=r"a.jsonl: changed while it was read; run again"):
        prepare(config(tmp_path, {"a": path}), BYTES, log=quiet)
    assert not list((tmp_path / "cache" / "tokens").glob("*.tmp")) and not list((tmp_path / "cache").rglob("meta.json"))


def test_long_work_says_how_far_it_is(monkeypatch):
    said, clock = [], iter([0.0, 1.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    shown = progress.Progress("reading", 100_000_000, said.append)
    for position in (10, 30, 40, 60):
        shown.show(position * 1_000_000)
    assert said == ["reading, 30% of 100 MB, 5.0 MB/s, 14 s left", "reading, 60% of 100 MB, 5.0 MB/s, 8 s left"]


def test_a_process_that_dies_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "SMALL", 0)
    path = write_lines(tmp_path / "a.jsonl", texts_of(10))
    monkeypatch.setattr(tokenize, "Worker", lambda *a: Dies())
    with pytest.raises(RunError, match="a worker process was killed"):
        prepare(config(tmp_path, {"a": path}, workers=2), BYTES, log=quiet)
    assert list((tmp_path / "cache" / "tokens").glob("*.tmp")) == []


class Dies:
    def __call__(self, block):
        os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------- long documents


def test_a_document_in_parts_is_the_document(tmp_path, monkeypatch):
    text = " ".join(texts_of(300)) + "日" * 2000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "b.txt").write_text("short", encoding="utf-8")
    whole, parts = [], []
    for into, block in ((whole, 1 << 20), (parts, 2048)):
        monkeypatch.setattr(read, "BLOCK", block)
        one = prepare(config(tmp_path / str(block), {"a": tmp_path}, validation=0), BYTES, log=quiet).sources[0]
        into += decoded(one.train)
        assert one.counts.documents == 2 and one.counts.bytes == len(text.encode()) + 5
    assert len(list(read.blocks(tmp_path / "a.txt", Source(path=str(tmp_path))))) > 5
    assert whole == parts == [text, "short"]


def test_a_long_document_with_a_bad_part_is_dropped_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "BLOCK", 1024)
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"word " * 1000 + b"\xff" + b" word" * 1000 + b"\xff")
    (tmp_path / "c.txt").write_text("last", encoding="utf-8")
    cfg = config(tmp_path, {"a": tmp_path / "*.txt"}, validation=0, invalid_utf8="drop")
    one = prepare(cfg, BYTES, log=quiet).sources[0]
    assert decoded(one.train) == ["first", "last"]
    assert (one.counts.invalid, one.counts.dropped, one.counts.documents) == (1, 1, 2)
    one = prepare(dataclasses.replace(cfg, invalid_utf8="replace"), BYTES, log=quiet).sources[0]
    assert decoded(one.train) == ["first", "word " * 1000 + "\ufffd" + " word" * 1000 + "\ufffd", "last"]
    assert (one.counts.invalid, one.counts.dropped, one.counts.documents) == (1, 0, 3)


@pytest.mark.slow
def test_memory_does_not_grow_with_a_document(tmp_path):
    """A document of 200 MB takes less than half of that over what a small one takes."""
    script = SLOW + "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    script = script.replace("read.BLOCK = 4096", "").replace("time.sleep(float(sys.argv[3]))", "").replace("0.2", "0.0")
    peaks = {}
    for n in (1, 200):
        (tmp_path / str(n)).mkdir()
        with open(tmp_path / str(n) / "a.txt", "wb") as file:
            for _ in range(n):
                file.write(b"some words of text " * 52_000)
        out = subprocess.run([sys.executable, "-c", script, str(tmp_path / str(n)), str(tmp_path / "cache"), "0"],
                             capture_output=True, text=True, check=True)
        peaks[n] = int(out.stdout.split()[-1]) / 1000  # MB
    assert peaks[200] < peaks[1] + 100, peaks


# ---------------------------------------------------------------- rows


def packed_slowly(documents, seq_len):
    """Returns what `pack` should, one position at a time."""
    stream = [(token, d, i) for d, document in enumerate(documents) for i, token in enumerate(document)]
    batch = {name: [] for name in ("token_BT", "target_BT", "weight_BT", "pos_BT", "doc_BT")}
    for begin in range(0, max(len(stream) - 1, 1), seq_len):
        row = {name: [] for name in batch}
        for t in range(begin, begin + seq_len):
            here = stream[t] if t < len(stream) else None
            after = stream[t + 1] if t + 1 < len(stream) else None
            first = stream[begin]
            row["token_BT"].append(here[0] if here else 0)
            row["target_BT"].append(after[0] if after else 0)
            row["weight_BT"].append(float(here is not None and after is not None and here[1] == after[1]))
            row["pos_BT"].append(0 if here is None else min(here[2], t - begin))
            row["doc_BT"].append(0 if here is None else here[1] - first[1] + 1)
        for name in batch:
            batch[name].append(row[name])
    return batch


def test_packing_equals_its_definition():
    pick = np.random.default_rng(0)
    for _ in range(200):
        documents = [pick.integers(1, 99, pick.integers(1, 12)).tolist() for _ in range(pick.integers(1, 9))]
        seq_len = int(pick.integers(2, 9))
        batch = pack(documents, seq_len)
        for name, rows in packed_slowly(documents, seq_len).items():
            np.testing.assert_array_equal(batch[name], rows, err_msg=name)
            assert batch[name].dtype == (np.float32 if name == "weight_BT" else np.int32)
        assert batch["weight_BT"].sum() == sum(len(d) - 1 for d in documents)  # each is predicted once, first ones never


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    sources = {name: Source(path=str(write_lines(folder / f"{name}.jsonl", texts_of(n, seed=n))), weight=weight)
               for name, n, weight in (("a", 40, 1.0), ("b", 90, 2.0), ("c", 60, 0.35))}
    return prepare(config(folder, sources, validation=0.1), BYTES, log=quiet)


CFG = DataConfig(seq_len=16)


def take(stores, n, start=0, batch_size=8, **how):
    batches = TrainingInput(stores, CFG, batch_size, **{"seed": 0} | how).batches(start)
    taken = [next(batches) for _ in range(n)]
    batches.close()
    return taken


def joined(shares):
    """Returns the global batches of what several processes were given."""
    return [{name: np.concatenate([share[name] for share in step]) for name in step[0]} for step in zip(*shares, strict=True)]


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_any_number_of_processes_sees_the_same_batches(stores, n):
    shares = [take(stores, 12, share=p, shares=n) for p in range(n)]
    assert_same(joined(shares), take(stores, 12))


@pytest.mark.parametrize("start", [1, 7, 500])
def test_going_on_from_a_step_is_never_having_stopped(stores, start):
    assert_same(take(stores, 5, start), take(stores, start + 5)[start:])


def test_an_epoch_holds_every_row_once_and_the_next_is_in_another_order(stores):
    alone = dataclasses.replace(stores, sources=stores.sources[:1])
    n = n_rows(len(alone.sources[0].train.tokens), 16)
    rows = [one["token_BT"][0].tolist() for one in take(alone, 3 * n, batch_size=1)]
    stream = np.pad(alone.sources[0].train.tokens, (0, 16))
    there = sorted(stream[i * 16 : i * 16 + 16].tolist() for i in range(n))
    epochs = [rows[i : i + n] for i in range(0, 3 * n, n)]
    assert all(sorted(epoch) == there for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != there
    other = [one["token_BT"][0].tolist() for one in take(alone, n, batch_size=1, seed=1)]
    assert sorted(other) == there and other not in epochs  # the next seed is not this one's next epoch


def test_shares_of_a_mixture(stores):
    def all_tokens(one, token):
        return dataclasses.replace(one, train=dataclasses.replace(one.train, tokens=np.full_like(one.train.tokens, token)))

    named = dataclasses.replace(stores, sources=[all_tokens(one, i) for i, one in enumerate(stores.sources)])
    seen = np.concatenate([batch["token_BT"][:, 0] for batch in take(named, 1000)])
    np.testing.assert_allclose(np.bincount(seen) / len(seen), np.array([1, 2, 0.35]) / 3.35, rtol=0.01)
    assert "59.7% of rows" in TrainingInput(stores, CFG, 8, 0).describe()
    within = [np.bincount(seen[i : i + 67], minlength=3) for i in range(0, 6700, 67)]  # evenly, not only on the whole
    assert np.ptp(within, axis=0).max() <= 2


def test_batches_are_rows_of_the_stores(stores):
    batch = {name: np.concatenate([b[name] for b in take(stores, 60)]) for name in take(stores, 1)[0]}
    text = "".join(BYTES.decode(one.train.tokens.tolist()) for one in stores.sources)
    for row_T in batch["token_BT"]:
        assert BYTES.decode(row_T.tolist(), final=False).lstrip("\ufffd") in text
    inner = batch["weight_BT"][:, :-1] > 0
    np.testing.assert_array_equal(batch["target_BT"][:, :-1][inner], batch["token_BT"][:, 1:][inner])
    assert (batch["target_BT"][batch["weight_BT"] > 0] != BYTES.bos_id).all()  # nobody has to guess that a document begins


def test_describe_and_batch_size(stores):
    given = TrainingInput(stores, CFG, 8, 0)
    assert given.tokens_per_epoch == sum(len(one.train.tokens) for one in stores.sources)
    assert len(given.describe().splitlines()) == 3
    with pytest.raises(UserError, match=r"train.batch_size=9 is not divisible by the 2 processes"):
        TrainingInput(stores, CFG, 9, 0, 0, 2)


@pytest.mark.parametrize("n", [1, 2])
def test_validation_covers_every_row_once(stores, n):
    shares = [ValidationInput(stores, CFG, 8, 0, p, n) for p in range(n)]
    batches = joined([share.batches() for share in shares])
    assert all(batch["token_BT"].shape == (8, 16) for batch in batches)
    held_out = [one.validation for one in stores.sources]
    documents, tokens = sum(len(one.ends) for one in held_out), sum(len(one.tokens) for one in held_out)
    assert sum(batch["weight_BT"].sum() for batch in batches) == tokens - documents
    n_bytes = sum(one.validation.byte_counts.sum() for one in stores.sources)
    assert [share.n_bytes for share in shares] == [n_bytes] * n  # of all rows, in every process
    assert_same(batches, joined([share.batches() for share in shares]))  # the same ones each time


def test_some_validation_rows(stores):
    batches = list(ValidationInput(stores, CFG, 4, 10).batches())
    assert sum((batch["doc_BT"] > 0).any(axis=1).sum() for batch in batches) == 10
    nothing = dataclasses.replace(stores, sources=[dataclasses.replace(
        one, validation=store.Store(*(np.empty(0, np.int64),) * 3)) for one in stores.sources])
    assert list(ValidationInput(nothing, CFG, 4, 10).batches()) == []


def test_data_needs_no_jax():
    """All but the loader: grain imports jax's profiler where there is one."""
    code = ("import sys, pkgutil, importlib, jaxllm.data as d\n"
            "for m in pkgutil.iter_modules(d.__path__):\n"
            "    if m.name != 'loader': importlib.import_module('jaxllm.data.' + m.name)\n"
            "print([m for m in ('jax', 'flax', 'jaxllm.model', 'jaxllm.train') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
