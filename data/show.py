"""Display of data as the model sees it: one line about a dataset, and the text of single packs."""

from collections.abc import Iterator

from rich.text import Text

from data.chat import Document
from data.dataset import Dataset
from data.packing import supervised_tokens
from data.tokenizer import Tokenizer

# Supervised text is marked by characters as well, since a pipe loses the colour.
TRAINED_START, TRAINED_END = "⟦", "⟧"


def describe(dataset: Dataset) -> str:
    """One line: rows, documents, packs and their fill, share of supervised tokens, dropped rows."""
    facts = dataset.manifest
    line = (
        f"{facts['rows']:,} rows, {facts['documents']:,} documents in {facts['packs']:,} packs of "
        f"{facts['sequence_tokens']:,} tokens ({facts['fill']:.1%} full); "
        f"{facts['tokens']:,} tokens, {facts['supervised_tokens'] / facts['tokens']:.1%} supervised"
    )
    if facts["split_rows"]:
        line += f"; {facts['split_rows']:,} rows split"
    if facts["dropped"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(facts["dropped"].items()))
        line += f"; dropped {sum(facts['dropped'].values()):,} ({reasons})"
    return line


def amounts(dataset: Dataset) -> dict[str, int]:
    """The size of a dataset, for a run's records."""
    names = ("rows", "documents", "packs", "tokens", "supervised_tokens", "sequence_tokens")
    return {name: int(dataset.manifest[name]) for name in names}


def show_pack(dataset: Dataset, tokenizer: Tokenizer, pack: int) -> Iterator[Text]:
    """One pack for `rich`: a heading for it and for each document, and the text with supervised parts marked."""
    documents = dataset.documents(pack)
    used = sum(len(document.ids) for document in documents)
    padding = dataset.sequence_tokens - used
    yield Text(f"pack {pack}: {len(documents)} documents, {used:,} tokens, {padding:,} of padding", style="bold")
    for index, document in enumerate(documents):
        yield Text(
            f"document {index}: {len(document.ids):,} tokens, {supervised_tokens(document):,} supervised", style="cyan"
        )
        yield show_document(document, tokenizer)


def show_document(document: Document, tokenizer: Tokenizer) -> Text:
    """The text of a document: supervised runs green and in ⟦ ⟧, control tokens reversed."""
    controls = set(tokenizer.control_ids.values())
    text = Text()
    ids, trained = document.ids.tolist(), document.trained.tolist()
    trained[0] = False  # the first token has no context to be predicted from
    start = 0
    while start < len(ids):
        is_trained = trained[start]
        end = next((i for i in range(start, len(ids)) if trained[i] != is_trained), len(ids))
        text.append(TRAINED_START if is_trained else "", style="green")
        for run, is_control in _runs(ids[start:end], controls):
            style = ("green" if is_trained else "dim") + (" reverse" if is_control else "")
            text.append(tokenizer.decode(run), style=style)
        text.append(TRAINED_END if is_trained else "", style="green")
        start = end
    return text


def _runs(ids: list[int], controls: set[int]) -> Iterator[tuple[list[int], bool]]:
    """`ids` in runs that are decoded together: each control token alone, the text between them as a whole."""
    run: list[int] = []
    for token in ids:
        if token in controls:
            if run:
                yield run, False
            yield [token], True
            run = []
        else:
            run.append(token)
    if run:
        yield run, False
