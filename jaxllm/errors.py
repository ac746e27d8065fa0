"""The three ways a command ends early, each with its exit code. Anything else that is raised is a bug of ours."""


class UserError(Exception):
    """The user's mistake, told in one line: what, where, what it should be. Exit code 2."""


class RunError(Exception):
    """The run could not go on (loss is NaN, disk is full): one line, nothing committed is lost. Exit code 1."""

    def __init__(self, message: str, result: dict | None = None):
        super().__init__(message)
        self.result = result  # what --json writes all the same


class Stopped(Exception):
    """Stopped on request after saving; the same command goes on. Exit code 75."""
