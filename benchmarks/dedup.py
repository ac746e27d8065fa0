"""Deduplication beside rensa and datasketch: `python benchmarks/dedup.py [--documents 2000000] [--peers]`.

--peers: made-up documents with planted near-duplicates of known similarity (tests/planted.py), the same 5-word shingles, the
same number of values, bands and threshold for all three; each in a process of its own for its peak memory. Recall is over
pairs of Jaccard .8 or more, false removals over documents whose kept one is no such pair's, directly or in steps.
--speed: MB/s of signatures with one worker and two.
--documents N: N made-up documents through signatures (in a file) and the decision, with time and peak memory.

Times are of the processor (time.process_time).
"""

import argparse
import json
import multiprocessing
import pathlib
import re
import resource
import sys
import tempfile
import time

import numpy as np

sys.path[:0] = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parents[1] / "tests")]

from planted import Planted, planted  # noqa: E402

from jaxllm.data import minhash, units  # noqa: E402
from jaxllm.data.dedup import decide  # noqa: E402
from jaxllm.data.minhash import DedupConfig  # noqa: E402

CFG = DedupConfig()


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(texts: list[str]) -> tuple[list[int], float]:
    """Returns, for each document, the one that stands for it, and the seconds of signatures alone."""
    began = time.process_time()
    rows = minhash.signatures(texts, CFG)
    signed = time.process_time() - began
    decision = decide(rows, lambda i: minhash.shingles(texts[i], CFG), CFG)
    return [i if d < 0 else int(d) for i, d in enumerate(decision.duplicate_of_N)], signed


def shingles_of(text: str) -> list[str]:
    words = re.findall(r"[\u4e00-\u9fff]|[^\W_\u4e00-\u9fff]+", text.lower())
    return [" ".join(words[i : i + CFG.n]) for i in range(max(len(words) - CFG.n + 1, 1))]


def with_rensa(texts: list[str]) -> tuple[list[int], float]:
    import rensa

    began = time.process_time()
    made = []
    for text in texts:
        made.append(rensa.RMinHash(num_perm=CFG.bands * CFG.rows, seed=42))
        made[-1].update(shingles_of(text))
    signed = time.process_time() - began
    lsh = rensa.RMinHashLSH(threshold=CFG.threshold, num_perm=CFG.bands * CFG.rows, num_bands=CFG.bands)
    first = []
    for i, one in enumerate(made):  # the first that is similar by its signature stands for it
        similar = [k for k in lsh.query(one) if made[k].jaccard(one) >= CFG.threshold]
        first.append(first[min(similar)] if similar else i)
        lsh.insert(i, one)
    return first, signed


def with_datasketch(texts: list[str]) -> tuple[list[int], float]:
    import datasketch

    began = time.process_time()
    made = []
    for text in texts:
        made.append(datasketch.MinHash(num_perm=CFG.bands * CFG.rows, seed=1))
        made[-1].update_batch([s.encode() for s in shingles_of(text)])
    signed = time.process_time() - began
    lsh = datasketch.MinHashLSH(num_perm=CFG.bands * CFG.rows, params=(CFG.bands, CFG.rows))
    first = []
    for i, one in enumerate(made):
        similar = [k for k in lsh.query(one) if made[k].jaccard(one) >= CFG.threshold]
        first.append(first[min(similar)] if similar else i)
        lsh.insert(i, one)
    return first, signed


def in_process(function, texts, answer) -> None:
    units.folding()
    before, began = peak_mb(), time.process_time()
    first, signed = function(texts)
    answer.send((first, signed, time.process_time() - began, peak_mb() - before))


def components(pairs, n: int) -> np.ndarray:
    label = np.arange(n)
    for a, b in pairs:
        label[label == label[a]] = label[b]
    return label


def peers(made: Planted) -> None:
    pairs, n = made.similar(CFG.threshold), len(made.texts)
    label, size = components(pairs, n), sum(len(t.encode()) for t in made.texts)
    print(f"{n} documents, {size / 1e6:.1f} MB, {len(pairs)} pairs of Jaccard {CFG.threshold} or more")
    base = None
    for name, function in (("jaxllm", ours), ("rensa", with_rensa), ("datasketch", with_datasketch)):
        receive, send = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.Process(target=in_process, args=(function, made.texts, send))
        process.start()
        first, signed, total, memory = receive.recv()
        process.join()
        base = base or total
        recall = np.mean([first[a] == first[b] for a, b in pairs])
        false = sum(label[i] != label[k] for i, k in enumerate(first))
        print(f"{name:11} signatures {size / signed / 1e6:6.1f} MB/s, all {size / total / 1e6:6.1f} MB/s "
              f"(time x {total / base:.1f}), recall {recall:.4f}, false removals {false / n:.4%}, peak + {memory:.0f} MB")


