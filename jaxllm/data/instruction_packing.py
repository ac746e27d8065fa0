"""Examples into rows: first-fit with a bounded number of open rows, and the batch that a model is given. NumPy only.

N example, B row of a batch, T position in a row.
An example of n + 1 tokens takes n positions: its last token is only a target, since nothing follows it.
"""

import dataclasses
import functools

import numpy as np

from jaxllm.data.draws import permutation
from jaxllm.data.packing import gather_rows, n_rows
from jaxllm.data.store import Store

BLOCK = 1000  # rows of pretraining in which each store has its share


@dataclasses.dataclass(frozen=True)
class Examples:
    """Encoded examples, one after the other."""

    tokens: np.ndarray  # int32
    weights: np.ndarray  # uint8, of each token as a target
    ends: np.ndarray  # int64 [N]: where each ends

    @property
    def positions_N(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0) - 1


def first_fit(positions_N, seq_len: int, window: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns (row_N, start_N, rows): each example goes, in order, into the first open row that has room for it.

    At most `window` rows are open; a new one closes the oldest. So a row's examples are near each other in the order, and
    what is packed first does not depend on what comes later.
    """
    room_W = np.zeros(window, np.int64)  # a ring, row r at place r % window; a place without a row has no room
    row_N, start_N = np.empty(len(positions_N), np.int64), np.empty(len(positions_N), np.int64)
    rows = 0
    for n, size in enumerate(np.asarray(positions_N).tolist()):
        fits = np.flatnonzero(room_W >= size)
        if len(fits):
            place = int(fits[np.argmax((rows - 1 - fits) % window)])  # the row that was opened first
        else:
            place, rows = rows % window, rows + 1
            room_W[place] = seq_len
        row_N[n] = rows - 1 - (rows - 1 - place) % window
        start_N[n] = seq_len - room_W[place]
        room_W[place] -= size
    return row_N, start_N, rows


class Rows:
    """Packed rows, or with window=0 one example each, and the batch of any of them."""

    def __init__(self, examples: Examples, seq_len: int, window: int, pad_id: int):
        self.examples, self.seq_len, self.pad_id = examples, seq_len, pad_id
        positions_N = examples.positions_N
        if window:
            row_N, self.start_N, self.n_rows = first_fit(positions_N, seq_len, window)
        else:
            self.n_rows = len(positions_N)
            row_N, self.start_N = np.arange(self.n_rows), np.zeros(self.n_rows, np.int64)
        self.of_rows = np.argsort(row_N, kind="stable")  # examples row by row, and in a row as they stand
        self.bounds = np.searchsorted(row_N[self.of_rows], np.arange(self.n_rows + 1))
        self.begins = examples.ends - positions_N - 1

    def members(self, row: int) -> np.ndarray:
        """Returns the examples in a row, in the order in which they stand."""
        return self.of_rows[self.bounds[row] : self.bounds[row + 1]]

    def fill(self, batch: dict[str, np.ndarray], b: int, row: int) -> None:
        """Writes a row into place b of a batch."""
        for doc, n in enumerate(self.members(row), 1):
            first, last, at = self.begins[n], self.examples.ends[n], self.start_N[n]
            here = slice(at, at + last - first - 1)
            batch["token_BT"][b, here] = self.examples.tokens[first : last - 1]
            batch["target_BT"][b, here] = self.examples.tokens[first + 1 : last]
            batch["weight_BT"][b, here] = self.examples.weights[first + 1 : last]
            batch["pos_BT"][b, here] = np.arange(last - first - 1)
            batch["doc_BT"][b, here] = doc


def empty_batch(n_rows: int, seq_len: int, pad_id: int) -> dict[str, np.ndarray]:
    """Returns a batch of padding: weight, position and document 0."""
    token_BT = np.full((n_rows, seq_len), pad_id, np.int32)
    return {"token_BT": token_BT, "target_BT": token_BT.copy(), "weight_BT": np.zeros((n_rows, seq_len), np.float32),
            "pos_BT": np.zeros((n_rows, seq_len), np.int32), "doc_BT": np.zeros((n_rows, seq_len), np.int32)}


class PretrainingRows:
    """Rows of tokenised text, to be mixed in: every token of them is learned."""

    def __init__(self, stores: list[Store], weights: list[float], seq_len: int, seed: int, pad_id: int):
        self.streams, self.seq_len, self.seed, self.pad_id = [(s.tokens, s.ends) for s in stores], seq_len, seed, pad_id
        self.sizes = [n_rows(len(store.tokens), seq_len) for store in stores]
        # of each BLOCK rows that are drawn, how many are of each store: rounded down, the rest to the largest remainders
        exact = np.array(weights) / sum(weights) * BLOCK
        self.quotas = np.floor(exact).astype(int)
        self.quotas[np.argsort(self.quotas - exact, kind="stable")[: BLOCK - self.quotas.sum()]] += 1

    def fill(self, batch: dict[str, np.ndarray], b: int, k: int) -> None:
        """Writes the k-th row that is drawn into place b: stores by weight, their rows shuffled anew in each pass."""
        stream, rank = self._block(k // BLOCK)
        stream, rank = int(stream[k % BLOCK]), int(rank[k % BLOCK])
        nth, size = k // BLOCK * int(self.quotas[stream]) + rank, self.sizes[stream]
        row = self._order(stream, nth // size)[nth % size]
        for name, array in gather_rows(self.streams, np.array([stream]), np.array([row]), self.seq_len, self.pad_id).items():
            batch[name][b] = array[0]

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns of each row in a block its store, and how many of that store come before it there."""
        stream = np.repeat(np.arange(len(self.quotas)), self.quotas)[permutation(BLOCK, "stores", self.seed, block)]
        rank = np.empty(BLOCK, int)
        for one, quota in enumerate(self.quotas):
            rank[stream == one] = np.arange(quota)
        return stream, rank

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _order(self, stream: int, time: int) -> np.ndarray:
        return permutation(self.sizes[stream], "pretraining", self.seed, stream, time)
