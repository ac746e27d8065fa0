"""Answers of a run's model, sampled once and kept beside the output: comparisons belong to them."""

import json
import pathlib
import sys
import threading

from jaxllm.align.collect.appended import Appended
from jaxllm.align.collect.config import CollectVerb
from jaxllm.align.collect.items import Item, different, digest
from jaxllm.config import to_dict
from jaxllm.data.preference_rows import Prompt, as_messages
from jaxllm.errors import UserError

ROUNDS = 3  # of n seeds each, until there are n different answers
AHEAD = 8  # prompts that are answered together where they are answered on demand


class Writer:
    """A run's model as a function of prompts, loaded when it is first asked."""

    def __init__(self, cfg: CollectVerb):
        self.cfg, self.engine, self.step, self.chat = cfg, None, None, None

    def load(self) -> None:
        from jaxllm.data.chat import load_chat
        from jaxllm.generate.verb import load_engine

        self.engine, self.step = load_engine(self.cfg.run, self.cfg.step)
        self.chat = load_chat(self.cfg.template, self.engine.tokenizer) if self.cfg.template else None
        if self.chat:  # what ends a turn of this template; the run may have been tuned with another, or none
            self.engine.end_id = self.chat.end_id

    def __call__(self, prompts: list[Prompt]) -> list[tuple[str, ...]]:
        """Returns up to n different answers of each prompt; which ones does not depend on the other prompts.

        A prompt that leaves the model no room to answer has none.
        """
        if self.engine is None:
            self.load()
        cfg, found = self.cfg, [() for _ in prompts]
        encoded = [self._encode(prompt) for prompt in prompts]
        fit = [i for i, ids in enumerate(encoded) if len(ids) < self.engine.cfg.max_seq_len]
        for k in range(0, ROUNDS * cfg.n, cfg.n):
            tasks = [(i, int(digest(cfg.sample.seed, prompts[i], k + j), 16) % 2**32)
                     for i in fit if len(found[i]) < cfg.n for j in range(cfg.n)]
            for at in range(0, len(tasks), cfg.batch_size):
                part = tasks[at : at + cfg.batch_size]
                made = self.engine.generate([encoded[i] for i, _ in part], cfg.sample, [seed for _, seed in part])
                for (i, _), one in zip(part, made, strict=True):
                    found[i] = different((*found[i], self._text(one)))[: cfg.n]
        return found

    def _encode(self, prompt: Prompt) -> list[int]:
        if self.chat:
            return self.chat.prompt_ids(as_messages(prompt), f"prompts={self.cfg.prompts}")
        return [self.engine.tokenizer.bos_id, *self.engine.tokenizer.encode(prompt)]

    def _text(self, one) -> str:
        """Returns an answer up to <eos>, which ends a text too where the template has an end of its own."""
        tokenizer = self.engine.tokenizer
        if tokenizer.eos_id not in one.tokens:
            return one.text
        return tokenizer.decode(one.tokens[: one.tokens.index(tokenizer.eos_id)])


class SampledItems:
    """Items whose answers a model writes: before the page opens, or when somebody comes to them."""

    def __init__(self, prompts: list[Prompt], cfg: CollectVerb, path: pathlib.Path, write):
        self.prompts, self.cfg, self.write, self.lock = prompts, cfg, write, threading.Lock()
        if cfg.template is None and not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"prompts={cfg.prompts}: a prompt is a list of messages; --template=NAME says how they "
                            "become text, e.g. own")
        self.keys = [digest(prompt) for prompt in prompts]
        self.file = Appended(path)
        self.made_by = {"run": str(pathlib.Path(cfg.run).resolve().name), "n": cfg.n, "template": cfg.template,
                        "sample": to_dict(cfg.sample)}
        self.answers: dict[str, tuple[str, ...]] = {}
        self.made: dict[str, Item] = {}
        for where, row in self.file.rows():
            if not isinstance(row.get("made_by"), dict) or not isinstance(row.get("answers"), list):
                raise UserError(f"{where}: is no line of sampled answers; should be written by jaxllm rlhf collect alone")
            before = {key: row["made_by"].get(key) for key in self.made_by}
            if changed := next((key for key in self.made_by if before[key] != self.made_by[key]), None):
                raise UserError(f"{where}: these answers were sampled with {changed}={before[changed]}, now "
                                f"{self.made_by[changed]}; another --output samples anew")
            self.answers[digest(row["prompt"])] = tuple(row["answers"])

    def known(self, i: int) -> Item | None:
        key = self.keys[i]
        if key not in self.made and len(self.answers.get(key, ())) > 1:
            self.made[key] = Item(self.prompts[i], self.answers[key])
        return self.made.get(key)

    def item(self, i: int) -> Item | None:
        if self.keys[i] not in self.answers:
            with self.lock:  # one at a time on the device; who waited for the same prompts finds them there
                if self.keys[i] not in self.answers:
                    self._sample(self.missing(), first=i)
        return self.known(i)

    def missing(self) -> list[int]:
        """Returns the items that no answers were sampled of."""
        return [i for i, key in enumerate(self.keys) if key not in self.answers]

    def sample_all(self) -> None:
        """Samples what is missing, and says how far it is."""
        missing = self.missing()
        for at in range(0, len(missing), AHEAD):
            self._sample(missing[at : at + AHEAD], first=missing[at])
            print(f"answers of {len(self.answers)} of {len(self.keys)} prompts sampled", file=sys.stderr)

    @property
    def n_same(self) -> int:
        """How many prompts are left out: the model gave them no two different answers, or they are too long for it."""
        return sum(len(self.answers.get(key, "ab")) < 2 for key in self.keys)

    def _sample(self, missing: list[int], first: int) -> None:
        chosen = [first, *(i for i in missing if i != first)][:AHEAD]
        for i, answers in zip(chosen, self.write([self.prompts[i] for i in chosen]), strict=True):
            row = {"prompt": self.prompts[i], "answers": answers, "made_by": self.made_by | {"step": self.write.step}}
            self.file.append(json.dumps(row, ensure_ascii=False))
            self.answers[self.keys[i]] = answers
