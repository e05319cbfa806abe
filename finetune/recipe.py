"""Every setting of a run: its type, its unit, its limits and what it does; and how a recipe file becomes one.

A recipe is checked as a whole before anything starts: all mistakes are reported at once, each with its line. Settings
that contradict each other are mistakes too; one without effect is a note (finetune/recipe_notes.py). Imports no torch.
"""

import functools
import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from finetune import recipe_rules, wording, yaml_tree
from finetune.paths import expanded, path_problem
from finetune.recipe_secrets import secret_mistakes, without_secrets
from finetune.recipe_sections import (
    Checkpoint,
    Data,
    Kernels,
    Lora,
    Model,
    Monitor,
    Optim,
    Output,
    Parallel,
    Router,
    Section,
    Train,
)
from finetune.yaml_tree import Mistake, Node, Plain
from monitoring.file_search import SearchError, matches

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
LONGEST_NAME = 100
CHECKOUT = Path(__file__).resolve().parents[1]


class RecipeError(ValueError):
    """A recipe that cannot be run: one line for each mistake, with its place, its key and what to do."""


class Recipe(Section):
    """Every setting of one run."""

    name: Annotated[str, Field(pattern=f"^{NAME}$", max_length=LONGEST_NAME)] = ""
    """Name of the run and of its folder; the recipe's file name by default."""
    model: Model
    """The model that is trained."""
    data: Data
    """What is trained on, and what is only measured."""
    train: Train = Train()
    """How much is trained, and in what portions."""
    optim: Optim = Optim()
    """The optimizer and its schedule."""
    lora: Lora | None = Lora()
    """Low-rank adapters on a frozen base; null trains every parameter of the model instead."""
    router: Router = Router()
    """The routers of the experts."""
    parallel: Parallel = Parallel()
    """How the work is divided over processes."""
    kernels: Kernels = Kernels()
    """Which form of a computation is used where there are several."""
    monitor: Monitor = Monitor()
    """What is watched beside the loss."""
    checkpoint: Checkpoint = Checkpoint()
    """What a run can be continued from."""
    output: Output = Output()
    """Where results go."""

    @property
    def packs_per_micro_batch(self) -> int:
        """Training sequences that one rank forwards at once."""
        return self.train.micro_batch_tokens // self.train.sequence_tokens

    @property
    def drift_every_steps(self) -> int:
        """How often drift is measured: never without adapters, which alone leave a frozen base to compare with."""
        return self.monitor.drift_every_steps if self.lora is not None else 0

    def accumulation(self, ranks: int) -> int:
        """Micro-batches that each of `ranks` ranks forwards in one optimizer step.

        Raises:
            RecipeError: the global batch does not divide evenly over so many ranks.
        """
        problem = recipe_rules.batch_problem(self, ranks)
        if problem is not None:
            raise RecipeError(f"{self.name}: train.global_batch_tokens: {problem}")
        return self.train.global_batch_tokens // (self.train.micro_batch_tokens * ranks)

    def check_ranks(self, ranks: int, num_experts: int) -> None:
        """Refuse a number of ranks, or a model, that the recipe's expert parallel size does not fit.

        Raises:
            RecipeError: says which number parallel.expert does not divide.
        """
        expert = self.parallel.expert
        for whole, what in ((ranks, "ranks of this run"), (num_experts, "experts of the model")):
            if whole % expert:
                raise RecipeError(f"{self.name}: parallel.expert: {expert} does not divide the {whole} {what}")


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, root: Path = CHECKOUT, check_paths: bool = True
) -> Recipe:
    """The recipe in a YAML file, after `section.key=value` overrides.

    Args:
        root: folder that relative paths are looked up in when the current folder does not have them.
        check_paths: whether data and model folders must exist on this machine.

    Raises:
        RecipeError: everything that is wrong with it, one line each.
    """
    path = Path(path)
    if not os.path.exists(path):  # which, unlike Path.exists, is False for what cannot be seen
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
    for keys, rule in recipe_rules.RULES:
        if not any(yaml_tree.touches(key, bad) for key in keys for bad in wrong):
            problem = rule(recipe)
            if problem is not None:
                mistakes.append(Mistake(_blamed(tree, keys), keys[0], problem))
    if check_paths:
        mistakes += [mistake for mistake in _missing_paths(tree, root) if mistake.key not in wrong]
    if mistakes:
        raise _error(mistakes, tree)
    return recipe


def resolve(path: str, root: Path = CHECKOUT) -> Path | None:
    """The existing file, folder or glob that `path` means: from the current folder, else from `root`; or None."""
    if path_problem(path) is not None:
        return None
    given = expanded(path)
    for place in (Path.cwd() / given, root / given):
        try:
            if os.path.exists(place) or (glob.has_magic(path) and any(matches(str(place)))):
                return Path(os.path.normpath(place))
        except SearchError:  # more than can be looked through; whoever reads it says so
            return Path(os.path.normpath(place))
    return None


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; reads back as an equal recipe."""
    return yaml_tree.write(recipe.model_dump(mode="json"))


@functools.cache
def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors."""
    return Recipe.model_json_schema()


