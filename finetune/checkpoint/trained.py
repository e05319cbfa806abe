"""The trained tensors of a run (LoRA factors and whole parameters), and the stored tensors that result from them."""

import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.checkpoint.finite import all_finite
from finetune.checkpoint.layout import CheckpointError, Shape, Slot, is_expert_parameter, parameter_shapes
from finetune.checkpoint.shards import listed
from finetune.model.config import ModelConfig

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.default\.weight::fp32")
_EXPERT_FACTOR = re.compile(
    r"(?P<experts>.+\.mlp\.experts)\.lora_(?P<factor>[AB])\.(?P<matrix>\w+)::fp32::(?P<expert>\d+)"
)
_WEIGHT = re.compile(r"(?P<parameter>.+)::fp32(?P<expert>::\d+)?")


class LoraFactors(NamedTuple):
    """LoRA factors: scaling * B @ A is added to the weight of a module, or to one matrix of one expert."""

    rank: int
    alpha: float
    dropout: float  # during training; the merged weights do not depend on it
    modules: dict[str, tuple[Tensor, Tensor]]  # module name in our model -> A (rank, in), B (out, rank); float32
    # Factors of the routed experts, read on access: `PARAMETER::EXPERT::A` (rank, in), `::B` (out, rank); float32.
    experts: Mapping[str, Tensor] = MappingProxyType({})
    rslora: bool = False  # alpha / sqrt(rank) instead of alpha / rank

    @property
    def scaling(self) -> float:
        """The factor of B @ A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class Renamed(Mapping[str, Tensor]):
    """A mapping with renamed keys; its tensors are read on access."""

    def __init__(self, tensors: Mapping[str, Tensor], names: dict[str, str]):
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def split_trained(
    tensors: Mapping[str, Tensor], *, alpha: float, dropout: float, rslora: bool = False
) -> tuple[LoraFactors | None, Mapping[str, Tensor]]:
    """Split a training state into the LoRA factors and the parameters that were trained directly.

    The latter are named by parameter, routed experts by `PARAMETER::EXPERT`. They and the factors of routed experts are
    read on access. Optimizer state is ignored.

    Args:
        tensors: by the trainer's names: `PARAMETER::fp32`, for routed experts `PARAMETER::fp32::EXPERT`.

    Returns:
        The factors (None: the run has no LoRA), and the directly trained parameters.

    Raises:
        CheckpointError: only one of A and B is there, or factors differ in rank.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    names: dict[str, str] = {}
    on_experts: dict[str, str] = {}
    for name in tensors:
        if factor := _FACTOR.fullmatch(name):
            factors.setdefault(factor["module"], {})[factor["factor"]] = tensors[name]
        elif factor := _EXPERT_FACTOR.fullmatch(name):
            on_experts[f"{factor['experts']}.{factor['matrix']}::{factor['expert']}::{factor['factor']}"] = name
        elif weight := _WEIGHT.fullmatch(name):
            names[weight["parameter"].replace(".base_layer.", ".") + (weight["expert"] or "")] = name
    replaced = Renamed(tensors, names)
    if not factors and not on_experts:
        return None, replaced
    lone = [module for module, pair in factors.items() if pair.keys() != {"A", "B"}]
    if lone:
        raise CheckpointError(f"the training state holds one LoRA factor of two for {listed(lone)}; it is damaged")
    ranks = {pair["A"].shape[0] for pair in factors.values()}
    for name in list(on_experts)[:1]:  # the others are checked when they are read
        ranks.add(tensors[on_experts[name]].shape["AB".index(name[-1])])
    if len(ranks) > 1:
        raise CheckpointError(f"the training state mixes LoRA ranks {sorted(ranks)}; one run trains one rank")
    modules = {module: (pair["A"], pair["B"]) for module, pair in factors.items()}
    return LoraFactors(ranks.pop(), alpha, dropout, modules, Renamed(tensors, on_experts), rslora), replaced


