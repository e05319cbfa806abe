"""Required fields of the lines of metrics.jsonl; a damaged line lacks them."""

import math
from collections.abc import Callable
from typing import Any

from monitoring.json_file import kind_of

OPTIONAL = ("parts",)
LEVELS = ("info", "warn", "alert", "stop")


def problem_of(record: Any) -> str | None:
    """Why a value is not a valid line of metrics.jsonl, or None. Keys that no reader uses are not checked."""
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return "not an object with a `kind`"
    if "step" in record and not _is_count(record["step"]):
        return f"`step` is {_shown(record['step'])}, not a whole number from 0"
    for key, is_right, what in NEEDED.get(record["kind"], ()):
        if key not in record and key not in OPTIONAL:
            return f"a line of kind {record['kind']} without `{key}`"
        if key in record and not is_right(record[key]):
            return f"`{key}` is {_shown(record[key])}, not {what}"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    """Null stands for a number that is not finite."""
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_level(value: Any) -> bool:
    return value in LEVELS


def _are_parts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(part, list) and len(part) == 2 and _is_number(part[0]) and _is_count(part[1]) for part in value
    )


def _are_layers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(layer, dict) and _is_count(layer.get("layer")) for layer in value)


def _shown(value: Any) -> str:
    return repr(value)[:40] if value is None or isinstance(value, bool | int | float | str) else kind_of(value)


Check = tuple[str, Callable[[Any], bool], str]
_STEP: Check = ("step", _is_count, "a whole number from 0")
NEEDED: dict[str, tuple[Check, ...]] = {
    "eval": (_STEP, ("loss", _is_number, "a number"), ("parts", _are_parts, "pairs of a loss and a number of tokens")),
    "finding": (_STEP, ("level", _is_level, f"one of {', '.join(LEVELS)}"), ("message", _is_text, "text")),
    "routing": (_STEP, ("layers", _are_layers, "a list of layers")),
    "checkpoint": (_STEP,),
}
