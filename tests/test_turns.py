"""Episodes of several turns: arrays, limits, what the policy sees, and that no environment token counts as an action."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jaxllm.align import ppo
from jaxllm.align.environments import Environments, Step
from jaxllm.align.environments_config import EnvironmentConfig
from jaxllm.align.rewards_config import RewardRule
from jaxllm.align.turns import Player, chat_reply, plain_reply
from jaxllm.data.chat import load_chat
from jaxllm.data.preference import shortened
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import RunError, UserError
from jaxllm.generate.config import SampleConfig
from jaxllm.generate.continuous import Sampler
from jaxllm.generate.engine import Engine
from jaxllm.generate.rollout_arrays import Rollout

BYTES = load_tokenizer("bytes")
EOS, PAD = BYTES.eos_id, BYTES.pad_id
ROWS = [{"prompt": "1+2=", "answer": 3}, {"prompt": "2*3+1=", "answer": 7}, {"prompt": "9=", "answer": 9}]


def encode(prompt) -> list[int]:
    return [BYTES.bos_id, *BYTES.encode(prompt)]


class Scripted:
    """Writes what it is told to for each prompt and turn, with log-probabilities that tell where they belong; keeps what it saw.

    "$" at the end of a turn is the end token.
    """

    def __init__(self, turns: dict[str, list[str]]):
        self.turns, self.seen, self.done = turns, [], dict.fromkeys(turns, 0)

    def __call__(self, prompts):
        self.seen.append(prompts)
        return [self.one(ids) for ids in prompts]

    def one(self, ids):
        text = BYTES.decode(ids)
        name = next(p for p in self.turns if text.startswith(p))
        turn = self.turns[name][self.done[name]]
        self.done[name] += 1
        tokens = BYTES.encode(turn.removesuffix("$")) + [EOS] * turn.endswith("$")
        return tokens, [-0.001 * (len(ids) + i) for i in range(len(tokens))], turn.endswith("$")


def player(environments=None, **settings) -> Player:
    return Player(environments or Environments(EnvironmentConfig(**{"kind": "tools"} | settings)), BYTES, encode=encode, reply=plain_reply(BYTES))


TURNS = {"1+2=": ["<calc>1+2</calc>", "3$"], "2*3+1=": ["<calc>2*3</calc>", "then <calc>6+1</calc>", "7$"], "9=": ["8$"]}


def test_the_arrays_of_episodes():
    policy = Scripted(TURNS)
    found = player().play(ROWS, policy, prompt_slots=8, response_slots=80)
    assert found.token_BS.shape == (3, 88) and found.token_BS.dtype == found.first_B.dtype == found.length_B.dtype == np.int32
    assert found.action_BR.dtype == found.logp_BR.dtype == found.score_B.dtype == np.float32
    assert found.first_B.tolist() == [8 - 5, 8 - 7, 8 - 3] and found.score_B.tolist() == [1, 1, 0]
    assert found.finish == ["done"] * 3 and found.ended_B.all() and found.turns_B.tolist() == [2, 3, 1] and not found.incidents
    whole = ["<calc>1+2</calc>|<result>3</result>|3$", "<calc>2*3</calc>|<result>6</result>|then <calc>6+1</calc>|<result>7</result>|7$", "8$"]
    for b, text in enumerate(whole):
        pieces = text.removesuffix("$").split("|")
        tokens = [*BYTES.encode("".join(pieces)), EOS]
        action = [float(i % 2 == 0) for i, piece in enumerate(pieces) for _ in piece] + [1.0]
        n = found.length_B[b]
        assert found.token_BS[b].tolist() == [PAD] * found.first_B[b] + encode(ROWS[b]["prompt"]) + tokens + [PAD] * (80 - n)
        assert found.action_BR[b].tolist() == action + [0] * (80 - n)
        at = np.arange(80) + 8 - found.first_B[b]  # how long the sequence was when the token was written
        np.testing.assert_array_equal(found.logp_BR[b], np.float32(-0.001 * at) * found.action_BR[b])
        one = found.samples[b]
        assert (one.response, one.tokens, one.ended, one.row, one.prompt) == ("".join(pieces), tokens, True, ROWS[b], ROWS[b]["prompt"])
        assert one.prompt_tokens == encode(ROWS[b]["prompt"])


def test_the_policy_sees_its_own_tokens_again():
    """Also where text has other tokens: here é as two tokens out of order, which no text encodes to."""
    odd = BYTES.encode("é")[::-1]
    seen = []

    def policy(prompts):
        seen.append(prompts)
        return [([*odd, *BYTES.encode("<calc>1</calc>")] if len(seen) == 1 else [EOS], [0.0] * (len(odd) + 14) if len(seen) == 1 else [0.0], len(seen) > 1) for _ in prompts]

    player().play(ROWS[:1], policy, prompt_slots=8, response_slots=60)
    assert seen[1] == [seen[0][0] + odd + BYTES.encode("<calc>1</calc><result>1</result>")]


def test_only_episodes_that_go_on_are_asked_for():
    policy = Scripted(TURNS)
    player().play(ROWS, policy, prompt_slots=8, response_slots=80)
    assert [len(prompts) for prompts in policy.seen] == [3, 2, 1]
    assert [BYTES.decode(ids) for ids in policy.seen[1]] == ["1+2=<calc>1+2</calc><result>3</result>", "2*3+1=<calc>2*3</calc><result>6</result>"]


class Says:
    """An environment of three turns that answers with one word, scored each time."""

    stop: list = []
    cfg = EnvironmentConfig(kind="answer")

    def __init__(self, word):
        self.word = word

    def make(self):
        return Says(self.word)

    def reset(self, row):
        self.turns = 0
        return row["prompt"]

    def step(self, response):
        self.turns += 1
        return Step(self.word, self.turns == 3, 0.25 * self.turns)


@jax.jit
def learned(score_B, logp_BR, action_BR):
    """All that an update takes from a batch of episodes but its tokens: the loss, its gradient, the advantages."""
    reward_BR = ppo.token_rewards(score_B, logp_BR, logp_BR - 0.1, action_BR, beta=0.1)
    advantage_BR, _ = ppo.gae(reward_BR, jnp.zeros_like(action_BR), action_BR, gamma=0.99, lam=0.9)

    def loss(new_BR):
        total, count = ppo.policy_loss(new_BR, logp_BR, advantage_BR, action_BR)
        return total / count

    return *jax.value_and_grad(loss)(logp_BR + 0.05), advantage_BR


def test_no_environment_token_is_an_action():
    """A change of one changes no weight, no log-probability, no loss and no gradient of any action."""
    rows = [{"prompt": "a"}, {"prompt": "bb"}]
    script = {"a": ["one", "two", "three$"], "bb": ["x", "y", "z$"]}
    found, other = (player(Says(word)).play(rows, Scripted(script), prompt_slots=4, response_slots=40) for word in ("<er>", "<ex>"))
    changed = found.token_BS != other.token_BS
    assert changed.sum() == 4  # two turns of two episodes
    assert not found.action_BR[changed[:, 4:]].any() and not found.logp_BR[changed[:, 4:]].any()
    np.testing.assert_array_equal(found.action_BR, other.action_BR)
    one, two = (jax.device_get(learned(e.score_B, e.logp_BR, e.action_BR)) for e in (found, other))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    loss, grad_BR, _ = one
    assert loss != 0 and not grad_BR[found.action_BR == 0].any() and (grad_BR[found.action_BR == 1] != 0).all()
    assert found.action_BR.sum(axis=1).tolist() == [3 + 3 + 6, 1 + 1 + 2]
    assert found.score_B.tolist() == [1.5, 1.5]


# ---------------------------------------------------------------- limits


def test_turns_are_limited():
    policy = Scripted({"1+2=": ["<calc>1</calc>"] * 9})
    found = player(max_turns=3, unfinished=-0.5).play(ROWS[:1], policy, prompt_slots=8, response_slots=200)
    assert found.turns_B.tolist() == [3] and found.finish == ["turns"] and found.score_B.tolist() == [-0.5]
    assert found.length_B.tolist() == [14 * 3 + 18 * 2] and found.action_BR[0, 14 * 3 + 18 * 2 - 1] == 1  # no answer that nobody reads


def test_tokens_are_limited():
    """Cut off at any length: the arrays hold the beginning of what they hold without a limit, and never end in an environment's."""
    whole = player().play(ROWS[1:2], Scripted(TURNS), prompt_slots=8, response_slots=100)
    n = int(whole.length_B[0])
    for R in range(1, n + 3):
        found = player(unfinished=-1.0).play(ROWS[1:2], Scripted(TURNS), prompt_slots=8, response_slots=R)
        m = int(found.length_B[0])
        assert m <= R and found.action_BR[0, m - 1] == 1
        for key in ("action_BR", "logp_BR"):
            np.testing.assert_array_equal(getattr(found, key)[0, :m], getattr(whole, key)[0, :m])
        np.testing.assert_array_equal(found.token_BS[0, : 8 + m], whole.token_BS[0, : 8 + m])
        assert (found.finish, found.score_B.tolist(), found.ended_B.tolist()) == ((["done"], [1], [True]) if R >= n else (["length"], [-1], [False]))


