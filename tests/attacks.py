"""Where an attack takes place: a base, rows, a run and a recipe of one test, each of which it may damage."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import cli
from finetune.checkpoint.weights import from_pretrained
from tests.commands import ROOT, SETTINGS

Run = Sequence[str] | Callable[[], object]


@dataclass(frozen=True)
class Ground:
    """A folder with `base` (a checkpoint), `train.jsonl`, `heldout.jsonl` and, where asked for, `runs/tiny`."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def rows(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def run(self) -> Path:
        return self.folder / "runs/tiny"

    def settings(self, /, **changes: Any) -> list[str]:
        """Overrides of recipes/tiny.yaml as arguments; `changes` as section__key=value."""
        here = {
            "model.path": self.base,
            "output.dir": self.folder / "runs",
            "data.train": f"[{{path: {self.rows}}}]",
            "data.eval": f"[{{path: {self.folder / 'heldout.jsonl'}}}]",
        }
        given = here | SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
        return [text for key, value in given.items() for text in ("--set", f"{key}={value}")]

    def command(self, name: str, /, **changes: Any) -> list[str]:
        """`plan`, `data`, `finished`: the arguments of a command that takes a recipe."""
        return [name, "--recipe", str(ROOT / "recipes/tiny.yaml"), *self.settings(**changes)]

    def load(self) -> Callable[[], object]:
        """Read the weights of the base, as a run does when it starts."""
        import torch

        return lambda: from_pretrained(self.base, dtype=torch.float32)

    def change(self, path: str, **changes: Any) -> None:
        """Change keys at the top of a JSON file; `...` removes one."""
        file = self.folder / path
        values = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    def write(self, path: str, content: str | bytes) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)

    def copy_from(self, other: Path) -> None:
        shutil.copytree(other, self.folder, dirs_exist_ok=True)


def outcome(what: Run) -> int:
    """The exit code of a command; a call of Python that is refused counts as a command's 2."""
    if not callable(what):
        return cli.main(list(what))
    from finetune.run.failure import is_told, tell

    try:
        what()
    except ValueError as error:
        if not is_told(error):
            raise
        tell(error)
        return 2
    return 0
