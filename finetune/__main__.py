"""`python -m finetune plan|data|export|...`; see `finetune/cli.py`."""

import sys

from finetune.cli import main

sys.exit(main(sys.argv[1:]))
