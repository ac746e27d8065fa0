"""Settings of instruction data. No jax here."""

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class InstructionSource:
    # .jsonl of {"messages"}, or of {"prompt", "response"} (or "instruction", "input", "output"); .json task files with
    # templates; a folder of these, or a glob
    path: str
    weight: float = 1.0  # times the share that data.mix gives; 0: left out
    max_examples: int | None = None  # of each file or task, drawn by a hash; null: all
    cluster: str = ""  # kind of task, for data.hold_out; a task file that names its own keeps that
    template: str | None = None  # how conversations are written; null: data.template
    few_shot: float = 0.0  # share of examples that have others of their task before them
    shots: int = 4  # with few_shot: 1 to so many of them
    rationale: float = 0.5  # share with reasoning before the answer, of the examples that have a "rationale"
    invert: float = 0.0  # share whose answer is given and whose question is asked for, in tasks with "inverted" templates
    answer_separator: str = ""  # what stands between rationale and answer in a response ("####" in GSM8K)

    def __post_init__(self):
        for name, ok, should in (
            ("weight", 0 <= self.weight < math.inf, "0 or more, and finite"),
            ("max_examples", self.max_examples is None or self.max_examples >= 1, "at least 1, or null"),
            ("shots", self.shots >= 1, "at least 1"),
            *((share, 0 <= getattr(self, share) <= 1, "in [0, 1]") for share in ("few_shot", "rationale", "invert")),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)} of source {self.path}: should be {should}")


@dataclass(frozen=True, kw_only=True)
class InstructionData:
    sources: dict[str, InstructionSource] = field(default_factory=dict)
    tokenizer: str | None = None  # a SentencePiece .model file or `bytes`; null: the one of the run that is started from
    # own, plain (text and nothing around it), chatml, qwen, llama3, gemma; or a .jinja or tokenizer_config.json file;
    # null: that of the run that is started from, plain where it has none
    template: str | None = None
    seq_len: int = 512  # tokens a row
    pack: bool = True  # several examples a row, none of which sees another; false: one a row
    window: int = 64  # with pack: rows that are open at a time, into the first of which an example goes that has room
    too_long: Literal["drop", "truncate"] = "drop"  # what becomes of an example longer than a row: left out, or its end is
    # how often a source or task is drawn: proportional to its examples times its weight, or by its weight alone
    mix: Literal["proportional", "weights"] = "proportional"
    cap: int = 3000  # with two or more sources or tasks: examples of one that count, and are drawn an epoch at weight 1
    hold_out: list[str] = field(default_factory=list)  # clusters that are never trained on, to measure on unseen tasks
    validation: float = 0.01  # share of examples held out, chosen by a hash of their text
    validation_path: str | None = None  # a file of examples to evaluate on instead

    def __post_init__(self):
        for name, ok, should in (
            ("seq_len", self.seq_len >= 2, "at least 2"), ("window", self.window >= 1, "at least 1"),
            ("cap", self.cap >= 1, "at least 1"), ("validation", 0 <= self.validation < 1, "in [0, 1)"),
        ):
            if not ok:
                raise ValueError(f"data.{name}={getattr(self, name)}: should be {should}")
