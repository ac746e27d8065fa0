"""A JSON-lines file to which whole lines are appended, each on disk before the call returns."""

import json
import os
import pathlib

from jaxllm.data.json_rows import json_rows
from jaxllm.errors import writing


class Appended:
    """A kill while a line is written leaves part of a line at the end, which is cut off when the file is opened again."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                self._cut(file)

    def _cut(self, file) -> None:
        """Removes what follows the last line's end."""
        end = size = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - (1 << 16))
            file.seek(begin)
            at = file.read(end - begin).rfind(b"\n")
            if at >= 0:
                end = begin + at + 1
                break
            end = begin
        if end == size:
            return
        file.seek(end)
        try:  # a file that somebody wrote may lack the last line's end
            json.loads(file.read())
            file.write(b"\n")
        except ValueError:
            file.truncate(end)

    def rows(self):
        """Yields ("file:line", object) of every line."""
        if self.path.stat().st_size:
            yield from json_rows(str(self.path), "output")

    def append(self, line: str) -> None:
        """Adds a line; what a full disk left of it is removed."""
        data = line.encode() + b"\n"
        with writing(self.path), self.path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) != len(data):
                    raise OSError(28, "No space left on device")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise

    def replace(self, lines: list[str]) -> None:
        """Writes the file anew under another name and renames it, so that it is never there in part."""
        part = self.path.with_name(self.path.name + ".part")
        with writing(self.path):
            with part.open("wb") as file:
                file.write("".join(line + "\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
