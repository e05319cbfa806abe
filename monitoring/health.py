"""Rules that check a run's records; a finding says what is wrong, where, and what to do.

Absolute imbalance is not a criterion: a healthy router on code can be as uneven as a collapsing one elsewhere, and the
number of dead experts reacts last. Routing is therefore compared with the frozen base on the same tokens where that was
measured, otherwise with the run's first window; a deviation from the latter must persist for two windows. The
thresholds are our own, chosen from simulated collapses of a 512-expert router; the literature has none.

`RULES` at the end of the file lists all rules.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

from monitoring.metrics import Record, plain
from monitoring.paired import paired_change

Level = Literal["info", "warn", "alert", "stop"]
LEVELS: tuple[Level, ...] = ("info", "warn", "alert", "stop")

HISTORY_RECORDS = 50
ENOUGH_RECORDS = 10  # needed before a value can be called unusual
LOSS_SPREADS, LOSS_RISE, LOSS_NATS = 8.0, 0.25, 0.2  # a spike exceeds the median by the maximum of the three
GRAD_NORM_FACTOR = 10.0
RISE_RECORDS = 3  # the median of this number is compared, so that a single batch is not a rise
# Rise relative to the lowest value; a training loss must also rise by LOSS_NATS, a held-out loss by standard errors.
TRAIN_RISE: tuple[tuple[float, Level], ...] = ((0.1, "warn"), (0.5, "alert"))
HELD_OUT_RISE: tuple[tuple[float, Level], ...] = ((0.01, "warn"), (0.05, "alert"))
HELD_OUT_ERRORS = 4.0
WINDOW_SHARE = 0.5  # smaller windows, relative to the first one's tokens, have more dead experts by chance

# (limit, level), mildest first; the last limit exceeded sets the level.
COLLAPSE_RATIO: tuple[tuple[float, Level], ...] = ((0.75, "warn"), (0.5, "alert"), (0.3, "stop"))
BASE_COLLAPSE_RATIO: tuple[tuple[float, Level], ...] = ((0.9, "warn"), (0.6, "alert"), (0.3, "stop"))
TAKEOVER_SHARE: tuple[tuple[float, Level], ...] = ((0.5, "warn"), (0.9, "alert"))
TAKEOVER_GROWTH = 0.25
DEAD_GROWTH: tuple[tuple[float, Level], ...] = ((0.05, "warn"), (0.15, "alert"))
DEAD_SPREADS = 3.0  # in standard deviations: chance varies the number of dead experts by its square root
NEWLY_DEAD: tuple[tuple[float, Level], ...] = ((0.02, "warn"), (0.05, "alert"))
DRIFT_BITS: tuple[tuple[float, Level], ...] = ((0.03, "warn"), (0.15, "alert"))
DRIFT_NOISE_FACTOR = 4.0

WHAT_TO_DO = (
    "lower optim.lr, freeze the router (router.train: false), raise router.balance.coefficient, "
    "or go back to an earlier checkpoint"
)
WHAT_TO_DO_WHILE_FROZEN = (
    "the router is frozen, so what it reads has moved: lower optim.lr, train fewer layers or steps, "
    "or go back to an earlier checkpoint"
)


@dataclass(frozen=True)
class Finding:
    """One rule broken by a record. `layer` is None if the finding is about the whole model."""

    step: int
    level: Level
    rule: str
    layer: int | None
    message: str

    def record(self) -> dict[str, Any]:
        """The `finding` line of metrics.jsonl."""
        return {"kind": "finding", **asdict(self)}


@dataclass
class History:
    """What rules need from earlier records."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY_RECORDS))
    grad_norms: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY_RECORDS))
    first_routing: Record | None = None
    last_routing: Record | None = None
    lowest_loss: float | None = None  # median of RISE_RECORDS training losses
    lowest_eval: Record | None = None
    router_trains: bool = True

    @property
    def what_to_do(self) -> str:
        """About routing that changed."""
        return WHAT_TO_DO if self.router_trains else WHAT_TO_DO_WHILE_FROZEN

    def remember(self, record: Record) -> None:
        if record["kind"] == "train":
            for key, values in (("loss", self.losses), ("grad_norm", self.grad_norms)):
                value = record.get(key)
                if value is not None and math.isfinite(value):
                    values.append(value)
            if len(self.losses) >= RISE_RECORDS:
                recent = median(list(self.losses)[-RISE_RECORDS:])
                self.lowest_loss = min(recent, recent if self.lowest_loss is None else self.lowest_loss)
        if record["kind"] == "eval" and _is_number(loss := record.get("loss")):
            here = {"step": record["step"], "loss": loss, "parts": record.get("parts")}
            self.lowest_eval = min(self.lowest_eval or here, here, key=lambda one: float(one["loss"]))
        if record["kind"] == "routing":
            self.first_routing = self.first_routing or record
            self.last_routing = record


