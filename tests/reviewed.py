"""A small output folder of `jaxllm data` whose truth is known: a document is bad where its text says so."""

import json
import pathlib

import numpy as np
import zstandard

PROSE = ("The river rises in the hills north of the town and reaches the sea after ninety miles. Its upper course is steep; below the "
         "second bridge it widens, and small boats have carried slate and wool there since the fourteenth century. ")
MENU = "Home | About us | Contact | Login | Cookie settings | Accept all | Sitemap | Share | Like | Newsletter | Terms | "


def write_folder(folder: pathlib.Path, n: int = 400, seed: int = 0) -> pathlib.Path:
    """Writes n documents of two sources, one with a worse filter; returns the folder."""
    rng = np.random.default_rng(seed)
    kept, removed, texts = [], [], []
    for i in range(n):
        source = "web" if i % 4 else "books"
        bad = rng.random() < (0.35 if source == "web" else 0.05)
        text = f"{'BAD' if bad else 'GOOD'} {i}. " + (MENU if bad else PROSE) * int(rng.integers(1, 4))
        doc, length = f"{source}-{i}", int(rng.integers(10, 40)) if bad else int(rng.integers(45, 400))
        caught = rng.random() < (0.8 if bad else 0.04)
        if caught:
            removed.append({"id": doc, "source": source, "stage": "filter", "rule": "gopher.min_words", "value": length})
            texts.append({"id": doc, "text": text})
        else:
            kept.append({"id": doc, "source": source, "text": text, "meta": {"quality_score": round(float(rng.random()), 3)}})
    for i in range(12):
        removed.append({"id": f"copy-{i}", "source": "web", "stage": "dedup", "rule": "minhash", "value": 0.9, "duplicate_of": kept[i]["id"]})
        texts.append({"id": f"copy-{i}", "text": kept[i]["text"] + " (copy)"})
    kept.append(kept[0] | {"id": kept[0]["id"] + "#copy2"})
    removed.append({"id": "mixed-out", "source": "web", "stage": "mix", "rule": "share", "value": 0.4})
    removed.append({"id": "empty", "source": "web", "stage": "extract", "rule": "nothing_left", "value": None})
    texts.append({"id": "empty", "text": " "})
    for name, rows in (("documents/part-00000.jsonl.zst", kept), ("removed-text/part-00000.jsonl.zst", texts)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    (folder / "removed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in removed), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps({"kept": len(kept), "removed": len(removed)}), encoding="utf-8")
    return folder
