"""Runs a user's code in a process of its own, with limits on its time: what goes wrong there harms nothing here."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from multiprocessing.connection import Pipe

from jaxllm.align.guarded_child import MOST_ANSWERED
from jaxllm.errors import UserError

START_SECONDS = 300.0  # for the process to come up and load the user's file, which may import much
# Not multiprocessing: it would run the main script again in the child, and could not end what the user's code starts.
BOOT = ("import json, sys; sys.path[:] = json.loads(sys.argv[2]); from jaxllm.align.guarded_child import serve; "
        "serve(int(sys.argv[1]))")


class Failure(Exception):
    """A call of the user's code that gave no value: why, in one line."""


class Gone(Failure):
    """The call took too long or ended its process: the code is to blame, not what it was given."""


class Guarded:
    """A user's code in another process. The process is started at the first call, and again after one that it did not survive.

    `what` says what is run, as guarded_child.py reads it; `name` names it in messages. What the code prints goes to the file
    `output`, its first megabyte, or nowhere. Not for several threads at a time.
    """

    def __init__(self, what: dict, name: str, output: pathlib.Path | None = None):
        self.what, self.name, self.output = what, name, output
        self._process = self._channel = None

    def start(self) -> None:
        """Starts the process and loads the code. Raises UserError where it cannot be loaded."""
        if self._process is not None:
            return
        self._channel, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", BOOT, str(theirs.fileno()), json.dumps(sys.path)], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},  # accelerators belong to the run
                start_new_session=True)  # Ctrl-C is for the run alone, and the whole session is ended with the code
        try:
            output = str(self.output.resolve()) if self.output else None
            self._ask({**self.what, "output": output, "seconds": START_SECONDS}, START_SECONDS)
        except Failure as e:
            self.close()
            raise UserError(f"{self.name}: {e}") from None

    def call(self, argument, seconds: float):
        """Returns what the code makes of `argument` (JSON). Raises Failure where it raises, or takes longer than `seconds`."""
        self.start()
        return self._ask({"argument": argument, "seconds": seconds}, seconds)

    def close(self) -> int | None:
        """Ends the process, and those that it started; returns its exit code."""
        if self._process is None:
            return None
        process, channel = self._process, self._channel
        self._process = self._channel = None
        # Before it is reaped, so that its number is not another's. One that ended by itself keeps its own exit code.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        channel.close()
        return process.wait()

    def _ask(self, message: dict, seconds: float):
        try:
            self._channel.send_bytes(json.dumps(message).encode())
            if not self._channel.poll(seconds):
                raise Gone(f"took longer than {seconds:g} s")
            answer = json.loads(self._channel.recv_bytes(MOST_ANSWERED))
        except (EOFError, OSError):
            raise Gone(f"ended its process ({_ending(self.close())})") from None
        except ValueError:
            self.close()
            raise Gone("wrote to the way between its process and the run") from None
        except BaseException:  # Ctrl-C too: an answer that comes later must not be taken for the next call's
            self.close()
            raise
        if "error" in answer:
            raise Failure(answer["error"])
        return answer["value"]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "SIGKILL: out of memory, or it closed the way to the run"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
