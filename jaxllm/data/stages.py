"""Which stages a document goes through, in which order."""

import functools
import importlib.util
import pathlib
import pickle

from jaxllm.data.clean import Clean
from jaxllm.data.decontaminate import Decontaminate, build_index
from jaxllm.data.document import Document
from jaxllm.data.extract import Extract
from jaxllm.data.filters import Filters
from jaxllm.data.harm import Harm
from jaxllm.data.homographs import Homographs
from jaxllm.data.language import Language
from jaxllm.data.privacy import Privacy
from jaxllm.errors import UserError, writing

INDEX = "evaluation-items.pickle"


def prepared(cfg, folder: str) -> dict[str, list]:
    """Does what is done once for all workers, and checks what they will need; returns tables for the report."""
    if cfg.output.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError("output.format=parquet needs pyarrow: pip install 'jaxllm[parquet]'")
    if not cfg.decontaminate.folder:
        per_document(cfg, folder)
        return {}
    path = pathlib.Path(folder) / INDEX
    if not path.is_file():
        with writing(path):
            part = path.with_suffix(".part")
            part.write_bytes(pickle.dumps(build_index(cfg.decontaminate, functools.partial(_cleaned, Clean(cfg.clean)))))
            part.replace(path)
    per_document(cfg, folder)
    index = _index(folder)
    return {"evaluation items": [{"task": task, "looked for": n, "too short to look for": index.too_short.get(task, 0)}
                                 for task, n in index.looked_for.items()]}


def _cleaned(clean: Clean, text: str) -> str:
    doc = Document("", "", text, {}, {})
    clean(doc)
    return doc.text


@functools.lru_cache(1)
def _index(folder: str):
    return pickle.loads((pathlib.Path(folder) / INDEX).read_bytes())  # of the work folder, which this run wrote


def per_document(cfg, folder: str) -> list:
    """Returns the stages that look at one document, built for this process."""
    stages = [Extract(cfg.extract), Clean(cfg.clean)]
    if cfg.decontaminate.folder:  # before anything cuts lines or masks words of an item
        stages.append(Decontaminate(cfg.decontaminate, _index(folder)))
    if cfg.language.use:
        stages.append(Language(cfg.language))
    stages.append(Filters(cfg.filter))
    if cfg.harm.use:
        stages.append(Harm(cfg.harm))
    stages.append(Privacy(cfg.privacy))
    if cfg.homographs.treatment != "none":
        stages.append(Homographs(cfg.homographs))
    return stages