class Trained:
    """The trained tensors, checked against the model: each must correspond to a parameter."""

    def __init__(self, config: ModelConfig, adapter: LoraFactors | None, replaced: Mapping[str, Tensor]):
        self.shapes = shapes = parameter_shapes(config)
        if adapter is None and not replaced:
            raise CheckpointError("the training state holds no trained weights; there is nothing to export")
        self.replaced = replaced
        self.factors = {f"{module}.weight": pair for module, pair in adapter.modules.items()} if adapter else {}
        self.on_experts = adapter.experts if adapter else {}
        self.adapted_experts = {name.split("::")[0] for name in self.on_experts}
        self.rank, self.scaling = (adapter.rank, adapter.scaling) if adapter else (0, 0.0)
        for name, (a, b) in self.factors.items():
            if len(shapes.get(name, ())) != 2:
                raise CheckpointError(f"LoRA factors for {name.removesuffix('.weight')}: the model has no such matrix")
            _check_product(name, a, b, shapes[name])
        self._check_expert_factors()
        self._check_replaced()

    def _check_expert_factors(self) -> None:
        """If any expert matrix of a layer is adapted, both matrices of all its experts must be."""
        layers = {name.rpartition(".")[0] for name in self.adapted_experts}
        places = {
            f"{_piece(name, expert)}::{factor}"
            for name, shape in self.shapes.items()
            if is_expert_parameter(name) and name.rpartition(".")[0] in layers
            for expert in range(shape[0])
            for factor in "AB"
        }
        if homeless := sorted(self.on_experts.keys() - places):
            raise CheckpointError(f"LoRA factors have no place in the model: {listed(homeless)}")
        if absent := sorted(places - self.on_experts.keys()):
            raise CheckpointError(f"LoRA factors of experts are missing from the training state: {listed(absent)}")

    def _check_replaced(self) -> None:
        places = {
            place
            for name, shape in self.shapes.items()
            for place in ([_piece(name, expert) for expert in range(shape[0])] if is_expert_parameter(name) else [name])
        }
        homeless = [name for name in self.replaced if name not in places]
        if homeless:
            raise CheckpointError(f"trained tensors have no place in the model: {listed(homeless)}")
        started = {name.split("::")[0] for name in self.replaced}
        absent = [place for place in places if place.split("::")[0] in started and place not in self.replaced]
        if absent:
            raise CheckpointError(f"trained experts are missing from the training state: {listed(sorted(absent))}")

    def touches(self, slot: Slot) -> bool:
        """Whether training changed the stored tensor of `slot`."""
        return slot.parameter in self.factors or slot.parameter in self.adapted_experts or self._replaces(slot)

    def value(self, slot: Slot, stored: Callable[[], Tensor]) -> Tensor:
        """The trained values of a stored tensor, float32.

        Args:
            stored: returns its values before training; called unless `replaced` holds the tensor.
        """
        if not self._replaces(slot):
            value = stored().float()
        elif slot.fused:
            value = torch.stack([self._replacement(slot, expert) for expert in range(slot.shape[0])])
        else:
            value = self._replacement(slot, slot.expert)
            value = value if slot.rows is None else value[slot.rows]
        if slot.parameter in self.factors:
            a, b = self.factors[slot.parameter]
            value = value + self.scaling * (b.float().cpu() @ a.float().cpu())
        elif slot.parameter in self.adapted_experts:
            if slot.expert is None:
                value = torch.stack([whole + self._growth(slot.parameter, e) for e, whole in enumerate(value)])
            else:
                growth = self._growth(slot.parameter, slot.expert)
                value = value + (growth if slot.rows is None else growth[slot.rows])
        return value

    def expert_factors(self, parameter: str, expert: int) -> tuple[Tensor, Tensor]:
        """A and B of one matrix of one expert, float32."""
        a, b = (self.on_experts[f"{_piece(parameter, expert)}::{factor}"].float().cpu() for factor in "AB")
        _check_product(_piece(parameter, expert), a, b, self.shapes[parameter][1:], self.rank)
        return a, b

    def _growth(self, parameter: str, expert: int) -> Tensor:
        a, b = self.expert_factors(parameter, expert)
        return self.scaling * (b @ a)

    def _replaces(self, slot: Slot) -> bool:
        return _piece(slot.parameter, 0 if slot.fused else slot.expert) in self.replaced

    def _replacement(self, slot: Slot, expert: int | None) -> Tensor:
        piece, whole = _piece(slot.parameter, expert), self.shapes[slot.parameter]
        value, shape = self.replaced[piece], whole if expert is None else whole[1:]
        if tuple(value.shape) != shape:
            raise CheckpointError(f"trained {piece}: {list(value.shape)} does not make {list(shape)}")
        return value.float()


def _check_product(name: str, a: Tensor, b: Tensor, shape: Shape, rank: int | None = None) -> None:
    inner = a.shape[0] if rank is None else rank
    if (tuple(a.shape), tuple(b.shape)) != ((inner, shape[1]), (shape[0], inner)):
        raise CheckpointError(f"LoRA factors of {name}: {list(b.shape)} x {list(a.shape)} does not make {list(shape)}")


def _piece(parameter: str, expert: int | None) -> str:
    return parameter if expert is None else f"{parameter}::{expert}"


def rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A trained value in its stored dtype, on the CPU.

    Raises:
        CheckpointError: the dtype is an integer or float8, or the rounded value is not finite.
    """
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise CheckpointError(
            f"{name}: the base stores it as {dtype}, into which nothing can be merged; use another base"
        )
    result = value.to("cpu", dtype).contiguous()
    if not all_finite(result):
        raise CheckpointError(
            f"{name}: holds infinite or undefined numbers after training; resume an earlier checkpoint"
        )
    return result
