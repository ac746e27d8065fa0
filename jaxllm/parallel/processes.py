"""Several processes, one a host, that run one program: how they find each other, and what only one of them does.

Every process runs the same command. They meet at process 0's address before jax starts, so that one that is missing is
named in a line; jax's own start would end the process with a stack trace.
"""

import contextlib
import dataclasses
import os
import re
import socket
import sys
import time
from collections.abc import Mapping

from jaxllm.errors import RunError, UserError
from jaxllm.parallel.config import ProcessesConfig

PATIENCE = 10  # seconds until the first word about who is missing
DEFAULT_TIMEOUT = 5  # seconds a single connection may be silent


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process this is, of how many, and where they meet."""

    coordinator: str  # HOST:PORT of process 0
    count: int
    index: int
    launcher: str  # who said so
    hosts: tuple[str, ...] = ()  # of all processes, where the launcher tells


def find_place(cfg: ProcessesConfig, env: Mapping[str, str]) -> Place | None:
    """Returns this process's place by the settings, or else by the launcher's environment; None: it is alone."""
    if cfg.count is not None:
        return Place(cfg.coordinator, cfg.count, cfg.index, "settings") if cfg.count > 1 else None
    for launcher, read in LAUNCHERS.items():
        found = read(env, cfg.port)
        if found is not None and found[1] > 1:
            coordinator, count, index, hosts = found
            return Place(cfg.coordinator or coordinator, count, index, launcher, hosts)
    return None


def _jax(env, port):
    if "JAX_COORDINATOR_ADDRESS" in env and "JAX_NUM_PROCESSES" in env:
        return env["JAX_COORDINATOR_ADDRESS"], int(env["JAX_NUM_PROCESSES"]), int(env.get("JAX_PROCESS_ID", 0)), ()
    return None


def _torchrun(env, port):
    if {"MASTER_ADDR", "WORLD_SIZE", "RANK"} <= env.keys():
        return f"{env['MASTER_ADDR']}:{env.get('MASTER_PORT', port)}", int(env["WORLD_SIZE"]), int(env["RANK"]), ()
    return None


def _slurm(env, port):
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if nodes and {"SLURM_NTASKS", "SLURM_PROCID"} <= env.keys():
        return f"{first_host(nodes)}:{port}", int(env["SLURM_NTASKS"]), int(env["SLURM_PROCID"]), ()
    return None


def _tpu_pod(env, port):
    hosts = tuple(filter(None, env.get("TPU_WORKER_HOSTNAMES", "").split(",")))
    if hosts and "TPU_WORKER_ID" in env:
        return f"{hosts[0]}:{port}", len(hosts), int(env["TPU_WORKER_ID"]), hosts
    return None


LAUNCHERS = {"jax's environment": _jax, "torchrun": _torchrun, "Slurm": _slurm, "the TPU pod": _tpu_pod}


def first_host(nodes: str) -> str:
    """Returns the first of Slurm's "a[003-007,12],b": a003."""
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return found[1] + (found[2] or "")


def start(cfg: ProcessesConfig) -> Place | None:
    """Waits for all processes and joins them into one program; returns this one's place, None when it is alone.

    Raises RunError that names who has not come within the timeout.
    """
    place = find_place(cfg, os.environ)
    if place is None:
        return None
    meet(place, cfg.timeout)
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # acts on CPUs only
    jax.distributed.initialize(place.coordinator, place.count, place.index, initialization_timeout=max(cfg.timeout, 60))
    return place


# ---------------------------------------------------------------- meeting


def meet(place: Place, timeout: float, say=lambda text: print(text, file=sys.stderr, flush=True)) -> None:
    """Returns when every process is there; raises RunError that names the missing, UserError when two are the same."""
    host, _, port = place.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"processes.coordinator={place.coordinator!r}: should be HOST:PORT of process 0")
    if place.index == 0:
        _host(place, int(port), time.monotonic() + timeout, timeout, say)
    else:
        _visit(place, host, int(port), time.monotonic() + timeout, timeout, say)


