"""What answers the policy: nothing but a score, or the results of tools that it calls, turn by turn.

    with Environments(cfg.environment) as environments:
        environment = environments.make()                           # one for each episode
        prompt = environment.reset(row)                             # text or messages
        text, done, score = environment.step(what the policy wrote)  # again with the next turn, until done
"""

import itertools
import pathlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

from jaxllm.align.calculator import CalculatorError, calculate
from jaxllm.align.environments_config import EnvironmentConfig
from jaxllm.align.guarded import Failure, Gone, Guarded
from jaxllm.align.rewards_config import RewardRule
from jaxllm.align.rules import RULES, Failed, Sample

Prompt = str | list[dict]  # a list: messages, each {"role", "content"}


class Step(NamedTuple):
    text: str  # what the environment adds behind the policy's turn; "" where the episode is over
    done: bool
    score: float | None  # None: this turn is not scored; an episode's score is the sum over its turns


class EnvironmentFailure(Exception):
    """An environment, or a tool, that failed: why, in one line. It costs the episode its score, and an incident names it."""


class Environment(Protocol):
    """One episode. What it does depends on the row and on what the policy wrote alone."""

    def reset(self, row: dict) -> Prompt:
        """Returns the prompt of a row."""

    def step(self, response: str) -> Step:
        """Takes a turn of the policy, without the end token."""


class Answer:
    """One turn, whose answer is checked against the row's."""

    def __init__(self, rule: RewardRule):
        self.rule = rule

    def reset(self, row):
        self.row = row
        return row["prompt"]

    def step(self, response):
        return Step("", True, scored(self.rule, response, self.row))


def scored(rule: RewardRule, response: str, row: dict) -> float:
    """Returns a rule's score of a turn. Raises EnvironmentFailure where there is none."""
    score = RULES[rule.kind](rule, Sample("", response, [], True, row))
    if isinstance(score, Failed):
        raise EnvironmentFailure(score)
    return score


# ---------------------------------------------------------------- tools

Tool = Callable[[str], str]


class ToolError(Exception):
    """What a tool says of an argument that it cannot use. The policy is told."""


def calculator(argument: str) -> str:
    try:
        return calculate(argument)
    except CalculatorError as e:
        raise ToolError(str(e)) from None


class UserTool:
    """A user's function from text to text, in a process of its own."""

    def __init__(self, name: str, function: str, timeout: float, output: pathlib.Path | None = None):
        self.timeout = timeout
        self._code = Guarded({"call": "text", "function": function}, f"environment.tools.{name}",
                             output and output / f"{name}.txt")
        self._code.start()

    def __call__(self, argument: str) -> str:
        """Returns the tool's answer. Raises ToolError where it raises, EnvironmentFailure where it takes too long or dies."""
        try:
            return self._code.call(argument, self.timeout)
        except Gone as e:
            raise EnvironmentFailure(str(e)) from None
        except Failure as e:
            raise ToolError(str(e)) from None

    def close(self) -> None:
        self._code.close()


class WithTools:
    """Several turns. One that ends in <NAME>argument</NAME> calls a tool, whose answer is added as <result>...</result>; one
    that does not ends the episode, and is scored.

    An argument that a tool cannot use is answered with "error: ...". A tool that fails by itself is told in `trouble` too.
    """

    def __init__(self, tools: dict[str, Tool], rule: RewardRule, max_result: int = 400):
        self.tools, self.rule, self.max_result = tools, rule, max_result
        self.trouble: list[str] = []

    def reset(self, row):
        self.row = row
        return row["prompt"]

    def step(self, response):
        call = self._last_call(response)
        if call is None:
            return Step("", True, scored(self.rule, response, self.row))
        name, argument = call
        try:
            result = self.tools[name](argument)
        except ToolError as e:
            result = f"error: {e}"
        except EnvironmentFailure as e:
            self.trouble.append(f"tool {name!r}: {e}")
            result = "error: no answer"
        return Step(f"<result>{result[: self.max_result]}</result>", False, None)

    def _last_call(self, response: str) -> tuple[str, str] | None:
        text = response.rstrip()
        for name in self.tools:
            if text.endswith(f"</{name}>"):
                before, opened, argument = text.removesuffix(f"</{name}>").rpartition(f"<{name}>")
                return (name, argument) if opened and f"</{name}>" not in argument else None
        return None


# ---------------------------------------------------------------- a user's class


class UserEnvironment:
    """An episode in a user's class, in a process of its own that all episodes share.

    What the policy wrote so far is sent each time, so that a new process, after one that took too long or died, can come to
    where the episode was.
    """

    def __init__(self, code: Guarded, number: int, timeout: float):
        self.code, self.number, self.timeout = code, number, timeout

    def reset(self, row):
        self.row, self.past = row, []
        return self._call(None)

    def step(self, response):
        step = Step(*self._call(response))
        self.past.append(response)
        return step

    def _call(self, response: str | None):
        try:
            return self.code.call({"episode": self.number, "row": self.row, "past": self.past, "step": response}, self.timeout)
        except Failure as e:
            raise EnvironmentFailure(str(e)) from None


class Environments:
    """Makes a run's episodes, and holds the processes of a user's code, which end with `close`.

    `stop` are the strings that call a tool, at which sampling may stop (SampleConfig.stop); what is written behind one is cut
    off. What a user's code prints goes to files in `output`. Raises UserError where it cannot be loaded.
    """

    def __init__(self, cfg: EnvironmentConfig, output: pathlib.Path | None = None):
        self.cfg, self._close, self._numbers = cfg, [], itertools.count()
        self.stop = [f"</{name}>" for name in cfg.tools] if cfg.kind == "tools" else []
        if output is not None and cfg.kind != "answer":
            output.mkdir(parents=True, exist_ok=True)
        try:
            self.tools = {name: self._tool(name, output) for name in cfg.tools} if cfg.kind == "tools" else {}
            if cfg.kind == "python":
                self._code = Guarded({"call": "episodes", "function": cfg.function}, "environment.function",
                                     output and output / "environment.txt")
                self._close.append(self._code.close)
                self._code.start()
        except BaseException:
            self.close()
            raise

    def make(self) -> Environment:
        """Returns a new episode's environment."""
        if self.cfg.kind == "tools":
            return WithTools(self.tools, self.cfg.answer, self.cfg.max_result)
        if self.cfg.kind == "python":
            return UserEnvironment(self._code, next(self._numbers), self.cfg.timeout)
        return Answer(self.cfg.answer)

    def close(self) -> None:
        for close in self._close:
            close()

    def _tool(self, name: str, output: pathlib.Path | None) -> Tool:
        if self.cfg.tools[name] == "calculator":
            return calculator
        tool = UserTool(name, self.cfg.tools[name], self.cfg.timeout, output)
        self._close.append(tool.close)
        return tool

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
