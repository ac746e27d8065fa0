"""A study's folder: one small JSON file a job, and claims by which workers of several machines share them.

    study.yaml     the settings          base.yaml  what every trial begins from        known.json  an earlier study's trials
    trials/0007.json  a job: its trial, its settings, how it stands and what it gave (with successive halving one a rung)
    claims/0007.0     who works on job 7; touched while it works. 0007.1: who took it over when that one was dead
    runs/0007/     the trial's run folder, as `jaxllm pretrain` writes it; runs/0007-seed-1/ the same with another seed

A file is written whole or not at all. A claim is a file that only one worker can create, and taking over creates the next
one instead of touching the first, so two that see the same dead worker cannot both succeed.
"""

import contextlib
import json
import os
import pathlib
import platform
import threading

import yaml

from jaxllm.errors import UserError, writing

OURS = ("study.yaml", "base.yaml", "best.yaml", "known.json", "report.html", "trials", "claims", "runs")


class Folder:
    """The files of one study."""

    def __init__(self, path: pathlib.Path):
        self.path, self.trials = path, path / "trials"
        self.ended: dict[int, dict] = {}  # jobs that have ended do not change, and are read once

    def create(self) -> None:
        with writing(self.path):
            for name in ("trials", "claims", "runs"):
                (self.path / name).mkdir(parents=True, exist_ok=True)

    def jobs(self) -> list[dict]:
        """Returns the jobs in their order, up to the first number that has no file yet."""
        out: list[dict] = []
        while (job := self.ended.get(len(out)) or self.read(len(out))) is not None:
            if job["state"] != "running":
                self.ended[len(out)] = job
            out.append(job)
        return out

    def read(self, number: int) -> dict | None:
        path = self.trials / f"{number:04}.json"
        try:
            job = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(job, dict) or not {"trial", "rung", "params", "state"} <= job.keys():
                raise ValueError("is no trial of a study")
            return job
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as e:
            why = getattr(e, "strerror", None) or e
            raise UserError(f"{path}: cannot be read: {why}; delete it to make that trial again") from None

    def settings(self) -> dict | None:
        """Returns the settings of study.yaml; None where there is none. Raises UserError for one that is damaged."""
        path = self.path / "study.yaml"
        try:
            held = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
            raise UserError(f"{path}: cannot be read: {' '.join(str(getattr(e, 'strerror', None) or e).split())}") from None
        if not isinstance(held, dict) or not {"base", "goal", "metric", "parallel", "space"} <= held.keys():
            raise UserError(f"{path}: is damaged, or of no study: should be as `jaxllm plan search` wrote it; give another "
                            "run.dir, or --run.overwrite=true to delete that study")
        return held

    def write(self, job: dict) -> None:
        write_whole(self.trials / f"{job['job']:04}.json", json.dumps(job, indent=1) + "\n")

    def run_of(self, job: dict) -> pathlib.Path:
        suffix = f"-seed-{job['seed_offset']}" if "seed_offset" in job else ""
        return self.path / "runs" / f"{job['trial']:04}{suffix}"


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all, also where several write it at once."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    with writing(path):
        part.write_text(text, encoding="utf-8")
        part.replace(path)


class Claims:
    """Who works on which job. Times are those of the shared folder's own files, as the clocks of two machines may differ."""

    def __init__(self, folder: pathlib.Path, heartbeat_s: float):
        self.folder, self.heartbeat_s = folder / "claims", heartbeat_s
        self.mine: dict[int, pathlib.Path] = {}
        self.me = json.dumps({"host": host(), "pid": os.getpid(), "started": started(os.getpid())})

    def claim(self, number: int) -> bool:
        """Returns whether the job is now this worker's: it was nobody's, or that of a worker that is dead."""
        found = self.all_of(number)
        if found and not self.dead(found[-1]):
            return False
        path = self.folder / f"{number:04}.{len(found)}"
        with writing(self.folder):
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:  # another was faster
                return False
        with os.fdopen(descriptor, "w") as f:
            f.write(self.me)
        self.mine[number] = path
        return True

    def all_of(self, number: int) -> list[pathlib.Path]:
        """Returns a job's claims, the one that counts last."""
        found = []
        while (path := self.folder / f"{number:04}.{len(found)}").exists():
            found.append(path)
        return found

    def beat(self, number: int) -> bool:
        """Gives a sign of life; returns whether the job is still this worker's."""
        with contextlib.suppress(OSError):
            os.utime(self.mine[number])
        return self.holds(number)

    def holds(self, number: int) -> bool:
        found = self.all_of(number)
        return bool(found) and found[-1] == self.mine.get(number)

    def dead(self, path: pathlib.Path) -> bool:
        """Returns whether the worker of a claim is gone: its process here, or else its signs of life."""
        try:
            owner = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # it is just being written, or its writer died over it
            owner = {}
        if owner.get("host") == host():
            return started(owner["pid"]) != owner["started"]
        try:
            return self.now() - path.stat().st_mtime > self.heartbeat_s
        except OSError:
            return False

    def now(self) -> float:
        path = self.folder / f".now.{platform.node()}.{os.getpid()}"
        path.touch()
        return path.stat().st_mtime

    def any_alive(self) -> bool:
        return any(not self.dead(path) for path in self.folder.glob("[0-9]*"))


def host() -> str:
    """Returns what a process number means something in: this machine since it started, and this container of it."""
    out = platform.node()
    with contextlib.suppress(OSError):
        out += " " + pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        out += " " + str(pathlib.Path("/proc/self/ns/pid").readlink())
    return out


def started(pid: int) -> str:
    """Returns when a process began, in the kernel's ticks, which no other of the same number shares; "" when it is gone."""
    try:
        words = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if words[0] == "Z" else words[19]  # Z: dead, and not yet fetched by its parent
    except (FileNotFoundError, ProcessLookupError):
        if pathlib.Path("/proc/self").exists():
            return ""
    try:  # not Linux
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "unknown"
