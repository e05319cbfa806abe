"""Recipes: what is read, what is refused and how it is said."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from ruamel.yaml import YAML

from data import sources
from finetune.recipe import load, paths, yaml_tree
from finetune.recipe import messages as wording
from finetune.recipe import recipe as recipes
from finetune.recipe import sections as recipe_sections
from finetune.recipe.load import dump, json_schema, load_recipe
from finetune.recipe.notes import notes
from finetune.recipe.paths import resolve
from finetune.recipe.recipe import Recipe, RecipeError

SETTINGS = wording.settings_of(json_schema())
KEYS = [key for key, setting in SETTINGS.items() if key and "properties" not in setting and not key.endswith(".N")]
SMALLEST = "model: {path: Qwen/Qwen3-Coder-Next}\ndata: {train: [{path: rows.jsonl}]}\ntrain: {steps: 100}\n"
EVAL = SMALLEST.replace("data: {", "data: {eval: [{path: held.jsonl}], ")
RECIPES = sorted((paths.CHECKOUT / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder that holds one source of rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    return tmp_path


def read(text: str, *overrides: str, **options: Any) -> Recipe:
    Path("x.yaml").write_text(text, encoding="utf-8")
    return load_recipe(Path("x.yaml"), overrides, **options)


def mistakes(text: str, *overrides: str, **options: Any) -> list[str]:
    with pytest.raises(RecipeError) as error:
        read(text, *overrides, **options)
    return str(error.value).splitlines()


# What is read


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_this_checkout_load_from_any_folder(path: Path) -> None:
    recipe = load_recipe(Path("recipes") / path.name)
    assert recipe.name == path.stem
    assert recipe.accumulation(recipe.parallel.ranks) >= 1


def test_smallest_recipe_takes_its_name_from_the_file_and_the_rest_from_the_defaults() -> None:
    recipe = read(SMALLEST)
    assert (recipe.name, recipe.train.steps, recipe.lora, recipe.optim) == (
        "x",
        100,
        recipe_sections.Lora(),
        recipe_sections.Optim(),
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5e5", 5e5),
        ("2.", 2.0),
        (".5", 0.5),
        ("-1.5e+3", -1500.0),
        ("0", 0),
        ("-7", -7),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("16_384", 16384),
        ("_1", "_1"),
        ("1__0", "1__0"),
        ("1_0.5", "1_0.5"),
        ("010x", "010x"),
        ("1:30", "1:30"),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("off", "off"),
        ("Yes", "Yes"),
        ("~", None),
        ("null", None),
        ("-.inf", float("-inf")),
        ("2026-01-01", "2026-01-01"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_scalars_mean_what_yaml_12_says(text: str, value: object) -> None:
    found = yaml_tree.scalar(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["1", "-3", "0o17", "0x1F", "0.25", "1.5e3", "true", "null", "~", "no", "on", "x y"])
def test_scalars_agree_with_another_yaml_12_reader(text: str) -> None:
    assert yaml_tree.scalar(text) == YAML(typ="safe", pure=True).load(text)


def test_a_list_of_words_may_be_its_only_word() -> None:
    for key, word in (("lora.targets", "all-linear"), ("lora.targets", "q_proj"), ("train.recompute", "full")):
        section, name = key.split(".")
        assert getattr(getattr(read(SMALLEST, f"{key}={word}"), section), name) == (word,)


def test_quoted_numbers_stay_text() -> None:
    assert read(SMALLEST + "name: '7'\n").name == "7"
    assert mistakes(SMALLEST + "optim: {lr: '1e-4'}\n") == ["x.yaml:4: optim.lr: expected a number, found '1e-4'"]


# What is refused


def test_all_mistakes_come_at_once_in_the_order_of_lines() -> None:
    text = """\
model: {path: rows.jsonl}
data:
  train:
    - {path: nowhere.jsonl, format: chta}
    - path: rows.jsonl
      formt: chat
