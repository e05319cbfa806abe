"""The ranks of a run: rank and device of this process, process groups, and the collectives that the trainer needs."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import deepspeed.ops
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups
from torch import Tensor
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

# Timeout of collectives once the watchdog runs. Long, because ranks may wait for one that makes progress: rank 0 may
# tokenise for hours. The watchdog detects hangs (finetune/run/watchdog.py).
TIMEOUT = timedelta(days=7)
UNWATCHED_TIMEOUT = timedelta(minutes=70)  # before the watchdog runs
MEETING = timedelta(minutes=10)  # for all ranks to connect; hosts of a cluster may start minutes apart


class MeetingError(ValueError):
    """The ranks cannot form a process group."""


class RankError(ValueError):
    """A user error that at least one rank found, raised with the same message on every rank."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank, device and groups of this process. Every rank has its own data, so all ranks are data parallel.

    Expert ranks are consecutive: for expert parallel size E, ranks 0..E-1 hold one copy of the experts, E..2E-1 the
    next. `expert_data_rank` is the index of this rank's copy.
    """

    rank: int
    size: int
    device: torch.device
    expert_size: int
    expert_rank: int
    expert_data_rank: int
    expert_group: dist.ProcessGroup | None  # None: every rank holds all experts

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def leads_host(self) -> bool:
        """Whether this is the first rank of its host, which does the work needed once per host."""
        return int(os.environ.get("LOCAL_RANK", "0")) == 0

    def experts(self, num_experts: int) -> range:
        """Ids of the experts of this rank."""
        each = num_experts // self.expert_size
        return range(self.expert_rank * each, (self.expert_rank + 1) * each)

    def sum(self, value: Tensor) -> Tensor:
        """Replace `value` by its sum over all ranks, in place. Collective."""
        dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait for every rank. Collective."""
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def gather(self, value: object) -> list[object]:
        """The `value` of every rank, by rank. Collective. Pickles, so meant for small objects at start and end."""
        everyone: list[object] = [None] * self.size
        dist.all_gather_object(everyone, value)
        return everyone

    def free_memory(self) -> int:
        """Minimum over ranks of free bytes: of the GPU, or an equal share of the host's memory. Collective."""
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_SIZE", "1"))
        everyone = torch.tensor(free, device=self.device)
        dist.all_reduce(everyone, dist.ReduceOp.MIN)
        return int(everyone)

    @contextmanager
    def together(self, *errors: type[ValueError]) -> Iterator[None]:
        """Raise a user error of any rank inside the block on every rank. Collective.

        Otherwise ranks without the error would wait in the next collective for one that has exited. The block itself
        must not communicate.

        Args:
            errors: exception types that count as user errors.

        Raises:
            RankError: the message of the first rank that raised one of `errors`.
        """
        found: ValueError | None = None
        try:
            yield
        except errors as error:
            found = error
        messages = [message for message in self.gather(str(found) if found else None) if message]
        if messages:
            raise RankError(str(messages[0])) from found


def read_rank() -> tuple[int, int]:
    """Rank and world size as set by the launcher; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def start(expert_size: int) -> World:
    """Join the other ranks and build the expert groups. Collective.

    On a CPU, DeepSpeed would compile an inference-only operation here. That takes two minutes, and fails without a
    compiler, so the operation is disabled first.

    Args:
        expert_size: expert parallel size, the number of ranks that hold one copy of the experts.

    Raises:
        MeetingError: the ranks cannot connect, or this host has fewer GPUs than ranks.
    """
    rank, size = read_rank()
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = _device()
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _choose_interface()
    if not dist.is_initialized():
        _meet(rank, size)
    deepspeed.init_distributed(verbose=False, timeout=UNWATCHED_TIMEOUT)
    groups._create_expert_and_data_parallel(expert_size)
    expert_group = groups._get_expert_parallel_group(group_name(expert_size)) if expert_size > 1 else None
    set_timeouts(UNWATCHED_TIMEOUT)
    return World(
        rank=rank,
        size=size,
        device=device,
        expert_size=expert_size,
        expert_rank=rank % expert_size,
        expert_data_rank=rank // expert_size,
        expert_group=expert_group,
    )


def set_timeouts(timeout: timedelta = TIMEOUT) -> None:
    """Set the timeout of every process group; DeepSpeed creates groups with torch's default, 10 minutes under NCCL."""
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timeout, group)


def _device() -> torch.device:
    """The device of this rank: the CPU, or its GPU, which is set as the current one."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    index, visible = int(os.environ["LOCAL_RANK"]), accelerator.device_count()
    here = int(os.environ.get("LOCAL_SIZE", index + 1))
    if visible == 1 and "SLURM_LOCALID" in os.environ:
        index, here = 0, 1  # --gpus-per-task: each task sees only its own GPU
    if here > visible:
        raise MeetingError(
            f"{here} ranks on {socket.gethostname()}, which has {visible} GPU(s); start one for each: slots= in the"
            " hostfile, --ntasks-per-node of SLURM, --num_gpus of deepspeed"
        )
    accelerator.set_device(index)
    return torch.device(accelerator.device_name(), index)


def _meet(rank: int, size: int) -> None:
    """Initialise the process group at `MASTER_ADDR`; ranks may connect minutes apart."""
    backend = get_accelerator().communication_backend_name()
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=MEETING))
        store.set_timeout(TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=UNWATCHED_TIMEOUT)
    except (DistNetworkError, DistStoreError) as error:
        raise MeetingError(
            f"the {size} ranks do not find each other at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            f" ({str(error).splitlines()[0]}); if another run is using that port, give another (--master-port of"
            " launch.sh, --master_port of deepspeed, MASTER_PORT under SLURM); over several hosts see that this address"
            " and port can be reached from each of them"
        ) from error


def _choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME, unless it is set, to the network interface with the route to rank 0.

    By default gloo uses the interface of this host's own name. That is often the loopback, and then ranks on two hosts
    never connect.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or int(os.environ.get("CROSS_SIZE", "1")) == 1:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as towards, suppress(OSError):  # sends nothing
        towards.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        own = towards.getsockname()[0]
        for interface, addresses in psutil.net_if_addrs().items():
            if own in [address.address for address in addresses]:
                os.environ["GLOO_SOCKET_IFNAME"] = interface


def group_name(expert_size: int) -> str:
    """DeepSpeed's name for the groups of this expert parallel size."""
    return f"ep_size_{expert_size}"


def stop() -> None:
    """Destroy the process groups, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()
