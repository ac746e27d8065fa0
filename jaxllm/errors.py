"""The three ways a command ends early, each with its exit code. Anything else that is raised is a bug of ours."""

import contextlib
import difflib
import errno
import os
import pathlib
import signal
import sys
import threading


class UserError(Exception):
    """The user's mistake, told in one line: what, where, what it should be. Exit code 2."""


class RunError(Exception):
    """The run could not go on (loss is NaN, disk is full): one line, nothing committed is lost. Exit code 1."""

    def __init__(self, message: str, result: dict | None = None):
        super().__init__(message)
        self.result = result  # what --json writes all the same


STOPPED = 75  # exit code of what goes on when it is started again


class Stopped(Exception):
    """Stopped on request after saving; the same command goes on. Exit code 75."""


def nearest(name: str, known) -> str:
    """Returns what an error says of an unknown name: the nearest known one, or some of them."""
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"found: {', '.join(sorted(known)[:12]) or 'nothing'}"


AGAIN_S, PATIENCE = 0.05, 5  # after which a signal comes again, until it has ended the command; how often it waits for jax


@contextlib.contextmanager
def stopping_at_once(where: str = ""):
    """Makes SIGTERM and SIGINT end the command with exit code 75, where nothing that is done is lost by it.

    An exception that a handler raises breaks into whatever runs. A half-made extension module crashes by it, and jax takes it
    for a failure of its own or, in a callback of the garbage collector, drops it. So one waits until these are done, for jax
    a quarter of a second; then the process ends as it is. The signal comes again until the command has left.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    again: list[threading.Timer] = []

    def stop(number, frame):
        if leaving():
            return
        again.append(threading.Timer(AGAIN_S, os.kill, (os.getpid(), number)))
        again[-1].daemon = True
        again[-1].start()
        told = f"{where and where + ': '}stopped by {signal.Signals(number).name}; run the same command to go on"
        if importing(frame):
            return
        if not in_jax(frame):
            raise Stopped(told)
        if len(again) > PATIENCE:
            print(f"jaxllm: {told}", file=sys.stderr, flush=True)
            os._exit(STOPPED)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for timer in again:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def in_jax(frame) -> bool:
    return frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("jax", "jaxlib")


def leaving() -> bool:
    """Tells whether what is running cleans up on the way out of a command that is being stopped."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None


def importing(frame) -> bool:
    """Tells whether a module is being imported: an exception that a signal raises in a half-made extension module crashes the
    process."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def check_folder(setting: str, path: str | None) -> None:
    """Raises UserError when a file that a setting names could not be written, before anything is computed."""
    if path is not None and not pathlib.Path(path).absolute().parent.is_dir():
        raise UserError(f"{setting}={path}: its folder is not there")


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path):
    """Turns a failure to write into one line that names the file."""
    try:
        yield
    except OSError as e:
        if e.errno in DISK_FULL:
            raise RunError(f"{path}: cannot be written: {e.strerror}; what was saved before is complete: free some "
                           "space and run the same command again") from None
        raise UserError(f"{path}: cannot be written: {e.strerror or e}") from None