def _host(place: Place, port: int, end: float, timeout: float, say) -> None:
    """Process 0: takes one visitor for each other index, then sends all of them off."""
    visitors: dict[int, tuple[str, socket.socket]] = {}
    try:
        server = socket.create_server(("", port), backlog=place.count)
    except OSError as e:
        raise UserError(f"processes.coordinator={place.coordinator}: port {port} cannot be used here: {e.strerror}") from None
    warn_at = time.monotonic() + PATIENCE
    with server, contextlib.ExitStack() as stack:
        while len(visitors) < place.count - 1:
            now = time.monotonic()
            if now > end:
                told = (f"of {place.count} processes (by {place.launcher}) not come within {timeout:.0f} s: "
                        f"{_missing(place, visitors)}")
                _send_all(visitors, told)
                raise RunError(told)
            if now > warn_at:
                say(f"! waiting for {_missing(place, visitors)}; every host must run this same command")
                warn_at = end if warn_at >= end else now + 6 * PATIENCE
            server.settimeout(min(max(end - now, 0.01), 0.5))
            with contextlib.suppress(TimeoutError):
                visitor = stack.enter_context(server.accept()[0])
                visitor.settimeout(DEFAULT_TIMEOUT)
                with contextlib.suppress(OSError, ValueError):  # a stranger, or one that died
                    index, count, name = visitor.makefile(encoding="utf-8").readline().split()
                    _seat(place, visitors, int(index), int(count), name, visitor)
        _send_all(visitors, "all are here")
        for _, visitor in visitors.values():  # they close first, so that the port is free at once
            with contextlib.suppress(OSError):
                visitor.recv(1)


def _seat(place: Place, visitors, index: int, count: int, name: str, visitor) -> None:
    wrong = None
    if count != place.count:
        wrong = f"{name} says there are {count} processes, process 0 says {place.count}"
    elif not 0 < index < place.count or index in visitors:
        other = visitors[index][0] if index in visitors else socket.gethostname()
        wrong = f"{name} and {other} both say they are process {index}"
    visitors[index] = name, visitor
    if wrong:
        _send_all(visitors, wrong)
        raise UserError(f"processes: {wrong}")


def _send_all(visitors, text: str) -> None:
    for _, visitor in visitors.values():
        with contextlib.suppress(OSError):
            visitor.sendall(f"{text}\n".encode())


def _missing(place: Place, visitors) -> str:
    gone = [i for i in range(1, place.count) if i not in visitors]
    return ", ".join(f"process {i}" + (f" ({place.hosts[i]})" if place.hosts else "") for i in gone)


def _visit(place: Place, host: str, port: int, end: float, timeout: float, say) -> None:
    """Any other process: goes to process 0 until it is sent off."""
    warn_at = time.monotonic() + PATIENCE
    while True:
        if time.monotonic() > end:
            raise RunError(f"process {place.index} of {place.count} (by {place.launcher}): process 0 was not reached at "
                           f"{place.coordinator} within {timeout:.0f} s; does it run, and is the port open?")
        if time.monotonic() > warn_at:
            say(f"! waiting for process 0 at {place.coordinator}; every host must run this same command")
            warn_at = end
        try:
            with socket.create_connection((host, port), timeout=2) as server:
                server.sendall(f"{place.index} {place.count} {socket.gethostname()}\n".encode())
                server.settimeout(max(end - time.monotonic(), 0) + DEFAULT_TIMEOUT)
                answer = server.makefile(encoding="utf-8").readline().strip()
        except OSError:
            time.sleep(0.2)
            continue
        if answer == "all are here":
            return
        if answer:
            raise (RunError if "not come" in answer else UserError)(f"processes: {answer}")
        time.sleep(0.2)  # process 0 ended before it answered


# ---------------------------------------------------------------- together


def is_first() -> bool:
    """Returns whether this process writes what is written once: logs, settings, reports."""
    import jax

    return jax.process_index() == 0


def together(where: str) -> None:
    """Returns when every process has come to this point of the program."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(where)


def highest(n: int) -> int:
    """Returns the largest of the numbers that the processes give."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return n
    from jax.experimental.multihost_utils import process_allgather

    return int(process_allgather(np.int32(n)).max())
