"""Settings of sampling from a trained model. No jax here."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    max_tokens: int = 128  # longest continuation
    temperature: float = 0.8  # 0: always the likeliest token (greedy)
    top_k: int = 0  # sample from this many likeliest tokens; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens whose probabilities sum to this (nucleus)
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # divides the positive logits of tokens seen before, multiplies negative ones
    stop: list[str] = field(default_factory=list)  # strings that end the text, themselves left out
    seed: int = 0  # the same seed gives the same text, whatever else is in the batch

    def __post_init__(self):
        for name, ok, should in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"), ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"), ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1)"), ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not ok:
                raise ValueError(f"sample.{name}={getattr(self, name)}: should be {should}")


@dataclass(frozen=True, kw_only=True)
class GenerateVerb:
    run: str = ""  # the run folder (the word after the verb)
    step: int | None = None  # checkpoint to use; null: the newest
    prompt: str | None = None  # the text to continue
    prompts: str | None = None  # a file of prompts: .jsonl with a "prompt" field, else one a line
    batch_size: int = 16  # prompts decoded together
    n: int = 1  # continuations of each prompt, with seeds seed, seed+1, …
    # a prompt is a user's message, written in the template that the run was tuned with; null: where it was
    chat: bool | None = None
    stream: bool | None = None  # show text as it comes; null: when there is one continuation and a terminal
    logprobs: bool = False  # also the log-probability of every token
    output: str | None = None  # write JSON lines here instead of showing text
    sample: SampleConfig = field(default_factory=SampleConfig)


@dataclass(frozen=True, kw_only=True)
class ChatVerb:
    run: str = ""  # the run folder (the word after the verb)
    step: int | None = None  # checkpoint to use; null: the newest
    sample: SampleConfig = field(default_factory=SampleConfig)
