"""What a user gets wrong: one sentence that says where and what to do, exit code 2, no traceback, nothing left behind.

Every case is the command as it is typed. Those that one rank alone could see go through the launcher on two ranks,
where a mistake that is not shared would be a hang or the other rank's traceback; the rest are started by hand.
"""

import json
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file

from finetune.checkpoint.resume import newest_checkpoint, open_state
from finetune.recipe.load import load_recipe
from finetune.run.folder import claim
from tests.commands import (
    BIN,
    ROOT,
    Done,
    Place,
    command,
    files,
    launcher,
    place,
    run,
    run_with_checkpoint,
    write_base,
    write_rows,
)
from tests.poison import poison

# Rank 0 comes later than rank 1: before it has spoken, the launcher must have no reason to end it.
SLOW_RANK_0 = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(4)\n"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.getbasetemp())


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    before = files(folder)
    yield
    assert files(folder) == before
    assert not list(folder.rglob("*.tmp"))


def told(done: Done) -> str:
    """The one message of a command that refused: no traceback, and no line of the launcher's own log."""
    assert done.code == 2, done.out + done.err
    everything = done.out + done.err
    assert "Traceback" not in everything, everything
    assert everything.count("nextune: ") == 1, everything
    assert not re.search(r"^\[\d{4}-\d\d-\d\d ", everything, re.MULTILINE), everything
    lines = done.err.partition("nextune: ")[2].splitlines()
    assert not [line for line in lines if line.startswith(("  File", "Exception", "RuntimeError", "[rank"))], everything
    return "\n".join(lines)


