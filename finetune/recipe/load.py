"""Conversion between recipe files and `Recipe`; all mistakes are reported together. Imports no torch."""

import functools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.recipe import messages, yaml_tree
from finetune.recipe.paths import CHECKOUT, is_hub_id, path_problem, resolve
from finetune.recipe.recipe import LONGEST_NAME, NAME, Recipe, RecipeError
from finetune.recipe.rules import RULES
from finetune.recipe.secret_values import secret_mistakes, without_secrets
from finetune.recipe.yaml_tree import Mistake, Node, Plain


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, root: Path = CHECKOUT, check_paths: bool = True
) -> Recipe:
    """Load the recipe in a YAML file and apply `section.key=value` overrides.

    Args:
        root: folder for relative paths that do not exist in the current folder.
        check_paths: whether data and model folders must exist on this machine.

    Raises:
        RecipeError: all mistakes, one a line.
    """
    path = Path(path)
    if not os.path.exists(path):  # unlike Path.exists, it is False for an inaccessible path
        path = resolve(str(path), root) or path
    tree, mistakes = yaml_tree.read_file(path)
    if tree is None:
        raise _error(mistakes)
    yaml_tree.apply_overrides(tree, overrides, mistakes)
    assert isinstance(tree.value, dict)
    if "name" not in tree.value:
        tree.value["name"] = Node(_name_of(path, tree, mistakes), tree.place)
    mistakes += secret_mistakes(tree)
    recipe = _validate(tree, mistakes)
    wrong = [mistake.key for mistake in mistakes]
    for keys, rule in RULES:
        if not any(yaml_tree.touches(key, bad) for key in keys for bad in wrong):
            problem = rule(recipe)
            if problem is not None:
                mistakes.append(Mistake(_blamed(tree, keys), keys[0], problem))
    if check_paths:
        mistakes += [mistake for mistake in _missing_paths(tree, root) if mistake.key not in wrong]
    if mistakes:
        raise _error(mistakes, tree)
    return recipe


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, including defaults; loading it gives an equal recipe."""
    return yaml_tree.write(recipe.model_dump(mode="json"))


@functools.cache
def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors."""
    return Recipe.model_json_schema()


def schema_text() -> str:
    """The contents of recipes/schema.json, which the first line of a recipe names for editors."""
    return json.dumps(json_schema(), indent=2) + "\n"


def explain() -> str:
    """Every key with its unit or choices, default and meaning, as lines of text."""
    return messages.table(json_schema())


def _name_of(path: Path, tree: Node, mistakes: list[Mistake]) -> str:
    """The recipe's name, taken from its file name; an invalid one is added to the mistakes."""
    if re.fullmatch(NAME, path.stem) and len(path.stem) <= LONGEST_NAME:
        return path.stem
    sentence = (
        f"missing, and the file's own, {messages.shown(path.stem)}, cannot be that of a run; write one of at most"
        f" {LONGEST_NAME} letters, digits, '.', '_' and '-' that starts with a letter or digit"
    )
    mistakes.append(Mistake(tree.place, "name", sentence))
    return "x"


def _validate(tree: Node, mistakes: list[Mistake]) -> Recipe:
    """Validate the tree. Invalid values are added to the mistakes and left out, so that the rest can be checked."""
    plain = tree.plain()
    assert isinstance(plain, dict)
    for required in ("model", "data"):
        plain.setdefault(required, {})
    try:
        return Recipe.model_validate(plain)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    read, settings = list(mistakes), messages.settings_of(json_schema())
    for found in errors:
        key, place = ".".join(map(str, found["loc"])), tree.place_of(found["loc"])
        reported = any(mistake.place == place and yaml_tree.touches(key, mistake.key) for mistake in read)
        only_its_items_are_wrong = found["type"] == "too_short" and found["input"]
        if not reported and not only_its_items_are_wrong:
            mistakes.append(Mistake(place, key, messages.sentence(found, settings)))
        yaml_tree.leave_out(plain, found["loc"])
    for section, key, stand_in in _STAND_INS:
        inside = plain.setdefault(section, {})
        assert isinstance(inside, dict)
        inside.setdefault(key, stand_in)
    return Recipe.model_validate(plain)


def _blamed(tree: Node, keys: Sequence[str]) -> yaml_tree.Place:
    """The place to report for a contradiction between `keys`: the last `--set` among them, else the first in the file.

    An override is reported first, since the file was valid without it.
    """
    paths = [tuple(key.split(".")) for key in keys]
    places = [tree.place_of(path) for path in paths if tree.at(path) is not None]
    return next((place for place in places if place.is_override), places[0] if places else tree.place)


def _error(mistakes: list[Mistake], tree: Node | None = None) -> RecipeError:
    by_line = sorted(mistakes, key=lambda mistake: (mistake.place.line == 0, mistake.place.line))
    return RecipeError(without_secrets("\n".join(map(str, by_line)), tree))


def _missing_paths(tree: Node, root: Path) -> Iterator[Mistake]:
    """Data sources and a model folder that do not exist on this machine."""
    for key, place, path in _written_paths(tree):
        found = resolve(path, root)
        if path_problem(path) is not None:
            continue  # reported for the setting itself
        if found is None and not (key == "model.path" and is_hub_id(path, root)):
            yield Mistake(place, key, f"'{path}' exists neither in the current folder nor in {root}")
        elif found is not None and key == "model.path" and not found.is_dir():
            yield Mistake(place, key, f"'{path}' is a file; give the folder of the checkpoint")


def _written_paths(tree: Node) -> Iterator[tuple[str, yaml_tree.Place, str]]:
    """Every path in the tree that must exist, as dotted key, place and text; other mistakes are ignored."""
    nodes = {"model.path": tree.at(("model", "path")), "lora.init_from": tree.at(("lora", "init_from"))}
    for part in ("train", "eval"):
        sources = tree.at(("data", part))
        if sources is not None and isinstance(sources.value, list):
            nodes |= {f"data.{part}.{i}.path": source.child("path") for i, source in enumerate(sources.value)}
    for key, node in nodes.items():
        if node is not None and isinstance(node.value, str) and node.value:
            yield key, node.place, node.value


# Values for invalid required settings, so that the rest can be checked.
_STAND_INS: tuple[tuple[str, str, Plain], ...] = (
    ("model", "path", "-"),
    ("data", "train", ({"path": "-"},)),
)
