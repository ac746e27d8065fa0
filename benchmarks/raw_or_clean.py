"""Does cleaning pay? One small model a kind of text of the same pages, as many tokens each, judged on pages that none has seen.

    python benchmarks/raw_or_clean.py --pages=DIR --config=configs/data/docs.yaml --most=1000 --steps=300

"markup" is the HTML as it is, "raw" all text of a page (Resiliparse, nothing taken for boilerplate), "clean" what `jaxllm data
CONFIG` writes. A tenth of the pages, by a hash of their names, is set apart before anything is made of any; links are not
followed, and of one file with two names the first counts. Training pages that are near copies of a page set apart, by the
text of either kind (jaxllm's MinHash, Jaccard .8), are in no training set. The pages set apart are cleaned by a run of
their own. Every model, of 0.9 M parameters on bytes, is judged on both kinds of their text.
"""

import argparse
import hashlib
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import yaml

from jaxllm.data.charset import page_text
from jaxllm.data.dedup import decide
from jaxllm.data.minhash import DedupConfig, shingles, signatures
from jaxllm.data.packing import gather_rows, n_rows
from jaxllm.data.read import documents_of
from jaxllm.data.signatures import Earlier
from jaxllm.data.unit_files import read_lines

ROOT = pathlib.Path(__file__).parents[1]
LENGTH, ROWS = 256, 16  # bytes of a row; rows of a batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", required=True, help="a folder of .html files")
    parser.add_argument("--config", required=True, help="of `jaxllm data`")
    parser.add_argument("--most", type=int, default=1000, help="pages that are used, the first by a hash of their names")
    parser.add_argument("--steps", type=int, default=300, help=f"of {ROWS} rows of {LENGTH} bytes")
    parser.add_argument("--judged-rows", type=int, default=1024, help="rows of held-out text, drawn evenly")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        pages = pages_of(pathlib.Path(args.pages), args.most)
        held = {page: html for page, html in pages.items() if is_of_tenth(page)}
        train = {page: html for page, html in pages.items() if page not in held}
        copies = near_copies(train, held)
        train = {page: html for page, html in train.items() if page not in copies}
        print(f"{len(train)} pages to train on, {len(held)} held out, {len(copies)} near copies of these left out", flush=True)
        texts = variants(train, args.config, folder / "train")
        judged = variants(held, args.config, folder / "held")
        for kind in texts:
            sizes = [sum(len(text.encode()) for text in some[kind]) / 1e6 for some in (texts, judged)]
            print(f"{kind}: {len(texts[kind])} pages, {sizes[0]:.2f} MB; held out {len(judged[kind])} pages, {sizes[1]:.2f} MB",
                  flush=True)
        for kind, some in texts.items():
            trained(folder / kind, some, args.steps)
            bits = {k: bits_per_byte(folder / kind / "run", judged[k], args.judged_rows) for k in ("clean", "raw")}
            told = "  ".join(f"held-out {k} {b:.4f}" for k, b in bits.items())
            print(f"trained on {kind:<7} {told} bits per byte", flush=True)


def pages_of(folder: pathlib.Path, most: int) -> dict[str, str]:
    """Returns the HTML of pages by name; a link is none, and a file with several names is one page."""
    files = {}
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders.sort()
        for path in (pathlib.Path(parent, name) for name in sorted(names) if name.endswith((".html", ".htm"))):
            if not path.is_symlink():
                about = path.stat()
                files.setdefault((about.st_dev, about.st_ino), path)
    chosen = sorted(files.values(), key=lambda path: _digest(path.relative_to(folder).as_posix(), "drawn"))[:most]
    return {path.relative_to(folder).as_posix(): page_text(path.read_bytes())[0] for path in chosen}


def is_of_tenth(name: str) -> bool:
    return _digest(name, "held")[0] < 26


def _digest(name: str, what_for: str) -> bytes:
    return hashlib.sha256(f"{what_for} {name}".encode()).digest()


