"""`jaxllm data review FOLDER`: draws the sample, serves the page, takes and gives CSV, tells what the labels say."""

import json
import pathlib

from jaxllm.data.review import labels as labels_file
from jaxllm.data.review.config import ReviewVerb
from jaxllm.data.review.labels import Labels, check_name
from jaxllm.data.review.local import alone, serve
from jaxllm.data.review.results import results, told
from jaxllm.data.review.sample import manifest_bytes, open_sample, write_whole
from jaxllm.data.review.serve import Review
from jaxllm.errors import UserError, writing


def main(cfg: ReviewVerb) -> dict:
    """Returns where things are and, unless it only wrote a CSV file, the results."""
    folder = pathlib.Path(cfg.run)
    output = pathlib.Path(cfg.output) if cfg.output else folder / "review"
    if cfg.export_csv and cfg.import_csv:
        raise UserError("export_csv and import_csv: give one of them")
    if cfg.expert:
        check_name(cfg.expert, "expert")
    with writing(output):
        manifest_bytes(folder)  # before anything is made in a folder that is none of ours
        output.mkdir(parents=True, exist_ok=True)
    with alone(output / "review.lock", f"{output}: another `jaxllm data review` serves it; stop that one first"):
        return _review(cfg, folder, output)


def _review(cfg: ReviewVerb, folder: pathlib.Path, output: pathlib.Path) -> dict:
    sample = open_sample(folder, output, cfg)
    labels = Labels(output / "labels.csv")
    if cfg.export_csv:
        n = labels_file.export(sample.items, labels, cfg.expert, pathlib.Path(cfg.export_csv))
        print(f"{cfg.export_csv}: {n} documents; fill in `label` (keep, drop or unsure), then "
              f"--import_csv={cfg.export_csv} --expert=NAME")
        return {"csv": cfg.export_csv, "documents": n}
    if cfg.import_csv:
        n = labels_file.take(pathlib.Path(cfg.import_csv), sample.items, labels, cfg.expert)
        print(f"{cfg.import_csv}: {n} labels taken")
    elif cfg.serve:
        serve(Review(sample, labels, cfg), cfg.port, f"{len(sample.items)} documents to label at ADDRESS "
              "(Ctrl-C ends; every label is saved as it is given)")
    found = results(sample, labels, cfg)
    with writing(output):
        write_whole(output / "results.json", json.dumps(found, indent=1) + "\n")
    print(told(found))
    print(f"\n{output / 'results.json'}")
    return {"output": str(output), **found}
