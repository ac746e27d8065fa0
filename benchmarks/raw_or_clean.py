"""Does cleaning pay? One small model on raw and on cleaned text of the same pages, as many tokens, the same held-out pages.

    python benchmarks/raw_or_clean.py --pages=/usr/share/doc/postgresql-doc-15 --config=configs/data/docs.yaml --steps=1500

"markup" is the HTML as it is, "raw" all text of a page (Resiliparse, nothing taken for boilerplate), "clean" what `jaxllm data
CONFIG` writes. A tenth of the pages, by a hash of their names, is trained on by none. Held-out bits per byte are told for
these pages' clean and raw text; a byte model of 0.9 M parameters. Pages that the filters drop are in no clean figure.
"""

import argparse
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile

import yaml

from jaxllm.data.charset import page_text
from jaxllm.data.read import documents_of
from jaxllm.data.tokenize import is_held_out
from jaxllm.data.unit_files import read_lines

ROOT = pathlib.Path(__file__).parents[1]
# Documents go to pretraining's validation by a hash of their text: of held-out pages the others are left out.
VALIDATION = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", required=True, help="a folder of .html files")
    parser.add_argument("--config", required=True, help="of `jaxllm data`")
    parser.add_argument("--steps", type=int, default=1500, help="of 16 rows of 256 bytes")
    parser.add_argument("--judged", default="clean,raw", help="which text of the held-out pages")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        texts = variants(pathlib.Path(args.pages), args.config, folder)
        for kind, found in texts.items():
            sizes = [sum(len(text.encode()) for text, held in found if held == side) for side in (False, True)]
            print(f"{kind}: {len(found):,} pages, {sizes[0] / 1e6:.1f} MB to train on, {sizes[1] / 1e6:.2f} MB held out",
                  flush=True)
        for kind in ("raw", "clean", "markup"):
            for judged in args.judged.split(","):
                bits = bits_per_byte(folder / f"{kind}-{judged}", texts[kind], texts[judged], args.steps)
                print(f"trained on {kind:<7} held-out {judged:<6} {bits:.4f} bits per byte", flush=True)


def variants(pages: pathlib.Path, path: str, folder: pathlib.Path) -> dict[str, list[tuple[str, bool]]]:
    """Returns (text, whether its page is held out) of each page, by kind."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    out = {"markup": [], "raw": [], "clean": []}
    for file in sorted(pages.rglob("*.html")):
        html, held = page_text(file.read_bytes())[0], is_of_tenth(file.relative_to(pages).as_posix())
        out["markup"].append((html, held))
        out["raw"].append((extract_plain_text(HTMLTree.parse(html), main_content=False), held))
    settings = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))
    settings |= {"sources": {"pages": {"path": f"{pages}/**/*.html"}}, "run": {"dir": str(folder / "out")}}
    (folder / "clean.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "jaxllm", "data", str(folder / "clean.yaml")], check=True, cwd=ROOT)
    for part in sorted(documents_of(folder / "out", "").iterdir()):
        out["clean"] += [(row["text"], is_of_tenth(row["meta"]["path"])) for row in read_lines(part)]
    return out


def is_of_tenth(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] < 26


def bits_per_byte(folder: pathlib.Path, train: list, judged: list, steps: int) -> float:
    """Returns the held-out figure at the end of a run."""
    folder.mkdir()
    rows = [text for text, held in train if not held and not is_held_out(text.encode(), VALIDATION)]
    left_out = [text for text, held in judged if held and is_held_out(text.encode(), VALIDATION)]
    left_out.append(next(t for t in map(str, range(99)) if not is_held_out(t.encode(), VALIDATION)))  # a source needs some text
    for name, texts in (("train", rows), ("held", left_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    subprocess.run([
        sys.executable, "-m", "jaxllm", "pretrain", str(ROOT / "configs/pretrain/tiny.yaml"), f"--run.dir={folder / 'run'}",
        f"--data.sources.text.path={folder}/train.jsonl", f"--data.sources.held={{path: {folder}/held.jsonl, weight: 1e-9}}",
        f"--data.validation={VALIDATION}", f"--data.cache={folder / 'cache'}", "--data.seq_len=256", "--model.max_seq_len=256",
        "--model.d_model=128", "--model.n_layers=4", f"--train.steps={steps}", "--train.batch_size=16",
        f"--train.eval_every={steps}", "--train.eval_rows=512", "--train.sample_every=0",
        f"--checkpoint.every={steps}", "--optim.warmup=100",
        "--log.tensorboard=false"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["eval_bits_per_byte"] for line in lines if "eval_bits_per_byte" in line][-1]


if __name__ == "__main__":
    main()