def test_five_mistakes_in_a_recipe_are_told_at_once_with_their_lines(here: Place, tmp_path: Path) -> None:
    (tmp_path / "five.yaml").write_text(f"""\
model: {{path: {here.folder / "base"}}}
data: {{train: [{{path: {here.folder / "train.jsonl"}, format: chta}}]}}
train: {{steps: 12, sequence_tokens: 128, micro_batch_tokens: 200, global_batch_tokens: 400}}
optim:
  schedule: cosin
lora: {{rank: 0}}
monitr: {{wandb: off}}
""")
    (tmp_path / "sitecustomize.py").write_text(SLOW_RANK_0)
    with nothing_left(tmp_path):
        done = run(*launcher(2), "--recipe", "five.yaml", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    places = [line.split(": ")[:2] for line in told(done).splitlines()]
    assert [(path.rpartition("/")[2], key) for path, key in places] == [
        ("five.yaml:2", "data.train.0.format"),
        ("five.yaml:3", "train.micro_batch_tokens"),
        ("five.yaml:5", "optim.schedule"),
        ("five.yaml:6", "lora.rank"),
        ("five.yaml:7", "monitr"),
    ]


def test_a_mistyped_override_is_named(here: Place) -> None:
    with nothing_left(here.folder):
        message = told(here.by_hand(name="typo", optim__learning_rate=1e-3))
    assert message.startswith("--set optim.learning_rate=0.001: optim.learning_rate: unknown key")


def test_a_missing_model_folder_is_named(here: Place) -> None:
    with nothing_left(here.folder):
        message = told(here.by_hand(name="no-model", model__path="checkpoints/nowhere/at-all"))
    assert "model.path: 'checkpoints/nowhere/at-all' exists neither in the current folder nor in" in message


def test_a_row_that_is_not_json_is_named_with_its_line(here: Place, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, range(96))
    lines = rows.read_text().splitlines()
    lines[40] = lines[40][:-3]
    rows.write_text("\n".join(lines))
    with nothing_left(here.folder):
        message = told(here.launch(name="bad-row", data__train=f"[{{path: {rows}}}]"))
    assert message.startswith(f"{rows}:41:{len(lines[40]) + 1}: not JSON (")
    assert "correct these rows, or set data.on_bad_row: skip" in message


def test_missing_tensors_are_named_even_one_that_only_rank_1_reads(here: Place, tmp_path: Path) -> None:
    """Expert 7 lies on rank 1; rank 0 would wait for that rank in the first exchange."""
    shutil.copytree(here.folder / "base", tmp_path / "base")
    weights = tmp_path / "base/model.safetensors"
    tensors = load_file(weights)
    for absent, name in (
        ("model.layers.2.mlp.experts.7.up_proj.weight", "no-expert"),
        ("model.layers.1.linear_attn.A_log", "no-tensor"),
    ):
        less = {name: tensor for name, tensor in tensors.items() if name != absent}
        save_file(less, weights, metadata={"format": "pt"})
        with nothing_left(here.folder):
            message = told(here.launch(name=name, model__path=tmp_path / "base"))
        assert message.startswith(f"{tmp_path}/base: the weights do not fit config.json; 1 missing: {absent}; download")


def test_two_ranks_cannot_share_five_experts(here: Place, tmp_path: Path) -> None:
    base = write_base(tmp_path / "five", num_experts=5)
    with nothing_left(here.folder):
        message = told(here.launch(name="five-experts", model__path=base))
    assert message.splitlines()[0] == "five-experts: parallel.expert: 2 does not divide the 5 experts of the model"


def test_a_coefficient_that_reaches_nothing_is_refused(here: Place, tmp_path: Path) -> None:
    """One layer with adapters behind its router: nothing that trains lies before a router."""
    base = write_base(tmp_path / "one-layer", num_hidden_layers=1)
    nowhere = {"lora__targets": "[shared_expert]", "router__balance__coefficient": 0.01}
    with nothing_left(here.folder):
        message = told(here.launch(name="nowhere", model__path=base, **nowhere))
    assert message.startswith("router.balance.coefficient is 0.01, but its loss gives a gradient of 0 to everything")
    assert "train the router (router.train: true) or set the coefficient to 0" in message


def test_data_shorter_than_one_step_is_refused(here: Place) -> None:
    sizes = {"train__sequence_tokens": 2048, "train__micro_batch_tokens": 2048, "train__global_batch_tokens": 16384}
    with nothing_left(here.folder):
        message = told(here.by_hand(name="short", **sizes))
    assert re.match(r"data\.train: fills 3 sequences of 2,048 tokens, but one optimizer step takes 8; lower", message)


def test_another_recipe_does_not_go_on_with_a_run(here: Place) -> None:
    recipe = load_recipe(ROOT / "recipes/tiny.yaml", here.settings(name="taken")[1::2])
    folder = here.run_folder("taken")
    claim(folder, recipe).release()
    with nothing_left(here.folder):
        message = told(here.by_hand(name="taken", train__seed=1, lora__rank=4))
    assert message.startswith(
        f"{folder}: holds a run of another recipe (lora.rank was 8, is 4, train.seed was 0, is 1)"
    )
    assert "--set name=" in message


def test_a_run_that_another_process_trains_is_refused(here: Place) -> None:
    folder = here.run_folder("in-use")
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        message = told(here.by_hand(name="in-use"))
    assert message.startswith(f"{folder}: another process is training this run; stop it first")
    assert list(files(folder)) == [".lock"]


def test_an_output_folder_that_cannot_be_is_refused(here: Place) -> None:
    in_a_file = here.folder / "train.jsonl/runs"
    with nothing_left(here.folder):
        message = told(here.by_hand(name="nowhere", output__dir=in_a_file))
    assert message.startswith(f"output.dir: {in_a_file}/nowhere cannot be written")


@pytest.mark.slow
def test_a_checkpoint_that_one_rank_cannot_write_is_told_by_all(here: Place) -> None:
    """Rank 0 fails while rank 1 waits for it; rank 1 must not die of the lost connection with a traceback."""
    folder = here.run_folder("no-room")
    folder.mkdir(parents=True)
    (folder / "checkpoints").touch()
    message = told(here.launch(name="no-room", train__eval_every_steps=0, checkpoint__every_steps=1))
    assert message.startswith(f"{folder}/checkpoints/step-1: rank 0 could not write it (")
    assert not (folder / "crash").exists()
    assert not (folder / "finished.json").exists()


def test_a_loss_that_is_not_a_number_stops_before_a_checkpoint_keeps_it(here: Place, tmp_path: Path) -> None:
    """On one token of one row the first layer overflows. Saving is due at the step that meets it."""
    base = tmp_path / "base"
    shutil.copytree(here.folder / "base", base)
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, range(96))
    assert "\u0416" not in rows.read_text()
    rows.write_text(rows.read_text().replace("Return number 70.", "Return number 70\u0416."))
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    poison(base, vocabulary["\u00d0"])  # how a byte-level tokenizer spells it

    settings = {"data__train": f"[{{path: {rows}}}]", "checkpoint__every_steps": 1, "train__log_every_steps": 100}
    quiet = {"monitor__drift_every_steps": 0, "monitor__probe_tokens": 4096, "train__eval_every_steps": 0}
    message = told(here.launch(name="nan", model__path=base, **settings, **quiet))
    folder = here.run_folder("nan")
    stopped = re.match(r"step (\d+): the loss or the gradient is not finite: ", message)
    assert stopped is not None, message
    step = int(stopped[1])
    assert step > 1, "the row came in the first step: nothing was saved before it"
    newest, _ = newest_checkpoint(folder / "checkpoints")
    assert newest is not None
    assert newest.name == f"step-{step - 1}"
    assert all(tensor.isfinite().all() for tensor in open_state(newest)[1].values())
    assert f"the newest checkpoint is {newest}" in message
    assert not (folder / "finished.json").exists()


def test_a_port_that_another_run_uses_is_named(here: Place) -> None:
    with socket.socket() as other, nothing_left(here.folder):
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        deepspeed = [
            str(BIN / "deepspeed"),
            "--log_level",
            "critical",
            "--master_port",
            port,
            str(ROOT / "finetune/train.py"),
        ]
        recipe = ("--recipe", "recipes/tiny.yaml", *here.settings(name="port"))
        message = told(run(*deepspeed, *recipe, cwd=here.folder))
    assert message.startswith(f"the 1 ranks do not find each other at 127.0.0.1:{port} (")
    assert "--master_port of deepspeed" in message


def test_an_export_never_replaces_a_folder(here: Place, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine").write_text("mine")
    folder = run_with_checkpoint(here, "exported")
    with nothing_left(tmp_path):
        message = told(command("export", str(folder), "--to", str(tmp_path / "model"), "--format", "merged"))
    assert message.startswith(f"{tmp_path}/model: already exists and is not an empty folder; choose another or remove")
