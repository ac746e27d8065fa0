"""Settings of preference files and of prompt files. No jax here."""

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PreferenceSource:
    path: str  # a .jsonl, .jsonl.gz or .jsonl.zst file, a folder of them, or a glob
    weight: float = 1.0  # times each of its groups is read in an epoch; 0.5: every second one, drawn anew each epoch
    objective: str | None = None  # what lines without an "objective" are compared by; null: the first of `objectives`

    def __post_init__(self):
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight={self.weight} of source {self.path}: should be 0 or more, and finite")


@dataclass(frozen=True, kw_only=True)
class PreferenceData:
    sources: dict[str, PreferenceSource] = field(default_factory=dict)
    tokenizer: str | None = None  # a SentencePiece .model file, or `bytes`; null: that of the run that training starts from
    template: str | None = None  # how messages become text; null: that of the run that training starts from
    seq_len: int = 512  # tokens of a prompt and one answer together; shorter ones are padded on the right
    validation: float = 0.02  # share of prompts held out with all their answers, chosen by a hash of the prompt
    # a prompt that does not fit with its longest answer: the group is dropped, or the prompt keeps its first token and as
    # many of its last ones as fit; a group with an answer that fits with no prompt at all is always dropped
    too_long: Literal["drop", "truncate"] = "drop"
    # empty answers, equal answers with different ranks, and answers to different prompts: the first is an error, or they
    # are left out and counted
    unusable: Literal["error", "drop"] = "error"
    objectives: list[str] = field(default_factory=lambda: ["preference"])  # names; a score head each

    def __post_init__(self):
        if self.seq_len < 2:
            raise ValueError(f"data.seq_len={self.seq_len}: should be at least 2")
        if not 0 <= self.validation < 1:
            raise ValueError(f"data.validation={self.validation}: should be in [0, 1)")
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"data.objectives={self.objectives}: should be one name or more, each once")
        for name, source in self.sources.items():
            if source.objective is not None and source.objective not in self.objectives:
                known = ", ".join(self.objectives)
                raise ValueError(f"data.sources.{name}.objective={source.objective}: should be one of {known}")


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    path: str  # a .jsonl, .jsonl.gz or .jsonl.zst file, a folder of them, or a glob
    weight: float = 1.0  # times each of its prompts is read in an epoch; 0.5: every second one, drawn anew each epoch

    def __post_init__(self):
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight={self.weight} of source {self.path}: should be 0 or more, and finite")


@dataclass(frozen=True, kw_only=True)
class PromptData:
    sources: dict[str, PromptSource] = field(default_factory=dict)
    template: str | None = None  # how messages become text; null: that of the run that training starts from
    prompt_len: int = 256  # most tokens of a prompt
    validation: float = 0.0  # share of prompts held out, chosen by a hash of the prompt
    # longer prompts are left out, or keep their first token and as many of their last ones as fit
    too_long: Literal["drop", "truncate"] = "drop"

    def __post_init__(self):
        if self.prompt_len < 1:
            raise ValueError(f"prompts.prompt_len={self.prompt_len}: should be at least 1")
        if not 0 <= self.validation < 1:
            raise ValueError(f"prompts.validation={self.validation}: should be in [0, 1)")
