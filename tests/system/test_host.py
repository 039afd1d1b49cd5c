"""Programs outlive the process that compiled them, where users did not say otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowseg_jax.system import host

PROGRAM = """
import jax
from flowseg_jax.system import host
host.enable_compilation_cache()
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8))).block_until_ready()
print(jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size)
"""


def run(home: Path, **extra: str) -> list[str]:
    """What PROGRAM prints where nothing about a cache is set but `extra`."""
    told = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name and "_CACHE_" not in name}
    env = told | {"XDG_CACHE_HOME": str(home), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | extra
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()


def test_programs_are_kept_in_a_folder_of_the_users_own(tmp_path: Path) -> None:
    folder, limit = run(tmp_path)
    assert Path(folder).parent == tmp_path / "flowseg_jax"
    assert Path(folder).stat().st_mode & 0o777 == 0o700
    assert int(limit) == host.CACHE_BYTES
    programs = sorted(Path(folder).glob("*-cache"))
    assert programs
    assert run(tmp_path) == [folder, limit]
    assert sorted(Path(folder).glob("*-cache")) == programs  # found, not compiled again under another name


@pytest.mark.parametrize("value", ["false", "elsewhere"])
def test_the_environment_has_the_last_word(tmp_path: Path, value: str) -> None:
    if value == "false":
        assert run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == ["None", "-1"]
    else:
        elsewhere = str(tmp_path / "elsewhere")
        assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=elsewhere) == [elsewhere, "-1"]
    assert not (tmp_path / "flowseg_jax").exists()
    assert run(tmp_path, JAX_COMPILATION_CACHE_MAX_SIZE="-1")[1] == "-1"


def test_where_nothing_can_be_written_programs_run_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file") == ["None", "-1"]


def test_memory_is_that_of_this_process() -> None:
    assert 2**26 < host.peak_memory() < 2**37
    assert host.memory_line().startswith("peak host memory ")
