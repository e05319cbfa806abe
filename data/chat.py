"""Rows as token ids and a mask of supervised tokens; conversations are rendered by the checkpoint's chat template.

Text is tokenised in separate pieces, split at control tokens and between prompt and supervised parts. This matches
inference, where the prompt is tokenised before the first token of the answer exists.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.formats import Completion, Content, Conversation, Message, Text
from data.sources import DataError, RowError
from data.template import Piece, TemplateText
from data.template_process import TemplateProcess
from data.tokenizer import Tokenizer

PORTION = 1 << 19  # characters tokenised at once, extended to the next line end
LONGEST_LINE = 2 << 20
_LINE_START = re.compile(r"\n(?=[^\s\x00-\x20\x7f-\xa0\u180e\u200b-\u200f\u2060-\u206f\ufeff])")
_WRITTEN_TOKEN = re.compile(r"<\|[A-Za-z0-9_.:-]{1,60}\|>")  # a control token, as templates of all families write it


class Document(NamedTuple):
    """Token ids, and for each whether it is supervised (predicting it is trained)."""

    ids: NDArray[np.int64]
    trained: NDArray[np.bool_]


class ChatTemplate:
    """A checkpoint's chat template, rendered in a separate process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        source = tokenizer.chat_template
        if source is None:
            raise DataError(
                f"{tokenizer.place}: the checkpoint has no chat template; add chat_template.jinja to the folder, "
                "or train on text or on prompt + completion rows"
            )
        if "add_generation_prompt" not in source:
            raise DataError(
                f"{tokenizer.place}: the chat template knows no add_generation_prompt, so turns have no start"
            )
        unknown = sorted(set(_WRITTEN_TOKEN.findall(source)) - tokenizer.control_ids.keys())
        if unknown:
            raise DataError(
                f"{tokenizer.place}: the chat template writes {', '.join(unknown[:5])}, which is no token of the"
                " tokenizer, so the model would learn it letter by letter; use the chat template of this checkpoint, or"
                " add the token to the tokenizer and a row for it to the model"
            )
        controls = tuple(tokenizer.control_ids)
        self._process = TemplateProcess(TemplateText(source, tokenizer.template_variables, controls, tokenizer.place))

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, *, prompt: bool) -> str:
        """The text of `messages`, followed by the start of an assistant turn if `prompt`.

        Raises:
            RowError: the template rejects these messages.
        """
        return self._process.render(messages, tools, prompt=prompt)

    def pieces(self, conversations: Sequence[Conversation]) -> list[list[Piece] | RowError]:
        """Each rendered conversation, split at control tokens and at the boundaries of supervised turns.

        A conversation that the template rejects, or whose earlier turns the template changes, is replaced by its
        RowError.
        """
        return self._process.pieces(conversations)


def pieces_of(
    contents: Sequence[Content], tokenizer: Tokenizer, template: ChatTemplate | None
) -> list[list[Piece] | RowError]:
    """The pieces of each row; a text ends with the end-of-document token, a completion with the stop token.

    A row that cannot be rendered, or holds characters that cannot be encoded, is replaced by its RowError.
    """
    conversations = [content for content in contents if isinstance(content, Conversation)]
    assert template is not None or not conversations, "conversations need a chat template"
    rendered = iter(template.pieces(conversations) if template is not None else ())
    rows = [next(rendered) if isinstance(one, Conversation) else _plain_pieces(one, tokenizer) for one in contents]
    return [row if isinstance(row, RowError) else _checked(row, tokenizer) for row in rows]


def _plain_pieces(content: Content, tokenizer: Tokenizer) -> list[Piece]:
    if isinstance(content, Completion):
        stop = tokenizer.control_token(tokenizer.eos_id)
        given = [Piece(content.prompt, False, False)] if content.prompt else []
        return [*given, Piece(content.completion, False, True), Piece(stop, True, True)]
    assert isinstance(content, Text)
    return [Piece(content.text, False, True), Piece(tokenizer.control_token(tokenizer.document_id), True, True)]


def _checked(row: list[Piece], tokenizer: Tokenizer) -> list[Piece] | RowError:
    for piece in row:
        try:
            piece.text.encode()
        except UnicodeEncodeError as error:
            return RowError("not UTF-8", f"half of a surrogate pair ({piece.text[error.start]!a})")
        try:
            portions(piece.text, tokenizer)
        except RowError as error:
            return error
    return row


def encode(rows: Sequence[Sequence[Piece]], tokenizer: Tokenizer) -> list[Document]:
    """The documents of many rows; texts that occur repeatedly (`user`, newlines) are tokenised once."""
    texts = {piece.text: None for row in rows for piece in row if not piece.is_control}
    short = [text for text in texts if len(text) <= PORTION]
    ids_of = {
        text: np.array(ids, np.int64) for text, ids in zip(short, tokenizer.encode_plain_batch(short), strict=True)
    }
    documents = []
    for row in rows:
        runs = [_ids(piece, ids_of, tokenizer) for piece in row]
        trained = np.array([piece.is_trained for piece in row], np.bool_)
        documents.append(
            Document(
                ids=np.concatenate([*runs, np.empty(0, np.int64)]),
                trained=np.repeat(trained, [len(run) for run in runs]),
            )
        )
    return documents


def _ids(piece: Piece, ids_of: Mapping[str, NDArray[np.int64]], tokenizer: Tokenizer) -> NDArray[np.int64]:
    if piece.is_control:
        return np.array([tokenizer.control_id(piece.text)], np.int64)
    if piece.text in ids_of:
        return ids_of[piece.text]
    return np.concatenate(
        [np.array(tokenizer.encode_plain_batch([part])[0], np.int64) for part in portions(piece.text, tokenizer)]
    )


def portions(text: str, tokenizer: Tokenizer) -> list[str]:
    """Split a long text where splitting does not change its tokens; the tokenizer needs 100 bytes a character.

    In the tokenizers of this family no token spans a line end and the first character of the next line, so `text` is
    split there. Each cut is verified on 200 characters around it; if their tokens differ, the next line end is tried.

    Raises:
        RowError: a line is longer than `LONGEST_LINE`.
    """
    parts, start = [], 0
    while len(text) - start > PORTION:
        cut = next(
            (
                found.start() + 1
                for found in _LINE_START.finditer(text, start + PORTION, start + PORTION + LONGEST_LINE)
                if _is_seam(text, found.start() + 1, tokenizer)
            ),
            None,
        )
        if cut is None:
            if len(text) - start > PORTION + LONGEST_LINE:
                raise RowError("too long", f"holds a line of more than {LONGEST_LINE:,} characters; break it")
            break
        parts.append(text[start:cut])
        start = cut
    return [*parts, text[start:]]


def _is_seam(text: str, cut: int, tokenizer: Tokenizer) -> bool:
    before, after = text[cut - 100 : cut], text[cut : cut + 100]
    return tokenizer.encode_plain(before + after) == tokenizer.encode_plain(before) + tokenizer.encode_plain(after)
