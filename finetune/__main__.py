"""`python -m finetune plan|data|export|...`; see `finetune/cli.py`."""

import sys

from finetune.cli import main
from finetune.run.failure import write_any_text

write_any_text()
sys.exit(main(sys.argv[1:]))
