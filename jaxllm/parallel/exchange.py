"""Means of vectors over a few processes, made by threads while the process computes.

A device runs its programs one after the other, and so does jax's CPU client, even where they have nothing to do with each
other: a program that waits for another group's part of a sum would hold up every step behind it (measured, docs/LOG.md).
So what may be late goes through the hosts' own sockets. Process i is the one that adds up the i-th of n pieces, in the
order of the processes, whoever came first: the mean is the same to the bit in every process and every run.
"""

import functools
import queue
import socket
import struct
import threading
from typing import NamedTuple

import numpy as np

from jaxllm.errors import RunError

HEADER = struct.Struct("!BqiiQ")  # kind, step, fragment, note, bytes that follow
PART, MEAN = 0, 1
Key = tuple[int, int]  # (step, fragment)


class Piece(NamedTuple):
    note: int
    values: np.ndarray


class Exchange:
    """The processes at one place of every group. `peers[i]` is the connection to process i, None for this one."""

    def __init__(self, peers: list[socket.socket | None], names: list[str]):
        self.peers, self.names, self.me = peers, names, peers.index(None)
        self.parts: dict[Key, dict[int, Piece]] = {}
        self.means: dict[Key, dict[int, Piece]] = {}
        self.gone: set[int] = set()
        self.changed = threading.Condition()
        self.sent_bytes = 0  # without headers
        self.queues = [queue.SimpleQueue() if peer else None for peer in peers]
        for i, peer in enumerate(peers):
            for run in (self._send, self._receive) if peer else ():
                threading.Thread(target=run, args=(i,), daemon=True).start()

    def submit(self, key: Key, vector: np.ndarray, note: int = 0) -> None:
        """Gives this process's vector; returns at once. Of the notes the highest comes back with the mean."""
        for i, piece in enumerate(np.array_split(vector, len(self.peers))):
            self._put(PART, key, i, Piece(note, piece))

    def result(self, key: Key) -> tuple[np.ndarray, int]:
        """Returns (mean, highest note), once all have given their vectors. Raises RunError when one cannot any more."""
        with self.changed:
            self.changed.wait_for(lambda: self._whole(key) or self._lost(key))
            if not self._whole(key):
                raise RunError(f"{self.names[min(self._lost(key))]} left, and its part of the meeting after step {key[0]} "
                               "will not come; run the same command everywhere to go on from the last checkpoint")
            pieces = self.means.pop(key)
        in_order = [pieces[i] for i in range(len(self.peers))]
        return np.concatenate([piece.values for piece in in_order]), max(piece.note for piece in in_order)

    def _whole(self, key: Key) -> bool:
        return len(self.means.get(key, ())) == len(self.peers)

    def _lost(self, key: Key) -> set[int]:
        """Returns who is gone without having given what the mean needs."""
        added = self.me in self.means.get(key, ())
        return {i for i in self.gone if i not in self.means.get(key, ()) or not (added or i in self.parts.get(key, ()))}

    def _put(self, kind: int, key: Key, to: int, piece: Piece) -> None:
        if to == self.me:
            self._take(kind, key, to, piece)
        else:
            self.queues[to].put((kind, key, piece))

    def _take(self, kind: int, key: Key, of: int, piece: Piece) -> None:
        with self.changed:
            pieces = (self.parts if kind == PART else self.means).setdefault(key, {})
            pieces[of] = piece
            complete = len(pieces) == len(self.peers)
            if complete and kind == PART:
                del self.parts[key]
            self.changed.notify_all()
        if complete and kind == PART:
            in_order = [pieces[i] for i in range(len(self.peers))]
            total = functools.reduce(np.add, [p.values for p in in_order])
            mean = Piece(max(p.note for p in in_order), total / np.float32(len(self.peers)))
            for i in range(len(self.peers)):
                self._put(MEAN, key, i, mean)

    def _send(self, to: int) -> None:
        while True:
            kind, key, piece = self.queues[to].get()
            data = np.ascontiguousarray(piece.values, np.float32)
            try:
                self.peers[to].sendall(HEADER.pack(kind, *key, piece.note, data.nbytes))
                self.peers[to].sendall(data.data)
            except OSError:
                return  # its receiver tells
            self.sent_bytes += data.nbytes

    def _receive(self, of: int) -> None:
        try:
            with self.peers[of].makefile("rb") as stream:
                while len(head := stream.read(HEADER.size)) == HEADER.size:
                    kind, step, fragment, note, n = HEADER.unpack(head)
                    data = stream.read(n)
                    if len(data) < n:
                        break
                    self._take(kind, (step, fragment), of, Piece(note, np.frombuffer(data, np.float32)))
        except (OSError, ValueError):
            pass
        with self.changed:
            self.gone.add(of)
            self.changed.notify_all()


def listen() -> socket.socket:
    """Returns a socket at a free port of this host, for `connect`."""
    return socket.create_server(("", 0), backlog=64)


def own_address(towards: str) -> str:
    """Returns this host's address as the host of HOST:PORT `towards` sees it."""
    host, _, port = towards.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # sends nothing
        return probe.getsockname()[0]


def connect(server: socket.socket, me: int, addresses: list[tuple[str, int]], timeout: float) -> list[socket.socket | None]:
    """Returns the connections to all the others, None for this process itself; each calls those before it."""
    peers: list[socket.socket | None] = [None] * len(addresses)
    for i, address in enumerate(addresses[:me]):
        peers[i] = socket.create_connection(address, timeout=timeout)
        peers[i].sendall(struct.pack("!i", me))
    server.settimeout(timeout)
    for _ in addresses[me + 1 :]:
        peer, _ = server.accept()
        peer.settimeout(timeout)
        peers[struct.unpack("!i", peer.recv(4, socket.MSG_WAITALL))[0]] = peer
    server.close()
    for peer in filter(None, peers):
        peer.settimeout(None)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peers
