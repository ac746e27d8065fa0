"""Settings: defaults, files, overrides, help, and the line that each mistake gets."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import pytest
import yaml

from jaxllm import cli, config
from jaxllm.errors import UserError
from jaxllm.train.config import PretrainConfig, TrainConfig

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def pretrain(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {steps: 10}\ndata: {sources: {a: {path: a.txt}}}\noptim: {lr: 1e-3}\n", encoding="utf-8")
    return str(path)


def test_defaults_then_file_then_overrides(pretrain):
    cfg = config.load(PretrainConfig, pretrain, ["model.d_model=64", "data.sources.a.weight=2", "optim.b1=8e-1", "model.window=null"])
    assert (cfg.model.d_model, cfg.model.n_layers, cfg.train.steps, cfg.optim.lr, cfg.optim.b1) == (64, 4, 10, 1e-3, 0.8)
    assert cfg.data.sources["a"].weight == 2.0 and cfg.data.sources["a"].path == "a.txt"


def test_what_is_saved_loads_as_the_same_settings(pretrain, tmp_path):
    cfg = config.load(PretrainConfig, pretrain, ["model.n_kv_heads=2", "train.sample_prompts=[a, b]"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(config.to_yaml(config.to_dict(cfg)), encoding="utf-8")
    assert config.load(PretrainConfig, str(saved)) == cfg


@pytest.mark.parametrize("text", ["the ", " a", "1e5", "yes", "${x}", "a: b", "[1, 2", "a=b", "", "{", "#x"])
def test_text_is_taken_as_it_stands(text):
    from jaxllm.generate.config import GenerateVerb

    assert config.load(GenerateVerb, None, [f"prompt={text}"]).prompt == text
    assert config.load(PretrainConfig, None, ["train.steps=1", f"data.sources.x-1.path={text}"]).data.sources["x-1"].path == text
    assert config.load(GenerateVerb, None, ["prompt=null"]).prompt is None


@pytest.mark.parametrize(("override", "says"), [
    ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
    ("lr=1", "unknown key 'lr'; did you mean 'optim.lr'?"),
    ("modle.d_model=8", "unknown key 'modle'; did you mean 'model'?"),
    ("data.sources.a.wieght=2", "unknown key 'data.sources.a.wieght'; did you mean 'data.sources.NAME.weight'?"),
    ("model.d_model=wide", "model.d_model='wide': should be int"),
    ("model.d_model=2.5", "model.d_model=2.5: should be int"),
    ("train.precision=bf16", "train.precision='bf16': should be auto|float32|bfloat16"),
    ("log.tensorboard=maybe", "log.tensorboard='maybe': should be bool"),
    ("model.n_heads=3", "model.d_model=256 is not divisible by model.n_heads=3"),
    ("model.n_kv_heads=3", "model.n_heads=4 is not divisible by model.n_kv_heads=3"),
    ("model.window=0", "model.window=0: should be at least 1, or null"),
    ("data.seq_len=2048", "data.seq_len=2048 is longer than model.max_seq_len=1024"),
    ("train.micro_batches=5", "train.batch_size=32 is not divisible by train.micro_batches=5"),
    ("train.tokens=100", "give one of train.steps and train.tokens, found 10 and 100"),
    ("mesh.fsdp=-1", "only one axis may be -1"),
    ("mesh.tensor=0", "mesh.tensor=0: should be a positive number"),
    ("optim.lr=0", "optim.lr=0.0: should be above 0"),
    ("optim.lr=inf", "optim.lr=inf: should be a finite number"), ("optim.b2=nan", "optim.b2=nan: should be"),
    ("checkpoint.keep=0", "checkpoint.keep=0"),
    ("train.sample.top_p=0", "sample.top_p=0.0: should be in (0, 1]"),
    ("data.sources.b.weight=2", "data.sources.b.path is missing"),
])
def test_a_mistake_gets_one_line(pretrain, override, says):
    with pytest.raises(UserError) as error:
        config.load(PretrainConfig, pretrain, [override])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "says"), [
    ("train: {steps: 10", "not valid YAML"), ("train: {steps: 1, steps: 2}", "found 'steps' twice"), ("- a\n- b\n", "should hold `key: value` lines"),
    ("train: 3\n", "train=3: is a group"), ("optim: {lr: fast}\n", "optim.lr='fast': should be float"),
])
def test_a_broken_file_is_named(tmp_path, text, says):
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        config.load(PretrainConfig, str(path))
    assert says in str(error.value) and str(path) in str(error.value)


def test_nothing_is_looked_up_in_the_environment(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {steps: 1, sample_prompts: ['cost ${x}', '${oc.env:HOME}', '${']}\n", encoding="utf-8")
    want = ["cost ${x}", "${oc.env:HOME}", "${"]
    cfg = config.load(PretrainConfig, str(path))
    assert list(cfg.train.sample_prompts) == want
    path.write_text(config.to_yaml(config.to_dict(cfg)), encoding="utf-8")
    assert list(config.load(PretrainConfig, str(path)).train.sample_prompts) == want
    assert list(config.load(PretrainConfig, None, ["train.steps=1", "train.sample_prompts=['${x}']"]).train.sample_prompts) == ["${x}"]


def test_help_shows_the_defaults_that_a_verb_has():
    assert config._fields(PretrainConfig)["train.sample.max_tokens"].default == PretrainConfig(
        train=TrainConfig(steps=1)).train.sample.max_tokens == 64


def test_a_missing_file_has_its_nearest_name(tmp_path):
    (tmp_path / "tiny.yaml").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"no such file; did you mean .*tiny\.yaml"):
        config.load(PretrainConfig, str(tmp_path / "tinny.yaml"))


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_lists_every_key_with_a_meaning_and_imports_no_jax(verb):
    code = f"import sys; from jaxllm.cli import main; main([{verb!r}, '--help']); sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    settings = cli._find(cli.VERBS[verb].settings)
    for name, field in config._fields(settings).items():
        assert f"--{name}=" in done.stdout
        assert field.meaning, f"{name} has no meaning beside it"


def test_help_answers_within_half_a_second():
    times = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "jaxllm", "pretrain", "--help"], capture_output=True, cwd=ROOT, check=True)
        after = os.times()  # processor time, which other work on the machine does not lengthen
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 0.5


@pytest.mark.parametrize(("argv", "code", "says"), [
    (["pretian"], 2, "did you mean 'pretrain'?"), (["pretrain"], 2, "expected one config file"),
    (["generate"], 2, "expected one run folder"), (["report"], 2, "expected at least one run folder"),
    (["pretrain", "nowhere.yaml"], 2, "no such file"), (["doctor", "x"], 2, "unexpected 'x'"), ([], 0, ""),
])
def test_exit_codes(argv, code, says, capsys):
    assert cli.main(argv) == code
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*/*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_loads_and_builds(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# "), "the first lines say what it costs and what it reached"
    verb = f"plan {path.stem.split('-')[0]}" if path.parent.name == "plan" else path.parent.name
    cfg = config.load(cli._find(cli.VERBS[verb].settings), str(path))
    if path.parent.name == "pretrain":
        build_abstractly(cfg)


def build_abstractly(cfg: PretrainConfig):
    from jaxllm.mesh import MeshConfig
    from jaxllm.partition import make_mesh
    from jaxllm.train.optim import make_optimizer
    from jaxllm.train.pretrain import n_steps
    from jaxllm.train.state import build

    model = dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or 4096)
    program = build(model, cfg.train, make_optimizer(cfg.optim, n_steps(cfg)), make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    assert sum(leaf.size for leaf in jax.tree.leaves(program.abstract.params)) > 0


def test_the_comment_of_a_field_is_its_help():
    fields = config._fields(PretrainConfig)
    assert fields["model.d_model"].meaning == "width of the residual stream"
    assert fields["model.n_kv_heads"].meaning.startswith("heads of keys and values")  # a comment above the field
    assert yaml.safe_load(config.to_yaml({"a": 1})) == {"a": 1}
