import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune import cli
from finetune.commands import plan as plan_command
from finetune.commands.train import _share_cores
from finetune.distributed import world as worlds
from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import RecipeError
from finetune.run.folder import claim, folder_of, mark_finished, mark_stopped
from tests.checkpoints import write_checkpoint
from tests.commands import ROOT, run

TINY = ("--recipe", str(ROOT / "recipes/tiny.yaml"))


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("command", ["train", "ranks", "plan", "data", "finished", "export", "summary", "keys"])
def test_every_command_says_what_it_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: python -m finetune {command}")
    assert re.search(r"\n\n[A-Z][^.]+\.", out), "no sentence"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "the following arguments are required: --recipe"),
        (["train", "--recipe", "r", "--steps", "3"], "unrecognized arguments: --steps 3"),
        (["plan", "--recipe", "r", "--ranks", "0"], "argument --ranks: 0 is not a whole number from 1 to 65,536"),
        (["export", "r", "--to", "d", "--format", "gguf"], "invalid choice: 'gguf'"),
    ],
)
def test_a_command_that_cannot_be_read_is_refused(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nextune: ")
    assert expected in line
    assert line.endswith(" --help")


def test_keys_lists_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keys"]) == 0
    out = capsys.readouterr().out
    for key in ("train.steps", "optim.lr", "router.balance.coefficient", "monitor.wandb", "output.dir"):
        assert key in out


def test_ranks_is_what_the_recipe_says_where_there_is_no_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_command, "gpus", lambda: ())
    assert cli.main(["ranks", *TINY]) == 0
    assert capsys.readouterr().out == "2\n"


def test_plan_says_whether_the_run_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *TINY]) == 0
    assert "2 ranks" in capsys.readouterr().out
    assert cli.main(["plan", "--recipe", str(ROOT / "recipes/code.yaml"), "--ranks", "8", "--device-gib", "8"]) == 1


def test_a_setting_without_effect_is_a_note_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *TINY, "--set", "monitor.drift_every_steps=0", "--set", "train.steps=3"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "note: optim.warmup_steps: the warm-up of 6 steps is cut to the 3 of the run",
        "note: monitor.probe_tokens: no effect because drift of the routing is not measured",
    ]