def schema_text() -> str:
    """What recipes/schema.json holds; editors read it through the first line of a recipe."""
    return json.dumps(json_schema(), indent=2) + "\n"


def explain() -> str:
    """Every key with its unit or choices, its default and what it does, as lines of text."""
    return wording.table(json_schema())


def _name_of(path: Path, tree: Node, mistakes: list[Mistake]) -> str:
    """The name that a recipe takes from its file; one that no run can have is a mistake."""
    if re.fullmatch(NAME, path.stem) and len(path.stem) <= LONGEST_NAME:
        return path.stem
    sentence = (
        f"missing, and the file's own, {wording.shown(path.stem)}, cannot be that of a run; write one of at most"
        f" {LONGEST_NAME} letters, digits, '.', '_' and '-' that starts with a letter or digit"
    )
    mistakes.append(Mistake(tree.place, "name", sentence))
    return "x"


def _validate(tree: Node, mistakes: list[Mistake]) -> Recipe:
    """The recipe in the tree; what is wrong joins the mistakes and is left out, so that the rest can be checked."""
    plain = tree.plain()
    assert isinstance(plain, dict)
    for required in ("model", "data"):
        plain.setdefault(required, {})
    try:
        return Recipe.model_validate(plain)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    read, settings = list(mistakes), wording.settings_of(json_schema())
    for found in errors:
        key, place = ".".join(map(str, found["loc"])), tree.place_of(found["loc"])
        reported = any(mistake.place == place and yaml_tree.touches(key, mistake.key) for mistake in read)
        only_its_items_are_wrong = found["type"] == "too_short" and found["input"]
        if not reported and not only_its_items_are_wrong:
            mistakes.append(Mistake(place, key, wording.sentence(found, settings)))
        yaml_tree.leave_out(plain, found["loc"])
    for section, key, stand_in in _STAND_INS:
        inside = plain.setdefault(section, {})
        assert isinstance(inside, dict)
        inside.setdefault(key, stand_in)
    return Recipe.model_validate(plain)


def _blamed(tree: Node, keys: Sequence[str]) -> yaml_tree.Place:
    """Where a contradiction between `keys` came from: the last `--set` among them, else the first key in the file.

    The file was right before it was overridden.
    """
    paths = [tuple(key.split(".")) for key in keys]
    places = [tree.place_of(path) for path in paths if tree.at(path) is not None]
    return next((place for place in places if place.is_override), places[0] if places else tree.place)


def _error(mistakes: list[Mistake], tree: Node | None = None) -> RecipeError:
    by_line = sorted(mistakes, key=lambda mistake: (mistake.place.line == 0, mistake.place.line))
    return RecipeError(without_secrets("\n".join(map(str, by_line)), tree))


def _missing_paths(tree: Node, root: Path) -> Iterator[Mistake]:
    """Sources, and a model folder, that are not on this machine."""
    for key, place, path in _written_paths(tree):
        found = resolve(path, root)
        if path_problem(path) is not None:
            continue  # said of the setting itself
        if found is None and not (key == "model.path" and is_hub_id(path, root)):
            yield Mistake(place, key, f"'{path}' exists neither in the current folder nor in {root}")
        elif found is not None and key == "model.path" and not found.is_dir():
            yield Mistake(place, key, f"'{path}' is a file; give the folder of the checkpoint")


def _written_paths(tree: Node) -> Iterator[tuple[str, yaml_tree.Place, str]]:
    """Every path of the tree that must exist, whatever else is wrong: dotted key, place, text."""
    nodes = {"model.path": tree.at(("model", "path")), "lora.init_from": tree.at(("lora", "init_from"))}
    for part in ("train", "eval"):
        sources = tree.at(("data", part))
        if sources is not None and isinstance(sources.value, list):
            nodes |= {f"data.{part}.{i}.path": source.child("path") for i, source in enumerate(sources.value)}
    for key, node in nodes.items():
        if node is not None and isinstance(node.value, str) and node.value:
            yield key, node.place, node.value


def is_hub_id(path: str, root: Path = CHECKOUT) -> bool:
    """Whether `path`, which is not on this machine, reads as owner/name on the hub rather than as a folder."""
    owner, slash, name = path.partition("/")
    words = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
    return bool(slash and words.fullmatch(owner) and words.fullmatch(name)) and resolve(owner, root) is None


# Stand in for required settings that are wrong, while the rest is checked.
_STAND_INS: tuple[tuple[str, str, Plain], ...] = (
    ("model", "path", "-"),
    ("data", "train", ({"path": "-"},)),
)
