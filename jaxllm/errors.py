"""The three ways a command ends early, each with its exit code. Anything else that is raised is a bug of ours."""

import contextlib
import errno


class UserError(Exception):
    """The user's mistake, told in one line: what, where, what it should be. Exit code 2."""


class RunError(Exception):
    """The run could not go on (loss is NaN, disk is full): one line, nothing committed is lost. Exit code 1."""

    def __init__(self, message: str, result: dict | None = None):
        super().__init__(message)
        self.result = result  # what --json writes all the same


class Stopped(Exception):
    """Stopped on request after saving; the same command goes on. Exit code 75."""


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
