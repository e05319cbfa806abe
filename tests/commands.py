"""The commands as a user types them: processes of their own, on a small checkpoint and a few dozen rows."""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from finetune.checkpoint.fingerprint import fingerprint
from finetune.recipe.load import load_recipe
from finetune.run.folder import claim
from finetune.run.stored_recipe import recipe_state
from monitoring.metrics import read_metrics
from tests.checkpoints import write_checkpoint
from tests.configs import tiny_config
from tests.tiny_checkpoints import transformers_model

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
# A machine that also runs other tests may take three times as long as these need alone.
SECONDS = 240

# Over recipes/tiny.yaml: 12 steps of 2 ranks x 2 micro-batches x 2 sequences.
SETTINGS: dict[str, Any] = {
    "train.steps": 12,
    "train.sequence_tokens": 128,
    "train.micro_batch_tokens": 256,
    "train.global_batch_tokens": 1024,
    "train.eval_every_steps": 6,
    "train.log_every_steps": 3,  # between two checkpoints, so that a resumed run starts amid a report's window
    "optim.lr": 1e-2,
    "optim.warmup_steps": 2,
    "lora.dropout": 0.1,
    "monitor.routing_every_steps": 1,
    "monitor.drift_every_steps": 4,
    "monitor.probe_tokens": 512,
    "monitor.wandb": "off",
    "checkpoint.every_steps": 4,
    "checkpoint.keep": 1,
}

# Changes to these for a run of many short steps, of which only the end counts: every step reported, nothing measured.
UNWATCHED: dict[str, Any] = {
    "train__eval_every_steps": 0,
    "train__log_every_steps": 1,
    "data__eval": "[]",
    "monitor__routing_every_steps": 0,
    "monitor__drift_every_steps": None,
    "monitor__probe_tokens": None,
}


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str
    started: float  # time.time()


@dataclass(frozen=True)
class Place:
    """A folder to work in: `base` (a checkpoint), rows for training and for measuring, `runs`."""

    folder: Path

    def settings(self, **changes: Any) -> list[str]:
        """The overrides of a run here, as arguments; `changes` as section__key=value, None to leave one out."""
        here = {
            "model.path": self.folder / "base",
            "output.dir": self.folder / "runs",
            "data.train": f"[{{path: {self.folder / 'train.jsonl'}}}]",
            "data.eval": f"[{{path: {self.folder / 'heldout.jsonl'}}}]",
        }
        given = here | SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
        return [text for key, value in given.items() if value is not None for text in ("--set", f"{key}={value}")]

    def launch(self, *arguments: str, ranks: int | None = 2, cwd: Path | None = None, **changes: Any) -> Done:
        """`deepspeed finetune/train.py --recipe recipes/tiny.yaml`, on `ranks` ranks or as many as it starts itself."""
        command = launcher(ranks)
        return run(*command, *(arguments or TINY), *self.settings(**changes), cwd=cwd or self.folder)

    def by_hand(self, *arguments: str, **changes: Any) -> Done:
        """The same without a launcher: `python finetune/train.py`, one rank."""
        command = (sys.executable, str(ROOT / "finetune/train.py"))
        return run(*command, *(arguments or TINY), *self.settings(**changes), cwd=self.folder)

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / name


TINY = ("--recipe", "recipes/tiny.yaml")


def launcher(ranks: int | None) -> list[str]:
    """The launcher and the script; the port is free, since other tests may be training."""
    number = ["--num_gpus", str(ranks)] if ranks else []
    return [
        str(BIN / "deepspeed"),
        "--log_level",
        "critical",
        *number,
        "--master_port",
        str(free_port()),
        str(ROOT / "finetune/train.py"),
    ]


def run(*command: str, cwd: Path, **environment: str) -> Done:
    """Run a command to its end, in the environment of a user; one that hangs is killed with all it started."""
    started = time.time()
    process = start(*command, cwd=cwd, **environment)
    try:
        out, err = process.communicate(timeout=SECONDS)
    except BaseException:
        os.killpg(process.pid, 9)
        raise
    return Done(process.returncode, out, err, started)


def start(*command: str, cwd: Path, **environment_too: str) -> "subprocess.Popen[str]":
    """Start a command in a process group of its own."""
    ours = ("WANDB_", "OMP_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    # One thread: two on a machine that is busy with other tests wait for each other more than they compute.
    environment |= {"PATH": f"{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    # Bytecode beside a test's own files would look like something that the command left behind.
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"} | environment_too
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def command(name: str, *arguments: str) -> Done:
    """`python -m finetune NAME ...`, from the checkout."""
    return run(sys.executable, "-m", "finetune", name, *arguments, cwd=ROOT)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@functools.cache
def place(parent: Path) -> Place:
    """The place that all tests of this session share, below pytest's folder for the session."""
    made = Place(parent / "commands")
    made.folder.mkdir()
    write_base(made.folder / "base")
    write_rows(made.folder / "train.jsonl", range(96))
    write_rows(made.folder / "heldout.jsonl", range(200, 224))
    return made


def write_base(folder: Path, **changes: Any) -> Path:
    """A float32 checkpoint that transformers wrote, with the tokenizer of the embedded base."""
    transformers_model(tiny_config(vocab_size=4096, **changes)).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(ROOT / "recipes/base" / name, folder / name)
    return folder


def run_with_checkpoint(here: Place, name: str, *, recipe_in_state: bool = True, **changes: Any) -> Path:
    """A run folder with a checkpoint of one adapted module, as training leaves it.

    Args:
        recipe_in_state: False leaves a checkpoint as earlier versions wrote it, without the recipe.
    """
    recipe = load_recipe(ROOT / "recipes/tiny.yaml", here.settings(name=name, **changes)[1::2])
    claim(here.run_folder(name), recipe).release()
    module = "model.layers.3.self_attn.q_proj"
    rows, columns = load_file(here.folder / "base/model.safetensors")[f"{module}.weight"].shape
    factors = {"A": torch.ones(8, columns), "B": torch.ones(rows, 8)}
    write_checkpoint(
        here.run_folder(name) / "checkpoints",
        1,
        tensors={f"{module}.lora_{factor}.default.weight::fp32": value for factor, value in factors.items()},
        state={"base": fingerprint(here.folder / "base"), **(recipe_state(recipe) if recipe_in_state else {})},
    )
    return here.run_folder(name)


def write_rows(path: Path, numbers: range) -> None:
    """Chat rows of 25 to 60 tokens."""
    rows = []
    for n in numbers:
        listed = ", ".join(str((n * k) % 17) for k in range(1, 3 + n % 9))
        answer = f"def numbers_{n}():\n    return [{listed}]\n"
        rows.append({"messages": [turn("user", f"Return number {n}."), turn("assistant", answer)]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind, of a run as if it had never been killed."""
    return [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == kind]


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: when it was changed, and what it holds. Kept tokenised data is no part of it."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}
