"""The rules of ARCHITECTURE.md that a machine can check: imports, sizes, names, and what no file may say."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for name in ("finetune", "data", "monitoring") for path in (ROOT / name).rglob("*.py"))

# One row a package: which of our packages its files may import, besides their own. A package without a row fails.
# ARCHITECTURE.md shows the same table. Imports for type checkers alone count as well.
# Whole-or-absent writing, bounded reading, which files a pattern means: they import nothing of ours.
SHARED_FILES = ("monitoring.files", "monitoring.json_file", "monitoring.file_search")
MAY_IMPORT = {
    "finetune": ("finetune.commands", "finetune.plan", "finetune.run", "finetune.recipe", "finetune.cluster"),
    "finetune.commands": (
        *("finetune.training", "finetune.plan", "finetune.run", "finetune.checkpoint", "finetune.distributed"),
        *("finetune.recipe", "finetune.model", "finetune.cluster", "data", "monitoring"),
    ),
    "finetune.training": (
        *("finetune.engine", "finetune.kernels", "finetune.plan", "finetune.run", "finetune.checkpoint"),
        *("finetune.distributed", "finetune.recipe", "finetune.model", "data", "monitoring"),
    ),
    "finetune.engine": ("finetune.distributed", "finetune.recipe", "finetune.model"),
    "finetune.run": (
        *("finetune.checkpoint", "finetune.distributed", "finetune.recipe", "finetune.cluster"),
        *("monitoring.metrics", *SHARED_FILES),
    ),
    "finetune.plan": ("finetune.recipe", "finetune.model", "finetune.checkpoint.layout"),
    "finetune.checkpoint": ("finetune.model", "monitoring.metrics", *SHARED_FILES),
    "finetune.kernels": ("finetune.model",),
    "finetune.distributed": ("finetune.model",),
    "finetune.model": SHARED_FILES,
    "finetune.recipe": SHARED_FILES,
    "finetune.cluster": ("finetune.recipe.messages", *SHARED_FILES),
    "data": SHARED_FILES,
    "monitoring": (),
}
# Libraries that a package may not import.
NOT_HERE = {
    "finetune": ("torch", "deepspeed", "transformers"),
    "finetune.plan": ("torch", "deepspeed", "transformers"),
    "finetune.recipe": ("torch", "deepspeed", "transformers"),
    "finetune.cluster": ("torch", "deepspeed", "transformers"),
    "finetune.model": ("torch.distributed", "deepspeed", "peft", "transformers"),
    "finetune.kernels": ("torch.distributed", "deepspeed", "transformers"),
    "finetune.checkpoint": ("torch.distributed", "deepspeed"),
    "data": ("torch.distributed", "deepspeed"),
    "monitoring": ("torch.distributed", "deepspeed"),
}
WITHOUT_TORCH = ("finetune.recipe", "finetune.plan", "finetune.cluster")  # proved by importing them
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def name_of(path: Path) -> str:
    """Dotted name of a module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of(name: str) -> str:
    """The package whose row applies: two levels below finetune, one elsewhere."""
    parts = name.split(".")
    if parts[0] != "finetune":
        return parts[0]
    inside = (ROOT / "finetune" / parts[1]).is_dir() if len(parts) > 1 else False
    return ".".join(parts[:2]) if inside else "finetune"


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


OWN = ("finetune", "data", "monitoring")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_keeps_the_rules(path: Path) -> None:
    where, names, package = path.relative_to(ROOT).as_posix(), imports(tree_of(path)), package_of(name_of(path))
    assert package in MAY_IMPORT, f"{package} has no row in MAY_IMPORT (and in ARCHITECTURE.md)"
    bad = sorted(name for name in names if is_in(name, NOT_HERE.get(package, ())))
    assert not bad, f"{where} imports {', '.join(bad)}; ARCHITECTURE.md says which way imports go"
    own = {name for name in names if is_in(name, OWN) and package_of(name) != package}
    bad = sorted(name for name in own if not is_in(name, MAY_IMPORT[package]))
    allowed = ", ".join(MAY_IMPORT[package]) or "nothing"
    assert not bad, f"{where} imports {', '.join(bad)}; of our own it may import {allowed}"
    assert path.stem not in sys.stdlib_module_names, f"{where} has the name of a standard-library module"
    assert path.stem not in ("utils", "common", "helpers", "base"), f"{where}: name the file for what it holds"


@pytest.mark.parametrize("unit", [lambda name: name, package_of], ids=["files", "packages"])
def test_imports_have_no_circle(unit) -> None:  # type: ignore[no-untyped-def]
    modules = {name_of(path): path for path in FILES}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        for imported in imports(tree_of(path)):
            while imported and imported not in modules:
                imported = imported.rpartition(".")[0]
            if imported and unit(imported) != unit(name):
                graph.setdefault(unit(name), set()).add(unit(imported))
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"these import each other: {' -> '.join(error.args[1])}")


def test_the_top_of_finetune_holds_the_entry_points_alone() -> None:
    top = {path.name for path in (ROOT / "finetune").glob("*.py")}
    assert top == {"__init__.py", "__main__.py", "cli.py", "train.py"}


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_package_is_imported_without_torch(package: str) -> None:
    names = [name_of(path) for path in FILES if package_of(name_of(path)) == package]
    loaded = (
        f"import {', '.join(names)}, sys; print(*sorted({{'torch', 'deepspeed', 'transformers'}} & {{*sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_is_small_enough_to_hold(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines; split it by noun"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            long = (node.end_lineno or 0) - node.lineno + 1
            assert long <= MAX_FUNCTION_LINES, f"{node.name} has {long} lines"


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
