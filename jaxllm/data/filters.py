"""The filters of `jaxllm data` in their order: lists (which read nothing), Gopher, C4, FineWeb, a trained classifier."""

from dataclasses import dataclass, field

from jaxllm.data.classifier import ByClassifier, ClassifierConfig
from jaxllm.data.document import Document, Removal
from jaxllm.data.lists import Lists, ListsConfig
from jaxllm.data.quality import C4, C4Config, FineWeb, FineWebConfig, Gopher, GopherConfig


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    lists: ListsConfig = field(default_factory=ListsConfig)
    gopher: GopherConfig = field(default_factory=GopherConfig)
    c4: C4Config = field(default_factory=C4Config)
    fineweb: FineWebConfig = field(default_factory=FineWebConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)


class Filters:
    """Drops a document by the first rule it breaks; C4's rules for lines may change its text."""

    name = "filter"

    def __init__(self, cfg: FilterConfig):
        self.chain = [Lists(cfg.lists), *(stage(group) for stage, group in (
            (Gopher, cfg.gopher), (C4, cfg.c4), (FineWeb, cfg.fineweb)) if group.use)]
        if cfg.classifier.path:
            self.chain.append(ByClassifier(cfg.classifier))

    def __call__(self, doc: Document) -> Removal | None:
        return next((removal for stage in self.chain if (removal := stage(doc))), None)
