"""Messages about invalid settings: pydantic's errors converted to sentences with a hint.

Derived from the JSON schema of the settings, so a new section or key needs no change here.
"""

import difflib
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from pydantic_core import ErrorDetails

from finetune.recipe.familiar import familiar, familiar_value

_SHOWN_CHARACTERS = 60
_ITEM = "N"  # placeholder for list indices in setting names


def settings_of(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The JSON schema of every setting by dotted key, sections before their keys; list items are `key.N`."""
    settings: dict[str, dict[str, Any]] = {}

    def add(key: str, part: dict[str, Any]) -> None:
        whole = {**_meaning(part, schema), **part}
        settings[key] = whole
        if "items" in whole:
            add(f"{key}.{_ITEM}", whole["items"])
        for name, inside in whole.get("properties", {}).items():
            add(f"{key}.{name}" if key else name, inside)

    add("", schema)
    return settings


def sentence(error: ErrorDetails, settings: dict[str, dict[str, Any]]) -> str:
    """One validation error as a sentence for the user."""
    key = ".".join(_ITEM if isinstance(part, int) else part for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key{_elsewhere(key, settings)}"
    setting = settings[key]
    if error["type"] == "missing":
        return f"missing; {setting['description'].splitlines()[0]}"
    choices = choices_of(setting)
    if choices:
        value = str(error["input"])
        answer = familiar_value(key, value)
        hint = f"; {answer}" if answer else did_you_mean(value, choices)
        return f"{shown(error['input'])} is not one of {', '.join(choices)}{hint}"
    if error["type"] == "model_type" and isinstance(error["input"], str) and "name" in setting["properties"]:
        return f"a section; write {key}: {{name: {error['input']}}} if that is its kind"
    return _SENTENCES[error["type"]](setting, error.get("ctx", {}), shown(error["input"]))


def table(schema: dict[str, Any]) -> str:
    """Every key with its unit or choices, default and meaning, as lines of text."""
    settings = settings_of(schema)
    lines = []
    for key, setting in settings.items():
        if not key or (key.endswith(f".{_ITEM}") and "properties" not in setting):
            continue
        meaning = setting["description"]
        if "properties" in setting:
            lines += ["", f"{key}: {' '.join(meaning.split())}"]
            continue
        lines.append(f"  {key}  [{_kind(setting)}; {_default(setting)}]")
        lines += textwrap.wrap(" ".join(meaning.split()), 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines).strip() + "\n"


def choices_of(setting: dict[str, Any]) -> list[str]:
    """The allowed values of a setting, in order; empty if it has no fixed choices."""
    return list(map(str, setting.get("enum", [setting["const"]] if "const" in setting else [])))


def shown(value: object) -> str:
    """A value in the notation of the recipe."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return f"a section ({', '.join(value)})" if value else "an empty section"
    if isinstance(value, tuple):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the known word most similar to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _kind(setting: dict[str, Any]) -> str:
    """The unit of a setting, or its choices, or its type."""
    choices = choices_of(setting) or choices_of(setting.get("items", {}))
    if choices:
        return " | ".join(choices)
    limits = {"exclusiveMinimum": "> ", "minimum": ">= ", "exclusiveMaximum": "< ", "maximum": "<= "}
    bounds = [f"{sign}{setting[limit]:,}" for limit, sign in limits.items() if limit in setting]
    types = {
        "integer": "whole number",
        "number": "number",
        "boolean": "true | false",
        "string": "text",
        "array": "list",
    }
    return " ".join([setting.get("unit", types[setting["type"]]), ", ".join(bounds)]).strip()


def _default(setting: dict[str, Any]) -> str:
    if "default" not in setting:
        return "required"
    value = setting["default"]
    return f"default {' '.join(value) or 'none'}" if isinstance(value, list) else f"default {shown(value)}"


def _meaning(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema part of a setting, with references and `or null` resolved."""
    options = [option for option in part.get("anyOf", []) if option != {"type": "null"}]
    if options:
        one_word = options[1:] == [options[0].get("items")]
        assert len(options) == 1 or one_word, "a setting is one kind of thing, or null, or a list or its only word"
        return {**options[0], **_meaning(options[0], schema)}
    if "$ref" in part:
        section = schema["$defs"][part["$ref"].rpartition("/")[2]]
        return {"properties": section["properties"], "description": section["description"]}
    return {}


def _elsewhere(key: str, settings: dict[str, dict[str, Any]]) -> str:
    """A hint for an unknown key: where it exists, its name here, or similar keys."""
    section, _, name = key.rpartition(".")
    others = [other for other in settings if other.rpartition(".")[2] == name and _ITEM not in other.split(".")]
    if others:
        return f" (there is {' and '.join(others)})"
    siblings = list(settings[section]["properties"])
    swapped = [sibling for sibling in siblings if sorted(sibling) == sorted(name)]
    if swapped:  # `rl` for `lr`
        return did_you_mean(name, swapped)
    if answer := familiar(name):
        return f"; {answer}"
    return did_you_mean(name, siblings) or f"; known here: {', '.join(siblings)}"


def _section(setting: dict[str, Any], _limits: dict[str, Any], found: str) -> str:
    return f"expected a section with keys such as {', '.join(list(setting['properties'])[:3])}, found {found}"


_Sentence = Callable[[dict[str, Any], dict[str, Any], str], str]
_SENTENCES: dict[str, _Sentence] = {
    "int_type": lambda setting, limits, found: f"expected a whole number, found {found}",
    "float_type": lambda setting, limits, found: f"expected a number, found {found}",
    "bool_type": lambda setting, limits, found: f"expected true or false, found {found}",
    "string_type": lambda setting, limits, found: (
        f"expected text, found {found}" + ("; put it in quotes" if not found.startswith("a") else "")
    ),
    "tuple_type": lambda setting, limits, found: f"expected a list, found {found}",
    "model_type": _section,
    "greater_than": lambda setting, limits, found: f"must be greater than {limits['gt']:g}, found {found}",
    "greater_than_equal": lambda setting, limits, found: f"must be at least {limits['ge']:g}, found {found}",
    "less_than": lambda setting, limits, found: f"must be less than {limits['lt']:g}, found {found}",
    "less_than_equal": lambda setting, limits, found: f"must be at most {limits['le']:g}, found {found}",
    "finite_number": lambda setting, limits, found: f"expected a finite number, found {found}",
    "too_short": lambda setting, limits, found: "needs at least one item",
    "string_too_long": lambda setting, limits, found: (
        f"may have at most {limits['max_length']} characters, found {found}"
    ),
    "path": lambda setting, limits, found: limits["problem"],
    "string_too_short": lambda setting, limits, found: "must not be empty",
    "string_pattern_mismatch": lambda setting, limits, found: (
        f"may hold letters, digits, '.', '_' and '-' and starts with a letter or digit, found {found}"
    ),
}
