"""Rows of training out of a stream of tokens: where documents begin, what may be predicted from what. NumPy only.

B row of a batch, T position in a row, S = T + 1 (a row with the target of its last position).
A row r of a stream is its tokens r*T to r*T + T, so each token but the first is the target of exactly one position.
"""

import numpy as np


def n_rows(n_tokens: int, seq_len: int) -> int:
    """Returns how many rows a stream makes; the last one may be padded."""
    return max(0, -(-(n_tokens - 1) // seq_len))


def gather_rows(tokens, ends, rows, seq_len: int, pad_id: int) -> dict[str, np.ndarray]:
    """Returns the batch of the named rows of a stream.

    `ends` holds the offset where each document ends. In a row documents are numbered 1, 2, … and positions restart in
    each. The weight is 0 where the target belongs to another document than the token, and where there is no target;
    what lies behind the end of the stream is padding, with document 0.
    """
    rows = np.asarray(rows, np.int64)
    token_BS = np.full((len(rows), seq_len + 1), pad_id, np.int32)
    starts_BS = np.zeros(token_BS.shape, bool)  # a document begins here
    begin_B = rows * seq_len
    stop_B = np.minimum(begin_B + seq_len + 1, len(tokens))
    first_B, last_B = np.searchsorted(ends, begin_B, "right"), np.searchsorted(ends, stop_B, "left")
    for i, (begin, stop, first, last) in enumerate(zip(begin_B, stop_B, first_B, last_B, strict=True)):
        token_BS[i, : stop - begin] = tokens[begin:stop]
        starts_BS[i, ends[first:last] - begin] = True
    return _batch(token_BS, starts_BS, stop_B - begin_B)


def _batch(token_BS, starts_BS, n_real_B) -> dict[str, np.ndarray]:
    at_T = np.arange(token_BS.shape[1] - 1, dtype=np.int32)
    starts_BT, target_starts_BT = starts_BS[:, :-1], starts_BS[:, 1:]
    doc_BT = np.cumsum(starts_BT, axis=1, dtype=np.int32) + 1
    pos_BT = at_T[None] - np.maximum.accumulate(np.where(starts_BT, at_T[None], 0), axis=1)
    weight_BT = ~target_starts_BT
    if (n_real_B < token_BS.shape[1]).any():
        weight_BT &= at_T[None] + 1 < n_real_B[:, None]
        padding_BT = at_T[None] >= n_real_B[:, None]
        doc_BT[padding_BT] = pos_BT[padding_BT] = 0
    return {
        "token_BT": np.ascontiguousarray(token_BS[:, :-1]), "target_BT": np.ascontiguousarray(token_BS[:, 1:]),
        "weight_BT": weight_BT.astype(np.float32), "pos_BT": pos_BT, "doc_BT": doc_BT,
    }


def pack(documents: list[list[int]], seq_len: int, pad_id: int = 0) -> dict[str, np.ndarray]:
    """Returns one batch of all rows that documents make, one after the other as they stand, without <bos> and <eos>."""
    tokens = np.concatenate([np.asarray(d, np.int32) for d in documents])
    ends = np.cumsum([len(d) for d in documents])
    return gather_rows(tokens, ends, np.arange(max(1, n_rows(len(tokens), seq_len))), seq_len, pad_id)


def padding_rows(n: int, seq_len: int, pad_id: int) -> dict[str, np.ndarray]:
    """Returns n rows in which nothing counts."""
    return gather_rows(np.empty(0, np.int32), np.empty(0, np.int64), np.zeros(n), seq_len, pad_id)