def test_what_is_written_behind_a_call_is_cut_off():
    """A policy that does not stop there: its episode is that of one that does, log-probabilities and all."""
    on = {"1+2=": ["<calc>1+2</calc> is 4, <calc>4</calc>", "3$"], "9=": ["<calc>9</calc>more$", "9$"]}
    stops = {"1+2=": ["<calc>1+2</calc>", "3$"], "9=": ["<calc>9</calc>", "9$"]}
    found, want = (player().play([ROWS[0], ROWS[2]], Scripted(turns), prompt_slots=8, response_slots=80) for turns in (on, stops))
    for key in ("token_BS", "logp_BR", "action_BR", "length_B", "ended_B", "score_B"):
        np.testing.assert_array_equal(getattr(found, key), getattr(want, key))
    ended = player().play(ROWS[2:], Scripted({"9=": ["<calc>9</calc>$", "9$"]}), prompt_slots=8, response_slots=80)
    assert ended.token_BS[0].tolist().count(EOS) == 2 and ended.score_B.tolist() == [1]  # right behind the call, it is the policy's


def test_an_end_token_is_needed_unless_told_otherwise():
    for must_end, score, finish in ((True, 0.0, "length"), (False, 1.0, "done")):
        found = player(kind="answer", must_end=must_end).play(ROWS[2:], Scripted({"9=": ["9"]}), prompt_slots=8, response_slots=8)
        assert found.score_B.tolist() == [score] and found.finish == [finish] and not found.ended_B[0]


