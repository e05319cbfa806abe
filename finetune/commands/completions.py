"""What the base and an exported model write for held-out rows, as transformers generates it on the CPU.

For the closing summary of a small model. transformers keeps the state of what is written, which the model that trains
does not; and the lines show that a reader other than ours opens the export.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from data.chat import ChatTemplate, Document, encode, pieces_of
from data.formats import Conversation, Text, read_contents
from data.sources import BadRows, RowError, Source
from data.tokenizer import Tokenizer, load_tokenizer
from finetune.checkpoint.weights import resolve_model
from finetune.recipe.paths import resolve
from finetune.recipe.recipe import Recipe

ROWS = 2
ROWS_AT_ONCE = 64
MOST_TOKENS = 80  # that a completion may have
MOST_PROMPT_TOKENS, MOST_ANSWER_TOKENS = 160, 48  # of a row that is shown


@dataclass(frozen=True)
class Row:
    """A held-out row: the tokens up to the first that is trained, and the trained ones after it."""

    prompt: list[int]
    answer: list[int]


def completion_lines(recipe: Recipe, exported: Path) -> list[str]:
    """Lines that show what the base and the model in `exported` write for the first short held-out rows.

    Raises:
        DataError: the held-out rows or the tokenizer cannot be read any more.
    """
    base = resolve_model(recipe.model.path)
    tokenizer = load_tokenizer(base)
    rows = held_out_rows(recipe, tokenizer, ROWS)
    if not rows:
        return ["completions: none, since no held-out row has a short prompt and a short answer"]
    prompts = [row.prompt for row in rows]
    ends = (tokenizer.eos_id, tokenizer.document_id)
    before, after = (complete(folder, prompts, ends) for folder in (base, exported))
    lines = [f"Greedy completions of the first {len(rows)} short held-out rows, at most {MOST_TOKENS} tokens"]
    for row, base_ids, ids in zip(rows, before, after, strict=True):
        lines += ["", *_block("prompt", tokenizer.decode(row.prompt))]
        lines += _block(f"base, {_end(base_ids, ends)}", tokenizer.decode(base_ids))
        lines += _block(f"fine-tuned, {_end(ids, ends)}", tokenizer.decode(ids))
    return [*lines, ""]


def held_out_rows(recipe: Recipe, tokenizer: Tokenizer, most: int) -> list[Row]:
    """The first rows of `data.eval` that a model answers and whose prompt and answer are short."""
    sources = [Source(str(resolve(source.path) or source.path), source.format) for source in recipe.data.eval]
    contents = (content for _, content in read_contents(sources, BadRows("skip")) if not isinstance(content, Text))
    template: ChatTemplate | None = None
    rows: list[Row] = []
    while len(rows) < most and (group := list(islice(contents, ROWS_AT_ONCE))):
        if template is None and any(isinstance(content, Conversation) for content in group):
            template = ChatTemplate(tokenizer)
        pieces = [row for row in pieces_of(group, tokenizer, template) if not isinstance(row, RowError)]
        rows += [row for row in map(_row, encode(pieces, tokenizer)) if _is_short(row)]
    return rows[:most]


def _is_short(row: Row) -> bool:
    return len(row.prompt) <= MOST_PROMPT_TOKENS and len(row.answer) <= MOST_ANSWER_TOKENS


def _row(document: Document) -> Row:
    ids, trained = document.ids.tolist(), document.trained.tolist()
    first = trained.index(True)
    answer = [token for token, _ in takewhile(lambda pair: pair[1], zip(ids[first:], trained[first:], strict=True))]
    return Row(ids[:first], answer)


def complete(
    folder: str | Path, prompts: Sequence[Sequence[int]], ends: Sequence[int], most: int = MOST_TOKENS
) -> list[list[int]]:
    """New tokens after each prompt, up to the first of `ends`, by the model in `folder`."""
    folder = Path(folder)
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        completions = []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)])
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=most,
                do_sample=False,
                eos_token_id=list(ends),
                pad_token_id=ends[0],
            )
            completions.append(made[0, len(prompt) :].tolist())
    return completions


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns that it has no kernels for a GPU and shows bars while it reads; neither is for this reader."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _end(ids: Sequence[int], ends: Sequence[int]) -> str:
    return f"ends after {len(ids)} tokens" if ids and ids[-1] in ends else f"no end within {len(ids)} tokens"


def _block(title: str, text: str) -> list[str]:
    return [f"  {title}", *(f"    | {line}" for line in text.rstrip("\n").split("\n"))]
