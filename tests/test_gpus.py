"""Which GPUs a machine has, as the driver says it: equal to torch, and harmless where there is no driver."""

import subprocess
from pathlib import Path

import pytest
import torch

from finetune.cluster.gpus import Gpu, _of_driver, gpus

# A driver with two devices; `INIT` is what it answers to the first call.
DRIVER = """
#include <stddef.h>
#include <stdio.h>
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = 10 + index; return 0; }
int cuDeviceGetName(char *name, int length, int device) { snprintf(name, length, "Card %d", device); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)device << 33; return 0; }
"""


def driver(folder: Path, *, init: int) -> str:
    library = folder / f"libcuda-{init}.so"
    (folder / "driver.c").write_text(DRIVER)
    subprocess.run(["gcc", "-shared", "-fPIC", f"-DINIT={init}", "driver.c", "-o", library], cwd=folder, check=True)
    return str(library)


def test_the_drivers_devices_are_listed_with_their_memory(tmp_path: Path) -> None:
    assert _of_driver(driver(tmp_path, init=0)) == (Gpu("Card 10", 10 << 33), Gpu("Card 11", 11 << 33))


@pytest.mark.parametrize("init", [100, 999])  # no device; unknown error
def test_a_driver_that_does_not_start_has_no_devices(tmp_path: Path, init: int) -> None:
    assert _of_driver(driver(tmp_path, init=init)) == ()
    assert _of_driver(str(tmp_path / "none.so")) == ()


def test_the_gpus_are_those_of_torch() -> None:
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    assert gpus() == tuple(Gpu(device.name, device.total_memory) for device in properties)
