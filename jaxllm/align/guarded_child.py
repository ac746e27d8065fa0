"""The process in which a user's code runs: loads it, calls it on what is sent, and sends back what comes of it.

Messages are JSON both ways, so that nothing the code returns is ever executed or unpickled in the run's own process.
"""

import importlib.util
import io
import itertools
import json
import math
import numbers
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

from jaxllm.align.rewards_config import RewardRule
from jaxllm.align.rules import RULES, Failed, Sample
from jaxllm.errors import UserError, nearest

MOST_ANSWERED = 64 << 20  # bytes of an answer
MOST_PRINTED = 1 << 20  # bytes kept of what the code prints
LONGEST_REASON = 300  # characters
MOST_EPISODES = 10_000  # environments kept


def serve(fd: int) -> None:
    """Answers calls until the other end is closed."""
    channel = Connection(fd)
    start = json.loads(channel.recv_bytes())
    _alarm(start.pop("seconds"))
    sys.stdout = sys.stderr = Printed(start.pop("output"))
    call = None

    def load(what):
        nonlocal call
        call = CALLS[what.pop("call")](**what)

    _answer(channel, load, start)
    signal.alarm(0)
    while call is not None:
        try:
            message = json.loads(channel.recv_bytes())
        except EOFError:
            break
        _alarm(message["seconds"])
        _answer(channel, call, message["argument"])
        signal.alarm(0)
    os._exit(0)  # threads that the code left running do not keep the process


def _alarm(seconds: float) -> None:
    """Ends this process some time after the run should have: the run may have been killed."""
    signal.alarm(math.ceil(seconds) + 5)


def _answer(channel: Connection, call: Callable, argument) -> None:
    owner = os.getpid()
    try:
        answer = {"value": call(argument)}
    except BaseException as e:  # SystemExit too
        answer = {"error": told(e)}
    if os.getpid() != owner:  # the code forked, and its copy came back here: one answer is enough
        os._exit(0)
    data = json.dumps(answer).encode()
    if len(data) > MOST_ANSWERED:
        data = json.dumps({"error": f"returned more than {MOST_ANSWERED >> 20} MB"}).encode()
    channel.send_bytes(data)


def told(e: BaseException) -> str:
    """Returns one line of what an exception says, and where in the user's code it comes from."""
    if isinstance(e, UserError):
        return str(e)
    try:
        message = str(e)
    except Exception:
        message = "(its message cannot be made)"
    message = " ".join(message[: 2 * LONGEST_REASON].split())[:LONGEST_REASON]
    ours = pathlib.Path(__file__).parent
    places = [f for f in traceback.extract_tb(e.__traceback__) if ours not in pathlib.Path(f.filename).parents]
    users = [f for f in places if not f.filename.startswith((sys.prefix, sys.base_prefix, "<"))] or places[:1]
    where = f" ({pathlib.Path(users[-1].filename).name}, line {users[-1].lineno})" if users else ""
    return f"{type(e).__name__}{message and ': ' + message}{where}"


class Printed(io.TextIOBase):
    """Takes what is printed: the first bytes of it go to a file, the rest nowhere."""

    def __init__(self, path: str | None):
        self.path = path

    def writable(self):
        return True

    def write(self, text):
        if self.path is not None:
            with open(self.path, "ab") as file:
                left = MOST_PRINTED - file.tell()
                if left > 0:
                    file.write(text[:left].encode("utf-8", "replace")[:left])
        return len(text)


# ---------------------------------------------------------------- the user's code


def load_function(function: str) -> Callable:
    """Returns the function that "path/to/file.py:function" names. Raises UserError where there is none."""
    name, _, attribute = function.rpartition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        beside = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"{function}: no such file; {nearest(name, beside)}")
    sys.path.insert(0, str(path.parent.resolve()))  # what stands beside it can be imported
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException as e:
        raise UserError(f"{function}: cannot be loaded: {told(e)}") from None
    if not callable(getattr(module, attribute, None)):
        found = [n for n, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == path.stem]
        raise UserError(f"{function}: the file has no such function; {nearest(attribute, found)}")
    return getattr(module, attribute)


def scores_of(rule: dict) -> Callable:
    """Returns what scores a list of samples by a rule: a list of numbers, and of reasons (text) in place of some."""
    rule = RewardRule(**rule)
    if rule.kind == "python":
        function = load_function(rule.function)

        def call(samples):
            return function(samples if rule.dicts else [Sample(**s) for s in samples])
    else:

        def call(samples):
            return [RULES[rule.kind](rule, Sample(**s)) for s in samples]

    return lambda samples: checked(call(samples), len(samples))


def text_of(function: str) -> Callable:
    """Returns what makes text of text: a tool."""
    call = load_function(function)

    def tool(argument: str) -> str:
        found = call(argument)
        if not isinstance(found, str):
            raise TypeError(f"returned {type(found).__name__}, should be text")
        return found

    return tool


def episodes_of(function: str) -> Callable:
    """Returns what takes a turn of one of many episodes: a prompt, or [text, whether it is done, a score or None]."""
    make = load_function(function)
    # An episode's number -> (its environment, turns taken). One that is not here is played again up to where it was.
    running = {}

    def call(message: dict):
        number, past, step = message["episode"], message["past"], message["step"]
        environment, turns = running.pop(number, (None, -1))
        if step is None or turns != len(past):
            environment = make()
            prompt = environment.reset(message["row"])
            if step is None:
                _keep(number, (environment, 0))
                return _is(prompt, str | list, "reset", "text or messages")
            for earlier in past:
                environment.step(earlier)
        text, done, score = _is(environment.step(step), tuple | list, "step", "(text, done, score)")
        if score is not None and isinstance(score := checked([score], 1)[0], Failed):
            raise ValueError(f"step returned a score that is {score}")
        if not done:
            _keep(number, (environment, len(past) + 1))
        return [_is(text, str, "step", "text first"), bool(done), score]

    def _keep(number, episode):
        running[number] = episode
        while len(running) > MOST_EPISODES:  # episodes that were cut off are never told to be over
            running.pop(next(iter(running)))

    return call


def _is(found, kind, method: str, should: str):
    if not isinstance(found, kind):
        raise TypeError(f"{method} returned {type(found).__name__}, should be {should}")
    return found


CALLS = {"scores": scores_of, "text": text_of, "episodes": episodes_of}


def checked(found, n: int) -> list:
    """Returns `n` finite floats of what a reward returned, a reason (Failed) where one is none.

    Raises ValueError where they are not `n`.
    """
    if found is None or isinstance(found, str | bytes | dict) or not hasattr(found, "__iter__"):
        raise ValueError(f"returned {'None' if found is None else type(found).__name__}, should be a list of {n} numbers")
    found = list(itertools.islice(found, n + 1))
    if len(found) != n:
        raise ValueError(f"returned {'more than ' + str(n) if len(found) > n else len(found)} scores of {n} samples")
    return [_number(score) for score in found]


def _number(score) -> float | Failed:
    if isinstance(score, Failed):
        return score
    if not isinstance(score, numbers.Real) and hasattr(score, "item"):
        try:
            score = score.item()  # an array of one number
        except Exception:
            return Failed(f"an array of {type(score).__name__}, should be a number")
    if not isinstance(score, numbers.Real):
        return Failed("None, should be a number" if score is None else f"{type(score).__name__}, should be a number")
    try:
        score = float(score)
    except Exception as e:
        return Failed(f"not a number: {told(e)}")
    return score if math.isfinite(score) else Failed(f"{score}, should be finite")

