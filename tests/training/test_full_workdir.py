"""A work directory on a disk that runs full, wherever that happens: one line, exit code 2, and the same command continues."""

from __future__ import annotations

import pytest

from flowseg_jax import experiment as configs
from tests.cli.test_full_disk import disk  # noqa: F401
from tests.training.test_two_processes import config, launch, metrics  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5000)]


def test_training_on_a_disk_that_is_full(config, disk, tmp_path):  # noqa: F811
    single = configs.from_json(configs.to_json(config))
    single.mesh.update(data=1, fsdp=1)
    expected = launch(single, tmp_path / "elsewhere", 1)
    disk.mount("size=20k")
    sizes = (20, 60, 300, 900, 1500, 2200)
    for size in sizes:  # in the config, the metrics, the first checkpoint, a later one, the model
        disk.remount(f"size={size}k")
        run = launch(single, disk.path / "run", 1)
        said = run.communicate(timeout=600)[0]
        if run.returncode == 0:
            break
        errors = [line for line in said.splitlines() if "rror" in line]
        assert run.returncode == 2 and len(errors) == 1 and errors[0].startswith("error: "), (size, said)
        assert "No space left on device" in errors[0] and "Traceback" not in said, (size, said)
        assert not any(".part" in name or ".lock" in name for name in disk.files()), size
    assert size > sizes[2]
    disk.remount("size=100m")
    run = launch(single, disk.path / "run", 1)
    said = run.communicate(timeout=600)[0]
    assert run.returncode == 0, said
    assert expected.wait(600) == 0
    assert metrics(disk.path / "run") == metrics(tmp_path / "elsewhere")
