"""How fast batches come: `python benchmarks/input.py`. The bar is 5 M tokens/s from one process.

Stores of random tokens are made in a temporary folder (memory-mapped, like real ones), then batches are drawn in turn from
one source and from a mixture of three, by one process and as one of eight, and the time is compared with that of copying as
many bytes as a batch holds (five arrays of four bytes a token).
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import numpy as np

from jaxllm.data.config import DataConfig
from jaxllm.data.loader import TrainingInput
from jaxllm.data.store import Counts, StoreWriter, open_stores
from jaxllm.data.tokenize import SourceStores, Stores

VOCAB = 32_000


def make_stores(folder: pathlib.Path, n_sources: int, n_tokens: int) -> Stores:
    """Returns stores of documents of 100 to 2000 random tokens."""
    pick, sources = np.random.default_rng(0), []
    for i in range(n_sources):
        with StoreWriter(folder / f"source{i}", VOCAB) as writer:
            lengths = pick.integers(100, 2000, n_tokens // 1050)
            writer.documents("train", pick.integers(16, VOCAB, lengths.sum()), lengths, 4 * lengths)
            writer.finish({})
        _, opened = open_stores(folder / f"source{i}")
        sources.append(SourceStores(f"source{i}", f"key{i}", 1.0 + i, Counts(), opened["train"], opened["validation"]))
    return Stores(sources, np.full(VOCAB, 4, np.int32), 0)


def tokens_per_s(given: TrainingInput, seconds: float, start: int) -> float:
    """Returns the rate of drawing batches, without the first ones."""
    batches = given.batches(start)
    for _ in range(8):
        next(batches)
    began, n = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        n += next(batches)["token_BT"].size
    rate = n / (time.perf_counter() - began)
    batches.close()
    return rate


def copied_per_s(batch: dict, seconds: float) -> float:
    """Returns tokens a second when a batch's arrays are only copied."""
    copies, began, n = {name: np.empty_like(x) for name, x in batch.items()}, time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for name, x in batch.items():
            np.copyto(copies[name], x)
        n += batch["token_BT"].size
    return n / (time.perf_counter() - began)


def main(seq_len: int, batch_size: int, rounds: int, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stores = make_stores(pathlib.Path(folder), 3, 50_000_000)
        one, cfg = Stores(stores.sources[:1], stores.token_bytes_V, 0), DataConfig(seq_len=seq_len)
        cases = {
            "one source": TrainingInput(one, cfg, batch_size, 0),
            "three sources": TrainingInput(stores, cfg, batch_size, 0),
            "three sources, process 3 of 8": TrainingInput(stores, cfg, 8 * batch_size, 0, 3, 8),
        }
        found = {name: [] for name in [*cases, "copying alone"]}
        batch = next(cases["one source"].batches())
        for i in range(rounds):
            for name, given in cases.items():
                found[name].append(tokens_per_s(given, seconds, 1000 * i))
            found["copying alone"].append(copied_per_s(batch, seconds))
    print(f"batches of {batch_size} rows of {seq_len} tokens, {rounds} rounds in turn; M tokens/s: median (least to most)")
    for name, rates in found.items():
        median, least, most = (f(rates) / 1e6 for f in (statistics.median, min, max))
        print(f"{name:<30} {median:8.1f} ({least:.1f} to {most:.1f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    main(**vars(parser.parse_args()))
