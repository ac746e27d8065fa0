"""The sampler of rollouts: what it writes and its log-probabilities are the trainer's, whatever stands in the other rows."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import UserError
from jaxllm.generate import continuous
from jaxllm.generate.config import SampleConfig
from jaxllm.generate.continuous import Sampler
from jaxllm.generate.engine import Engine
from jaxllm.generate.outside import check_against
from jaxllm.train.loss import token_logps

EOS, PAD, WORDS, P, R = 2, 0, 36, 12, 24
ENDS = (EOS, 3, 4, 5)  # so many that lengths differ
MODEL = dataclasses.replace(toy.MODEL, vocab_size=40)  # 4 rows that pad the embedding
PROMPTS = [np.random.default_rng(i).integers(6, WORDS, n).tolist() for i, n in enumerate((3, 7, 5, 11, 1))]
N = 4
CFG = SampleConfig(max_tokens=20, temperature=0.7)
SEEDS = np.arange(len(PROMPTS) * N, dtype=np.uint32) * 7919


def make(model=MODEL, eos_id=EOS, **mesh):
    prog = toy.program(model, **mesh)
    with jax.set_mesh(prog.mesh):
        params = prog.init().params
        # a sharper model: one whose likeliest token is clear, so that rounding decides nothing
        params["trunk"]["embed_VD"] = jax.tree.map(lambda x: 4 * x, params["trunk"]["embed_VD"])
    sampler = Sampler(prog.graph, model, prog.mesh, eos_id=eos_id, pad_id=PAD, vocab_size=WORDS)
    sampler.load(params)
    return prog, params, sampler


def write(sampler, prompts=PROMPTS, cfg=CFG, seeds=SEEDS, n=N, prompt_slots=P, stop_ids=ENDS[1:], **more):
    return sampler.sample(prompts, n=n, cfg=cfg, seeds=seeds, prompt_slots=prompt_slots, response_slots=R, stop_ids=stop_ids, **more)


@pytest.fixture(scope="module")
def made():
    return make()


@pytest.fixture(scope="module")
def plain(made):
    return write(made[2])


def same(a, b):
    for name in ("token_BS", "first_B", "length_B", "action_BR", "ended_B"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    np.testing.assert_allclose(a.logp_BR, b.logp_BR, atol=1e-5)


def trainers_logps(prog, params, one, temperature):
    """log softmax(logits / temperature) of left-padded rows, by the full forward of training."""
    @jax.jit
    def run(params, token_BS, first_B):
        model = nnx.merge(prog.graph, params)
        slot_1S = jnp.arange(token_BS.shape[1] - 1)[None]
        doc_BS = (slot_1S >= first_B[:, None]).astype(jnp.int32)
        x_BSD = model.hidden(token_BS[:, :-1], jnp.maximum(slot_1S - first_B[:, None], 0), doc_BS)
        return token_logps(x_BSD, model.head_DV()[:, :WORDS] / temperature, token_BS[:, 1:], chunk=1000)[:, P - 1 :]

    with jax.set_mesh(prog.mesh):
        return np.asarray(run(params, one.token_BS, one.first_B)) * one.action_BR


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("change", [{}, pytest.param({"window": 5, "n_kv_heads": 1}, marks=pytest.mark.slow)], ids=["plain", "window"])
def test_the_log_probabilities_are_the_trainers_at_the_temperature(change, rows):
    prog, params, sampler = make(dataclasses.replace(MODEL, **change))
    for cfg in (CFG, dataclasses.replace(CFG, temperature=1.0, top_k=5, repetition_penalty=1.3)):
        one = write(sampler, cfg=cfg, rows=rows)
        np.testing.assert_allclose(one.logp_BR, trainers_logps(prog, params, one, cfg.temperature), atol=1e-5)
        np.testing.assert_allclose(one.logp_BR, sampler.score(one, cfg.temperature), atol=1e-5)
        assert np.sum(one.action_BR) > 60 and np.all(one.logp_BR[one.action_BR > 0] < 0)


def test_arrays_are_as_training_takes_them(made, plain):
    assert plain.token_BS.shape == (len(PROMPTS) * N, P + R) and plain.logp_BR.shape == plain.action_BR.shape == (20, R)
    for i, row in enumerate(plain.token_BS):
        prompt, n = PROMPTS[i // N], plain.length_B[i]
        assert plain.first_B[i] == P - len(prompt) and plain.prompt(i) == prompt
        assert row[: P - len(prompt)].tolist() == [PAD] * (P - len(prompt)) and not row[P + n :].any()
        assert plain.ended_B[i] == (row[P + n - 1] in ENDS) and (plain.ended_B[i] or n == CFG.max_tokens)
        assert not set(ENDS) & set(row[P : P + n - 1].tolist()) and row.max() < WORDS
        assert plain.action_BR[i].tolist() == [1] * n + [0] * (R - n) and not plain.logp_BR[i, n:].any()
    assert 0 < plain.ended_B.sum() < len(plain.ended_B) and len({tuple(plain.response(i)) for i in range(N)}) == N


@pytest.mark.parametrize("rows", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 7, 64))])
def test_what_a_sample_writes_does_not_depend_on_how_many_are_written_at_once(made, plain, rows):
    same(write(made[2], rows=rows), plain)


@pytest.mark.slow
def test_neither_order_nor_number_of_samples_nor_padding_changes_one(made, plain):
    order = np.array([3, 0, 4, 1, 2])
    rows = (order[:, None] * N + np.arange(N)[None]).ravel()
    other = write(made[2], [PROMPTS[i] for i in order], seeds=SEEDS[rows], rows=4)
    same(other, dataclasses.replace(plain, **{f.name: getattr(plain, f.name)[rows] for f in dataclasses.fields(plain)}))
    two = write(made[2], n=2, seeds=SEEDS.reshape(-1, N)[:, 1:3].ravel(), rows=3)
    for i in range(len(PROMPTS)):
        assert [two.response(2 * i), two.response(2 * i + 1)] == [plain.response(N * i + 1), plain.response(N * i + 2)]
    wide = write(made[2], prompt_slots=30)
    np.testing.assert_array_equal(wide.token_BS[:, 30 - P :], plain.token_BS)
    np.testing.assert_allclose(wide.logp_BR, plain.logp_BR, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_every_mesh_writes_the_same(plain, mesh):
    sampler = make(devices=8, **mesh)[2]
    for rows in (None, 5):
        same(write(sampler, rows=rows), plain)
    np.testing.assert_allclose(sampler.score(plain, CFG.temperature), plain.logp_BR, atol=1e-5)


def test_rows_that_have_ended_are_filled_again(made):
    sampler = made[2]
    before = sampler.steps, sampler.tokens
    one = write(sampler, rows=8, n=8, seeds=np.arange(40))
    steps, tokens = sampler.steps - before[0], sampler.tokens - before[1]
    assert tokens == one.length_B.sum()
    in_rounds = one.length_B.reshape(-1, 8).max(axis=1).sum()  # if eight began together and waited for the longest
    assert steps < 0.8 * in_rounds


def test_few_rows_go_on_in_a_smaller_batch(made, plain, monkeypatch):
    before = made[2].places
    write(made[2])
    whole = made[2].places - before
    monkeypatch.setattr(continuous, "LEAST_ROWS", 2)
    same(write(made[2]), plain)
    assert made[2].places - before - whole < 0.9 * whole


def test_the_ring_grows_and_turns(made, plain, monkeypatch):
    from jaxllm.generate import engine

    monkeypatch.setattr(engine, "LEAST_SLOTS", 16)
    same(write(made[2], rows=3), plain)


def test_greedy_is_the_engines(made):
    prog, params, sampler = made
    tokenizer = load_tokenizer("bytes")
    tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size = EOS, PAD, WORDS
    cfg = dataclasses.replace(CFG, temperature=0.0)
    engine = Engine(prog.graph, params, MODEL, tokenizer, prog.mesh)
    want = engine.generate(PROMPTS, dataclasses.replace(cfg))
    one = write(sampler, cfg=cfg, n=1, seeds=SEEDS[: len(PROMPTS)], rows=2, stop_ids=())
    assert [one.response(i) for i in range(len(PROMPTS))] == [c.tokens for c in want]
    np.testing.assert_allclose(one.logp_BR, trainers_logps(prog, params, one, 1.0), atol=1e-5)


def test_the_first_token_may_be_the_end_and_other_tokens_may_end_too(made, plain):
    ends = {plain.response(i)[0] for i in range(len(SEEDS))}
    one = write(made[2], rows=3, stop_ids=tuple(sorted(ends)))
    assert one.ended_B.all() and (one.length_B == 1).all()
    np.testing.assert_array_equal(one.token_BS[:, P], plain.token_BS[:, P])
    short = write(made[2], cfg=dataclasses.replace(CFG, max_tokens=1), rows=3)
    np.testing.assert_array_equal(short.token_BS[:, P], plain.token_BS[:, P])
    assert (short.length_B == 1).all()


@pytest.mark.slow
def test_the_models_longest_sequence_ends_a_response():
    sampler = make(dataclasses.replace(MODEL, max_seq_len=14))[2]
    one = write(sampler, rows=3)
    lengths = np.repeat([len(p) for p in PROMPTS], N)
    assert ((lengths + one.length_B == 14) | one.ended_B | (one.length_B == CFG.max_tokens)).all()
    assert (lengths + one.length_B == 14).any()


def test_weights_are_those_loaded_last_and_their_digest_is_the_trainers(made):
    prog, params, _ = made
    sampler = make()[2]
    moved = jax.tree.map(lambda x: x * 1.1, params)
    old = write(sampler)
    wanted = sampler.digest_of(moved)
    assert sampler.digest() == sampler.digest_of(params) != wanted
    sampler.load(moved)
    assert sampler.digest() == wanted
    new = write(sampler)
    np.testing.assert_allclose(new.logp_BR, trainers_logps(prog, moved, new, CFG.temperature), atol=1e-5)
    assert not np.array_equal(old.token_BS, new.token_BS)
    jax.block_until_ready(jax.jit(lambda x: jax.tree.map(lambda leaf: 0 * leaf, x), donate_argnums=0)(moved))  # as a step takes its state
    same(write(sampler), new)


@pytest.mark.slow
def test_weights_come_from_any_mesh(plain):
    prog, params, _ = make(devices=8, fsdp=4, tensor=2)
    other = make(devices=8, data=2, tensor=2, fsdp=2)[2]
    other.load(jax.tree.map(lambda x: 2 * x, params))
    wrong = other.digest()
    other.load(params)
    assert other.digest() == other.digest_of(params) != wrong
    one_device = make()[2]
    one_device.load(params)
    assert one_device.digest() == other.digest()
    same(write(one_device), plain)


@pytest.mark.parametrize(("change", "says"), [
    ({"prompt_slots": 10}, "prompt 4 has 11 tokens, more than the 10 slots of a prompt"),
    ({"prompts": [[3], []], "n": 10}, "prompt 2 has no tokens"),
    ({"cfg": SampleConfig(max_tokens=40)}, "sample.max_tokens=40: should be at most the 24 slots of a response"),
    ({"cfg": SampleConfig(max_tokens=4, stop=["x"])}, "sample.stop"),
])
def test_what_cannot_be_sampled_is_said(made, change, says):
    with pytest.raises(UserError, match=says):
        write(made[2], **change)


class Outside:
    """An engine that does as the sampler does, but for one fault."""

    def __init__(self, sampler, fault=lambda one, cfg: one):
        self.sampler, self.fault = sampler, fault

    def load(self, params):
        self.sampler.load(params)

    def sample(self, prompts, *, cfg, **more):
        return self.fault(self.sampler.sample(prompts, cfg=cfg, **more), cfg)


def at_temperature_one(sampler):
    return lambda one, cfg: dataclasses.replace(one, logp_BR=sampler.score(one, 1.0))


def drops_the_end(one, cfg):
    return dataclasses.replace(one, length_B=one.length_B - one.ended_B, ended_B=np.zeros_like(one.ended_B))


def another_token(one, cfg):
    if cfg.temperature:
        return one
    token_BS = one.token_BS.copy()
    token_BS[2, P] = 30 if token_BS[2, P] != 30 else 31
    return dataclasses.replace(one, token_BS=token_BS)


@pytest.mark.slow
def test_an_outside_engine_is_checked_token_by_token(made):
    sampler = made[2]
    how = dict(n=N, cfg=CFG, seeds=SEEDS, prompt_slots=P, response_slots=R, stop_ids=ENDS[1:])
    scored = lambda one, cfg: dataclasses.replace(another_token(one, cfg), logp_BR=sampler.score(another_token(one, cfg), cfg.temperature))  # noqa: E731
    for fault, says in (
        (lambda one, cfg: one, None), (at_temperature_one(sampler), "temperature 0.7, sample 1, token 1 "),
        (drops_the_end, "without an end token"), (another_token, r"greedy, sample 3, token 1 \(id 3[01]\): log-probability"),
        (scored, r"greedy, sample 3, token 1: id 3[01] at log-probability -[\d.]+, should be id \d+ at -"),
        (lambda one, cfg: dataclasses.replace(one, first_B=one.first_B - 1), "greedy, sample 1: its prompt is"),
    ):
        found = check_against(Outside(sampler, fault), sampler, PROMPTS, **how)
        assert found is None if says is None else re.search(says, found), found
    older = make()[2]
    older.load(jax.tree.map(lambda x: 1.01 * x, made[1]))
    assert "log-probability" in check_against(Outside(older), sampler, PROMPTS, **how)