def test_empty_turns():
    for turn, score in (("$", 0), ("", 0)):
        found = player(kind="answer").play(ROWS[2:], Scripted({"9=": [turn]}), prompt_slots=8, response_slots=8)
        assert found.length_B.tolist() == [len(turn)] and found.action_BR.sum() == len(turn) and found.score_B.tolist() == [score]
    found = player(Says("w")).play([{"prompt": "a"}], Scripted({"a": ["", "", ""]}), prompt_slots=8, response_slots=8)
    assert found.finish == ["length"] and found.length_B.tolist() == [0]  # it would go on without end


def test_a_long_prompt_is_cut_as_those_of_files_are():
    policy = Scripted({"+2=": ["3$"]})
    found = player().play(ROWS[:1], policy, prompt_slots=4, response_slots=8)
    assert policy.seen == [[shortened(encode("1+2="), 4)]] and found.token_BS[0, :4].tolist() == policy.seen[0][0]


def test_no_rows_no_calls():
    found = player().play([], None, prompt_slots=4, response_slots=6)
    assert found.token_BS.shape == (0, 10) and found.samples == []


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="returned 0 turns of 3 episodes"):
        player().play(ROWS, lambda prompts: [], prompt_slots=8, response_slots=80)
    with pytest.raises(ValueError, match="1 log-probabilities of 2 tokens"):
        player().play(ROWS[:1], lambda prompts: [([5, 6], [0.0], False)], prompt_slots=8, response_slots=80)


