"""The paragraphs of a text that are prose, apart from its code, tables and lists."""

import re
from collections.abc import Callable

NOT_PROSE = re.compile(r"(?m)^(?:```|\||\s{2,}|\t|[•*#>-] |\d+[.)] )")
FENCED = re.compile(r"(`{3,4})[^\n]*\n.*?\n\1(?=\n|\Z)", re.DOTALL)


def by_paragraph(text: str, change: Callable[[str], str]) -> str:
    """Returns the text with `change` applied to each paragraph of prose, and all else as it was."""
    out, at = [], 0
    for code in [*FENCED.finditer(text), None]:
        prose, at_next = (text[at:code.start()], code.end()) if code else (text[at:], len(text))
        parts = re.split(r"(\n\s*\n)", prose)
        out += [part if i % 2 or NOT_PROSE.search(part) else change(part) for i, part in enumerate(parts)]
        out.append(code[0] if code else "")
        at = at_next
    return "".join(out)
