"""Settings of what answers the policy: a check of its answer, or tools that it calls. No jax here."""

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Literal

from jaxllm.align.rewards_config import RewardRule, check_rewards, has_pattern


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
    # none: rewards score a response, and nothing answers it; answer: one turn; tools: turns until the response calls no tool;
    # python: a class of yours
    kind: Literal["none", "answer", "tools", "python"] = "none"
    # tools: name -> calculator, or path/to/file.py:function, which makes text of text; the policy writes <NAME>text</NAME>
    tools: dict[str, str] = field(default_factory=lambda: {"calc": "calculator"})
    function: str | None = None  # python: path/to/file.py:Class, with reset(row) and step(text)
    # answer, tools: how the last turn is scored; kind exact or format, without a pattern
    answer: RewardRule = field(default_factory=lambda: RewardRule(kind="exact"))
    max_turns: int = 8  # turns that the policy may write
    timeout: float = 10.0  # tools, python: seconds for one answer
    max_result: int = 400  # tools: characters of a tool's answer; the rest is cut off
    must_end: bool = True  # an episode whose last turn has no end token gets `unfinished`, whatever the turn says
    unfinished: float = 0.0  # score of an episode that reached max_turns or the length of a response
    on_error: float = 0.0  # score of an episode in which the environment failed
    max_errors: int = 100  # times that environments or tools may fail in the run; one more ends it

    def __post_init__(self):
        of_kind = {"none": (), "answer": ("answer",), "tools": ("answer", "tools", "max_turns", "timeout", "max_result"),
                   "python": ("max_turns", "timeout")}
        defaults = {f.name: f.default if f.default is not MISSING else f.default_factory()
                    for f in fields(self) if f.name in ("answer", "tools", "max_turns", "timeout", "max_result")}
        calls = [name for name, what in self.tools.items() if what != "calculator"]
        rule = self.answer
        for name, ok, should in (
            *((name, name in of_kind[self.kind] or getattr(self, name) == default, f"left out with kind={self.kind}")
              for name, default in defaults.items()),
            ("tools", self.kind != "tools" or bool(self.tools), "at least one tool"),
            ("function", (self.function is not None) == (self.kind == "python"), "there with kind=python, and only then"),
            ("function", self.function is None or _names_code(self.function), "path/to/file.py:Class"),
            ("answer.kind", rule.kind in ("exact", "format"), "exact or format; others are rewards"),
            ("answer.extract", not has_pattern(rule), "without a pattern, which may take for ever; a reward may have one"),
            ("answer.must_end", not rule.must_end, "left out; environment.must_end says it"),
            ("max_turns", self.max_turns >= 1, "at least 1"), ("max_errors", self.max_errors >= 0, "0 or more"),
            ("timeout", 0 < self.timeout < math.inf, "above 0 seconds, and finite"),
            ("max_result", self.max_result >= 1, "at least 1"),
            ("unfinished", math.isfinite(self.unfinished), "finite"), ("on_error", math.isfinite(self.on_error), "finite"),
            *((f"tools.{name}", _names_code(self.tools[name]), "calculator, or path/to/file.py:function") for name in calls),
            *((f"tools.{name}", name.replace("-", "_").isidentifier(), "named with letters, digits, - and _")
              for name in self.tools),
        ):
            if not ok:
                group, _, key = name.partition(".")
                value = getattr(self, group)
                value = (value[key] if group == "tools" else getattr(value, key)) if key else value
                raise ValueError(f"environment.{name}={'null' if value is None else value}: should be {should}")
        try:
            check_rewards({"answer": rule})
        except ValueError as e:
            raise ValueError(str(e).replace("rewards.answer.", "environment.answer.", 1)) from None


def _names_code(text: str) -> bool:
    path, _, name = text.rpartition(":")
    return path.endswith(".py") and name.isidentifier()
