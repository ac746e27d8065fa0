"""A document on its way through the stages of `jaxllm data`, and why it went no further."""

import dataclasses
from typing import Any, NamedTuple


@dataclasses.dataclass
class Document:
    id: str  # stable: the input's own, or made of its source, file and place in it
    source: str  # the name under `sources`
    text: str  # of a page, its markup until `extract` has run
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)  # what the input said (url, date, …), what stages found
    counts: dict[str, float] = dataclasses.field(default_factory=dict)  # tallies by "stage.what", summed over documents


class Removal(NamedTuple):
    """Why a document is dropped: a line of removed.jsonl, with its id and the stage."""

    rule: str  # e.g. "gopher.mean_word_length"
    value: float | int | str | None = None  # what was measured
    duplicate_of: str | None = None
