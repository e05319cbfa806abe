"""The rules of ARCHITECTURE.md that a machine can check: imports, sizes, names, and what no file may say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for name in ("finetune", "data", "monitoring") for path in (ROOT / name).rglob("*.py"))

STAGES = ("finetune", "data", "monitoring")
RECIPE = (
    "finetune.paths",
    "finetune.recipe",
    "finetune.recipe_notes",
    "finetune.recipe_rules",
    "finetune.recipe_secrets",
    "finetune.recipe_sections",
    "finetune.familiar",
    "finetune.wording",
    "finetune.yaml_tree",
)
PLAN = (
    *("finetune.planner", "finetune.activations", "finetune.arithmetic", "finetune.plan_text", "finetune.state_bytes"),
    *("finetune.exchange_plan", "finetune.throughput", "finetune.workload"),
    *(
        "finetune.recompute",
        "finetune.working_bytes",
        "finetune.adapter_targets",
        "finetune.optimizer_state",
        "finetune.checkpoint.layout",
    ),
    *("finetune.recipe", "finetune.recipe_sections", "finetune.model.config"),
)
# A file whose path starts with the left side may import nothing whose name starts with a word on the right.
FORBIDDEN = {
    "data/": ("deepspeed", "torch.distributed"),
    "monitoring/": ("deepspeed", "torch.distributed"),
    "finetune/model/": ("deepspeed", "torch.distributed", "transformers", "peft"),
    "finetune/kernels/": ("deepspeed", "torch.distributed"),
    "finetune/losses.py": ("deepspeed", "torch.distributed"),
    "finetune/recipe": ("torch", "deepspeed", "transformers"),
    "finetune/wording.py": ("torch", "deepspeed", "transformers"),
    "finetune/yaml_tree.py": ("torch", "deepspeed", "transformers"),
    "finetune/planner.py": ("torch", "deepspeed"),
    "finetune/state_bytes.py": ("torch", "deepspeed"),
    "finetune/throughput.py": ("torch", "deepspeed"),
    "finetune/adapter_targets.py": ("torch", "deepspeed"),
    "finetune/optimizer_state.py": ("torch", "deepspeed"),
    "finetune/working_bytes.py": ("torch", "deepspeed"),
    "finetune/workload.py": ("torch", "deepspeed"),
    "finetune/recompute.py": ("torch", "deepspeed"),
    **dict.fromkeys(("finetune/cli.py", "finetune/gpus.py", "finetune/ranks.py"), ("torch", "deepspeed")),
    **dict.fromkeys(("finetune/run_folder.py", "finetune/commands/plan.py"), ("torch", "deepspeed")),
    "finetune/checkpoint/": ("deepspeed",),
    "finetune/engine.py": ("data", "monitoring"),
}
# Reading a file that others wrote is the same everywhere; this module imports none of ours.
READING = "monitoring.json_file"
SEARCH = "monitoring.file_search"  # so is which files a pattern means
# A file whose path starts with the left side may, of our own packages, import only what the right side names.
ALLOWED = {
    "finetune/losses.py": (),
    "finetune/recipe": (*RECIPE, SEARCH),
    "finetune/paths.py": (),
    "finetune/wording.py": ("finetune.familiar",),
    "finetune/familiar.py": (),
    "finetune/yaml_tree.py": (),
    "finetune/planner.py": PLAN,
    "finetune/activations.py": PLAN,
    "finetune/arithmetic.py": PLAN,
    "finetune/plan_text.py": PLAN,
    "finetune/exchange_plan.py": (),
    "finetune/throughput.py": PLAN,
    "finetune/state_bytes.py": PLAN,
    "finetune/adapter_targets.py": PLAN,
    "finetune/optimizer_state.py": PLAN,
    "finetune/working_bytes.py": PLAN,
    "finetune/workload.py": PLAN,
    "finetune/recompute.py": PLAN,
    "finetune/model/": ("finetune.model", READING),
    "finetune/kernels/": ("finetune.model", "finetune.kernels"),
    "finetune/checkpoint/": (
        "finetune.model",
        "finetune.checkpoint",
        "monitoring.files",
        "monitoring.metrics",
        READING,
    ),
    "finetune/parallel/": ("finetune.model", "finetune.parallel"),
    "data/": ("data", READING, SEARCH),
    "monitoring/": ("monitoring",),
    "monitoring/json_file.py": (),
    "monitoring/file_search.py": (),
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> set[str]:
    """Every module that is imported, also inside a function, and every name with the module it is taken from."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import; name the file from the checkout's root"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_in(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def rules(where: str, table: dict[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [words for prefix, words in table.items() if where.startswith(prefix)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_keeps_the_rules(path: Path) -> None:
    where, tree = path.relative_to(ROOT).as_posix(), tree_of(path)
    names = imports(tree)
    for words in rules(where, FORBIDDEN):
        bad = sorted(name for name in names if is_in(name, words))
        assert not bad, f"{where} imports {', '.join(bad)}; ARCHITECTURE.md says which way imports go"
    for words in rules(where, ALLOWED):
        bad = sorted(name for name in names if is_in(name, STAGES) and not is_in(name, words))
        assert not bad, f"{where} imports {', '.join(bad)}; of our own it may import {', '.join(words) or 'nothing'}"
    assert path.stem not in sys.stdlib_module_names, f"{where} has the name of a standard-library module"
    assert path.stem not in ("utils", "common", "helpers", "base"), f"{where}: name the file for what it holds"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_is_small_enough_to_hold(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines; split it by noun"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            long = (node.end_lineno or 0) - node.lineno + 1
            assert long <= MAX_FUNCTION_LINES, f"{node.name} has {long} lines"


def test_reading_a_recipe_needs_no_torch() -> None:
    loaded = "import finetune.recipe, sys; print(*sorted({'torch', 'deepspeed', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


@pytest.mark.parametrize("package", [path for path in FILES if path.name == "__init__.py"], ids=lambda p: p.parent.name)
def test_packages_export_nothing(package: Path) -> None:
    body = tree_of(package).body
    assert len(body) == 1, f"{package} holds more than a docstring; every name has one address, the file it is in"
    assert ast.get_docstring(tree_of(package))


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


# Absolute places that mean something on one machine only. Spelled in halves, so that this file is not one that says it.
MACHINE_PATHS = re.compile(rb"(?:^|[^\w.\-])/(?:%s)/" % "|".join(("work", "tmp", "root", "home", "farm")).encode())


def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    found = []
    for path in tracked_files():
        if path.suffix in (".py", ".sh", ".md", ".toml", ".yaml", ".yml", ".json") or "." not in path.name:
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                if MACHINE_PATHS.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line[:100]!r}")
    assert not found, "\n".join(found)


def test_no_source_is_unfinished() -> None:
    """No stand-ins left in; nothing of every kind caught and kept, except where monitoring must not stop a run.

    In `data/tokenizer.py` it becomes a sentence: the Rust library raises `Exception` itself.
    """
    for path in FILES:
        where = path.relative_to(ROOT).as_posix()
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Raise):
                raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                stands_in = isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
                assert not stands_in, f"{where}:{node.lineno}: not implemented"
            if isinstance(node, ast.ExceptHandler) and where not in ("monitoring/sinks.py", "data/tokenizer.py"):
                caught = node.type.id if isinstance(node.type, ast.Name) else node.type
                broad = caught in (None, "Exception", "BaseException")
                passed_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
                assert not broad or passed_on, f"{where}:{node.lineno}: catches everything and keeps it"


def test_data_folder_is_not_ignored() -> None:
    """A .gitignore that swallows `data/` loses a package without a word."""
    ignored = subprocess.run(["git", "check-ignore", "data/anything.py"], cwd=ROOT, capture_output=True, check=False)
    assert ignored.returncode == 1


def test_every_recipe_is_in_the_readme_and_every_recipe_there_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"recipes/([\w\-]+\.yaml)", readme))
    present = {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    assert named == present, f"only in README.md: {sorted(named - present)}; missing there: {sorted(present - named)}"


def test_every_file_that_the_architecture_table_names_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.split("## Files", 1)[1].split("\n## ", 1)[0]
    named = [
        name
        for row in table.splitlines()
        if row.startswith("|")
        for name in re.findall(r"`([\w./\-]+)`", row.split("|")[1])
    ]
    assert len(named) > 10
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"ARCHITECTURE.md names files that are not there: {missing}"
