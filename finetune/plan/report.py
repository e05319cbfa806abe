"""Renders a plan as text for a terminal."""

from finetune.plan.adapter_targets import all_linear_sentence
from finetune.plan.exchange import Exchange
from finetune.plan.planner import Plan
from finetune.plan.recompute import described
from finetune.plan.workload import FREE_FRACTION, GIB


def render(plan: Plan, source: str = "") -> str:
    """Render the whole plan.

    Args:
        source: the sentence of `planner.model_config` on the source of the sizes.
    """
    work = plan.work
    recipe, machine, lora = work.recipe, work.machine, work.recipe.lora
    total = sum(work.config.parameter_counts().values())
    lines = [
        f"{recipe.name}: {recipe.model.path} on {machine.ranks} rank{'s' if machine.ranks > 1 else ''}"
        f" ({machine.device_name}, {min(machine.ranks, machine.ranks_per_node)} a node),"
        f" expert parallel {recipe.parallel.expert}, ZeRO-{recipe.parallel.zero_stage}"
        + {"none": "", "cpu": ", optimizer's state in host memory", "nvme": ", optimizer's state on a disk"}[
            recipe.parallel.offload
        ],
        *([source] if source else []),
        *([all_linear_sentence(work.config, lora)] if lora and "all-linear" in lora.targets else []),
        f"{total:,} parameters, of which {work.trained:,} train ({work.trained / total:.3%})",
        "",
        "Memory of each rank, GiB",
        *(_row(name, size) for name, size in plan.memory.items() if size),
        _row("together", plan.rank_bytes),
        *_verdict(plan),
        "",
        *_work(plan),
        "",
        "Beside the ranks",
        f"  memory of each node while weights are read {_gib(plan.host_load_bytes)} GiB,"
        f" of rank 0 for a checkpoint {_gib(plan.host_save_bytes)} GiB",
        *_offload(plan),
        *_disk(plan),
        "",
        "Assumed",
        "  - experts receive even load; a rank whose experts receive twice as much keeps more rows",
    ]
    return "\n".join(lines) + "\n"


def _verdict(plan: Plan) -> list[str]:
    work = plan.work
    room = work.room_bytes
    if room is None:
        return ["Whether it fits is not known: the memory of this machine is not."]
    what = (
        f"{_gib(plan.rank_bytes)} GiB of {_gib(room)} GiB a rank ({FREE_FRACTION:.0%} of the"
        f" {'GPU' if work.machine.device_bytes is not None else 'host memory'} is kept free)"
    )
    if plan.fits:
        return [f"Fits: {what}."]
    if plan.rank_bytes <= room:
        return [
            f"Does NOT fit: {what}, but what is offloaded takes {_gib(plan.offload_host_bytes)} GiB of the"
            f" {_gib(work.machine.host_bytes or 0)} GiB of a node's memory.",
            f"To make it fit: {plan.suggestion}.",
        ]
    largest = max(plan.memory, key=lambda name: plan.memory[name])
    return [
        f"Does NOT fit: {what}; most of it is '{largest}', {_gib(plan.memory[largest])} GiB.",
        f"To make it fit: {plan.suggestion}.",
    ]


