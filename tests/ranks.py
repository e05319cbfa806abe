"""Run a function on several CPU ranks: `losses = ranks(2, check, argument)`."""

import faulthandler
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

# Children start from a server that has imported torch but never used it: `spawn` imports torch again in every child,
# and `fork` deadlocks once any test of this process has run a backward pass.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "finetune.model.model"])


class _Rendezvous(NamedTuple):
    folder: Path
    port: int
    world: int
    deadline_seconds: float


def ranks(world: int, check: Callable[..., Any], *args: Any, deadline_seconds: float = 120) -> list[Any]:
    """What `check(rank, *args)` returned on each of `world` ranks joined by gloo; check and args must be picklable.

    As soon as one rank fails, the others are killed and that rank's traceback is the message of the assertion. A call
    that takes longer than its deadline fails with the stacks of the ranks that were still busy.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = _Rendezvous(Path(folder), _free_port(), world, deadline_seconds)
        children, readers = [], []
        for rank in range(world):
            reader, writer = _context.Pipe(duplex=False)
            child = _context.Process(target=_run, args=(rank, place, writer, check, args), daemon=True)
            child.start()
            writer.close()  # the child holds the only end now, so its death is the end of the file
            children.append(child)
            readers.append(reader)
        try:
            return _collect(children, readers, place)
        finally:
            for child in children:
                child.kill()
                child.join()


def _collect(children: list[Any], readers: list[Connection], place: _Rendezvous) -> list[Any]:
    results: dict[int, Any] = {}
    end = time.monotonic() + place.deadline_seconds
    while len(results) < place.world:
        waiting = [rank for rank in range(place.world) if rank not in results]
        ready = wait([readers[rank] for rank in waiting], timeout=max(0, end - time.monotonic()))
        if not ready:
            stacks = "\n".join(f"rank {rank}:\n{_stack_file(place, rank).read_text()}" for rank in waiting)
            raise AssertionError(f"ranks {waiting} did not finish in {place.deadline_seconds} s\n{stacks}")
        for rank in waiting:
            if readers[rank] not in ready:
                continue
            try:
                message = readers[rank].recv_bytes()
            except EOFError:
                children[rank].join()
                raise AssertionError(f"rank {rank} died with exit code {children[rank].exitcode}") from None
            succeeded, results[rank] = pickle.loads(message)
            assert succeeded, f"rank {rank}:\n{results[rank]}"
    return [results[rank] for rank in range(place.world)]


def _run(rank: int, place: _Rendezvous, writer: Connection, check: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with _stack_file(place, rank).open("w") as stacks:
        faulthandler.dump_traceback_later(0.9 * place.deadline_seconds, file=stacks)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(place.world),
            LOCAL_WORLD_SIZE=str(place.world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(place.port),
        )
        torch.use_deterministic_algorithms(True)  # as in conftest.py: unwritten memory is NaN
        torch.set_num_threads(1)
        torch.manual_seed(0)
        try:
            dist.init_process_group("gloo", f"file://{place.folder}/store", rank=rank, world_size=place.world)
            result = True, check(rank, *args)
            dist.destroy_process_group()
        except BaseException:
            result = False, traceback.format_exc()
        # Plain pickle: the default of a pipe would hand tensors over by shared memory that dies with this rank.
        writer.send_bytes(pickle.dumps(result))
        faulthandler.cancel_dump_traceback_later()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _stack_file(place: _Rendezvous, rank: int) -> Path:
    return place.folder / f"rank{rank}.stack"
