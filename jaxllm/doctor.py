"""`jaxllm doctor`: what this machine has, what is missing, and the command that mends it."""

import dataclasses
import os
import pathlib
import platform
import shutil
import sys
from collections.abc import Iterator

from jaxllm import __version__, hardware, installed
from jaxllm.errors import RunError
from jaxllm.report.config import DoctorVerb

PIP = f"{sys.executable} -m pip install"
LEAST_PYTHON = (3, 11)
GOOGLE, NVIDIA = "0x1ae0", "0x10de"  # PCI vendors
NEED_GB, WANT_GB = 1, 10  # free disk: below the first nothing can be saved, below the second a larger model cannot


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing that was looked at."""

    group: str
    name: str
    state: str  # ok; note: worth knowing, nothing is broken; fail: something needed does not work
    said: str
    mend: str = ""  # the command, or the act, that mends it


def main(cfg: DoctorVerb) -> dict:
    """Prints every item as it is found; returns them all. Raises RunError when something needed fails."""
    print(f"jaxllm {__version__}\n")
    items, group = [], None
    for item in look(cfg):
        items.append(item)
        if item.group != group:
            group = item.group
            print(f"{'' if len(items) == 1 else chr(10)}{group}")
        print(show(item), flush=True)
    failed = [item.name for item in items if item.state == "fail"]
    result = {"ok": not failed, "version": __version__, "items": [dataclasses.asdict(item) for item in items]}
    if failed:
        raise RunError(f"doctor: {', '.join(failed)} {'does' if len(failed) == 1 else 'do'} not work; see above", result=result)
    print("\nall that is needed works")
    return result


def show(item: Item) -> str:
    mark = {"ok": "ok  ", "note": "note", "fail": "FAIL"}[item.state]
    line = f"  {mark}  {item.name:<18} {item.said}"
    return f"{line}\n        {'':<18} -> {item.mend}" if item.mend else line


def look(cfg: DoctorVerb) -> Iterator[Item]:
    yield python()
    yield from packages()
    yield from extras()
    yield from sizes()
    yield from machine()
    found = list(devices())
    yield from found
    if cfg.self_test and all(item.state != "fail" for item in found):
        from jaxllm.self_test import self_test

        for name, state, said, mend in self_test():
            yield Item("self-test", name, state, said, mend)


# ---------------------------------------------------------------- software


def python(version: tuple = sys.version_info[:3]) -> Item:
    said = f"{'.'.join(map(str, version))}, needs {'.'.join(map(str, LEAST_PYTHON))} or newer ({sys.executable})"
    if tuple(version[:2]) >= LEAST_PYTHON:
        return Item("software", "python", "ok", said)
    return Item("software", "python", "fail", said, "make the environment with a newer one: python3.12 -m venv .venv")


def packages() -> Iterator[Item]:
    """Yields each core dependency with what it should be, and jaxlib with what this jax asks for."""
    for need in installed.core():
        yield package(need)
    for need in installed.needs_of("jax"):
        if need.name == "jaxlib":
            yield package(need, "this jax")


def package(need, by: str = "") -> Item:
    """Returns whether a requirement is met; `by` asks for it."""
    wants = f"needs {need.specifier or 'any'}{f' for {by}' if by else ''}"
    have = installed.version(need.name)
    if have is None:
        return Item("software", need.name, "fail", f"missing, {wants}", f"{PIP} {quoted(need)}")
    if installed.meets(need):
        return Item("software", need.name, "ok", f"{have}, {wants}")
    both = f"jax=={installed.version('jax')} jaxlib=={installed.version('jax')}"  # the two are released together
    return Item("software", need.name, "fail", f"{have}, {wants}", f"{PIP} {both if need.name == 'jaxlib' else quoted(need)}")


def quoted(need) -> str:
    extras = f"[{','.join(sorted(need.extras))}]" if need.extras else ""
    return f"'{need.name}{extras}{need.specifier}'"


def extras() -> Iterator[Item]:
    """Yields the optional parts: there, or the command that adds them."""
    for name, needs in installed.extras().items():
        if name in ("tpu", "cuda"):
            continue  # the devices tell whether these are wanted
        missing = [need for need in needs if not installed.meets(need)]
        if missing:
            said = f"not installed: {', '.join(need.name for need in missing)}"
            yield Item("optional parts", name, "note", said, f"{PIP} {' '.join(map(quoted, missing))}")
        else:
            yield Item("optional parts", name, "ok", ", ".join(f"{n.name} {installed.version(n.name)}" for n in needs))


def sizes() -> Iterator[Item]:
    size = {dist.metadata["Name"]: installed.size(dist) for dist in installed.everything()}
    ours = {dist.metadata["Name"] for dist in installed.closure()}
    largest = ", ".join(f"{name} {size[name] / 1e6:,.0f} MB" for name in sorted(size, key=size.get, reverse=True)[:3])
    total = sum(size[name] for name in ours)
    yield Item("installed size", "jaxllm needs", "ok", f"{len(ours)} packages, {total / 1e6:,.0f} MB")
    said = f"{len(size)} packages, {sum(size.values()) / 1e6:,.0f} MB; largest: {largest}"
    yield Item("installed size", "environment", "ok", said)


# ---------------------------------------------------------------- machine


def machine() -> Iterator[Item]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Item("machine", "processor", "ok", f"{usable} cores, {platform.machine()}, {platform.system()} {platform.release()}")
    yield memory()
    from jaxllm.platform import CACHE

    for name, folder in (("working directory", pathlib.Path()), ("cache", CACHE)):
        yield disk(name, folder)


def memory() -> Item:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")  # a container's share may be less than the machine's
    text = limit.read_text().strip() if limit.exists() else "max"
    share = min(total, int(text) / 1e9) if text.isdigit() else total
    said = f"{share:.1f} GB" + (f" of the machine's {total:.1f} GB" if share < total else "")
    if share < 2:
        return Item("machine", "memory", "note", said, "take a smaller model and batch, or a larger machine")
    return Item("machine", "memory", "ok", said)


def disk(name: str, folder: pathlib.Path) -> Item:
    """Returns the free space where `folder` is or would be, and whether it can be written."""
    at = folder.expanduser().absolute()
    there = next(p for p in (at, *at.parents) if p.exists())
    free = shutil.disk_usage(there).free / 1e9
    held = f", compiled programs here: {used(at) / 1e6:,.0f} MB" if name == "cache" and at.exists() else ""
    said = f"{free:.1f} GB free in {at}{held}"
    if not os.access(there, os.W_OK):
        return Item("machine", name, "fail", f"{said}; cannot be written", f"chown -R {os.getuid()} {there}")
    if free < WANT_GB:
        mend = f"free some space: du -xh {there} | sort -h | tail"
        return Item("machine", name, "fail" if free < NEED_GB else "note", said, mend)
    return Item("machine", name, "ok", said)


def used(folder: pathlib.Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


# ---------------------------------------------------------------- devices


def devices() -> Iterator[Item]:
    """Yields what jax computes on, and an accelerator that it does not see."""
    there = accelerators()
    try:
        from jaxllm.platform import start_jax

        start_jax()
        import jax

        found = jax.devices()
    except Exception as e:  # whatever a broken install or a device in use makes jax raise
        yield Item("devices", "jax", "fail", f"cannot start: {first_line(e)}", mend_start(str(e), there))
        return
    kinds = {d.device_kind: [e for e in found if e.device_kind == d.device_kind] for d in found}
    for kind, same in kinds.items():
        yield Item("devices", same[0].platform, "ok", describe(kind, same))
    for kind in unseen(there, {d.platform for d in found}):
        yield kind


def describe(kind: str, same: list) -> str:
    said = [f"{len(same)} x {kind}"]
    stats = same[0].memory_stats() or {}
    if "bytes_limit" in stats:
        said.append(f"{stats['bytes_limit'] / 1e9:.1f} GB each")
    chip = hardware.chip(kind)
    if chip and (peak := chip.bf16_flops or chip.peak_flops("float32")):
        said.append(f"{peak / 1e12:.0f} TFLOP/s each in {'bfloat16' if chip.bf16_flops else 'float32'}")
    elif same[0].platform != "cpu":
        said.append("peak not known, so runs log no MFU")
    return ", ".join(said)


def accelerators(root: pathlib.Path = pathlib.Path("/")) -> dict[str, str]:
    """Returns {"tpu" or "gpu": what shows that one is plugged in}, without jax."""
    found = {}
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor, kind = ((device / name).read_text().strip() if (device / name).exists() else "" for name in ("vendor", "class"))
        # Google's network cards and disks (classes 02 and 01) have its vendor number too.
        if vendor == GOOGLE and not kind.startswith(("0x01", "0x02")):
            found.setdefault("tpu", f"PCI device {device.name}")
        if vendor == NVIDIA and kind.startswith("0x03"):
            found.setdefault("gpu", f"PCI device {device.name}")
    for kind, pattern in (("tpu", "accel[0-9]*"), ("tpu", "vfio/[0-9]*"), ("gpu", "nvidia[0-9]*")):
        for path in sorted((root / "dev").glob(pattern)):
            found.setdefault(kind, f"/dev/{path.relative_to(root / 'dev')}")
    return found


def unseen(there: dict[str, str], platforms: set[str]) -> Iterator[Item]:
    """Yields accelerators that are plugged in and that jax does not compute on, with what mends it."""
    for kind, sign in there.items():
        if kind in platforms or (kind == "gpu" and "cuda" in platforms):
            continue
        asked = os.environ.get("JAX_PLATFORMS", "")
        if asked and kind not in asked and "cuda" not in asked:
            mend = "unset JAX_PLATFORMS"
        elif kind == "tpu" and not installed.version("libtpu"):
            mend = f"{PIP} -U 'jax[tpu]'"
        elif kind == "tpu":
            mend = "sudo dmesg | tail; reboot the TPU VM if it stays so"
        elif not pathlib.Path("/proc/driver/nvidia/version").exists():
            mend = "load NVIDIA's driver first: sudo modprobe nvidia; nvidia-smi"
        else:
            mend = f"{PIP} -U 'jax[cuda12]'"
        yield Item("devices", f"unused {kind}", "note", f"{sign} is there, but jax computes on {', '.join(sorted(platforms))}"
                   + (f" (JAX_PLATFORMS={asked})" if asked else ""), mend)


def mend_start(error: str, there: dict[str, str]) -> str:
    """Returns what mends a jax that does not start."""
    if "already in use" in error or "libtpu_lockfile" in error:
        if owners := holders():
            return f"another process has the TPU; stop it: kill {' '.join(map(str, owners))}"
        return "no live process has the TPU; remove the lock that a dead one left: rm /tmp/libtpu_lockfile"
    if asked := os.environ.get("JAX_PLATFORMS"):
        return f"unset JAX_PLATFORMS (it is {asked})"
    if "No module named" in error or "jaxlib" in error:
        return f"{PIP} -U jax jaxlib"
    return f"{PIP} -U 'jax[{'tpu' if 'tpu' in there else 'cuda12'}]'" if there else f"{PIP} --force-reinstall jax jaxlib"


def holders(proc: pathlib.Path = pathlib.Path("/proc")) -> list[int]:
    """Returns the processes that have a TPU's device file or lock open."""
    found = set()
    for link in proc.glob("[0-9]*/fd/*"):
        try:
            target = str(link.readlink())
        except OSError:  # it ended, or is another user's
            continue
        if target.startswith(("/dev/accel", "/dev/vfio/")) or target == "/tmp/libtpu_lockfile":
            found.add(int(link.parts[-3]))
    return sorted(found - {os.getpid()})


def first_line(e: BaseException) -> str:
    return f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:200]}"