def _work(plan: Plan) -> list[str]:
    work = plan.work
    train, ranks = work.recipe.train, work.machine.ranks
    packs = work.recipe.packs_per_micro_batch
    tokens = train.steps * train.global_batch_tokens
    lines = [
        "Work",
        f"  a step: {train.global_batch_tokens:,} tokens = {ranks} rank{'s' if ranks > 1 else ''} x {work.accumulation}"
        f" micro-batch{'es' if work.accumulation > 1 else ''} x {packs} sequence{'s' if packs > 1 else ''} of"
        f" {train.sequence_tokens:,}",
        f"  the run: {train.steps:,} steps, {tokens:,} tokens" if tokens else f"  the run: {train.epochs:g} epochs",
        f"  a token: {_operations(work.operations)} operations"
        + (f", and {_operations(plan.recomputed)} computed again" if plan.recomputed else ""),
        f"  computed again in the backward pass: {described(work.config, plan.recompute)}",
        *([f"  the run: {_operations(tokens * (work.operations + plan.recomputed))} operations"] if tokens else []),
        *(_exchange(plan.exchange) if plan.exchange is not None else []),
    ]
    if not tokens:
        return [*lines, "  time: not known before the number of steps is"]
    speed = plan.throughput
    if isinstance(speed, str):
        return [*lines, f"  time: no estimate; {speed}"]
    fast, slow = tokens / speed.fastest, tokens / speed.slowest
    return [
        *lines,
        f"  time: {_duration(fast)} to {_duration(slow)} ({speed.slowest:,.0f} to {speed.fastest:,.0f} tokens/s)",
        f"  source of the time: {speed.source}",
    ]


def _exchange(made: Exchange) -> list[str]:
    """Lines on the bytes that ranks exchange, and the minimum time for them."""
    passes = f"{made.forward_passes:.3g} forward pass{'es' if made.forward_passes > 1 else ''} and the backward pass"

    def sizes(times: int) -> str:
        places = ((made.node_bytes, "within its machine"), (made.network_bytes, "over the network"))
        return " and ".join(f"{_amount(size * times)} {where}" for size, where in places if size)

    lines = [
        f"  exchange of rows between experts, in {passes}: a rank sends {sizes(1)} a layer and micro-batch,"
        f" {sizes(made.times)} a step"
    ]
    links = made.links
    node = f"{links.node_gbit:,.0f} Gbit/s a rank within a machine" if made.node_bytes and links.node_gbit else ""
    network = f"{links.network_gbit:,.0f} Gbit/s a machine" if made.network_bytes and links.network_gbit else ""
    if made.seconds is None:
        missing = "--network-gbit" if made.network_bytes and not links.network_gbit else "--node-gbit"
        return [*lines, f"  its time: not known; {missing} says what the links carry"]
    return [
        *lines,
        f"  its time: at least {made.seconds:,.3g} s a step at {' and '.join(filter(None, (node, network)))};"
        " what of it other work hides was not measured",
    ]


def _offload(plan: Plan) -> list[str]:
    work = plan.work
    if work.recipe.parallel.offload == "none":
        return []
    in_memory = f"  memory of each node for what is offloaded {_gib(plan.offload_host_bytes)} GiB"
    if work.machine.device_bytes is None:
        in_memory = "  what is offloaded is in the memory of the ranks, which have no other"
    if not plan.offload_disk_bytes:
        return [in_memory]
    return [f"{in_memory}, disk {_gib(plan.offload_disk_bytes)} GiB in {work.recipe.parallel.offload_path}"]


def _disk(plan: Plan) -> list[str]:
    checkpoint = plan.work.recipe.checkpoint
    kept = f"{checkpoint.keep} kept{', the best' if checkpoint.keep_best else ''} and one being written"
    lines = [
        f"  disk for checkpoints {_gib(plan.checkpoints_bytes)} GiB ({kept},"
        f" {_gib(plan.checkpoint_bytes)} GiB each), for a merged export {_gib(plan.merged_bytes)} GiB"
    ]
    free = plan.work.machine.disk_bytes
    if free is not None and free < plan.checkpoints_bytes:
        lines.append(f"  only {_gib(free)} GiB are free there: lower checkpoint.keep or set output.dir elsewhere")
    return lines


def _row(name: str, size: int) -> str:
    return f"  {name:<46}{_gib(size):>10}"


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f}" if size >= GIB / 10 else f"{size / GIB:,.3f}"


def _amount(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.2f} MiB"


def _operations(count: float) -> str:
    power = next(power for power in (18, 15, 12, 9, 6, 0) if count >= 10**power or power == 0)
    return f"{count / 10**power:,.2f}e{power}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
