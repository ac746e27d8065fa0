"""`jaxllm generate` and `jaxllm chat` from outside."""

import json

import pytest
import runs

from jaxllm import cli


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert cli.main(["pretrain", str(runs.config(folder, train={"eval_every": 0}))]) == 0
    return folder / "run"


def generate(trained, *words) -> int:
    return cli.main(["generate", str(trained), "--sample.max_tokens=12", *words])


def test_a_prompt_is_continued_and_the_rate_is_told(trained, capsys):
    assert generate(trained, "--prompt=the ") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("the ") and len(captured.out) > 5
    assert "step 24: 12 tokens in" in captured.err or "tok/s" in captured.err


def test_a_file_of_prompts_in_batches_is_each_prompt_alone(trained, tmp_path, capsys):
    prompts = ["the ", "a much longer prompt of and ", "of", "x", "in her"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), encoding="utf-8")
    out = tmp_path / "out.jsonl"
    assert generate(trained, f"--prompts={tmp_path}/p.jsonl", "--n=2", "--batch_size=3", f"--output={out}", "--logprobs") == 0
    made = runs.lines(out)
    assert [(m["prompt"], m["seed"]) for m in made] == [(p, s) for p in prompts for s in (0, 1)]
    assert all(len(m["logprobs"]) == len(m["tokens"]) for m in made)
    capsys.readouterr()
    for one in made[::3]:
        assert generate(trained, f"--prompt={one['prompt']}", f"--sample.seed={one['seed']}", "--stream=true") == 0
        assert capsys.readouterr().out == one["prompt"] + one["text"] + "\n"


@pytest.mark.parametrize(("words", "says"), [
    ([], "give one of --prompt=TEXT and --prompts=FILE"), (["--prompt=a", "--prompts=b"], "not both"),
    (["--prompts=nowhere.txt"], "nowhere.txt: cannot be read"), (["--prompt=a", "--step=5"], "no checkpoint of step 5; there are: 20, 24"),
    (["--prompt=a", "--n=2", "--stream=true"], "shows one continuation"), (["--prompt=a", "--n=0"], "n=0: should be at least 1"),
    ([f"--prompt={'a' * 70}"], "max_seq_len=64"), (["--prompt=a", "--sample.top_k=-1"], "sample.top_k=-1: should be 0 or more"),
])
def test_a_mistake_gets_one_line(trained, words, says, capsys):
    assert generate(trained, *words) == 2
    error = capsys.readouterr().err.splitlines()
    assert says in error[-1] and error[-1].startswith("jaxllm: ")


def test_a_bad_line_of_prompts_is_named(trained, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n', encoding="utf-8")
    assert generate(trained, f"--prompts={tmp_path}/p.jsonl") == 2
    assert "p.jsonl, line 2" in capsys.readouterr().err


def test_a_folder_that_is_no_run_has_its_neighbours_named(trained, capsys):
    assert cli.main(["generate", str(trained.parent / "rnu"), "--prompt=a"]) == 2
    assert str(trained) in capsys.readouterr().err


def test_the_run_folder_is_enough(trained, tmp_path, capsys):
    """Moved, and its text gone, it still generates the same."""
    assert generate(trained, "--prompt=the ") == 0
    before = capsys.readouterr().out
    moved = tmp_path / "elsewhere"
    trained.rename(moved)
    try:
        assert generate(moved, "--prompt=the ") == 0
    finally:
        moved.rename(trained)
    assert capsys.readouterr().out == before


def test_chat_goes_on_with_the_text_and_takes_settings(trained, monkeypatch, capsys):
    said = iter(["the ", "/set temperature=0", "/set top_p=7", "/more", "/bogus", "/reset", "of"])

    def say(prompt=""):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", say)
    assert cli.main(["chat", str(trained), "--sample.max_tokens=8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("the ") and "sample.top_p=7.0: should be in (0, 1]" in out and "unknown /bogus" in out
    assert out.splitlines()[-1].startswith("of")
