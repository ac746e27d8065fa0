"""Rows of training out of a stream of tokens: where documents begin, what may be predicted from what. NumPy only.

B row of a batch, T position in a row, S = T + 1 (a row with the target of its last position).
A row r of a stream is its tokens r*T to r*T + T, so each token but the first is the target of exactly one position.
"""

import numpy as np


def n_rows(n_tokens: int, seq_len: int) -> int:
    """Returns how many rows a stream makes; the last one may be padded."""
    return max(0, -(-(n_tokens - 1) // seq_len))


def gather_rows(streams, stream_B, row_B, seq_len: int, pad_id: int) -> dict[str, np.ndarray]:
    """Returns the batch of rows `row_B` of the streams that `stream_B` numbers; -1: a row of padding.

    A stream is (its tokens, the offsets where its documents end). In a row documents are numbered 1, 2, … and positions
    restart in each. The weight is 0 where the target belongs to another document than the token, and where there is no
    target; what lies behind the end of a stream is padding, with document 0.
    """
    token_BS = np.full((len(row_B), seq_len + 1), pad_id, np.int32)
    starts_BS = np.zeros(token_BS.shape, bool)  # a document begins here
    n_real_B = np.zeros(len(row_B), np.int64)
    for i in np.unique(stream_B[stream_B >= 0]):
        tokens, ends = streams[i]
        of_stream = np.flatnonzero(stream_B == i)
        begins = row_B[of_stream] * seq_len
        stops = np.minimum(begins + seq_len + 1, len(tokens))
        firsts, lasts = np.searchsorted(ends, begins, "right"), np.searchsorted(ends, stops, "left")
        for b, begin, stop, first, last in zip(of_stream, begins, stops, firsts, lasts, strict=True):
            token_BS[b, : stop - begin] = tokens[begin:stop]
            starts_BS[b, ends[first:last] - begin] = True
        n_real_B[of_stream] = stops - begins
    return _batch(token_BS, starts_BS, n_real_B)


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
    row_B = np.arange(max(1, n_rows(len(tokens), seq_len)))
    return gather_rows([(tokens, ends)], np.zeros_like(row_B), row_B, seq_len, pad_id)
