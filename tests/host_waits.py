"""Counts the operations at which a host would wait for its GPU, on any device: what torch cannot say on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Their result, or the size of it, is known only when the GPU has computed it.
WAITING = {"_local_scalar_dense", "nonzero", "bincount", "_unique2", "unique_dim", "masked_select", "equal"}
# Copies to the host, which are no operation on a CPU.
COPYING = ("tolist", "numpy", "cpu")


@contextmanager
def host_waits() -> Iterator[list[str]]:
    """The names of all waits inside the block, in their order, those of backward passes and recomputation included."""
    found: list[str] = []
    with ExitStack() as stack:
        for name in COPYING:
            stack.enter_context(patch.object(Tensor, name, _told(getattr(Tensor, name), found)))
        stack.enter_context(_Operations(found))
        yield found


def _told(method: Callable[..., Any], found: list[str]) -> Callable[..., Any]:
    def told(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(method.__name__)
        return method(tensor, *args, **kwargs)

    return told


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation._schema.name.removeprefix("aten::")
        sized = name == "repeat_interleave" and kwargs.get("output_size") is None
        masked = name in ("index", "index_put", "index_put_", "_unsafe_index_put") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or sized or masked:
            self.found.append(name)
        return operation(*args, **kwargs)