def near_copies(train: dict[str, str], held: dict[str, str]) -> set[str]:
    """Returns the training pages that are near a held-out one, directly or over others, by all text or by the main text."""
    cfg, found, names = DedupConfig(), set(), list(train)
    for whole in (True, False):
        mine, theirs = ([plain_text(html, whole) for html in some.values()] for some in (train, held))
        earlier = Earlier((signatures(theirs, cfg),), tuple(held))
        decision = decide(signatures(mine, cfg), lambda i, mine=mine: shingles(mine[i], cfg), cfg, earlier=earlier,
                          load_earlier=lambda i, theirs=theirs: shingles(theirs[i], cfg))
        found |= {names[i] for i in np.flatnonzero(decision.duplicate_of_N >= len(mine))}
    return found


def plain_text(html: str, whole: bool) -> str:
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    return extract_plain_text(HTMLTree.parse(html), main_content=not whole)


def variants(pages: dict[str, str], path: str, folder: pathlib.Path) -> dict[str, list[str]]:
    """Returns the texts of these pages, by kind."""
    (folder / "pages").mkdir(parents=True)
    for i, html in enumerate(pages.values()):
        (folder / "pages" / f"{i:06}.html").write_text(f"\ufeff{html}", encoding="utf-8")  # whatever its <meta> says
    settings = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))
    settings |= {"sources": {"pages": {"path": f"{folder}/pages"}}, "run": {"dir": str(folder / "out")}}
    (folder / "clean.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "jaxllm", "data", str(folder / "clean.yaml")], check=True, cwd=ROOT,
                   stdout=subprocess.DEVNULL)
    clean = [row["text"] for part in sorted(documents_of(folder / "out", "").iterdir()) for row in read_lines(part)]
    return {"markup": list(pages.values()), "raw": [plain_text(html, True) for html in pages.values()], "clean": clean}


def trained(folder: pathlib.Path, texts: list[str], steps: int) -> None:
    """Trains a model on all of the texts; none of them is kept for validation."""
    folder.mkdir()
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    subprocess.run([
        sys.executable, "-m", "jaxllm", "pretrain", str(ROOT / "configs/pretrain/tiny.yaml"), f"--run.dir={folder / 'run'}",
        f"--data.sources.text.path={folder}/text.jsonl", "--data.validation=0", f"--data.cache={folder / 'cache'}",
        f"--data.seq_len={LENGTH}", f"--model.max_seq_len={LENGTH}", "--model.d_model=128", "--model.n_layers=4",
        f"--train.steps={steps}", f"--train.batch_size={ROWS}", "--train.eval_every=0", "--train.sample_every=0",
        f"--checkpoint.every={steps}", f"--optim.warmup={min(100, steps // 5)}", "--log.tensorboard=false",
    ], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def bits_per_byte(run: pathlib.Path, texts: list[str], most: int) -> float:
    """Returns a trained model's cross-entropy in bits over rows of these texts, <bos> and <eos> around each, by their bytes."""
    import jax
    from flax import nnx

    from jaxllm.platform import start_jax
    from jaxllm.train.checkpoint import load_model, run_mesh
    from jaxllm.train.loss import token_logps
    from jaxllm.train.run_folder import read_model, tokenizer_of

    start_jax()
    mesh, tokenizer = run_mesh(read_model(run)), tokenizer_of(run)
    _, graph, params, _ = load_model(run, None, mesh)
    documents = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    stream = np.concatenate(documents), np.cumsum([len(one) for one in documents])
    total = n_rows(len(stream[0]), LENGTH)
    chosen = np.unique(np.linspace(0, total - 1, min(most, total)).astype(int))

    @jax.jit
    def score(params, batch):
        model = nnx.merge(graph, params)
        x_BTD = model.hidden(batch["token_BT"], batch["pos_BT"], batch["doc_BT"])
        return token_logps(x_BTD, model.head_DV(), batch["target_BT"], chunk=LENGTH)

    nats = size = 0.0
    bytes_V = tokenizer.token_bytes()
    with jax.set_mesh(mesh):
        for at in range(0, len(chosen), ROWS):
            row_B = np.resize(chosen[at : at + ROWS], ROWS)
            batch = gather_rows([stream], np.zeros(ROWS, int), row_B, LENGTH, tokenizer.pad_id)
            weight_BT = batch["weight_BT"] * (np.arange(ROWS) < len(chosen) - at)[:, None]
            nats -= float((np.asarray(score(params, batch)) * weight_BT).sum())
            size += float((bytes_V[batch["target_BT"]] * weight_BT).sum())
    return nats / math.log(2) / size


if __name__ == "__main__":
    main()