class Health:
    """Checks records in order. A finding is reported once, and again only if it gets worse or recurs.

    `state` is stored in every checkpoint, so that a resumed run keeps the first window, the usual loss and the findings
    already reported.
    """

    def __init__(self, *, router_trains: bool = True) -> None:
        self._history = History(router_trains=router_trains)
        self._standing: dict[str, dict[tuple[str, int | None], Level]] = {}

    def check(self, record: Record) -> list[Finding]:
        """The findings of this record that are new or worse than before."""
        groups = [record["kind"]]
        if record["kind"] == "routing" and any("drift" in layer for layer in record["layers"]):
            groups.append("drift")
        fresh = []
        for group in groups:
            found = [finding for rule in RULES.get(group, ()) for finding in rule(record, self._history)]
            known = self._standing.get(group, {})
            new = [f for f in found if _severity(f.level) > _severity(known.get((f.rule, f.layer)))]
            fresh += sorted(new, key=lambda f: (-_severity(f.level), f.rule))  # worst first, grouped by rule
            self._standing[group] = {(f.rule, f.layer): f.level for f in found}
        self._history.remember(record)
        return fresh

    def state(self) -> dict[str, Any]:
        """The state as JSON values."""
        standing = {
            group: [[rule, layer, level] for (rule, layer), level in known.items()]
            for group, known in self._standing.items()
        }
        return {**plain(asdict(self._history)), "standing": standing}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state` returned."""
        history = self._history = History(
            first_routing=state["first_routing"],
            last_routing=state["last_routing"],
            router_trains=self._history.router_trains,
        )
        history.lowest_loss, history.lowest_eval = state.get("lowest_loss"), state.get("lowest_eval")
        history.losses.extend(state["losses"])
        history.grad_norms.extend(state["grad_norms"])
        self._standing = {
            group: {(rule, layer): level for rule, layer, level in known} for group, known in state["standing"].items()
        }


def _severity(level: Level | None) -> int:
    return LEVELS.index(level) if level else -1


def _why(record: Record) -> str:
    if record.get("broken_weights"):
        return record["broken_weights"]
    if record["kind"] != "eval":
        return "the weights are lost or about to be; resume from the last checkpoint with a lower optim.lr"
    rows = "other rows in data.eval" if record["step"] else "another copy of the base, or other rows in data.eval"
    return f"every weight is finite, so numbers overflow on the way through the model; try {rows}"


def not_finite(record: Record, history: History) -> Iterator[Finding]:
    """A loss or gradient norm that is NaN or infinite."""
    for key in ("loss", "grad_norm", "balance_loss", "z_loss"):
        value = record.get(key)
        if value is not None and not math.isfinite(value):
            message = f"{key} is {value} at step {record['step']}: {_why(record)}"
            yield Finding(record["step"], "stop", "not_finite", None, message)
            return  # the others are usually consequences


def loss_spike(record: Record, history: History) -> Iterator[Finding]:
    """A loss far above the recent ones, relative to their spread."""
    if len(history.losses) < ENOUGH_RECORDS or not _is_number(record.get("loss")):
        return
    usual = median(history.losses)
    spread = 1.4826 * median(abs(loss - usual) for loss in history.losses)  # a standard deviation, if normal
    limit = usual + max(LOSS_SPREADS * spread, LOSS_RISE * usual, LOSS_NATS)
    if record["loss"] > limit:
        message = (
            f"loss jumped to {record['loss']:.3f} from about {usual:.3f}; if it does not come back, lower optim.lr or "
            f"lengthen optim.warmup_steps, and look at the data of this step"
        )
        yield Finding(record["step"], "warn", "loss_spike", None, message)


def loss_rise(record: Record, history: History) -> Iterator[Finding]:
    """Training losses that stay well above the run's lowest."""
    if history.lowest_loss is None or not _is_number(record.get("loss")):
        return
    recent = median([*list(history.losses)[1 - RISE_RECORDS :], record["loss"]])
    rise = recent - history.lowest_loss
    level = _level_above(TRAIN_RISE, rise / abs(history.lowest_loss)) if rise > LOSS_NATS else None
    if level:
        message = (
            f"loss is about {recent:.3f} and was about {history.lowest_loss:.3f}: training makes the model worse; "
            f"lower optim.lr, or go back to an earlier checkpoint"
        )
        yield Finding(record["step"], level, "loss_rise", None, message)


def held_out_rise(record: Record, history: History) -> Iterator[Finding]:
    """A held-out loss significantly above the run's lowest, on the same rows."""
    lowest = history.lowest_eval
    if lowest is None or not _is_number(record.get("loss")):
        return
    rise = record["loss"] - lowest["loss"]
    change = paired_change(lowest.get("parts") or (), record.get("parts") or ())
    level = _level_above(HELD_OUT_RISE, rise / abs(lowest["loss"]))
    if level and change is not None and rise > HELD_OUT_ERRORS * change[1]:
        message = (
            f"held-out loss rose to {record['loss']:.4f} from {lowest['loss']:.4f} at step {lowest['step']}, by"
            f" {rise:.4f} with standard error {change[1]:.4f}: the model gets worse on rows that it does not train on;"
            f" lower optim.lr, train fewer steps, or keep the checkpoint of step {lowest['step']}"
        )
        yield Finding(record["step"], level, "held_out_rise", None, message)


def grad_norm_spike(record: Record, history: History) -> Iterator[Finding]:
    """A gradient norm many times the median of recent ones."""
    if len(history.grad_norms) < ENOUGH_RECORDS or not _is_number(record.get("grad_norm")):
        return
    usual = median(history.grad_norms)
    if 0 < GRAD_NORM_FACTOR * usual < record["grad_norm"]:
        message = (
            f"gradient norm jumped to {record['grad_norm']:.2f} from about {usual:.2f}; if this repeats, lower "
            f"optim.lr or optim.clip_norm"
        )
        yield Finding(record["step"], "warn", "grad_norm_spike", None, message)


def expert_collapse(record: Record, history: History) -> Iterator[Finding]:
    """Effective experts of a layer far fewer than in the first window, for two windows."""
    for now, before, first in _comparable_layers(record, history):
        most = max(now["effective_experts"], before["effective_experts"])
        if level := _level_below(COLLAPSE_RATIO, most / first["effective_experts"]):
            message = (
                f"layer {now['layer']} uses {now['effective_experts']:.1f} effective experts, down from "
                f"{first['effective_experts']:.1f} at the start: its routing is collapsing; {history.what_to_do}"
            )
            yield Finding(record["step"], level, "expert_collapse", now["layer"], message)


def expert_takeover(record: Record, history: History) -> Iterator[Finding]:
    """An expert chosen by most tokens that was not at the start, for two windows."""
    for now, before, first in _comparable_layers(record, history):
        share = min(now["max_token_share"], before["max_token_share"])
        level = _level_above(TAKEOVER_SHARE, share)
        if level and share - first["max_token_share"] > TAKEOVER_GROWTH:
            message = (
                f"layer {now['layer']} sends {now['max_token_share']:.0%} of all tokens to expert "
                f"{now['busiest_expert']}; the busiest took {first['max_token_share']:.0%} at the start; "
                f"{history.what_to_do}"
            )
            yield Finding(record["step"], level, "expert_takeover", now["layer"], message)


def dead_experts(record: Record, history: History) -> Iterator[Finding]:
    """More experts without a row than in the first window, for two windows."""
    for now, before, first in _comparable_layers(record, history):
        grown = min(now["dead"], before["dead"]) - first["dead"]
        level = _level_above(DEAD_GROWTH, grown / record["experts"])
        if level and grown > DEAD_SPREADS * math.sqrt(first["dead"] + 1):
            message = (
                f"layer {now['layer']} has {now['dead']} of {record['experts']} experts without a row, "
                f"{first['dead']} at the start; {history.what_to_do}"
            )
            yield Finding(record["step"], level, "dead_experts", now["layer"], message)


def drift_from_base(record: Record, history: History) -> Iterator[Finding]:
    """Expert load that differs from the frozen base's on the same tokens."""
    for layer, drift in _drifts(record):
        if drift["load_bits"] > DRIFT_NOISE_FACTOR * drift["noise_bits"]:
            level = _level_above(DRIFT_BITS, drift["load_bits"]) or "info"
            gained = ", ".join(map(str, drift["gained"]))
            message = (
                f"layer {layer} routes the same tokens otherwise than the base: load moved {drift['load_bits']:.3f} "
                f"bits, {drift['kept']:.0%} of the choices kept, most gained by experts {gained}"
            ) + (f"; {history.what_to_do}" if level != "info" else "")
            yield Finding(record["step"], level, "drift_from_base", layer, message)


def collapse_from_base(record: Record, history: History) -> Iterator[Finding]:
    """Fewer effective experts than in the frozen base on the same tokens."""
    for layer, drift in _drifts(record):
        if level := _level_below(BASE_COLLAPSE_RATIO, drift["effective_ratio"]):
            ratio = drift["effective_ratio"]
            message = (
                f"layer {layer} uses {ratio:.0%} of the base's effective experts on the same tokens; "
                f"{history.what_to_do}"
            )
            yield Finding(record["step"], level, "collapse_from_base", layer, message)


def newly_dead_experts(record: Record, history: History) -> Iterator[Finding]:
    """Experts that the frozen base uses on the same tokens, but this model does not."""
    for layer, drift in _drifts(record):
        if level := _level_above(NEWLY_DEAD, drift["newly_dead"] / record["experts"]):
            message = (
                f"layer {layer} gives no row to {drift['newly_dead']} experts that the base uses on the same tokens; "
                f"{history.what_to_do}"
            )
            yield Finding(record["step"], level, "newly_dead_experts", layer, message)


def _level_above(limits: Sequence[tuple[float, Level]], value: float) -> Level | None:
    levels = [level for limit, level in limits if value > limit]
    return levels[-1] if levels else None


def _level_below(limits: Sequence[tuple[float, Level]], value: float) -> Level | None:
    levels = [level for limit, level in limits if value < limit]
    return levels[-1] if levels else None


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _comparable_layers(record: Record, history: History) -> Iterator[tuple[Record, Record, Record]]:
    """Each layer's measures now, in the previous window and in the first one, if all three windows are large enough."""
    first, before = history.first_routing, history.last_routing
    if first is None or before is None or before is first:
        return
    if min(record["tokens"], before["tokens"]) < WINDOW_SHARE * first["tokens"]:
        return
    earlier, start = ({layer["layer"]: layer for layer in old["layers"]} for old in (before, first))
    for now in record["layers"]:
        layer = now["layer"]
        if layer in earlier and layer in start and min(w["rows"] for w in (now, earlier[layer], start[layer])) > 0:
            yield now, earlier[layer], start[layer]


def _drifts(record: Record) -> Iterator[tuple[int, Record]]:
    for layer in record["layers"]:
        if "drift" in layer:
            yield layer["layer"], layer["drift"]


Rule = Callable[[Record, History], Iterator[Finding]]

RULES: dict[str, tuple[Rule, ...]] = {
    "train": (not_finite, loss_spike, loss_rise, grad_norm_spike),
    "eval": (not_finite, held_out_rise),
    "routing": (expert_collapse, expert_takeover, dead_experts),
    "drift": (drift_from_base, collapse_from_base, newly_dead_experts),
}
