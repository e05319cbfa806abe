"""The GPUs that torch would use here, asked of the driver: importing torch for it takes seconds."""

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
    """One device, as CUDA describes it."""

    name: str
    memory_bytes: int


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES leaves; none where torch was built without CUDA."""
    return _of_driver() if _torch_has_cuda() else ()


def _torch_has_cuda() -> bool:
    """What `torch.version.cuda` says, read from its file."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    return runpy.run_path(str(Path(found.origin).with_name("version.py")))["cuda"] is not None


def _of_driver(library: str = _DRIVER) -> tuple[Gpu, ...]:
    """What the CUDA driver lists; nothing where there is no driver, or it has no device."""
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
