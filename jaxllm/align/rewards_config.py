"""Settings of what scores a response: one named group for each reward. No jax here."""

import math
import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RewardRule:
    # exact: the answer is the row's; regex: a pattern is found; length; format: JSON or tags; python: a function of yours;
    # model: a run of `jaxllm reward`
    kind: Literal["exact", "regex", "length", "format", "python", "model"]
    weight: float = 1.0  # what the score is multiplied with before all are summed; 0: only logged
    on_error: float = 0.0  # score of a sample that could not be scored (an exception, a timeout, NaN, ...)
    max_errors: int = 100  # such samples in the run; one more ends it
    score: float = 1.0  # exact, regex, format: the score where it holds
    otherwise: float = 0.0  # exact, regex, format: the score where it does not
    must_end: bool = False  # exact, regex, format: it does not hold where the response has no end token
    answer_key: str = "answer"  # exact: the field of a prompt's row that holds the true answer, or a list of them
    # exact: where the answer stands in the response: all of it (whole), behind the last `separator`, behind the last "####"
    # on its line (gsm8k), behind the last "The answer is" (final), the last number, or the last match of `pattern` (its first
    # group, where it has one)
    extract: Literal["whole", "separator", "gsm8k", "final", "last_number", "regex"] = "whole"
    separator: str = ";"  # exact with extract=separator
    # exact: auto: as numbers where both are, else as text; number; text: without case, outer punctuation and the amount of
    # space; verbatim: to the character
    compare: Literal["auto", "number", "text", "verbatim"] = "auto"
    pattern: str | None = None  # regex, and exact with extract=regex: a Python regular expression
    full: bool = False  # regex: the whole response has to match, not a part of it
    unit: Literal["tokens", "characters", "words"] = "tokens"  # length: what is counted
    target: int | None = None  # length: the score is 1 here and falls in a line to 0 at `soft` more or less
    limit: int | None = None  # length: the score is 1 up to here and falls in a line to 0 at `soft` more
    soft: int = 0  # length: over how many the score falls; 0: at once
    # format: json: an object or array, no more; tags: each of `tags` is opened once and closed once; blocks: the response is
    # these blocks in this order and nothing else
    format: Literal["json", "tags", "blocks"] = "blocks"
    tags: tuple[str, ...] = ("think", "answer")  # format=tags and format=blocks: names, as in <think>...</think>
    keys: tuple[str, ...] = ()  # format=json: keys that the object must have
    function: str | None = None  # python: path/to/file.py:function, which takes a list of samples and returns a list of numbers
    dicts: bool = False  # python: samples come as dicts, not as objects with attributes
    timeout: float = 60.0  # python, and rules with a pattern: seconds for a batch
    sample_timeout: float = 5.0  # the same: seconds for one sample, where those of a batch that failed are scored alone
    retry: bool = True  # the same: score the samples of a batch that failed alone; false: where samples are compared
    run: str | None = None  # model: its run folder
    step: int | None = None  # model: the checkpoint; null: the newest
    objectives: dict[str, float] = field(default_factory=dict)  # model: weight of each of its objectives; none given: 1 each


OF_KIND = {  # setting -> the kinds that it belongs to; those that are not named belong to all
    **dict.fromkeys(("score", "otherwise", "must_end"), ("exact", "regex", "format")),
    **dict.fromkeys(("answer_key", "extract", "separator", "compare"), ("exact",)),
    "pattern": ("exact", "regex"), "full": ("regex",),
    **dict.fromkeys(("unit", "target", "limit", "soft"), ("length",)), **dict.fromkeys(("format", "tags", "keys"), ("format",)),
    **dict.fromkeys(("function", "dicts"), ("python",)),
    **dict.fromkeys(("timeout", "sample_timeout", "retry"), ("python", "regex", "exact")),
    **dict.fromkeys(("run", "step", "objectives"), ("model",)),
}


