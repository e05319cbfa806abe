"""Memory of weights, masters, moments and gradients on one rank, and what of it is offloaded. Imports no torch."""

from finetune.model.config import ModelConfig
from finetune.plan import optimizer_state
from finetune.plan.activations import FLOAT32
from finetune.plan.workload import Workload

_LABELS = {
    "adamw": "AdamW moments",
    "adam": "Adam moments",
    "sgd": "momentum",
    "adafactor": "Adafactor sums of rows and columns",
}
STORED_BYTES = 2  # a released checkpoint is bfloat16
REDUCE_BUCKET = 100_000_000  # elements; the constant of this name in `engine.py`, which cannot be read without torch


def on_rank(work: Workload) -> dict[str, int]:
    """Weights and what the optimizer holds, on one rank. Exact but for padding of the partitions."""
    parallel, config = work.recipe.parallel, work.config
    local = work.trained_dense + work.trained_experts // parallel.expert
    # The decay rates of DeltaNet are float32 whatever the weights are.
    rates = 2 * config.linear_num_value_heads * config.layer_types.count("linear_attention")
    bytes_of = {
        "weights, all but experts": work.weight_bytes * (work.dense - rates) + FLOAT32 * rates,
        "weights, experts": work.weight_bytes * work.experts // parallel.expert,
        "adapters": work.weight_bytes * (work.dense_adapters + work.expert_adapters // parallel.expert),
    }
    collected = work.shard if parallel.zero_stage == 2 else local
    gradients = FLOAT32 * (collected + min(local, REDUCE_BUCKET))
    if parallel.offload == "none":
        own = rates * (work.recipe.lora is None) if work.weight_bytes < FLOAT32 else work.shard
        copies = work.shard - own if parallel.zero_stage == 0 else work.shard  # there, float32 is its own copy
        return bytes_of | {
            "float32 copies of what trains": FLOAT32 * copies,
            _LABELS[work.recipe.optim.name]: optimizer_state.state_bytes(work, work.shard),
            "gradients": gradients,
        }
    on_host = offloaded(work) if work.machine.device_bytes is None else 0
    # A buffer as large as the largest parameter, for gradients on their way to the host.
    return bytes_of | {
        "gradients": gradients + work.weight_bytes * _largest_trained(work),
        "offloaded optimizer state": on_host,
    }


def offloaded(work: Workload) -> int:
    """Host memory of one rank for an offloaded optimizer state: gradients, rounded weights, and the state but on disk.

    Pages of a state on disk that the kernel keeps in memory are not counted: it gives them up when asked to.
    """
    offload = work.recipe.parallel.offload
    if offload == "none":
        return 0
    kept = FLOAT32 * (1 + optimizer_state.moments(work.recipe.optim))
    return work.shard * (FLOAT32 + work.weight_bytes + (kept if offload == "cpu" else 0))


def _largest_trained(work: Workload) -> int:
    """Elements of the largest parameter that trains on one rank."""
    config, lora = work.config, work.recipe.lora
    local_experts = config.num_experts // work.recipe.parallel.expert * bool(config.moe_layers)
    if lora is None:
        stacked = local_experts * 2 * config.moe_intermediate_size
        return config.hidden_size * max(config.vocab_size, 2 * config.key_dim + 2 * config.value_dim, stacked)
    on_experts = local_experts * max(config.hidden_size, 2 * config.moe_intermediate_size) * ("experts" in lora.targets)
    on_linear = max(config.hidden_size, 2 * config.key_dim + 2 * config.value_dim)
    router = config.num_experts * config.hidden_size * work.recipe.router.train
    return max(lora.rank * max(on_experts, on_linear), router)


def largest_stored(config: ModelConfig) -> int:
    """Bytes of the largest tensor of a released checkpoint, whose experts are stored one by one."""
    largest = max(config.vocab_size, 2 * config.key_dim + 2 * config.value_dim, config.intermediate_size)
    return STORED_BYTES * config.hidden_size * largest
