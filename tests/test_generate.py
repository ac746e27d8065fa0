"""The sampler: what it writes is what the model of training would have written, whatever else is in the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import UserError
from jaxllm.generate import cache, sample
from jaxllm.generate import engine as engine_module
from jaxllm.generate.config import SampleConfig
from jaxllm.generate.engine import Engine
from jaxllm.generate.text import Text
from jaxllm.model.config import MoEConfig
from jaxllm.model.formulation import REFERENCE
from jaxllm.model.heads import LanguageModel
from jaxllm.train.loss import token_logps

BYTES = load_tokenizer("bytes")
MODEL = dataclasses.replace(toy.MODEL, vocab_size=BYTES.vocab_size + 8, max_seq_len=200)  # 8 rows that pad the embedding
PROMPTS = ["a", "a prompt that is longer", "", "two words"]


def make(model=MODEL, **mesh):
    prog = toy.program(model, **mesh)
    with jax.set_mesh(prog.mesh):
        params = prog.init().params
        # a sharper model: one whose likeliest token is clear, so that rounding decides nothing
        params["trunk"]["embed_VD"] = jax.tree.map(lambda x: 4 * x, params["trunk"]["embed_VD"])
    return prog, params, Engine(prog.graph, params, model, BYTES, prog.mesh)


@pytest.fixture(scope="module")
def made():
    return make()


def trainers_logps(prog, params, ids):
    """log p of each token of one sequence but the first, by the full forward of training."""
    ids = np.asarray(ids, np.int32)

    @jax.jit
    def run(params, token_BT):
        model = nnx.merge(prog.graph, params)
        pos_BT = jnp.arange(token_BT.shape[1] - 1, dtype=jnp.int32)[None]
        x_BTD = model.hidden(token_BT[:, :-1], pos_BT, jnp.ones_like(pos_BT))
        return token_logps(x_BTD, model.head_DV(), token_BT[:, 1:], chunk=1000)[0]

    with jax.set_mesh(prog.mesh):
        return np.asarray(run(params, ids[None]))


@pytest.mark.parametrize("change", [
    pytest.param({"window": 6}, id="window"),
    *(pytest.param(change, id=name, marks=pytest.mark.slow) for name, change in {
        "plain": {}, "tied": {"tied": True}, "others": {"position": "none", "norm": "layernorm", "activation": "gelu"}}.items())])
def test_the_samplers_logprobs_are_the_trainers(change):
    prog, params, engine = make(dataclasses.replace(MODEL, **change))
    for cfg in (SampleConfig(max_tokens=40, temperature=0), SampleConfig(max_tokens=40, temperature=1.3, top_k=20, repetition_penalty=1.2)):
        for prompt, one in zip(PROMPTS, engine.generate(PROMPTS, cfg, logprobs=True), strict=True):
            ids = [BYTES.bos_id, *BYTES.encode(prompt), *one.tokens]
            want = trainers_logps(prog, params, ids)[-len(one.tokens):]
            np.testing.assert_allclose(one.logprobs, want, atol=1e-5)


def test_greedy_takes_the_likeliest_token_of_the_full_forward(made):
    prog, params, engine = made
    one = engine.generate(["likely"], SampleConfig(max_tokens=8, temperature=0))[0]
    ids = [BYTES.bos_id, *BYTES.encode("likely")]
    for token in one.tokens:
        every = [trainers_logps(prog, params, [*ids, v])[-1] for v in (token, (token + 1) % 200, (token + 77) % 200)]
        assert every[0] == max(every)
        ids.append(token)


def test_a_rows_text_depends_on_its_own_seed_alone(made):
    engine = made[2]
    cfg = SampleConfig(max_tokens=30, temperature=1.0)
    alone = [engine.generate([p], cfg, [s])[0].tokens for s, p in enumerate(PROMPTS)]
    together = [c.tokens for c in engine.generate(PROMPTS, cfg, range(4))]
    backwards = [c.tokens for c in engine.generate(PROMPTS[::-1], cfg, range(4)[::-1])][::-1]
    beside_a_long_one = engine.generate([PROMPTS[0], "x" * 90], cfg, [0, 9])[0].tokens
    assert alone == together == backwards and beside_a_long_one == alone[0]
    assert engine.generate([PROMPTS[0]], cfg, [5])[0].tokens != alone[0]


@pytest.mark.parametrize("mesh", [{"devices": 8, "data": 2, "fsdp": 2, "tensor": 2}, pytest.param({"devices": 8, "data": 8}, marks=pytest.mark.slow)])
def test_sharded_decoding_writes_the_same(made, mesh):
    cfg = SampleConfig(max_tokens=20, temperature=0)
    want = [c.tokens for c in made[2].generate(PROMPTS[:3], cfg)]
    assert [c.tokens for c in make(**mesh)[2].generate(PROMPTS[:3], cfg)] == want


def test_sparse_layers_decode_where_rows_and_positions_do_not_divide():
    """A decoded token is one position: mesh.context cannot split it, nor `expert` three rows."""
    model, cfg = dataclasses.replace(MODEL, moe=MoEConfig(experts=4)), SampleConfig(max_tokens=8, temperature=0)
    want = [c.tokens for c in make(model)[2].generate(PROMPTS[:3], cfg)]
    assert [c.tokens for c in make(model, devices=4, expert=2, context=2)[2].generate(PROMPTS[:3], cfg)] == want


def test_looking_on_the_way_changes_nothing(made):
    engine, pieces = made[2], {}
    cfg = SampleConfig(max_tokens=150, temperature=0.9)
    plain = engine.generate(PROMPTS, cfg)
    shown = engine.generate(PROMPTS, cfg, on_text=lambda row, piece: pieces.setdefault(row, []).append(piece))
    assert [c.tokens for c in shown] == [c.tokens for c in plain]
    assert ["".join(pieces[i]) for i in range(4)] == [c.text for c in plain]
    assert len(pieces[0]) > 2


def test_length_is_the_models_and_the_prompts_end_is_said(made):
    engine = made[2]
    one = engine.generate(["x" * 150], SampleConfig(max_tokens=500, temperature=0))[0]
    assert one.finish in ("length", "eos") and 151 + len(one.tokens) <= 200
    with pytest.raises(UserError, match="prompt 2 has 201 tokens; a model with max_seq_len=200 takes at most 199"):
        engine.generate(["a", "x" * 200], SampleConfig())


def test_only_real_tokens_are_drawn(made):
    cfg = SampleConfig(max_tokens=60, temperature=50.0)  # nearly uniform
    tokens = {t for c in made[2].generate(["a"] * 16, cfg, range(16)) for t in c.tokens}
    assert max(tokens) < BYTES.vocab_size and len(tokens) > 150


def reference_filter(logits, k, p, min_p):
    """The tokens that may be drawn, from the definitions, one at a time."""
    order = np.argsort(-logits, kind="stable")
    if k:
        order = order[:k]
    probs = np.exp(logits[order] - logits[order].max())
    probs /= probs.sum()
    kept = [v for i, v in enumerate(order) if probs[:i].sum() < p]
    return {int(v) for v in kept if np.exp(logits[v] - logits.max()) >= min_p}


@pytest.mark.parametrize(("k", "p", "min_p"), [(5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2), (8, 0.6, 0.1), (1, 1.0, 0.0)])
def test_filters_keep_what_their_definitions_keep(k, p, min_p):
    rng = np.random.default_rng(0)
    cfg = SampleConfig(temperature=1.0, top_k=k, top_p=p, min_p=min_p)
    steps, numbers = sample.plan(cfg, False)
    draw = jax.jit(lambda logit_BV, seeds: sample.next_token(steps, numbers, logit_BV, sample.row_keys(seeds, 0)))
    for _ in range(3):
        logits = rng.normal(size=24).astype(np.float32) * 2
        drawn = draw(jnp.tile(logits[None], (4000, 1)), jnp.arange(4000, dtype=jnp.uint32))
        allowed = reference_filter(logits, k, p, min_p)
        share = np.bincount(np.asarray(drawn), minlength=24) / 4000
        want = np.where([v in allowed for v in range(24)], np.exp(logits), 0)
        want /= want.sum()
        assert set(np.flatnonzero(share)) <= allowed
        np.testing.assert_allclose(share, want, atol=4.5 * np.sqrt(0.25 / 4000))


def test_temperature_and_penalty_change_the_logits_as_defined():
    logits = jnp.array([[2.0, -1.0, 0.5, 1.9]])
    seen = jnp.array([[True, True, False, False]])
    np.testing.assert_allclose(sample.penalise(logits, seen, 2.0), [[1.0, -2.0, 0.5, 1.9]])
    steps, numbers = sample.plan(SampleConfig(temperature=0, repetition_penalty=2.0), False)
    assert sample.next_token(steps, numbers, logits, None, seen)[0] == 3  # the likeliest one was seen
    shares = []
    for temperature in (0.5, 2.0):
        steps, numbers = sample.plan(SampleConfig(temperature=temperature), False)
        keys = sample.row_keys(jnp.arange(4000, dtype=jnp.uint32), 0)
        shares.append(float(jnp.mean(sample.next_token(steps, numbers, jnp.tile(logits, (4000, 1)), keys) == 0)))
        want = jax.nn.softmax(logits / temperature)[0, 0]
        assert abs(shares[-1] - float(want)) < 0.035
    assert shares[0] > shares[1]


@pytest.mark.parametrize("pieces", [[3, 1, 5], [9], [1] * 9])
def test_stop_strings_end_the_text_exactly_across_tokens(pieces):
    written = list(BYTES.encode("ab STOP cd"))
    shown = []
    text = Text(BYTES, [BYTES.bos_id], 50, ["STOP", "zz"], shown.append)
    at = 0
    for n in pieces:
        text.add(written[at : at + n])
        at += n
    assert (text.text, text.finish) == ("ab ", "stop")
    assert "".join(shown) == "ab "  # nothing of the stop string was shown
    assert BYTES.decode(text.tokens) == "ab STOP"


def test_a_stop_string_ends_a_row_of_a_batch_and_not_the_others(made):
    engine = made[2]
    cfg = SampleConfig(max_tokens=60, temperature=0.9)
    plain = engine.generate(PROMPTS, cfg, range(4))
    stop = plain[1].text[20:23]
    stopped = engine.generate(PROMPTS, dataclasses.replace(cfg, stop=[stop]), range(4))
    for before, after in zip(plain, stopped, strict=True):
        at = before.text.find(stop)
        assert after.text == (before.text if at < 0 else before.text[:at])
        assert after.finish == (before.finish if at < 0 else "stop")
    assert stopped[1].finish == "stop"


def test_half_a_character_is_not_shown():
    shown, text = [], None
    text = Text(BYTES, [BYTES.bos_id], 50, [], shown.append)
    for token in BYTES.encode("é€"):
        text.add([token])
    assert shown == ["é", "€"]


def test_a_text_goes_on_inside_the_prompts_last_character():
    first, *rest = BYTES.encode("€a")
    text = Text(BYTES, [BYTES.bos_id, first], 50, [])
    text.add(rest)
    assert text.text == "€a"


def test_a_character_that_the_limit_cuts_is_shown_as_such():
    shown = []
    text = Text(BYTES, [BYTES.bos_id], 2, [], shown.append)
    for token in BYTES.encode("a€")[:2]:
        text.add([token])
    assert "".join(shown) == text.text == "a\ufffd" and text.finish == "length"


@pytest.mark.parametrize("change", [{}, {"n_kv_heads": 1, "window": 6}], ids=["plain", "one kv head, window"])
def test_scanned_layers_and_growing_caches_write_the_same(change, monkeypatch):
    model = dataclasses.replace(MODEL, **change)
    prog, params, engine = make(model)
    cfg = SampleConfig(max_tokens=60, temperature=0)
    want = engine.generate(PROMPTS, cfg, logprobs=True)
    graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(model, REFERENCE, rngs=nnx.Rngs(0))))
    monkeypatch.setattr(engine_module, "LEAST_SLOTS", 16)  # 32, 48, 64, 96 slots instead of 128
    found = Engine(graph, params, model, BYTES, prog.mesh).generate(PROMPTS, cfg, logprobs=True)
    for a, b in zip(want, found, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_the_end_of_text_ends_its_row_alone(made):
    prog, params, engine = made
    cfg = SampleConfig(max_tokens=30, temperature=1.0)
    plain = engine.generate(PROMPTS, cfg, range(4))
    ends = load_tokenizer("bytes")
    ends.eos_id = plain[0].tokens[5]
    for before, after in zip(plain, Engine(prog.graph, params, MODEL, ends, prog.mesh).generate(PROMPTS, cfg, range(4)), strict=True):
        if ends.eos_id in before.tokens:
            at = before.tokens.index(ends.eos_id) + 1
            assert (after.tokens, after.finish) == (before.tokens[:at], "eos")
        else:
            assert after.tokens[: len(before.tokens)] == before.tokens


def test_the_penalty_counts_prompt_and_text_but_no_padding(made):
    prompts = [[BYTES.bos_id, *range(3, 60)], [BYTES.bos_id]]
    written = made[2].generate(prompts, SampleConfig(max_tokens=40, temperature=0, repetition_penalty=1e6))
    for prompt, one in zip(prompts, written, strict=True):
        assert len(set(one.tokens)) == len(one.tokens) and not set(one.tokens) & set(prompt)
    few = load_tokenizer("bytes")
    few.vocab_size, few.eos_id = 4, -1  # <pad> is drawn too
    prog, params, _ = made
    engine = Engine(prog.graph, params, MODEL, few, prog.mesh)
    cfg = SampleConfig(max_tokens=4, temperature=2.0, repetition_penalty=5.0)
    filled = [[1] * 16] * 16
    flush = [c.tokens for c in engine.generate(filled, cfg, range(16))]
    assert [c.tokens for c in engine.generate([*filled, [1] * 40], cfg, range(17))][:16] == flush


def test_one_program_serves_many_lengths_and_settings(made, monkeypatch):
    traced = []
    for name in ("read_prompt", "read_token"):
        original = getattr(cache, name)
        monkeypatch.setattr(cache, name, lambda *a, name=name, original=original: traced.append(name) or original(*a))
    for n_prompts, letters, temperature in ((3, 1, 0.5), (4, 9, 0.7), (3, 14, 1.1)):
        cfg = SampleConfig(max_tokens=n_prompts, temperature=temperature, min_p=temperature / 10)
        made[2].generate(["x" * letters] * n_prompts, cfg, range(n_prompts))
    assert traced == ["read_prompt", "read_token"]
