"""Work on blocks in several processes, in order, without more in memory than is being worked on."""

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

from jaxllm.errors import RunError


def n_cores() -> int:
    """Returns the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(function: Callable, todo: Iterable, n_processes: int, setting: str = "data.workers") -> Iterator:
    """Yields function(item) of each item, in order."""
    if n_processes == 1:
        yield from map(function, todo)
        return
    # Not forked: jax may run threads in this process by now, and a fork copies their locks without them.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, context, _start, (function,)) as pool:
        pending = collections.deque()
        try:
            for item in todo:
                pending.append(pool.submit(_run, item))
                if len(pending) > 2 * n_processes:  # what waits is bounded, whatever is slowest
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise RunError(f"a worker process was killed (out of memory?); run again, or set {setting}=1") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_function = None  # of this process; set by _start


def _start(function: Callable) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this process
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([parent]), os._exit(1)), daemon=True).start()  # not to outlive a killed parent


def _run(item):
    return _function(item)
