"""What documents, comments and messages name exists: files, commands, and the options of commands."""

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from finetune import cli

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("finetune", "data", "monitoring", "benchmarks", "tests", "docs", "recipes")
TEXTS = sorted(
    path
    for pattern in ("*.md", "*.sh", "*.toml", ".ci/*", *(f"{name}/**/*" for name in PACKAGES))
    for path in ROOT.glob(pattern)
    if path.suffix in (".md", ".py", ".sh", ".yaml", ".toml", "") and path.is_file() and "__pycache__" not in path.parts
)
NAMED_FILE = re.compile(
    rf"(?<![\w/.{{}}-])((?:{'|'.join(PACKAGES)})/[\w./-]*\w\.(?:md|py|yaml|json|jsonl\.gz|sh|svg|safetensors))(?![\w*{{])"
)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
OPTION = re.compile(r"(?<!\S)(--[a-z][a-z-]+)(?=[\s=`'\"]|$)")
COMMANDS = ("launch.sh", "python -m finetune", "python -m benchmarks.", "python -m data.", "finetune/train.py")
# What a test writes by itself or says does not exist.
MADE_UP = {"test_documents.py", "test_architecture.py", "test_launch.py", "test_loading.py", "test_run_folder.py"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [path for path in TEXTS if path.name not in MADE_UP], ids=relative)
def test_every_file_that_is_named_exists(path: Path) -> None:
    text = text_of(path)
    missing = [name for name in NAMED_FILE.findall(text) if not (ROOT / name).exists()]
    if path.suffix == ".py":  # a benchmark names what it will write
        missing = [name for name in missing if not name.startswith("benchmarks/results/")]
    if path.suffix == ".md":
        links = [link for link in LINK.findall(text) if "://" not in link and not link.startswith("mailto:")]
        missing += [link for link in links if not (path.parent / link).exists()]
    assert not missing, f"{relative(path)} names {', '.join(sorted(set(missing)))}, which does not exist"


