"""The first step of `jaxllm data`, most of its work, on many machines: by datatrove's executors (Slurm, Ray, processes).

    from datatrove.executor import SlurmPipelineExecutor
    from jaxllm.data.cluster import MapUnits

    step = MapUnits("clean.yaml", ["run.dir=/shared/clean"])
    step.begin()
    SlurmPipelineExecutor(pipeline=[step], tasks=100, time="10:00:00", partition="cpu", logging_dir="/shared/logs").run()

When the tasks are through, `jaxllm data clean.yaml --run.dir=/shared/clean` finds all units done and goes on from there: the
output is the one of a single machine. The folder and the sources have to be on a file system that all of them see.
"""

import pathlib
from collections.abc import Sequence

from jaxllm import config
from jaxllm.data import pipeline
from jaxllm.data.map_unit import Worker
from jaxllm.data.pipeline_config import DataVerb
from jaxllm.data.raw import find_files, units
from jaxllm.errors import UserError


class MapUnits:
    """A step of a datatrove pipeline: does every world_size-th unit, unless it is done."""

    name = "jaxllm data"  # in datatrove's logs

    def __init__(self, path: str, overrides: Sequence[str] = ()):
        self.path, self.overrides = path, list(overrides)

    def load(self):
        cfg = config.load(DataVerb, self.path, self.overrides)
        files = {name: find_files(s.path, f"sources.{name}.path") for name, s in cfg.sources.items()}
        return cfg, files, pathlib.Path(cfg.run.dir).expanduser(), pipeline.plan_of(cfg, files)

    def begin(self) -> None:
        """Makes the folder in which the tasks work; once, before they start."""
        cfg, files, folder, plan = self.load()
        if pipeline.finished_before(folder, cfg, plan):
            return
        index = pipeline.checked(pipeline.seeded(cfg), files, folder, plan)
        with pipeline.claimed(folder):
            pipeline.start(folder, plan, index)

    def __call__(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        cfg, files, folder, plan = self.load()
        if pipeline.finished_before(folder, cfg, plan):
            return
        work = folder / "work"
        if not (work / "plan.json").is_file():
            raise UserError(f"{folder}: MapUnits.begin() should be called once before the tasks start")
        with pipeline.claimed(folder, shared=True):
            worker = Worker(pipeline.seeded(cfg), str(work))
            for unit in units(cfg.sources, files, cfg.read.max_bytes):
                if unit.number % world_size == rank:
                    worker(unit)
