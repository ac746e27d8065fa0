"""The arrays of sampled responses, as training takes them. No jax here.

B sample, P prompt slot, R response slot, S = P + R.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Prompts and what was written after them. The n samples of a prompt follow each other, in the order of the prompts.

    Index t of a [B, R] array is the response's token t, in slot P + t; the state before it is that of slot P - 1 + t.
    """

    token_BS: np.ndarray  # int32: padding, the prompt up to slot P - 1, the response, padding
    first_B: np.ndarray  # int32: slot of the prompt's first token; the position of slot s is s - first_B
    length_B: np.ndarray  # int32: tokens of the response, the end token included
    action_BR: np.ndarray  # float32: 1 where the policy wrote the token, 0 beyond the response's end
    logp_BR: np.ndarray  # float32: log softmax(logits / temperature) of each action, unfiltered; 0 where there is none
    ended_B: np.ndarray  # bool: the response's last token is an end token

    @property
    def prompt_slots(self) -> int:
        return self.token_BS.shape[1] - self.action_BR.shape[1]

    def prompt(self, i: int) -> list[int]:
        return self.token_BS[i, self.first_B[i] : self.prompt_slots].tolist()

    def response(self, i: int) -> list[int]:
        return self.token_BS[i, self.prompt_slots : self.prompt_slots + self.length_B[i]].tolist()


class Writing:
    """A rollout while its responses come in, in any order."""

    def __init__(self, prompts: list[list[int]], n: int, *, prompt_slots: int, response_slots: int, pad_id: int):
        B, P = len(prompts) * n, prompt_slots
        self.token_BS = np.full((B, P + response_slots), pad_id, np.int32)
        self.first_B = np.repeat(np.array([P - len(p) for p in prompts], np.int32), n)
        self.length_B, self.ended_B = np.zeros(B, np.int32), np.zeros(B, bool)
        self.logp_BR = np.zeros((B, response_slots), np.float32)
        for i, prompt in enumerate(prompts):
            self.token_BS[i * n : (i + 1) * n, P - len(prompt) : P] = prompt

    def add(self, sample_X, token_XM, logp_XM, length_X, ended_X) -> None:
        """Takes in the responses of some samples; what is beyond their lengths is left out."""
        M, R = token_XM.shape[1], self.logp_BR.shape[1]
        real_XM = np.arange(M)[None] < length_X[:, None]
        x, m = np.nonzero(real_XM)
        self.token_BS[sample_X[x], self.token_BS.shape[1] - R + m] = token_XM[x, m]
        self.logp_BR[sample_X[x], m] = logp_XM[x, m]
        self.length_B[sample_X], self.ended_B[sample_X] = length_X, ended_X

    def rollout(self) -> Rollout:
        action_BR = np.arange(self.logp_BR.shape[1])[None] < self.length_B[:, None]
        return Rollout(self.token_BS, self.first_B, self.length_B, action_BR.astype(np.float32), self.logp_BR, self.ended_B)
