"""Settings of `jaxllm data`. No jax here, and nothing that is slow to import."""

from dataclasses import dataclass, field
from typing import Literal

from jaxllm.data.augment import AugmentConfig
from jaxllm.data.clean import CleanConfig
from jaxllm.data.decontaminate import DecontaminateConfig
from jaxllm.data.extract import ExtractConfig
from jaxllm.data.filters import FilterConfig
from jaxllm.data.harm import HarmConfig
from jaxllm.data.homographs import HomographsConfig
from jaxllm.data.language import LanguageConfig
from jaxllm.data.minhash import DedupConfig
from jaxllm.data.mixture import MixConfig
from jaxllm.data.privacy import PrivacyConfig
from jaxllm.data.raw import RawSource
from jaxllm.data.repeats import RepeatsConfig
from jaxllm.data.substrings import SubstringsConfig


@dataclass(frozen=True, kw_only=True)
class DataRun:
    dir: str = "data/clean"  # everything that is written; data.sources.NAME.path of `jaxllm pretrain` takes it as it is
    seed: int = 0  # another choice of what mix and augment choose by chance; added to mix.seed and augment.seed
    overwrite: bool = False  # delete what an earlier run left in `dir` and start anew


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    max_bytes: int = 16 << 20  # a longer document is removed
    on_error: Literal["count", "stop"] = "count"  # what a document that cannot be read does: it is removed, or all stops

    def __post_init__(self):
        if not 1 <= self.max_bytes <= 1 << 30:
            raise ValueError(f"read.max_bytes={self.max_bytes}: should be 1 to {1 << 30}")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    format: Literal["jsonl", "parquet"] = "jsonl"  # of documents/: part-*.jsonl.zst, or part-*.parquet
    samples: int = 100  # documents of each rule, chosen by a hash of their ids, whose text is kept in removed-text/ for review

    def __post_init__(self):
        if self.samples < 0:
            raise ValueError(f"output.samples={self.samples}: should be 0 or more")


@dataclass(frozen=True, kw_only=True)
class DataVerb:
    run: DataRun = field(default_factory=DataRun)
    sources: dict[str, RawSource] = field(default_factory=dict)
    read: ReadConfig = field(default_factory=ReadConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    clean: CleanConfig = field(default_factory=CleanConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    harm: HarmConfig = field(default_factory=HarmConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    homographs: HomographsConfig = field(default_factory=HomographsConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    repeats: RepeatsConfig = field(default_factory=RepeatsConfig)
    substrings: SubstringsConfig = field(default_factory=SubstringsConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    workers: int = 0  # processes; 0: one a core. The result does not depend on it

    def __post_init__(self):
        if self.workers < 0:
            raise ValueError(f"workers={self.workers}: should be 1 or more, or 0 for one a core")
