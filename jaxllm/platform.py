"""Process-wide settings of jax, made once before its first use."""

import pathlib

CACHE = pathlib.Path("~/.cache/jaxllm/compiled").expanduser()


def start_jax(cache: pathlib.Path = CACHE) -> None:
    """Turns the persistent compilation cache on, so that the second start of a program need not compile."""
    import jax

    if jax.config.jax_compilation_cache_dir is not None:  # the caller has chosen another place
        return
    cache.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
