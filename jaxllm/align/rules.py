"""The rules that score one response: the right answer, a pattern, the length, the form. Plain Python, no arrays."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

from jaxllm.align.rewards_config import RewardRule
from jaxllm.data.rationale import behind, final_answer, last_number


@dataclass(frozen=True)
class Sample:
    """A response to be scored."""

    prompt: str
    response: str  # without the end token; with what an environment wrote
    tokens: list[int]  # of the response, the end token included
    ended: bool  # the policy wrote the end token
    row: dict  # the prompt's JSON object, with its "answer", ...
    prompt_tokens: list[int] = field(default_factory=list)  # a reward model reads these and then `tokens`


class Failed(str):
    """Why a sample has no score, in the place of one."""


Rule = Callable[[RewardRule, Sample], float | Failed]


def exact(rule: RewardRule, sample: Sample) -> float | Failed:
    """Scores whether the answer in a response is the row's, or one of a list of them."""
    truth = sample.row.get(rule.answer_key)
    truths = truth if isinstance(truth, list) else [truth]
    if not truths or any(t is None or isinstance(t, dict | list) for t in truths):
        return Failed(f"the prompt's row has {'no' if truth is None else 'no single'} {rule.answer_key!r}; "
                      f"it has {', '.join(sample.row) or 'nothing'}")
    found = extracted(rule, sample.response)
    return _score(rule, sample, found is not None and any(_same(rule, found, str(t)) for t in truths))


def regex(rule: RewardRule, sample: Sample) -> float:
    """Scores whether a pattern is found in a response, or matches all of it."""
    find = re.fullmatch if rule.full else re.search
    return _score(rule, sample, find(rule.pattern, sample.response) is not None)


def length(rule: RewardRule, sample: Sample) -> float:
    """Scores the length: 1 at `target` or up to `limit`, and a line down to 0 over `soft`."""
    n = {"tokens": len(sample.tokens), "characters": len(sample.response), "words": len(sample.response.split())}[rule.unit]
    beyond = [] if rule.target is None else [abs(n - rule.target)]
    beyond += [] if rule.limit is None else [max(n - rule.limit, 0)]
    return min(max(1 - d / rule.soft, 0.0) if rule.soft else float(d == 0) for d in beyond)


def form(rule: RewardRule, sample: Sample) -> float:
    """Scores whether a response is JSON, or has its tags."""
    if rule.format == "json":
        return _score(rule, sample, _is_json(sample.response, rule.keys))
    if rule.format == "tags":
        return _score(rule, sample, all(_has_block(tag, sample.response) for tag in rule.tags))
    return _score(rule, sample, blocks(sample.response, rule.tags) is not None)


RULES: dict[str, Rule] = {"exact": exact, "regex": regex, "length": length, "format": form}


def _score(rule: RewardRule, sample: Sample, holds: bool) -> float:
    return rule.score if holds and (sample.ended or not rule.must_end) else rule.otherwise


# ---------------------------------------------------------------- answers


def extracted(rule: RewardRule, response: str) -> str | None:
    """Returns the answer that a response gives; None where it gives none."""
    if rule.extract == "separator":
        return response.rpartition(rule.separator)[2] if rule.separator in response else None
    if rule.extract == "regex":
        found = None
        for found in re.finditer(rule.pattern, response):  # noqa: B007  the last one
            pass
        return None if found is None else found[1] if found.re.groups else found[0]
    return {"whole": str, "gsm8k": gsm8k_answer, "final": final_answer, "last_number": last_number}[rule.extract](response)


def vote(rule: RewardRule, sample: Sample) -> Fraction | str | None:
    """Returns the form that all answers have which the rule takes for the same, to count votes by; None: no answer."""
    found = extracted(rule, sample.response) if sample.ended or not rule.must_end else None
    if found is None or rule.compare == "verbatim":
        return found
    as_number = number(found) if rule.compare in ("auto", "number") else None
    return as_number if as_number is not None or rule.compare == "number" else plain(found) or None


def gsm8k_answer(text: str) -> str | None:
    """Returns what stands after the last "####" on its line (Cobbe et al. 2021); None where there is none."""
    return behind(text, "####")


def _same(rule: RewardRule, found: str, truth: str) -> bool:
    if rule.extract == "gsm8k":
        truth = gsm8k_answer(truth) or truth  # a row of GSM8K holds the reasoning too
    if rule.compare == "verbatim":
        return found == truth
    a, b = number(found), number(truth)
    if rule.compare == "number" or (rule.compare == "auto" and a is not None and b is not None):
        return a is not None and a == b
    return plain(found) == plain(truth)


NUMBER = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+|\d+)?(\.\d*)?(?:[eE]([-+]?\d{1,3}))?")
LONGEST = 200  # characters of a number: exact arithmetic on longer ones would cost more than a rule may


def number(text: str) -> Fraction | None:
    """Returns the number that a text is, exactly: "1,234.50", "-3/4", "1e3", "$12", "50 %"; None where it is none.

    Currency and percent signs and a full stop at the end do not count.
    """
    text = text.strip().replace("\u2212", "-")
    text = re.sub(r"^([-+]?)[$€£]\s*", r"\1", text).removesuffix("%").rstrip().removesuffix(".")
    top, slash, bottom = text.partition("/")
    if len(text) > LONGEST:
        return None
    numerator, denominator = _decimal(top.strip()), _decimal(bottom.strip()) if slash else Fraction(1)
    return None if numerator is None or not denominator else numerator / denominator


def _decimal(text: str) -> Fraction | None:
    found = NUMBER.fullmatch(text) if text.isascii() else None
    if not found or not (found[2] or len(found[3] or "") > 1):
        return None
    return Fraction(f"{found[1]}{(found[2] or '0').replace(',', '')}{found[3] or ''}e{found[4] or 0}")


def plain(text: str) -> str:
    """Returns a text without case, punctuation and quotes around it, and with single spaces."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*")


# ---------------------------------------------------------------- form


def _is_json(text: str, keys: tuple[str, ...]) -> bool:
    try:
        # float: an int of many digits would raise, or take long
        found = json.loads(text, parse_int=float, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict | list) and (not keys or (isinstance(found, dict) and all(key in found for key in keys)))


def _refuse(constant: str):
    raise ValueError(f"{constant} is not JSON")


def _has_block(tag: str, text: str) -> bool:
    return text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1 and text.index(f"<{tag}>") < text.index(f"</{tag}>")


def blocks(text: str, tags: tuple[str, ...]) -> list[str] | None:
    """Returns what stands in each block where a text is <a>...</a><b>...</b> with space between at most; else None."""
    found = []
    for tag in tags:
        if not _has_block(tag, text):
            return None
        before, _, rest = text.partition(f"<{tag}>")
        inside, close, text = rest.partition(f"</{tag}>")
        if before.strip() or not close:
            return None
        found.append(inside)
    return None if text.strip() else found