def test_the_start_says_the_same_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def alone(expert_size: int) -> None:
        raise worlds.MeetingError("nobody came")

    monkeypatch.setattr(worlds, "start", alone)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/log.txt").touch()
    settings = ("--set", "monitor.drift_every_steps=0", "--set", "train.steps=3", "--set", f"output.dir={tmp_path}")
    assert cli.main(["train", *TINY, *settings, "--set", "parallel.ranks=1", "--set", "parallel.expert=1"]) == 2
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("note: ")] == [
        "note: optim.warmup_steps: the warm-up of 6 steps is cut to the 3 of the run",
        "note: monitor.probe_tokens: no effect because drift of the routing is not measured",
        f"note: output.dir: {tmp_path}/tiny holds files of no run (log.txt); this run is put beside them",
    ]
    assert err == "nextune: nobody came\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["plan", *TINY], 0),
        (["ranks", *TINY], 0),
        (["finished", *TINY, "--set", "output.dir=nowhere"], 1),
        (["keys"], 0),
        (["plan", *TINY, "--set", "optim.rl=1"], 2),
        (["train", *TINY, "--set", "optim.rl=1"], 2),
        (["data", *TINY, "--set", "optim.rl=1"], 2),
        (["export", "nowhere", "--to", "there", "--format", "merged"], 2),
        (["summary", "nowhere"], 2),
        (["replay", "nowhere/crash/step-1"], 2),
    ],
    ids=lambda value: " ".join(value[::3]) if isinstance(value, list) else str(value),
)
def test_what_needs_no_tensors_starts_without_torch_and_deepspeed(
    arguments: list[str], code: int, tmp_path: Path
) -> None:
    """In a process of its own, where importing either ends the command with another exit code."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "torch/version.py").write_text("cuda = None")
    (tmp_path / "deepspeed.py").write_text("raise SystemExit('deepspeed was imported')")
    started = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; from finetune import cli; sys.exit(cli.main({arguments!r}))"
    done = run(sys.executable, "-c", started, cwd=tmp_path)
    assert (done.code, "Traceback" in done.err) == (code, False), done.out + done.err


def test_data_shows_what_is_trained_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    held_out = f"[{{path: {ROOT}/data/corpus/pairs-heldout.jsonl.gz, format: chat}}]"
    settings = ("--set", f"data.train={held_out}", "--set", "data.eval=[]", "--set", "train.eval_every_steps=0")
    assert cli.main(["data", *TINY, *settings, "--set", f"data.cache={tmp_path}", "--show", "2"]) == 0
    out = capsys.readouterr().out
    assert "packs of 512 tokens" in out
    assert re.findall(r"^pack (\d+): ", out, re.MULTILINE) == ["0", "1"]
    assert "<|im_start|>assistant" in out
    assert "⟦" in out


@pytest.mark.parametrize("written", ["recipes/tiny.yaml", "mine.yaml"])
def test_a_recipe_is_looked_for_here_and_then_in_the_checkout(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = (ROOT / "recipes/tiny.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(tiny.replace("ranks: 2, expert: 2", "ranks: 4, expert: 2"))
    monkeypatch.setattr(plan_command, "gpus", lambda: ())
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ranks", "--recipe", written]) == 0
    assert capsys.readouterr().out == {"recipes/tiny.yaml": "2\n", "mine.yaml": "4\n"}[written]


def test_a_recipe_that_is_nowhere_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--recipe", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith(f"nextune: {tmp_path}/none.yaml")


def test_finished_answers_by_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = f"output.dir={tmp_path}"
    recipe = load_recipe(ROOT / "recipes/tiny.yaml", [output])
    folder = folder_of(recipe)
    arguments = ["finished", *TINY, "--set", output]
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err == f"{folder}: has not finished of 60\n"
    claim(folder, recipe).release()
    mark_finished(folder, {"step": 60})
    lost = f"ended at step 60, but its checkpoint of that step is gone or incomplete ({folder}/checkpoints/step-60)"
    assert cli.main(arguments) == 1
    assert lost in capsys.readouterr().err
    write_checkpoint(folder / "checkpoints", 60, tensors={"a": torch.zeros(1)}, state={})
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert cli.main([*arguments, "--set", "train.steps=61"]) == 1
    assert capsys.readouterr().err == f"{folder}: stands at step 60 of 61\n"
    mark_stopped(folder, {"step": 60})
    assert cli.main([*arguments, "--set", "train.steps=61"]) == 3
    assert capsys.readouterr() == (f"{folder}\n", f"{folder}: stopped after step 60 of 61, resumable\n")
    assert cli.main(arguments) == 0
    claim(folder, recipe).release()
    assert cli.main([*arguments, "--set", "train.steps=61"]) == 1  # started again, and not stopped yet
    capsys.readouterr()
    assert cli.main([*arguments, "--set", "train.seed=1"]) == 2
    assert "holds a run of another recipe" in capsys.readouterr().err


class OurError(RecipeError):
    """Stands in for any of our errors."""


OurError.__module__ = "data.somewhere"


def ends_with(error: Exception) -> Callable[[object], int]:
    def summary(_: object) -> int:
        """Only fails."""
        raise error

    return summary


def test_a_mistake_is_told_by_rank_0_and_the_others_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(cli, "summary", ends_with(OurError("rows.jsonl:3: not JSON")))
    for rank, err in (("0", "nextune: rows.jsonl:3: not JSON\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["summary", "run"]) == 2
        assert capsys.readouterr().err == err
    assert len(waited) == 1
    assert waited[0] >= 10


@pytest.mark.parametrize("error", [ValueError("too many values"), KeyError("model"), AssertionError("ours")])
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "summary", ends_with(error))
    with pytest.raises(type(error)):
        cli.main(["summary", "run"])


@pytest.mark.parametrize(
    ("all_threads", "ranks", "given", "expected"),
    [(16, "8", None, 2), (2, "2", None, 1), (2, "4", None, 1), (8, None, None, 8), (16, "8", "4", None)],
)
def test_ranks_share_the_cores_unless_told_how_many_threads(
    all_threads: int, ranks: str | None, given: str | None, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: all_threads)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in (("LOCAL_SIZE", ranks), ("OMP_NUM_THREADS", given)):
        if value is not None:
            monkeypatch.setenv(name, value)
    _share_cores()
    assert chosen == ([] if expected is None else [expected])


def test_the_script_finds_its_own_packages_whatever_lies_around(tmp_path: Path) -> None:
    """A `data` in the user's folder, and our own folder that Python puts first, must not be imported in their place."""
    for name in ("data", "monitoring", "finetune"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    wrong = ("--recipe", "recipes/tiny.yaml", "--set", "lora.rank=0")
    done = run(sys.executable, str(ROOT / "finetune/train.py"), *wrong, cwd=tmp_path, PYTHONPATH=os.fspath(tmp_path))
    assert (done.code, done.out) == (2, "")
    assert done.err == "nextune: --set lora.rank=0: lora.rank: must be greater than 0, found 0\n"


def test_a_warning_about_kernels_that_nothing_uses_is_not_for_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    monkeypatch.setattr(logging.getLogger("bitsandbytes"), "level", logging.WARNING)
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    assert logger.isEnabledFor(logging.WARNING)
    assert cli.main(["train", "--recipe", "none.yaml"]) == 2
    assert not logger.isEnabledFor(logging.WARNING)
