"""Settings of `jaxllm rlhf collect`. No jax here."""

from dataclasses import dataclass, field
from typing import Literal

from jaxllm.generate.config import SampleConfig

MOST_ANSWERS = 9  # one a digit key


@dataclass(frozen=True, kw_only=True)
class CollectVerb:
    run: str = ""  # the run folder whose model answers (the word after the verb); left out with `answers`
    step: int | None = None  # checkpoint to use; null: the newest
    prompts: str | None = None  # .jsonl file of {"prompt": text or messages}, which the run's model answers
    answers: str | None = None  # .jsonl file of ready answers, in any form of docs/preferences.md; ranks are not read
    output: str = "preferences.jsonl"  # every comparison is a line here; the same command goes on from it
    items: int = 0  # prompts shown, drawn by the seed; 0: all
    n: int = 2  # different answers sampled of each prompt, and shown side by side
    # how messages become text, e.g. own or chatml; null: that of the run, and where it has none prompts are texts that the
    # model goes on with
    template: str | None = None
    on_demand: bool = False  # sample when somebody comes to a prompt, rather than all before the page opens
    batch_size: int = 16  # answers sampled together
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(temperature=1.0))
    # of more than two answers: `best` asks for the best one, `full` for an order of all of them
    ranking: Literal["best", "full"] = "best"
    overlap: float = 0.2  # share of the items that several people compare, which measures how far they agree
    annotators: int = 2  # how many people those are
    objective: str | None = None  # written into every line, e.g. helpful; null: none
    guidelines: str | None = None  # a text file, shown to the annotators; null: what jaxllm says
    seed: int = 0  # of the draw, and of the orders in which each annotator sees items and answers
    confidence: float = 0.95  # of every interval
    port: int = 8421  # the page is at http://127.0.0.1:PORT; 0: any that is free
    serve: bool = True  # false: tell what the comparisons say and end

    def __post_init__(self):
        for name, ok, should in (
            ("items", self.items >= 0, "0 or more"), ("n", 2 <= self.n <= MOST_ANSWERS, f"2 to {MOST_ANSWERS}"),
            ("batch_size", self.batch_size >= 1, "at least 1"), ("overlap", 0 <= self.overlap <= 1, "in [0, 1]"),
            ("annotators", self.annotators >= 2, "at least 2"), ("confidence", 0.5 <= self.confidence < 1, "in [0.5, 1)"),
            ("port", 0 <= self.port < 65536, "in 0 to 65535"),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)}: should be {should}")
        if self.sample.temperature == 0 and self.prompts is not None:
            raise ValueError("sample.temperature=0.0: should be above 0, as all answers of a prompt would be the same")
