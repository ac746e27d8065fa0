"""Answers that `jaxllm rlhf collect` samples from a run's model."""

import dataclasses

import jax
import toy

from jaxllm.align.collect import sampling
from jaxllm.align.collect.config import CollectVerb
from jaxllm.data.chat import load_chat
from jaxllm.data.tokenizer import ByteTokenizer
from jaxllm.generate import verb
from jaxllm.generate.config import SampleConfig
from jaxllm.generate.engine import Engine

TOKENIZER = ByteTokenizer()


def test_an_answer_stops_at_the_end_token_of_the_template_that_is_asked_for(monkeypatch):
    """Of a base model, whose texts end with <eos>: nothing is sampled behind the template's end, and <eos> ends a text too."""
    model = dataclasses.replace(toy.MODEL, vocab_size=272)
    prog, made = toy.program(model), []
    end_id = load_chat("own", TOKENIZER).end_id

    class Kept(Engine):
        def generate(self, *given, **more):
            made.extend(found := super().generate(*given, **more))
            return found

    with jax.set_mesh(prog.mesh):
        engine = Kept(prog.graph, prog.init().params, model, TOKENIZER, prog.mesh)
    monkeypatch.setattr(verb, "load_engine", lambda run, step: (engine, 7))
    write = sampling.Writer(CollectVerb(run="r", prompts="p", template="own", n=8, sample=SampleConfig(temperature=1.0, max_tokens=100)))
    [answers] = write(["a question"])
    assert any(end_id in one.tokens for one in made) and not any(end_id in one.tokens[:-1] for one in made)
    assert all(one.finish == ("eos" if end_id in one.tokens else "length") for one in made)
    beyond = [one for one in made if TOKENIZER.eos_id in one.tokens[:-1]]
    assert beyond and all(TOKENIZER.decode(one.tokens) not in answers for one in beyond)
    assert len(answers) == 8 and write.step == 7
