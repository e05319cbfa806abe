"""The GPUs that torch would use, queried from the driver, since importing torch takes seconds."""

import ctypes
import functools
import importlib.util
import runpy
from dataclasses import dataclass
from pathlib import Path

_DRIVER = "libcuda.so.1"
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """A CUDA device."""

    name: str
    memory_bytes: int


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs visible under CUDA_VISIBLE_DEVICES; none if torch was built without CUDA."""
    return _of_driver() if _torch_has_cuda() else ()


def _torch_has_cuda() -> bool:
    """Whether `torch.version.cuda` is set, read from its file without importing torch."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    return runpy.run_path(str(Path(found.origin).with_name("version.py")))["cuda"] is not None


def _of_driver(library: str = _DRIVER) -> tuple[Gpu, ...]:
    """The devices that the CUDA driver lists; empty without driver or device."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = []
    for index in range(count.value):
        device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(_NAME_BYTES)
        failed = (
            cuda.cuDeviceGet(ctypes.byref(device), index)
            or cuda.cuDeviceGetName(name, _NAME_BYTES, device)
            or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        )
        if failed:
            return ()
        found.append(Gpu(name.value.decode(), memory.value))
    return tuple(found)
