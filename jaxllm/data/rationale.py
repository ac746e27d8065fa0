"""Rationales: reasoning in front of an answer (Wei et al. 2022, chain of thought), and the answer found in it again."""

import re

TRIGGER = "Let's think step by step."  # Kojima et al. 2022; in prompts whose answer has a rationale
CLOSING = "The answer is"
NUMBER = re.compile(r"-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\$?\.\d+")


def asked(prompt: str) -> str:
    """Returns a prompt that asks for a rationale."""
    return f"{prompt.rstrip()}\n{TRIGGER}"


def reasoned(rationale: str, answer: str) -> str:
    """Returns a target of a rationale and its answer, which `final_answer` finds in it."""
    answer = answer.strip()
    return f"{rationale.strip()} {CLOSING} {answer}{'' if answer.endswith(('.', '!', '?')) else '.'}"


def split_answer(text: str, separator: str) -> tuple[str, str] | None:
    """Returns (rationale, answer) of a text that has the separator between them, None where it has none: "… #### 72"."""
    rationale, found, answer = text.rpartition(separator)
    return (rationale.strip(), answer.strip()) if found and rationale.strip() and answer.strip() else None


def final_answer(response: str) -> str | None:
    """Returns what stands behind the last "The answer is" (or "answer:"), without its full stop; None where there is none."""
    found = list(re.finditer(r"\banswer(?: is|:)[ \t]*:?[ \t]*", response, re.IGNORECASE))
    if not found:
        return None
    line = response[found[-1].end() :].strip().partition("\n")[0].strip()
    return re.split(r"[.!?](?=\s+[A-Z])", line, maxsplit=1)[0].removesuffix(".").strip() or None


def last_number(response: str) -> str | None:
    """Returns the last number of a text as Python writes it, without signs of money and thousands; None without one."""
    found = NUMBER.findall(response)
    return found[-1].replace(",", "").replace("$", "") if found else None


def behind(response: str, separator: str) -> str | None:
    """Returns what stands behind the last separator, up to the line's end; None where there is none."""
    _, found, answer = response.rpartition(separator)
    return (answer.strip().partition("\n")[0].strip() or None) if found else None


def matching(response: str, pattern: str) -> str | None:
    """Returns the first group, or all, of a regular expression's last match; None without one."""
    found = list(re.finditer(pattern, response))
    if not found:
        return None
    first = found[-1][1] if found[-1].re.groups else None
    return (found[-1][0] if first is None else first).strip()  # all of it where the group took no part


def same_answer(answer: str | None, wanted: str) -> bool:
    """Tells whether two answers are the same number, or the same words but for case, white space and a full stop."""
    return answer is not None and normal(answer) == normal(wanted)


def normal(answer: str) -> str:
    """Returns the one form that all answers have which are the same, to count votes by (self-consistency)."""
    text = " ".join(answer.split()).casefold().rstrip(".")
    text = text[1:-1] if re.fullmatch(r"\(\w\)", text) else text  # (b) is b
    return f"{float(last_number(text)):.12g}" if NUMBER.fullmatch(text) else text
