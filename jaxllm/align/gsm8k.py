"""Files in the format of GSM8K (Cobbe et al. 2021): {"question", "answer"}, the answer a rationale that ends in "#### n".

GSM8K's own test file, and all that is in shared/data, measure models: a run that trains on them has nothing left to be
measured with. Train on questions of your own in this format, of which those near the evaluation sets' were removed.
"""

import re
from collections.abc import Iterator

from jaxllm.align.rules import gsm8k_answer
from jaxllm.data.json_rows import json_rows
from jaxllm.errors import UserError

NOTE = re.compile(r"<<([^<>=]*)=([^<>]*)>>")  # GSM8K marks what a calculator should be asked: 48/2=<<48/2=24>>24


def read_gsm8k(path: str, key: str = "path") -> Iterator[dict]:
    """Yields {"prompt", "answer", "rationale"} of each line: the question, the number behind "####", and what leads to it.

    Raises UserError with file and line for what is no such object.
    """
    for where, row in json_rows(path, key):
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            found = ", ".join(sorted(row)[:12]) or "nothing"
            raise UserError(f'{where}: should have "question" and "answer" as text; found {found}')
        number = gsm8k_answer(answer)
        if number is None:
            raise UserError(f'{where}: "answer" has no "#### n" at its end')
        yield {"prompt": question, "answer": number, "rationale": answer.rpartition("####")[0].strip()}


def without_notes(rationale: str) -> str:
    """Returns a rationale as plain text."""
    return NOTE.sub("", rationale)


def with_calls(rationale: str) -> str:
    """Returns a rationale in which each note is a call of the calculator and what it wrote, for demonstrations of its use."""
    return NOTE.sub(lambda found: f"<calc>{found[1]}</calc><result>{found[2]}</result>", rationale)
