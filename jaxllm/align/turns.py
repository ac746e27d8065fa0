"""Plays episodes of several turns with all samples together: the policy writes, the environments answer, until all are done.

Axes: B episode, P prompt slot, R response slot, S = P + R slots.

What the policy sees next turn are the tokens so far, its own as it sampled them and the environment's behind them: nothing is
turned into text and back.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxllm.align.environments import Environment, EnvironmentFailure, Environments
from jaxllm.align.environments import Prompt as PromptText
from jaxllm.align.guarded_child import told
from jaxllm.align.rewards import PROMPT_SHOWN, Incident
from jaxllm.align.rules import Sample
from jaxllm.data.chat import Chat
from jaxllm.data.preference import shortened
from jaxllm.data.prompts import left_padded, text_of
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import RunError, UserError

# prompts -> for each the tokens that were sampled, their log-probabilities, and whether the last is the end token
Generate = Callable[[list[list[int]]], Sequence[tuple[Sequence[int], Sequence[float], bool]]]
Reply = Callable[[str, bool], list[int]]  # what an environment says, and whether the policy wrote the end token before -> ids


@dataclasses.dataclass(frozen=True)
class Episodes:
    """A batch of episodes, as NumPy arrays of a rollout; a response holds the policy's tokens and the environment's."""

    token_BS: np.ndarray  # int32: prompts that end at slot P - 1, responses, padding
    first_B: np.ndarray  # int32: slot of the prompt's first token
    length_B: np.ndarray  # int32: tokens of the response
    action_BR: np.ndarray  # float32: 1 where the policy wrote the token
    logp_BR: np.ndarray  # float32: its log-probability where it did, else 0
    ended_B: np.ndarray  # bool: the policy ended its last turn with the end token
    score_B: np.ndarray  # float32: the environment's
    turns_B: np.ndarray  # int32: turns that the policy wrote
    finish: list[str]  # "done", "turns" or "length" (the limits), or "failed"
    samples: list[Sample]  # for rewards besides
    incidents: list[Incident]


@dataclasses.dataclass
class _Episode:
    environment: Environment
    row: dict
    text: str = ""  # of the prompt
    prompt: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    actions: list[float] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    ended: bool = False
    score: float = 0.0
    turns: int = 0
    finish: str = ""

    def add(self, tokens: Sequence[int], action: float, logps: Sequence[float]) -> None:
        self.tokens += [int(t) for t in tokens]
        self.actions += [action] * len(tokens)
        self.logps += [float(x) for x in logps]


class Player:
    """Plays a run's episodes. `errors` counts what failed; a run that is resumed sets it to what it was.

    `encode` gives a prompt's ids up to where the policy writes, `reply` those of what an environment says.
    """

    def __init__(self, environments: Environments, tokenizer: Tokenizer, *, encode: Callable[[PromptText], list[int]],
                 reply: Reply):
        self.environments, self.cfg, self.tokenizer = environments, environments.cfg, tokenizer
        self.encode, self.reply = encode, reply
        self.errors = 0

    def play(self, rows: Sequence[dict], generate: Generate, *, prompt_slots: int, response_slots: int) -> Episodes:
        """Returns an episode of each row.

        `generate` is called once a turn, for all episodes that go on, and has to draw anew at each call. An episode is cut
        off at `response_slots` tokens, the environment's counted; a prompt is shortened to `prompt_slots` tokens, as those
        of files are. Raises RunError after more than max_errors failures in the run.
        """
        episodes = [_Episode(self.environments.make(), row) for row in rows]
        incidents: list[Incident] = []
        for i, episode in enumerate(episodes):
            self._begin(episode, i, prompt_slots, incidents)
        while going := [(i, episode) for i, episode in enumerate(episodes) if not episode.finish]:
            written = generate([episode.prompt + episode.tokens for _, episode in going])
            if len(written) != len(going):
                raise ValueError(f"generate returned {len(written)} turns of {len(going)} episodes")
            for (i, episode), turn in zip(going, written, strict=True):
                self._turn(episode, i, turn, response_slots, incidents)
        return self._arrays(episodes, prompt_slots, response_slots, incidents)

    def _begin(self, episode: _Episode, i: int, prompt_slots: int, incidents: list[Incident]) -> None:
        try:
            prompt = episode.environment.reset(episode.row)
            episode.text, episode.prompt = text_of(prompt), list(self.encode(prompt))
        except UserError:  # of the chat template
            raise
        except Exception as e:
            episode.text, episode.prompt = str(episode.row.get("prompt", "")), [self.tokenizer.bos_id]
            self._failed(episode, i, e, incidents)
        if not episode.prompt:
            raise ValueError(f"the prompt of episode {i} has no tokens")
        episode.prompt = shortened(episode.prompt, prompt_slots)

    def _turn(self, episode: _Episode, i: int, turn, response_slots: int, incidents: list[Incident]) -> None:
        """Adds a turn of the policy, and what the environment says to it."""
        tokens, logps, ended = turn
        if len(tokens) != len(logps):
            raise ValueError(f"generate returned {len(logps)} log-probabilities of {len(tokens)} tokens")
        n = min(self._until_stop(tokens, ended), response_slots - len(episode.tokens))
        episode.ended = bool(ended) and len(tokens) == n
        tokens, logps = list(tokens)[:n], list(logps)[:n]
        episode.add(tokens, 1.0, logps)
        episode.turns += 1
        try:
            said, done, score = episode.environment.step(self.tokenizer.decode(tokens[:-1] if episode.ended else tokens))
        except Exception as e:  # a user's class may raise anything
            self._failed(episode, i, e, incidents)
            return
        trouble: list[str] = getattr(episode.environment, "trouble", [])  # what tools could not do, though it goes on
        for reason in trouble:
            self._incident(episode, i, reason, None, incidents)
        trouble.clear()
        episode.score += score or 0.0
        if done:
            episode.finish = "done" if episode.ended or not self.cfg.must_end else "length"
        elif episode.turns == self.cfg.max_turns:
            episode.finish = "turns"
        else:
            said_tokens = self.reply(said, episode.ended)
            # What leaves no room for a token of the policy behind it is not added: nothing would be learned from it.
            if not tokens or len(episode.tokens) + len(said_tokens) >= response_slots:
                episode.finish = "length"
            else:
                episode.add(said_tokens, 0.0, [0.0] * len(said_tokens))
        if episode.finish in ("turns", "length"):
            episode.score = self.cfg.unfinished

    def _until_stop(self, tokens: Sequence[int], ended: bool) -> int:
        """Returns how many tokens it takes to call a tool, with an end token right behind the call, or all.

        What else was written behind it, before an answer was there, is no part of the turn. The tokens that are left are drawn
        as they would be if sampling had stopped there.
        """

        def calls(n: int) -> bool:
            text = self.tokenizer.decode(tokens[:n])
            return any(stop in text for stop in self.environments.stop)

        if not self.environments.stop or not calls(len(tokens)):
            return len(tokens)
        n = bisect.bisect_left(range(len(tokens)), True, key=calls)
        return len(tokens) if ended and n == len(tokens) - 1 else n

    def _failed(self, episode: _Episode, i: int, e: Exception, incidents: list[Incident]) -> None:
        episode.finish, episode.score = "failed", self.cfg.on_error
        self._incident(episode, i, str(e) if isinstance(e, EnvironmentFailure) else told(e), self.cfg.on_error, incidents)

    def _incident(self, episode: _Episode, i: int, reason: str, score: float | None, incidents: list[Incident]) -> None:
        incidents.append(Incident("environment", i, episode.text[:PROMPT_SHOWN], reason, score))
        self.errors += 1
        if self.errors > self.cfg.max_errors:
            raise RunError(f"environments failed {self.errors} times, more than environment.max_errors={self.cfg.max_errors}; "
                           f"the last: {incidents[-1]}", {"incidents": [dataclasses.asdict(one) for one in incidents]})

    def _arrays(self, episodes: list[_Episode], P: int, R: int, incidents: list[Incident]) -> Episodes:
        token_BP, first_B = left_padded([e.prompt for e in episodes], P, self.tokenizer.pad_id)
        token_BR = np.full((len(episodes), R), self.tokenizer.pad_id, np.int32)
        action_BR, logp_BR = np.zeros((2, len(episodes), R), np.float32)
        for b, e in enumerate(episodes):
            n = len(e.tokens)
            token_BR[b, :n], action_BR[b, :n], logp_BR[b, :n] = e.tokens, e.actions, e.logps
        return Episodes(
            token_BS=np.concatenate([token_BP, token_BR], axis=1), first_B=first_B,
            length_B=np.array([len(e.tokens) for e in episodes], np.int32), action_BR=action_BR, logp_BR=logp_BR,
            ended_B=np.array([e.ended for e in episodes], bool), score_B=np.array([e.score for e in episodes], np.float32),
            turns_B=np.array([e.turns for e in episodes], np.int32), finish=[e.finish for e in episodes],
            samples=[self._sample(e) for e in episodes], incidents=incidents)

    def _sample(self, e: _Episode) -> Sample:
        written = e.tokens[:-1] if e.ended else e.tokens
        return Sample(e.text, self.tokenizer.decode(written), e.tokens, e.ended, e.row, e.prompt)


def plain_reply(tokenizer: Tokenizer) -> Reply:
    """Returns what puts an environment's text behind the policy's as it is."""
    return lambda text, ended: tokenizer.encode(text)


def chat_reply(chat: Chat) -> Reply:
    """Returns what puts an environment's text behind the policy's as a message of the role "tool", and opens the next turn.

    Where the policy did not end its turn, the end token is put there in its place.
    """
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, weights = chat.encode(talk)
    end = max(i for i, weight in enumerate(weights) if weight) + 1  # behind the assistant's end token

    def reply(text: str, ended: bool) -> list[int]:
        longer = chat.prompt_ids([*talk, {"role": "tool", "content": text}])
        if longer[:end] != ids[:end]:
            raise UserError(f"template {chat.name}: writes an earlier turn otherwise once more follow; it cannot be used for "
                            "several turns of reinforcement learning, where the policy's tokens stay as they are")
        return ([] if ended else [chat.end_id]) + longer[end:]

    return reply
