"""The script DeepSpeed launches: `deepspeed finetune/train.py --recipe recipes/code.yaml`."""

import os

# Before anything else: a launcher that dies while the libraries are imported leaves this process to another parent.
os.environ["NEXTUNE_PARENT"] = str(os.getppid())

import sys
from pathlib import Path

# Python puts a script's own folder first on sys.path. Put the checkout there instead, so that `finetune`, `data` and
# `monitoring` are importable and no file of this folder hides a library of the same name.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != HERE)]

from finetune.cli import main  # noqa: E402
from finetune.run.failure import leave, write_any_text  # noqa: E402

if __name__ == "__main__":
    write_any_text()
    leave(main(["train", *sys.argv[1:]]))
