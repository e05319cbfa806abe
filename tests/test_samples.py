"""The output that README.md quotes is recorded output, and a new run prints lines of the same form."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from finetune import cli
from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import RecipeError
from tests.commands import ROOT, launcher, run

SAMPLES = ROOT / "docs" / "samples"
SCRIPT = (ROOT / "docs" / "record_samples.sh").read_text()


def blocks_after(heading: str) -> list[list[str]]:
    """The lines of every block without a language in one section of README.md."""
    section = (ROOT / "README.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return [text.splitlines() for language, text in blocks if not language]


def recorded(name: str) -> list[str]:
    return (SAMPLES / f"{name}.txt").read_text().splitlines()


def quotes(line: str, output: str) -> bool:
    """Whether `line` is `output`, with `...` in place of what was left out."""
    return re.fullmatch(".*".join(map(re.escape, line.split("..."))), output) is not None


@pytest.mark.parametrize(("heading", "name"), [("Two commands", "tiny"), ("What a collapse looks like", "collapse")])
def test_every_quoted_line_was_recorded_and_in_this_order(heading: str, name: str) -> None:
    (block,) = blocks_after(heading)
    lines, at = recorded(name), 0
    for line in block:
        if line.strip() == "...":
            continue
        place = next((i for i in range(at, len(lines)) if quotes(line, lines[i])), None)
        assert place is not None, f"{name}.txt has no line after line {at} that is: {line}"
        at = place + 1


def test_the_quoted_mistake_is_told_in_these_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = (ROOT / "recipes" / "code.yaml").read_text().replace("data/corpus", f"{ROOT}/data/corpus")
    settings = [line for line in recipe.splitlines() if not line.startswith("#")]
    settings = [line for line in settings if not line.startswith(("optim:", "model:"))]
    lines = [f"model: {{path: {ROOT}/recipes/base}}", "optim:", "  lr: 1e-4", "  warmup_steps: 50", "  clip_norm: 1.0"]
    (tmp_path / "mine.yaml").write_text("\n".join([*lines, "", "  schedule: cosin", *settings]) + "\n")
    with pytest.raises(RecipeError) as told:
        load_recipe(Path("mine.yaml"))
    (block,) = blocks_after("The real job")
    assert str(told.value) in block


def test_the_exchange_in_the_guide_is_what_its_command_plans(capsys: pytest.CaptureFixture[str]) -> None:
    section = (ROOT / "docs/multi-node.md").read_text().partition("\n## Before it starts")[2].partition("\n## ")[0]
    (_, command), (_, sample) = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "finetune"]
    cli.main(words[3:])
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(".*".join(map(re.escape, " ".join(sample.split()).split("..."))), out), out


def form(line: str) -> str:
    """A line without its numbers, bars and the end that depends on them."""
    line = re.sub(r"[▁▂▃▄▅▆▇█]+", "#", line)
    return re.sub(r"#[smh]?( #[smh])*", "#", re.sub(r"-?\d[\d,]*(\.\d+)?(e-?\d+)?", "#", line))


def collapse_command() -> list[str]:
    text = SCRIPT.partition("\n.venv/bin/python ")[2].partition("2>&1")[0].replace("\\\n", " ")
    return shlex.split(text)


@pytest.mark.slow
def test_the_default_job_still_prints_lines_of_these_forms(tmp_path: Path) -> None:
    """Ten steps of it, with what `./launch.sh` calls after the training but the export."""
    settings = ["--set", f"output.dir={tmp_path}", "--set", "train.steps=10", "--set", f"data.cache={tmp_path}"]
    trained = run(*launcher(2), "--recipe", "recipes/tiny.yaml", *settings, cwd=ROOT)
    assert trained.code == 0, trained.err
    summary = run(sys.executable, "-m", "finetune", "summary", str(tmp_path / "tiny"), cwd=ROOT)
    new = [form(line) for line in (trained.out + summary.out).splitlines()]
    (block,) = blocks_after("Two commands")
    quoted = [
        line for line in block if line.startswith(("step ", "held-out", "training", "experts", "layers", "mixers"))
    ]
    assert len(quoted) > 6
    for line in quoted:
        assert any(quotes(form(line), output) for output in new), line


@pytest.mark.slow
def test_the_collapse_of_the_readme_is_found_again(tmp_path: Path) -> None:
    words = [word.replace("$runs", str(tmp_path)) for word in collapse_command()]
    done = run(sys.executable, *words, cwd=ROOT)
    assert done.code == 2
    lines = (done.out + done.err).splitlines()
    assert any(" | STOP collapse_from_base: layer " in line for line in lines), done.out
    (block,) = blocks_after("What a collapse looks like")
    rules = {match[1] for line in block if (match := re.search(r"\| (?:WARN|ALERT|STOP) (\w+):", line))}
    assert all(any(f" {rule}: " in line for line in lines) for rule in rules)