train:
  steps: 010x
  sequence_tokens: 16_384
  micro_batch_tokens: 20000
  global_batch_tokens: 40000
optim:
  schedule: cosin
  warmup_steps: 1.5
  lr: 1e4
lr: 1e-4
router: {train: no}
"""
    root = paths.CHECKOUT
    assert mistakes(text) == [
        "x.yaml:1: model.path: 'rows.jsonl' is a file; give the folder of the checkpoint",
        "x.yaml:4: data.train.0.format: 'chta' is not one of auto, chat, sharegpt, alpaca, prompt_completion, text"
        " (did you mean 'chat'?)",
        f"x.yaml:4: data.train.0.path: 'nowhere.jsonl' exists neither in the current folder nor in {root}",
        "x.yaml:6: data.train.1.formt: unknown key (did you mean 'format'?)",
        "x.yaml:8: train.steps: expected a whole number, found '010x'",
        "x.yaml:10: train.micro_batch_tokens: 20000 is not a multiple of train.sequence_tokens; 16384 is",
        "x.yaml:13: optim.schedule: 'cosin' is not one of constant, constant_with_warmup, linear, cosine, wsd"
        " (did you mean 'cosine'?)",
        "x.yaml:14: optim.warmup_steps: expected a whole number, found 1.5",
        "x.yaml:15: optim.lr: must be at most 1, found 10000.0",
        "x.yaml:16: lr: unknown key (there is optim.lr)",
        "x.yaml:17: router.train: expected true or false, found 'no'",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "x.yaml:1: is empty"),
        ("# nothing\n", "x.yaml:1: is empty"),
        ("- a\n", "x.yaml:1: expected sections such as 'model:' and 'train:' at the top level"),
        ("a:\n\tb: 1\n", "x.yaml:2: holds a tab; YAML wants spaces"),
        ("a: 1\n---\nb: 1\n", "x.yaml:2: a second document starts here; a recipe is one"),
        ("%YAML 1.1\n---\na: 1\n", "x.yaml:2: directives (%YAML, %TAG) are not read; delete them"),
        ("a: 1\n? [1]\n: 2\n", "x.yaml:2: a key must be a single word"),
        ("[" * 5000, "x.yaml:1: nested more than 20 levels deep"),
    ],
)
def test_files_that_are_no_settings(text: str, expected: str) -> None:
    assert mistakes(text) == [expected]


def test_unreadable_yaml_names_its_line() -> None:
    (only,) = mistakes("model: {path: x}\ntrain: steps: 5\n")
    assert only.startswith("x.yaml:2: not readable as YAML (mapping values are not allowed here); look at")


@pytest.mark.parametrize(
    ("addition", "expected"),
    [
        ("optim:\n  lr: 1e-4\n  lr: 2e-4\n", "x.yaml:6: optim.lr: set before, on line 5; keep one"),
        ("optim: {}\noptim: {}\n", "x.yaml:5: optim: set before, on line 4; keep one"),
        ("lora:\n", "x.yaml:4: lora: has no value; write one (null if nothing is meant) or delete the line"),
        ("lora: &l {rank: 4}\n", "x.yaml:4: lora: anchors (&) and aliases (*) are not read; write the value out"),
        ("name: !!str x\n", "x.yaml:4: name: tags (!) are not read; delete it"),
        (
            "lora: {rank: 4, <<: {alpha: 2}}\n",
            "x.yaml:4: lora.<<: merge keys are not read; write the settings out",
        ),
        ("name: 5\n", "x.yaml:4: name: expected text, found 5; put it in quotes"),
        (
            "optim: null\n",
            "x.yaml:4: optim: expected a section with keys such as name, lr, warmup_steps, found null",
        ),
        ("checkpoint: {keep: 0}\n", "x.yaml:4: checkpoint.keep: must be greater than 0, found 0"),
        ("optim: {beta1: 1}\n", "x.yaml:4: optim.beta1: must be less than 1, found 1"),
        ("optim: {clip_norm: .inf}\n", "x.yaml:4: optim.clip_norm: expected a finite number, found inf"),
        ("lora: {targets: []}\n", "x.yaml:4: lora.targets: needs at least one item"),
        (
            "lora: {targets: [q_porj]}\n",
            "x.yaml:4: lora.targets.0: 'q_porj' is not one of q_proj, k_proj, v_proj, o_proj, in_proj_qkvz, in_proj_ba,"
            " out_proj, shared_expert, experts, all-linear (did you mean 'q_proj'?)",
        ),
        ("parallel: {zero_stage: 4}\n", "x.yaml:4: parallel.zero_stage: 4 is not one of 0, 1, 2, 3"),
        (
            "parallel: {zero_stage: 3}\n",
            "x.yaml:4: parallel.zero_stage: stage 3 divides the weights that every rank holds, which beside the experts"
            " are a thirtieth of the model",
        ),
        (
            "parallel: {zero_stage: 0, offload: cpu}\n",
            "x.yaml:4: parallel.offload: needs the state divided over the ranks; set parallel.zero_stage to 1 or 2",
        ),
        ("parallel: {offload: nvme}\n", "x.yaml:4: parallel.offload_path: offload nvme needs a folder on a fast"),
        ("optim: {xyzzy: 1}\n", "x.yaml:4: optim.xyzzy: unknown key; known here: "),
    ],
)
def test_mistakes_of_one_line(addition: str, expected: str) -> None:
    (only,) = mistakes(SMALLEST + addition)
    assert only.startswith(expected)


def test_what_is_missing_is_named_with_its_meaning() -> None:
    assert mistakes("name: x\n") == [
        "x.yaml:1: model.path: missing; Folder of the checkpoint, or the hub id of one (Qwen/Qwen3-Coder-Next).",
        "x.yaml:1: data.train: missing; Sources of the training rows: a list such as [{path: rows.jsonl}].",
        "x.yaml:1: train.steps: missing; give it, or train.epochs: 1 to train once on all of the data",
    ]


@pytest.mark.parametrize("key", [key for key in SETTINGS if key])
def test_no_value_of_any_key_escapes_as_anything_but_a_recipe_or_plain_words(key: str) -> None:
    text = EVAL.replace("held.jsonl", "rows.jsonl")
    for junk in (
        "null",
        "''",
        "no",
        "-1",
        "1.5",
        "1e400",
        ".nan",
        "true",
        "[]",
        "[[1]]",
        "{}",
        "{a: {b: 1}}",
        "9" * 99,
    ):
        try:
            read(text, f"{key.replace('.N', '.0')}={junk}", check_paths=False)
        except RecipeError as error:
            for line in str(error).splitlines():
                assert re.match(r"(--set .*|x\.yaml:\d+): [a-z_.0-9]+: [^A-Z]", line), line
                assert not re.search(r"pydantic|Input should|valid (integer|number|string)|_type|instance", line), line


# Rules between settings

PACK = "train.sequence_tokens=512", "train.micro_batch_tokens=1024"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ("train.micro_batch_tokens=5000", "train.global_batch_tokens=10000"),
            "--set train.micro_batch_tokens=5000: train.micro_batch_tokens: 5000 is not a multiple of"
            " train.sequence_tokens; 4096 is",
        ),
        (
            (*PACK, "train.global_batch_tokens=5000"),
            "train.global_batch_tokens: 5000 is not a multiple of train.micro_batch_tokens x 1 rank (1024 x 1);"
            " 5120 is",
        ),
        (
            (*PACK, "train.global_batch_tokens=3072", "parallel.ranks=2"),
            "train.global_batch_tokens: 3072 is not a multiple of train.micro_batch_tokens x 2 ranks (1024 x 2)",
        ),
        (("parallel.ranks=2", "parallel.expert=3"), "parallel.expert: 3 does not divide parallel.ranks, which is 2"),
        (("train.epochs=2",), "train.steps: 100 and train.epochs 2 both say how long the run is; keep one, and set"),
        (("train.steps=0",), "train.steps: missing; give it, or train.epochs: 1 to train once on all of the data"),
        (
            ("optim.warmup_steps=5", "optim.warmup_ratio=0.1"),
            "optim.warmup_ratio: 0.1 and optim.warmup_steps 5 both say how long it is; keep one, and set the other to",
        ),
        (("lora.targets=[q_proj, k_proj, q_proj]",), "lora.targets: q_proj is listed twice"),
        (
            ("lora.targets=[q_proj, experts]", "lora.dropout=0.1"),
            "lora.dropout: adapters of the routed experts have no dropout; set it to 0, or take experts out of",
        ),
        (("data.eval=[{path: rows.jsonl}]",), "data.eval: rows.jsonl is in data.train too; held-out rows must not"),
    ],
)
def test_settings_that_contradict(overrides: tuple[str, ...], expected: str) -> None:
    (only,) = mistakes(SMALLEST, *overrides)
    assert expected in only
    assert only.startswith("--set ")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("optim.warmup_steps=101",), "optim.warmup_steps: the warm-up of 101 steps is cut to the 100 of the run"),
        (("optim.warmup_steps=10", "train.steps=1"), "optim.warmup_steps: the warm-up of 10 steps is cut to the 1 of"),
        (
            ("optim.schedule=constant", "optim.final_lr_fraction=0.5"),
            "optim.final_lr_fraction: no effect on a constant schedule",
        ),
        (("optim.decay_ratio=0.5",), "optim.decay_ratio: no effect unless optim.schedule is wsd"),
        (("router.balance.kind=micro",), "router.balance.kind: no effect while router.balance.coefficient is 0"),
        (("lora=null", "monitor.drift_every_steps=5"), "monitor.drift_every_steps: no effect without lora: no frozen"),
        (("monitor.probe_tokens=512",), "monitor.probe_tokens: no effect because drift of the routing is not measured"),
        (("monitor.wandb=off", "monitor.project=x"), "monitor.project: no effect while monitor.wandb is off"),
        (("train.eval_every_steps=5",), "train.eval_every_steps: no effect without data.eval"),
        (("train.early_stopping_patience=2",), "train.early_stopping_patience: no effect without data.eval"),
        (
            ("train.early_stopping_threshold=0.1",),
            "train.early_stopping_threshold: no effect while train.early_stopping_patience is 0",
        ),
        (("checkpoint.keep_best=true",), "checkpoint.keep_best: no effect without data.eval"),
        (("parallel.offload_path=/x",), "parallel.offload_path: no effect while parallel.offload is none"),
        (
            ("data.train.0.format=text", "data.over_long=stop"),
            "data.over_long: no effect on text, which is split into sequences",
        ),
    ],
)
def test_a_setting_without_effect_is_a_note(overrides: tuple[str, ...], expected: str) -> None:
    (only,) = notes(read(SMALLEST, *overrides))
    assert only.startswith(expected)


def test_a_recipe_in_which_every_setting_counts_has_no_notes() -> None:
    for path in RECIPES:
        assert notes(load_recipe(path)) == []


def test_drift_is_never_due_without_a_frozen_base() -> None:
    drift = "monitor.drift_every_steps=5"
    assert read(SMALLEST, drift).drift_every_steps == 5
    assert read(SMALLEST, drift, "lora=null").drift_every_steps == 0


def test_an_override_that_breaks_a_rule_is_blamed_and_not_the_line_of_the_file() -> None:
    text = SMALLEST.replace("{steps: 100}", "{steps: 100, micro_batch_tokens: 8192}")
    assert mistakes(text, "train.sequence_tokens=3000") == [
        "--set train.sequence_tokens=3000: train.micro_batch_tokens: 8192 is not a multiple of train.sequence_tokens;"
        " 9000 is"
    ]
    assert mistakes(text + "parallel: {expert: 4, ranks: 4}\n", "parallel.ranks=2") == [
        "--set parallel.ranks=2: parallel.expert: 4 does not divide parallel.ranks, which is 2"
    ]


def test_the_line_of_a_rule_is_the_first_setting_that_was_written() -> None:
    assert mistakes(SMALLEST + "parallel:\n  ranks: 3\n") == [
        "x.yaml:5: train.global_batch_tokens: 65536 is not a multiple of train.micro_batch_tokens x 3 ranks (4096 x 3);"
        " 61440 is"
    ]


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 8), (2, 4), (8, 1)])
def test_accumulation_keeps_the_global_batch(ranks: int, micro_batches: int) -> None:
    recipe = read(SMALLEST, *PACK, "train.global_batch_tokens=8192")
    assert recipe.accumulation(ranks) == micro_batches
    assert recipe.packs_per_micro_batch == 2


def test_accumulation_and_experts_refuse_what_does_not_divide() -> None:
    recipe = read(SMALLEST, *PACK, "train.global_batch_tokens=8192", "parallel.ranks=2", "parallel.expert=2")
    with pytest.raises(RecipeError, match=r"^x: train.global_batch_tokens: 8192 is not a multiple of .*\(1024 x 3\)"):
        recipe.accumulation(3)
    with pytest.raises(RecipeError, match=r"^x: parallel.expert: 2 does not divide the 5 experts of the model$"):
        recipe.check_ranks(2, num_experts=5)
    with pytest.raises(RecipeError, match=r"^x: parallel.expert: 2 does not divide the 3 ranks of this run$"):
        recipe.check_ranks(3, num_experts=8)
    recipe.check_ranks(4, num_experts=8)


@pytest.mark.parametrize("frozen", ["lora: {rank: 2}\nrouter: {train: true}\n", "lora: null\n"])
def test_random_weights_that_would_not_be_kept_are_refused(frozen: str) -> None:
    with pytest.raises(RecipeError, match=r"model\.init: random weights that do not train would be lost with the run"):
        read(SMALLEST + frozen, "model.init=random", check_paths=False)


# Overrides


OTHER_VALUES = {
    "name": "other",
    "model.path": "Qwen/Other",
    "data.train.N.path": "more.jsonl",
    "data.eval.N.path": "other.jsonl",
    "data.over_long": "stop",
    "lora.targets": "[o_proj, shared_expert]",
    "data.train": "[{path: a.jsonl}, {path: b.jsonl, format: chat}]",
    "data.eval": "[]",
    "train.global_batch_tokens": "131072",
    "train.micro_batch_tokens": "8192",
    "train.sequence_tokens": "1024",
    "parallel.expert": "2",
    "train.recompute": "experts",
}


def other_value(key: str) -> str:
    """A valid value of a key that is not its default."""
    setting = SETTINGS[key]
    if key in OTHER_VALUES:
        return OTHER_VALUES[key]
    choices = [choice for choice in wording.choices_of(setting) if choice != str(setting.get("default"))]
    if choices:
        return choices[0]
    return {"integer": "4", "number": "0.5", "boolean": "true", "string": "other"}[setting["type"]]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_changes_the_recipe_alike_by_file_and_by_set(key: str) -> None:
    text = EVAL + (
        "parallel: {ranks: 2}\nrouter: {balance: {coefficient: 1e-3}}\n"
        "monitor: {drift_every_steps: 2}\nlora: {rank: 2}\n"
    )
    if key == "model.init":  # random weights go with training all of them
        text = EVAL + "lora: null\nrouter: {train: true}\n"
    if key == "train.epochs":  # in place of steps
        text = text.replace("steps: 100", "steps: 0, epochs: 2")
    if key == "parallel.offload_path":  # only for a disk
        text = text.replace("{ranks: 2}", "{ranks: 2, offload: nvme, offload_path: disk}")
    dotted = key.replace(".N", ".0")
    before = read(text, check_paths=False)
    by_set = read(text, f"{dotted}={other_value(key)}", check_paths=False)
    assert by_set != before
    assert read(dump(by_set), check_paths=False) == by_set

    def inside(recipe: Recipe) -> Any:
        value: Any = recipe
        for part in dotted.split("."):
            value = value[int(part)] if part.isdecimal() else getattr(value, part)
        return value

    assert inside(by_set) != inside(before)


def test_overrides_reach_into_lists_and_switch_sections_on() -> None:
    text = SMALLEST + "lora: null\n"
    assert read(text).lora is None
    recipe = read(text, "lora.rank=4", "data.train.0={path: rows.jsonl, format: chat}", "train.steps=7")
    assert recipe.lora == recipe_sections.Lora(rank=4)
    assert recipe.data.train == (recipe_sections.Source(path="rows.jsonl", format="chat"),)
    assert recipe.train.steps == 7


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=fast", "optim.lr: expected a number, found 'fast'"),
        ("optim.rl=1", "optim.rl: unknown key (did you mean 'lr'?)"),
        ("optim.lr", "expected key=value, such as optim.lr=1e-4"),
        ("optim..lr=1", "expected key=value, such as optim.lr=1e-4"),
        ("optim.lr=", "optim.lr: is empty"),
        ("optim.lr.x=1", "optim.lr.x: optim.lr has nothing inside it to set"),
        ("data.train.1.path=x", "data.train.1.path: data.train.1 has nothing inside it to set"),
        ("data.train.1={path: x}", "data.train.1: the list has no item 1; its items are numbered from 0"),
        ("optim.lr=&a 1", "optim.lr: anchors (&) and aliases (*) are not read; write the value out"),
    ],
)
def test_mistakes_in_overrides_name_the_override(override: str, expected: str) -> None:
    assert mistakes(SMALLEST + "optim: {lr: 1e-4}\n", override) == [f"--set {override}: {expected}"]


def test_of_an_override_given_twice_the_last_one_counts() -> None:
    assert read(SMALLEST, "optim.lr=1e-4", "optim.lr=2e-4").optim.lr == 2e-4
    assert read(SMALLEST, "optim.lr=[", "optim.lr=2e-4").optim.lr == 2e-4
    assert read(SMALLEST, "lora.rank=2", "lora=null", "lora.rank=3").lora == recipe_sections.Lora(rank=3)
    assert read(SMALLEST, "lora.rank=2", "lora=null").lora is None


# Paths


def test_paths_are_looked_up_in_the_current_folder_then_in_the_checkout(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    (root / "rows").mkdir(parents=True)
    (root / "rows" / "a.jsonl").touch()
    assert resolve("rows/a.jsonl", root) == root / "rows/a.jsonl"
    assert resolve("rows/*.jsonl", root) == root / "rows/*.jsonl"
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").touch()
    assert resolve("rows/a.jsonl", root) == tmp_path / "rows/a.jsonl"
    assert resolve(str(tmp_path / "rows"), root) == tmp_path / "rows"
    assert resolve("rows/b.jsonl", root) is None
    assert resolve("rows/b*.jsonl", root) is None


@pytest.mark.parametrize("path", ["models/base", "./here", "/nowhere/x", "~/x", "a/b/c", "one"])
def test_a_model_folder_that_is_nowhere_is_refused_unless_it_reads_as_a_hub_id(path: str, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (only,) = mistakes(SMALLEST, f"model.path={path}", root=tmp_path)
    assert f"model.path: '{path}' exists neither" in only
    assert read(SMALLEST, f"model.path={path}", root=tmp_path, check_paths=False).model.path == path
    assert read(SMALLEST, "model.path=Owner/name-1.5").model.path == "Owner/name-1.5"


@pytest.mark.parametrize(
    ("path", "expected"), [("nowhere.yaml", "nowhere.yaml: no such file"), (".", ".: cannot be read (Is a directory)")]
)
def test_a_recipe_that_cannot_be_opened(path: str, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(Path(path))
    assert str(error.value) == expected


def test_a_recipe_that_is_not_utf8(folder: Path) -> None:
    (folder / "y.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(RecipeError, match=r"^y\.yaml: not UTF-8 text \(byte 6\); save the file as UTF-8$"):
        load_recipe(Path("y.yaml"))


# What the recipe says about itself


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_written_recipe_reads_back_equal(path: Path) -> None:
    recipe = load_recipe(path)
    assert read(dump(recipe)) == recipe


@pytest.mark.parametrize("name", ["no", "1e5", "0x10", "2026-01-01", "true", "1_000"])
def test_text_that_looks_like_something_else_is_written_so_that_it_stays_text(name: str) -> None:
    recipe = read(SMALLEST, f"name='{name}'")
    assert recipe.name == name
    assert read(dump(recipe)) == recipe


def test_every_setting_is_explained() -> None:
    table = load.explain()
    for key in KEYS:
        assert f"  {key}  [" in table or f"{key}  [" in table.splitlines()[0]
        assert SETTINGS[key]["description"].split()[0] in table
    assert "\n  train.sequence_tokens  [tokens >= 2, <= 16,777,216; default 4096]\n" in table
    assert "\n  optim.schedule  [constant | constant_with_warmup | linear | cosine | wsd; default 'cosine']\n" in table
    assert "\n  model.path  [text; required]\n" in table


def test_the_schema_for_editors_is_that_of_the_recipe() -> None:
    text = (paths.CHECKOUT / "recipes" / "schema.json").read_text(encoding="utf-8")
    assert text == load.schema_text(), (
        "python -c 'from finetune.recipe.load import schema_text; print(schema_text(), end=\"\")' > recipes/schema.json"
    )


def test_source_formats_are_those_of_the_data_package() -> None:
    assert get_args(recipe_sections.Source.model_fields["format"].annotation) == get_args(sources.Format)


def test_reading_a_recipe_does_not_import_torch() -> None:
    code = "import sys, finetune.recipe.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=paths.CHECKOUT, check=False).returncode == 0


def test_every_setting_is_read_somewhere() -> None:
    """Each key appears as `section.key`, or on an argument of the section's type, where a run uses it."""
    read_keys: set[tuple[str, str]] = set()
    reading = {"recipe.py", "sections.py", "rules.py", "load.py"}  # of finetune/recipe/
    own = {*(f"recipe/{name}" for name in reading), "plan/planner.py", "plan/workload.py"}
    for package in ("finetune", "data", "monitoring"):
        for path in sorted((paths.CHECKOUT / package).rglob("*.py")):
            if path.relative_to(path.parents[1]).as_posix() not in own:
                read_keys |= _reads(ast.parse(path.read_text(encoding="utf-8")))
    own_methods = next(
        node.body
        for node in ast.parse(Path(recipes.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "Recipe"
    )
    for method in own_methods:
        if isinstance(method, ast.FunctionDef) and method.name in {name for _, name in read_keys}:
            read_keys |= _reads(method)
    sections = {"data.train.N": "source", "data.eval.N": "source", "": "recipe"}
    unread = []
    for key in KEYS:
        section, _, name = key.rpartition(".")
        if (sections.get(section, section.rpartition(".")[2]), name) not in read_keys:
            unread.append(key)
    assert not unread, f"settings that nothing reads: {', '.join(unread)}"


def _reads(tree: ast.AST) -> set[tuple[str, str]]:
    """(section, key) of every attribute access, with annotated names read as their section."""
    types = {
        argument.arg: argument.annotation.attr
        if isinstance(argument.annotation, ast.Attribute)
        else argument.annotation.id
        for argument in ast.walk(tree)
        if isinstance(argument, ast.arg) and isinstance(argument.annotation, ast.Name | ast.Attribute)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            found.add((name, node.attr))
            if isinstance(owner, ast.Name) and name in types:
                found.add((types[name].lower(), node.attr))
    return found