# ---------------------------------------------------------------- failures


class Fails(Says):
    cfg = EnvironmentConfig(on_error=-2.0, max_errors=2)

    def make(self):
        return Fails(self.word)

    def reset(self, row):
        if row["prompt"] == "b":
            raise RuntimeError("no start")
        self.row = row
        return super().reset(row)

    def step(self, response):
        if self.row["prompt"] == "a" and self.turns == 1:
            raise KeyError("lost")
        return super().step(response)


def test_an_environment_that_raises_costs_its_own_episode():
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    one = player(Fails("w"))
    found = one.play(rows, Scripted({"a": ["1", "2"], "c": ["1", "2", "3$"]}), prompt_slots=4, response_slots=20)
    assert found.score_B.tolist() == [-2, -2, 1.5] and found.finish == ["failed", "failed", "done"] and found.length_B.tolist() == [3, 0, 6]
    assert [(i.source, i.index, i.score) for i in found.incidents] == [("environment", 1, -2.0), ("environment", 0, -2.0)]
    assert "RuntimeError: no start" in str(found.incidents[0]) and "KeyError: 'lost'" in str(found.incidents[1])
    assert one.errors == 2
    with pytest.raises(RunError, match=r"failed 3 times, more than environment.max_errors=2; the last: environment: sample 1 \('b'\): RuntimeError: no start") as e:
        one.play(rows, Scripted({}), prompt_slots=4, response_slots=20)
    assert len(e.value.result["incidents"]) == 1


def test_a_row_without_an_answer_fails_alone():
    found = player(kind="answer", on_error=-1.0).play([{"prompt": "9="}, ROWS[0]], Scripted({"9=": ["9$"], "1+2=": ["3$"]}), prompt_slots=8, response_slots=8)
    assert found.score_B.tolist() == [-1, 1] and "'answer'" in str(found.incidents[0])


def test_a_tool_that_takes_too_long_is_told(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ndef slow(text): time.sleep(3600)")
    cfg = EnvironmentConfig(kind="tools", tools={"slow": f"{tmp_path}/slow.py:slow"}, timeout=0.3)
    with Environments(cfg) as environments:
        found = player(environments).play(ROWS[2:], Scripted({"9=": ["<slow>x</slow>", "9$"]}), prompt_slots=8, response_slots=80)
    assert found.score_B.tolist() == [1] and "<result>error: no answer</result>" in found.samples[0].response
    assert [str(i) for i in found.incidents] == ["environment: sample 0 ('9='): tool 'slow': took longer than 0.3 s; the episode goes on"]


# ---------------------------------------------------------------- chats


@pytest.mark.parametrize("template", ["own", "plain"])
def test_an_environments_message_goes_behind_the_policys_as_a_template_writes_it(template):
    """The tokens are those of the whole conversation at once, the policy's own among them."""
    chat = load_chat(template, BYTES)
    talk = [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "<calc>1+2</calc>"}, {"role": "tool", "content": "<result>3</result>"}]
    begun = chat.prompt_ids(talk[:1])

    def policy(prompts):
        asked.append(prompts[0])
        return [([*BYTES.encode("<calc>1+2</calc>" if len(asked) == 1 else "3"), chat.end_id], [-0.5] * (17 if len(asked) == 1 else 2), True)]

    asked = []
    one = Player(Environments(EnvironmentConfig(kind="tools")), BYTES, encode=chat.prompt_ids, reply=chat_reply(chat))
    found = one.play([{"prompt": talk[:1], "answer": 3}], policy, prompt_slots=40, response_slots=80)
    assert asked == [begun, chat.prompt_ids(talk)] and found.score_B.tolist() == [1]
    assert found.action_BR.sum() == 17 + 2 and found.samples[0].prompt == "user: 1+2?"