def check_rewards(rewards: dict[str, RewardRule]) -> None:
    """Raises ValueError "rewards.NAME.key=value: should be ..." for the first setting that is wrong; for the `__post_init__` of
    the config that holds them, as a rule does not know its own name."""
    for name, rule in rewards.items():
        for key, ok, should in (*_of_other_kinds(rule), *_of_own_kind(rule)):
            if not ok:
                value = getattr(rule, key)
                raise ValueError(f"rewards.{name}.{key}={'null' if value is None else value}: should be {should}")


def has_pattern(rule: RewardRule) -> bool:
    """Returns whether a rule runs a pattern of the user's, which may take for ever."""
    return rule.kind == "regex" or (rule.kind == "exact" and rule.extract == "regex")


def _of_other_kinds(rule: RewardRule):
    for f in fields(rule):
        value = getattr(rule, f.name)
        value = tuple(value) if isinstance(value, list) else value  # as the config loader gives it
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if default is not MISSING and value != default:
            kinds = OF_KIND.get(f.name, (rule.kind,))
            yield f.name, rule.kind in kinds, f"left out with kind={rule.kind}: it belongs to kind={'|'.join(kinds)}"


def _of_own_kind(rule: RewardRule):
    yield "weight", math.isfinite(rule.weight), "finite"
    yield "on_error", math.isfinite(rule.on_error), "finite"
    yield "max_errors", rule.max_errors >= 0, "0 or more"
    yield "score", math.isfinite(rule.score), "finite"
    yield "otherwise", math.isfinite(rule.otherwise), "finite"
    yield "timeout", 0 < rule.timeout < math.inf, "above 0 seconds, and finite"
    yield "sample_timeout", 0 < rule.sample_timeout <= rule.timeout, f"above 0 seconds, and at most timeout={rule.timeout:g}"
    if rule.kind == "exact" and rule.extract != "regex":
        for key in ("timeout", "sample_timeout", "retry"):
            yield key, getattr(rule, key) == getattr(RewardRule, key), "left out, or extract=regex: the others take no time"
    if rule.kind == "exact":
        yield "answer_key", bool(rule.answer_key), "the name of a field"
        yield "separator", bool(rule.separator), "at least one character"
        yield "separator", rule.extract == "separator" or rule.separator == ";", "left out, or extract=separator"
        yield "pattern", (rule.pattern is not None) == (rule.extract == "regex"), "there with extract=regex, and only then"
    if has_pattern(rule):
        yield "pattern", rule.pattern is not None, "a regular expression"
        yield "pattern", (why := _not_a_pattern(rule.pattern)) is None, f"a regular expression; {why}"
    if rule.kind == "length":
        yield "target", rule.target is not None or rule.limit is not None, "a number, or give limit"
        for key in ("target", "limit", "soft"):
            yield key, (getattr(rule, key) or 0) >= 0, "0 or more"
    if rule.kind == "format":
        yield "tags", rule.format == "json" or bool(rule.tags), "at least one name"
        yield "tags", all(re.fullmatch(r"[\w-]+", tag) for tag in rule.tags), "names of letters, digits, - and _"
        yield "tags", len(set(rule.tags)) == len(rule.tags), "names that differ"
        yield "tags", rule.format != "json" or tuple(rule.tags) == RewardRule.tags, "left out, or format=tags or format=blocks"
        yield "keys", rule.format == "json" or not rule.keys, "left out, or format=json"
    if rule.kind == "python":
        path, _, name = (rule.function or "").rpartition(":")
        yield "function", path.endswith(".py") and name.isidentifier(), "path/to/file.py:function"
    if rule.kind == "model":
        yield "run", bool(rule.run), "the run folder of a reward model"


def _not_a_pattern(text: str | None) -> str | None:
    try:
        re.compile(text or "")
    except (re.error, OverflowError, RecursionError) as e:
        return f"{e}"
    return None
