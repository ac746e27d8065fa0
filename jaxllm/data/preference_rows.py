"""One line of a preference file: a prompt and K answers with ranks, in any of the forms that public sets have.

    {"prompt": "text" or messages, "answers": ["text", ...], "rank": [1, 2, 2]}     smaller is better, equal is a tie
    {"prompt": "text" or messages, "chosen": "text", "rejected": "text"}
    {"prompt": ..., "chosen": messages, "rejected": messages}       the last message is the answer (UltraFeedback)
    {"chosen": messages, "rejected": messages}                      what comes before the answer is the prompt
    {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}    transcripts (Anthropic HH)
    {"prompt": ..., "answers": ["text"], "demonstration": true}     an answer that a person wrote; no rank

Messages are [{"role": "user", "content": "text"}, ...]. Optional: "margin" (how much better, of two answers), "objective".
"""

import dataclasses
import difflib
import math
import re

from jaxllm.errors import UserError, nearest

Prompt = str | list[dict]
TURN = re.compile(r"\n\n(Human|Assistant): ?")


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt and its answers."""

    prompt: Prompt
    answers: list[str]
    rank: list[int]  # 0 is best; a demonstration has 0
    objective: int
    margin: float
    demonstration: bool


class Unusable(Exception):
    """A line in good form from which nothing can be learned; `kind` is what it is counted as."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def group_of(row: dict, where: str, objectives: list[str], default: int, *, lenient: bool, counts: dict[str, int]) -> Group:
    """Returns the group of a line's object; `default` is the objective of a line that names none.

    Lenient: empty answers, and of equal ones the later, are left out and counted. Raises UserError for a line in no known
    form, and Unusable for one that leaves nothing to compare.
    """
    objective = objective_of(row, where, objectives, default)
    demonstration = row.get("demonstration", False)
    if not isinstance(demonstration, bool):
        raise UserError(f"{where}: demonstration={demonstration!r}: should be true or false")
    if "answers" in row:
        prompt, answers, rank = ranked(row, where, demonstration)
    elif "chosen" in row or "rejected" in row:
        prompt, answers, rank = *pair(row, where), [0, 1]
    else:
        near = next((f"; did you mean {near[0]!r} by {key!r}?" for key in row
                     if (near := difflib.get_close_matches(key, ["answers", "chosen", "rejected"], 1))), "")
        raise UserError(f"{where}: no \"answers\" and \"rank\", and no \"chosen\" and \"rejected\"{near} "
                        f"(found: {', '.join(sorted(row)[:12]) or 'nothing'})")
    margin = margin_of(row, where, len(answers))
    if not demonstration and len(answers) < 2:
        raise UserError(f"{where}: {len(answers)} answer{'s' * (not answers)}: should be two or more")
    answers, rank = usable(answers, rank, lenient, counts)
    if len(answers) < (1 if demonstration else 2):
        raise Unusable("short", "too few answers are left")
    if not demonstration and len(set(rank)) == 1:
        raise Unusable("tied", "all answers are tied")
    order = sorted(set(rank))
    return Group(prompt, answers, [order.index(r) for r in rank], objective, margin, demonstration)


def ranked(row: dict, where: str, demonstration: bool) -> tuple[Prompt, list[str], list[float]]:
    """Returns (prompt, answers, their ranks) of a line with "answers" and "rank"."""
    answers = row["answers"]
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise UserError(f"{where}: answers: should be a list of texts")
    if "prompt" not in row:
        raise UserError(f"{where}: no \"prompt\" (found: {', '.join(sorted(row)[:12])})")
    if demonstration:
        return prompt_of(row["prompt"], where), answers, [0] * len(answers)
    rank = row.get("rank")
    if rank is None:
        raise UserError(f"{where}: no \"rank\": should be a list of {len(answers)} numbers, one an answer, 1 the best")
    if not isinstance(rank, list) or not all(type(r) in (int, float) and math.isfinite(r) for r in rank):
        raise UserError(f"{where}: rank={rank!r}: should be a list of numbers, one an answer, 1 the best")
    if len(rank) != len(answers):
        raise UserError(f"{where}: rank has {len(rank)} numbers for {len(answers)} answers")
    return prompt_of(row["prompt"], where), answers, rank


