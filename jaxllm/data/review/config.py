"""Settings of `jaxllm data review`."""

from dataclasses import dataclass, field

REASONS = ("boilerplate", "not a text", "wrong language", "harmful", "personal data", "advertising", "machine-made", "copy")


@dataclass(frozen=True, kw_only=True)
class ReviewVerb:
    run: str = ""  # the output folder of `jaxllm data` (the word after the verb)
    output: str | None = None  # where the sample, labels and results are kept; null: `review` in that folder
    per_rule: int = 20  # documents drawn of each source and rule that removed them, near its threshold and away from it
    per_kept: int = 60  # the same of documents that were kept: what the filters missed is estimated from these
    documents: int = 600  # in all; where there would be more, fewer are drawn of each, in proportion
    near: float = 0.2  # share of a decision's documents that counts as near its threshold
    score: str = "quality_score"  # number in kept documents' metadata, whose lowest values count as near a threshold
    only: tuple[str, ...] = ()  # stages, or stage/rule, whose removals are reviewed; none: all
    skip: tuple[str, ...] = ("read", "mix")  # stages that drop documents for other reasons than what is in them
    max_chars: int = 4000  # longer documents are shown and exported up to here
    seed: int = 0  # of the draw and the order
    guidelines: str | None = None  # a text file, shown to the experts; null: what jaxllm says
    reasons: tuple[str, ...] = REASONS  # why a document should go, for the experts to tick (nine at most)
    labels_each: int = 2  # experts that a document is shown to
    show_decision: bool = False  # tell the experts what the filters decided, which makes them agree with it
    adjudicator: str = "final"  # the expert of this name settles disagreements: this label counts alone
    confidence: float = 0.95  # of every interval
    port: int = 8420  # the page is at http://127.0.0.1:PORT; 0: any that is free
    serve: bool = True  # false: compute the results and end
    export_csv: str | None = None  # write the sample to this file, to be labelled in a spreadsheet, and end
    import_csv: str | None = None  # take labels from this file, which replace the same experts' earlier ones
    expert: str = ""  # with export_csv: whose labels are filled in; with import_csv: whose they are where the file says nothing
    # where a rule's limit lies, by the last part of its name (min_words for gopher.min_words); not given: the end of its
    # values that its name tells (min_…, max_…), or at which they crowd
    thresholds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        for name, ok, should in (
            ("per_rule", self.per_rule >= 1, "at least 1"), ("per_kept", self.per_kept >= 1, "at least 1"),
            ("documents", self.documents >= 1, "at least 1"), ("near", 0 <= self.near < 1, "in [0, 1)"),
            ("max_chars", self.max_chars >= 100, "at least 100"), ("labels_each", self.labels_each >= 1, "at least 1"),
            ("reasons", len(self.reasons) <= 9, "nine at most, one a digit key"),
            ("confidence", 0.5 <= self.confidence < 1, "in [0.5, 1)"), ("port", 0 <= self.port < 65536, "in 0 to 65535"),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)}: should be {should}")
