"""Eight emulated CPU devices, full float32 matmuls, and programs compiled once for all test files."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of the time: without LLVM's optimizations it takes half. Runs in processes of their own keep them.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import pytest
from raw_corpus import everything, source, whole  # noqa: F401 (fixtures)

CACHE = pathlib.Path(__file__).parents[1] / ".jax_cache"

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")  # broadcasting is written out
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of evaluation data beside the checkout; skips where there is none."""
    folder = pathlib.Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared/data beside the checkout")
    return folder