def pair(row: dict, where: str) -> tuple[Prompt, list[str]]:
    """Returns (prompt, [chosen, rejected]); raises Unusable where these answer different prompts."""
    found = []
    for name in ("chosen", "rejected"):
        if name not in row:
            raise UserError(f"{where}: no {name!r} (found: {', '.join(sorted(row)[:12])})")
        value = row[name]
        if isinstance(value, str) and "prompt" in row:
            found.append(([], value))
        elif isinstance(value, str):
            found.append(answer_of(transcript(value, where, name), where, name))
        else:
            found.append(answer_of(prompt_of(value, where, name), where, name))
    (before, chosen), (other, rejected) = found
    if before != other:
        raise Unusable("other prompt", "chosen and rejected answer different prompts")
    if "prompt" not in row:
        if not before:
            raise UserError(f"{where}: no \"prompt\", and no message before the answer in \"chosen\"")
        return before, [chosen, rejected]
    prompt = prompt_of(row["prompt"], where)
    if before and before[: len(as_messages(prompt))] != as_messages(prompt) and prompt != before[-1]["content"]:
        raise UserError(f"{where}: the messages of chosen do not begin with the prompt")
    return before or prompt, [chosen, rejected]


def transcript(text: str, where: str, name: str) -> list[dict]:
    """Returns the messages of "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    start, *turns = TURN.split(text)
    if start.strip() or not turns:
        raise UserError(f'{where}: no "prompt", and {name} is no transcript; should begin with "\\n\\nHuman: ", '
                        f"found {text[:40]!r}")
    return [{"role": {"Human": "user", "Assistant": "assistant"}[who], "content": said.strip()}
            for who, said in zip(turns[::2], turns[1::2], strict=True)]


def answer_of(messages: list[dict], where: str, name: str) -> tuple[list[dict], str]:
    """Returns (what was said before, the last message's text)."""
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: {name}: the last message is by {messages[-1]['role']!r}, should be the assistant's answer")
    return messages[:-1], messages[-1]["content"]


def prompt_of(value, where: str, name: str = "prompt") -> Prompt:
    """Returns a prompt that is a text or a list of messages, with nothing else in them than role and content."""
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where}: {name} is empty")
        return value
    if not isinstance(value, list) or not value:
        raise UserError(f'{where}: {name}: should be a text or a list of {{"role": ..., "content": ...}}, '
                        f"found {str(value)[:60]!r}")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f'{where}: {name}: each message should be {{"role": "...", "content": "..."}}, '
                            f"found {str(message)[:60]!r}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def as_messages(prompt: Prompt) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def split_key(prompt: Prompt) -> bytes:
    """Returns what decides on which side of the held-out split a prompt is: its first turn by the user.

    So conversations that begin in the same way, and the same prompt as text and as messages, are on the same side.
    """
    messages = as_messages(prompt)
    first = next((m["content"] for m in messages if m["role"] == "user"), messages[0]["content"])
    return " ".join(first.split()).encode("utf-8", "surrogatepass")


def usable(answers: list[str], rank: list, lenient: bool, counts: dict[str, int]) -> tuple[list[str], list]:
    """Returns answers and ranks without empty and repeated answers."""
    kept: dict[str, float] = {}
    for answer, r in zip(answers, rank, strict=True):
        if not answer.strip():
            if not lenient:
                raise Unusable("empty", "an answer is empty")
            counts["empty answers"] += 1
        elif answer in kept:
            if kept[answer] != r:
                raise Unusable("equal", f"equal answers have different ranks: {answer[:60]!r}")
            counts["repeated answers"] += 1
        else:
            kept[answer] = r
    return list(kept), list(kept.values())


def objective_of(row: dict, where: str, objectives: list[str], default: int) -> int:
    name = row.get("objective")
    if name is None:
        return default
    if name not in objectives:
        raise UserError(f"{where}: objective {name!r} is unknown; {nearest(str(name), objectives)} (data.objectives)")
    return objectives.index(name)


def margin_of(row: dict, where: str, n: int) -> float:
    """Returns the margin of a line, 0 where it has none."""
    margin = row.get("margin")
    if margin is None:
        return 0.0
    if type(margin) not in (int, float) or not 0 <= margin < math.inf:
        raise UserError(f"{where}: margin={margin!r}: should be a number, 0 or more")
    if n != 2:
        raise UserError(f"{where}: margin={margin!r}: is of two answers, found {n}")
    return float(margin)
