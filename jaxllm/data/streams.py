"""Files as streams of bytes, compressed or not, with one clear line for what can be wrong with them."""

import gzip
import pathlib
import zlib

import zstandard

from jaxllm.errors import UserError

MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}  # how a file of another encoding begins
BOM = b"\xef\xbb\xbf"


class Stream:
    """A file's bytes, decompressed as its name says. Raises UserError where it cannot be read or ends early."""

    def __init__(self, path: pathlib.Path):
        self.path, self.problem = path, ""
        try:
            self.raw = path.open("rb")
        except OSError as e:
            raise UserError(f"{path}: cannot be read: {e.strerror}") from None
        opened = {".gz": lambda raw: gzip.GzipFile(fileobj=raw), ".zst": ZstdFile}
        self.file = opened.get(path.suffix.lower(), lambda raw: raw)(self.raw)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.raw.close()

    def position(self) -> int:
        """Returns how many bytes of the file, as it lies on disk, were read."""
        return self.raw.tell()

    def read(self, n: int) -> bytes:
        """Returns n bytes, fewer before the end or what cannot be read, which the next call tells; b"" at the end."""
        held = bytearray()
        try:
            while not self.problem and len(held) < n and (chunk := self.file.read1(n - len(held))):
                held += chunk
        except EOFError:
            self.problem = f"{self.path}: ends early: the file is truncated"
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as e:
            self.problem = f"{self.path}: damaged, or not a {self.path.suffix} file: {e}"
        except OSError as e:
            self.problem = f"{self.path}: cannot be read: {e.strerror}"
        if self.problem and not held:
            raise UserError(self.problem)
        return bytes(held)

    def read_start(self, n: int) -> bytes:
        """Returns the first bytes, without a byte order mark; raises UserError for text that is not UTF-8 as a whole."""
        start = self.read(n)
        if encoding := MARKS.get(start[:2]):
            raise UserError(f"{self.path}: is {encoding}; should be UTF-8 (iconv -f {encoding} -t UTF-8)")
        return start.removeprefix(BOM)


class ZstdFile:
    """Reads Zstandard frames; unlike the library's own reader it notices a file that ends inside a frame.

    Of a frame that was cut, whole blocks are had (of up to 128 KiB of text), so up to one is lost.
    """

    def __init__(self, raw):
        self.raw, self.ready, self.inside, self.ahead = raw, b"", False, b""
        self.frames = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # archives written with --long=31
        self.frame = self.frames.decompressobj()

    def read1(self, n: int) -> bytes:
        while not self.ready:
            packed = self.ahead or self.raw.read(1 << 14)  # little: a frame of zeros grows 30,000-fold
            if not packed:
                if self.inside:
                    raise EOFError
                return b""
            self.ready, self.ahead, self.inside = self.frame.decompress(packed), b"", True
            if self.frame.eof:
                self.ahead, self.inside, self.frame = self.frame.unused_data, False, self.frames.decompressobj()
        taken, self.ready = self.ready[:n], self.ready[n:]
        return taken