@cache
def subcommands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = [action.choices for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(choices)


def options_of(command: str) -> set[str]:
    return {option for action in subcommands()[command]._actions for option in action.option_strings}


@cache
def literals(path: Path) -> set[str]:
    """Every string of a Python file: among them the options that its argument parser takes."""
    return {
        node.value
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@cache
def launch_commands() -> set[str]:
    """The words of the `case` in the script's `main`."""
    main = text_of(ROOT / "launch.sh").partition("\nmain() {")[2].partition("\n}")[0]
    return set(re.findall(r"^    ([a-z]+)\)$", main, re.MULTILINE))


@cache
def launch_options() -> set[str]:
    usage = text_of(ROOT / "launch.sh").partition("HELP'")[2].partition("\nHELP")[0]
    return set(re.findall(r"--[a-z-]+", usage)) | {"--with-stdin"}


def quoted(text: str) -> Iterator[str]:
    """Commands in backticks, over line ends too, and lines of code blocks without their comments."""
    blocks = re.split(r"^```.*$", text, flags=re.MULTILINE)
    for number, block in enumerate(blocks):
        if number % 2:
            lines = block.replace("\\\n", " ").splitlines()
            yield from (line.partition("  #")[0].partition(" # ")[0].strip() for line in lines)
        else:
            yield from (" ".join(part.split()) for part in re.findall(r"`([^`]+)`", block))


def commands_in(path: Path) -> Iterator[str]:
    text = text_of(path)
    if path.suffix == ".md":
        found: Iterator[str] = quoted(text)
    else:  # comments, docstrings and messages; a sentence ends what is looked at
        found = iter(re.findall(r"((?:\./launch\.sh|python -m (?:finetune|benchmarks|data)\b)[^`\n\"';,|&()]*)", text))
    for command in found:
        yield from (part.strip() for part in re.split(r"\s(?:&&|\|\|?|;)\s|,? then ", command))


def fault_of(command: str) -> str:
    """What of a command does not exist, or nothing."""
    if match := re.search(r"python3? (?:-P )?-m finetune ([a-z]\w*)(.*)", command):
        name, rest = match.groups()
        if name not in subcommands():
            return f"no command {name}"
        unknown = set(OPTION.findall(rest)) - options_of(name)
        return f"{name} takes no {', '.join(sorted(unknown))}" if unknown else ""
    if match := re.search(r"python3? -m ((?:benchmarks|data)\.\w+(?:\.\w+)*)(.*)", command):
        module = ROOT / (match[1].replace(".", "/") + ".py")
        if not module.exists():
            return f"no module {match[1]}"
        unknown = set(OPTION.findall(match[2])) - literals(module) - {"--help"}
        return f"{match[1]} takes no {', '.join(sorted(unknown))}" if unknown else ""
    if match := re.search(r"(?:^|\s)\./launch\.sh(?:\s+(\S+))?(.*)", command):
        first, rest = match[1] or "", match[2]
        is_recipe = first.endswith((".yaml", ".yml", "RECIPE")) or first.startswith(("$", "<", "--", "["))
        if first and first[0].islower() and not is_recipe and first not in launch_commands():
            return f"launch.sh has no command {first}"
        options = set(OPTION.findall(f"{first} {rest}")) - launch_options()
        if first != "test" and options:
            return f"launch.sh takes no {', '.join(sorted(options))}"
    if match := re.match(r"(?:deepspeed|python) (?:--?\S+ )*(\S+/train\.py)(.*)", command):
        if not (ROOT / match[1]).exists():
            return f"no script {match[1]}"
        unknown = set(OPTION.findall(match[2])) - options_of("train")
        return f"train.py takes no {', '.join(sorted(unknown))}" if unknown else ""
    if match := re.match(rf"({'|'.join(subcommands())}) .*--", command):  # `plan --ranks 8`
        unknown = set(OPTION.findall(command)) - options_of(match[1])
        return f"{match[1]} takes no {', '.join(sorted(unknown))}" if unknown else ""
    return ""


@pytest.mark.parametrize("path", [path for path in TEXTS if path.name not in MADE_UP], ids=relative)
def test_every_command_that_is_named_is_one(path: Path) -> None:
    faults = [f"`{command[:100]}`: {fault}" for command in commands_in(path) if (fault := fault_of(command))]
    assert not faults, f"{relative(path)}: " + "; ".join(faults)


def whole_commands() -> list[tuple[str, str]]:
    """Lines of code blocks that start one of our Python commands, with all their arguments."""
    ours = re.compile(
        r"(?:\w+=\S+ )*(?:python (?:-P )?-m finetune|deepspeed finetune/train\.py) \S+ [^.]*(?:\.\w[^.]*)*$"
    )
    documents = [path for path in TEXTS if path.suffix == ".md"]
    return [(relative(path), line) for path in documents for line in quoted(text_of(path)) if ours.match(line)]


@pytest.mark.parametrize(("path", "line"), whole_commands())
def test_a_whole_command_of_a_document_is_accepted_by_the_parser(path: str, line: str) -> None:
    words = shlex.split(line)
    words = words[next(i for i, word in enumerate(words) if word in ("finetune", "finetune/train.py")) + 1 :]
    if "finetune/train.py" in line:
        words = ["train", *words]
    cli._parser().parse_args(words)


@pytest.mark.parametrize(
    "command",
    [
        "./launch.sh plan recipes/code.yaml",
        "./launch.sh recipes/code.yaml --resume",
        "python -m finetune fly",
        "python -m finetune plan --gpus 8",
        "python -m benchmarks.nothing",
        "python -m benchmarks.moe_layer --loudly",
        "deepspeed finetune/train.py --config x",
        "plan --gpus 8",
    ],
)
def test_a_command_that_does_not_exist_is_seen(command: str) -> None:
    assert fault_of(command)


def test_every_recipe_of_the_checkout_is_in_the_table_of_the_readme() -> None:
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"| `recipes/{path.name}` |" in text_of(ROOT / "README.md")
