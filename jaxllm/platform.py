"""Settings of the process and of jax, made once before its first use."""

import os
import pathlib
import platform
import sys

CACHE = pathlib.Path("~/.cache/jaxllm/compiled").expanduser()
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLE = "glibc.malloc.hugetlb"


def use_huge_pages() -> None:
    """Starts this process again, as it was called, with huge pages for malloc, where the C library can.

    XLA on a CPU takes and gives back its buffers at each step, and touching fresh 4 kB pages was the largest single cost of a
    step after the matmuls (docs/LOG.md). glibc reads the setting only when a process starts. Does nothing elsewhere.
    """
    library, version = platform.libc_ver()
    new_enough = library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if not new_enough or TUNABLE in tunables or not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(encoding="ascii"):
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{TUNABLE}=1"]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def start_jax(cache: pathlib.Path = CACHE) -> None:
    """Turns the persistent compilation cache on, so that the second start of a program need not compile.

    Not for several CPU devices: with jax 0.10 to 0.12 a program that comes out of the cache runs its collectives in no fixed
    order there, and devices that took another one wait for each other for ever (docs/LOG.md). A cache that the environment
    names is off then too; code that has jaxllm in its own process may choose otherwise.
    """
    import jax

    chosen, named = jax.config.jax_compilation_cache_dir, os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        if chosen == named:
            jax.config.update("jax_enable_compilation_cache", False)
        return
    if chosen is not None:  # the caller has chosen another place
        return
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        print(f"! compiled programs are not kept: {cache}: {e.strerror}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