def test_a_turn_that_was_not_ended_is_ended_by_the_environment():
    chat = load_chat("own", BYTES)
    reply = chat_reply(chat)
    assert reply("x", False) == [chat.end_id, *reply("x", True)]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    chat = load_chat("own", BYTES)

    class Forgets:
        name, end_id, encode = "forgets", chat.end_id, chat.encode

        def prompt_ids(self, messages):
            return chat.prompt_ids(messages[:1] + messages[2:])

    with pytest.raises(UserError, match="template forgets: writes an earlier turn otherwise"):
        chat_reply(Forgets())("x", True)


# ---------------------------------------------------------------- a real policy


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["engine", "sampler"])
def test_the_logprobs_of_a_real_policy_are_those_of_the_whole_sequence(kind):
    """A toy model, asked turn by turn, against one pass over each whole episode, at action positions alone."""
    model = dataclasses.replace(toy.MODEL, vocab_size=BYTES.vocab_size, max_seq_len=64)
    prog = toy.program(model)
    with jax.set_mesh(prog.mesh):
        params = prog.init().params
    sampler = Sampler(prog.graph, model, prog.mesh, eos_id=EOS, pad_id=PAD, vocab_size=BYTES.vocab_size)
    sampler.load(params)
    cfg = SampleConfig(max_tokens=2, temperature=1.0)

    engine = Engine(prog.graph, params, model, BYTES, prog.mesh)

    def policy(seed):
        draws = np.random.default_rng(seed)  # anew each turn: the same seeds would draw the same tokens again

        def generate(prompts):
            seeds = draws.integers(0, 2**32, len(prompts), np.uint32)
            if kind == "engine":
                return [(c.tokens, c.logprobs, c.finish == "eos") for c in engine.generate(prompts, cfg, seeds.tolist(), logprobs=True)]
            out = sampler.sample(prompts, n=1, cfg=cfg, seeds=seeds, prompt_slots=16, response_slots=2)
            return [(out.response(i), out.logp_BR[i, : out.length_B[i]], out.ended_B[i]) for i in range(len(prompts))]

        return generate

    rows = [{"prompt": "a"}, {"prompt": "b"}]
    found, again, other = (player(Says("env")).play(rows, policy(seed), prompt_slots=4, response_slots=20) for seed in (0, 0, 1))
    assert found.action_BR[:, :12].tolist() == [([1.0] * 2 + [0.0] * 3) * 2 + [1.0] * 2] * 2
    whole = Rollout(found.token_BS, found.first_B, found.length_B, found.action_BR, found.logp_BR, found.ended_B)
    np.testing.assert_allclose(found.logp_BR, sampler.score(whole) * found.action_BR, atol=1e-5)
    np.testing.assert_array_equal(found.token_BS, again.token_BS)
    assert (found.token_BS != other.token_BS).any()
    assert (found.token_BS[:, 4:6] != found.token_BS[:, 9:11]).any() and (found.token_BS[0] != found.token_BS[1]).any()


def test_rules_of_rewards_read_the_samples():
    from jaxllm.align.rewards import Rewards

    found = player().play(ROWS, Scripted(TURNS), prompt_slots=8, response_slots=80)
    with Rewards({"ends": RewardRule(kind="length", limit=40, must_end=False)}) as made:
        assert made(found.samples).score_B.tolist() == [1, 0, 1]