def sign(texts: list[str]) -> float:
    began = time.process_time()
    minhash.signatures(texts, CFG)
    return time.process_time() - began


def sign_eighth(i: int) -> float:
    return sign(HELD[i::8])


HELD: list[str] = []  # what forked workers find in their memory


def speed(made: Planted) -> None:
    units.folding()
    HELD[:] = [t for t in made.texts if " " in t] * 4
    size = sum(len(t.encode()) for t in HELD)
    alone, singly = min(sign(HELD) for _ in range(5)), 1e9
    for _ in range(3):
        began = time.process_time()
        for text in HELD:
            minhash.signature(text, CFG)
        singly = min(singly, time.process_time() - began)
    walls, cpus = {1: 1e9, 2: 1e9}, {1: 1e9, 2: 1e9}
    pools = {workers: multiprocessing.get_context("fork").Pool(workers) for workers in walls}
    for _ in range(7):  # in turn: others use the machine too
        for workers, pool in pools.items():
            began = time.perf_counter()
            cpus[workers] = min(cpus[workers], sum(pool.map(sign_eighth, range(8), chunksize=1)))
            walls[workers] = min(walls[workers], time.perf_counter() - began)
    for pool in pools.values():
        pool.terminate()
    print(f"{len(HELD)} documents, {size / 1e6:.1f} MB: {size / alone / 1e6:.1f} MB/s of processor time, document by document "
          f"{size / singly / 1e6:.1f} MB/s")
    print(f"by the clock, one worker {size / walls[1] / 1e6:.1f} MB/s, two {size / walls[2] / 1e6:.1f} MB/s "
          f"(x {walls[1] / walls[2]:.2f}; processor time of two over that of one: x {cpus[2] / cpus[1]:.2f})")


def many(n: int, folder: pathlib.Path) -> None:
    """Documents of 60 to 180 numbers as words; every tenth is an edited copy of the one before."""
    def text_of(i: int) -> str:
        copy = i % 10 == 9
        draw = np.random.default_rng(i - copy)
        words = draw.integers(0, 1 << 20, int(draw.integers(60, 180)))
        if copy:
            words[len(words) // 2] = 7
        return " ".join(np.char.mod("w%d", words))

    path = folder / "signatures.npy"
    rows = np.lib.format.open_memmap(path, "w+", np.uint32, (n, minhash.width(CFG)))
    began, size = time.process_time(), 0
    for first in range(0, n, 2000):
        texts = [text_of(i) for i in range(first, min(first + 2000, n))]
        size += sum(map(len, texts))
        rows[first : first + len(texts)] = minhash.signatures(texts, CFG)
    rows.flush()
    made, before = time.process_time() - began, peak_mb()
    print(f"{n} documents, {size / 1e6:.0f} MB, signatures {path.stat().st_size / 1e6:.0f} MB in a file; made and signed in "
          f"{made:.0f} s, peak {before:.0f} MB", flush=True)
    del rows
    answer, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_decide_many, args=(path, n, text_of, send))
    process.start()
    print(answer.recv())
    process.join()


def _decide_many(path, n, text_of, answer) -> None:
    rows = np.load(path, mmap_mode="r")
    began = time.process_time()
    decision = decide(rows, lambda i: minhash.shingles(text_of(i), CFG), CFG)
    removed = np.flatnonzero(decision.duplicate_of_N >= 0)
    right = int(np.sum((removed % 10 == 9) & (decision.duplicate_of_N[removed] == removed - 1)))
    status = dict(re.findall(r"(Rss\w+|VmHWM):\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text()))
    answer.send(json.dumps({
        "decided_in_s": round(time.process_time() - began, 1), "removed": len(removed), "planted": n // 10, "right": right,
        "compared": decision.compared, "peak_mb": int(status["VmHWM"]) // 1024,
        "own_mb_at_the_end": int(status["RssAnon"]) // 1024, "mapped_mb_at_the_end": int(status["RssFile"]) // 1024}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=0)
    parser.add_argument("--families", type=int, default=3000)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args()
    if args.peers or args.speed:
        made = planted(args.families, seed=5)
        if args.speed:
            speed(made)
        if args.peers:
            peers(made)
    if args.documents:
        with tempfile.TemporaryDirectory() as folder:
            many(args.documents, pathlib.Path(folder))


if __name__ == "__main__":
    main()
