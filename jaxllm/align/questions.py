"""Held-out examples of instruction tuning, asked: what the model answers, and what the majority of several answers is worth."""

import numpy as np

from jaxllm.align.rewards_config import RewardRule
from jaxllm.align.rules import Sample, extracted
from jaxllm.align.self_consistency import shares_right
from jaxllm.align.sft_config import AnswersConfig
from jaxllm.data.instruction_encoding import Prepared
from jaxllm.errors import UserError
from jaxllm.generate.config import SampleConfig

ROWS = 64  # responses that are written at once


class Questions:
    """Questions out of the held-out examples: all up to the last answer is asked, and the answer found in that is right."""

    def __init__(self, prepared: Prepared, cfg: AnswersConfig, max_seq_len: int, seed: int):
        """Raises UserError where no held-out example can be asked: without an answer, or longer than the model takes."""
        self.cfg, self.seed = cfg, seed
        self.rule = RewardRule(kind="exact", extract=cfg.extract)
        self.prompts: list[tuple[list[int], int, dict]] = []  # (ids, the template's end token, {"answer"})
        members = prepared.instructions.validation
        examples = [(member, member.example(i, 0, seed).messages, row.where) for member in members
                    for i, row in enumerate(member.rows)]
        self.lost, n = 0, min(cfg.questions, len(examples))
        for member, messages, where in (examples[i * len(examples) // n] for i in range(n)):
            chat, truth = prepared.encoder.chat(member), extracted(self.rule, messages[-1]["content"])
            ids = chat.prompt_ids(messages[:-1], where)
            if not truth or len(ids) >= max_seq_len:
                self.lost += 1
                continue
            self.prompts.append((ids, chat.end_id, {"answer": truth}))
        if not self.prompts:
            raise UserError(f"answers.questions={cfg.questions}: none of {n} held-out examples can be asked: they have no "
                            f"answer that answers.extract={cfg.extract} finds, or are too long")

    def describe(self) -> str:
        lost = f"; left out: {self.lost}, without an answer or too long" if self.lost else ""
        return f"questions: {len(self.prompts)} are asked at evaluations, {self.cfg.samples} samples of each{lost}"

    def shares(self, engine_of) -> dict[str, float]:
        """Returns `eval_greedy_right`, `eval_right` and, with several samples, `eval_majority_right` and `eval_any_right`:
        shares of questions. `engine_of(end token)` returns an engine with the weights to ask."""
        engines = {end_id: engine_of(end_id) for end_id in {end_id for _, end_id, _ in self.prompts}}
        greedy = shares_right(self.rule, self._answered(engines, 1, 0.0), 1)
        sampled = shares_right(self.rule, self._answered(engines, self.cfg.samples, self.cfg.temperature), self.cfg.samples)
        return {"eval_greedy_right": greedy["right"]} | {f"eval_{name}": x for name, x in sampled.items()}

    def _answered(self, engines, n: int, temperature: float) -> list[Sample]:
        """Returns n responses to each question, those of a question side by side."""
        how = SampleConfig(max_tokens=self.cfg.max_tokens, temperature=temperature)
        seeds = np.random.SeedSequence([self.seed, 4]).generate_state(len(self.prompts) * n).reshape(-1, n)
        found: list[list[Sample]] = [[] for _ in self.prompts]
        for end_id, engine in engines.items():
            tasks = [(i, int(seeds[i, j])) for i, (_, end, _) in enumerate(self.prompts) if end == end_id for j in range(n)]
            for at in range(0, len(tasks), ROWS):
                part = tasks[at : at + ROWS]
                made = engine.generate([self.prompts[i][0] for i, _ in part], how, [seed for _, seed in part])
                for (i, _), one in zip(part, made, strict=True):
                    found[i].append(Sample("", one.text, one.tokens, one.finish == "eos", self.prompts[i][2]))
        return [sample for of_question in found for sample in of_question]
