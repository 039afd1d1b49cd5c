"""What all tests share: the CPU, full float32 products, a compilation cache that survives runs, run-time shape checks."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Most of the suite's time is compiling programs that run once: let LLVM optimise less, and XLA emit fusions the short way.
# FLOWSEG_OPTIMISE=1 tests what users run.
if os.environ.get("FLOWSEG_OPTIMISE", "0") == "0":
    quick = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()
if "FLOWSEG_DEVICES" in os.environ:  # how many host devices a process has is fixed when JAX starts: tests/multidevice
    count = os.environ["FLOWSEG_DEVICES"]
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gc
import random
import typing

import jax
import jaxtyping
import numpy as np
import pytest

# Shape annotations are checked in every call that a test makes. A NumPy array is as good as a JAX array there.
jaxtyping.Array = typing.Union[jax.Array, np.ndarray]  # noqa: UP007 (jaxtyping takes a typing.Union)
if os.environ.get("FLOWSEG_TYPECHECK", "1") != "0":
    import tests.helpers.typecheck  # noqa: F401 (the hook names it)

    jaxtyping.install_import_hook(["flowseg_jax.ops", "flowseg_jax.models"], "tests.helpers.typecheck.check")

jax.config.update("jax_default_matmul_precision", "float32")


# These begin first, or the last of them would leave the other cores idle at the end.
LONGEST = (
    "test_eight_devices_training.py",
    "test_eight_devices_evaluation.py",
    "test_loop.py",
    "test_initialization.py",
    "test_flowseg.py",
    "test_segmentor.py",
    "test_command.py",
    "test_lora.py",
    "test_batch.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
    # What is imported by now stays: the collections of garbage to come need not walk through it.
    gc.collect()
    gc.freeze()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on the test's name alone."""
    return np.random.default_rng(list(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
