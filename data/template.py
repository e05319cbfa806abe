"""A chat template, compiled as in transformers, and the boundaries of supervised turns in its output.

The template is rendered for the whole conversation. An assistant turn is the text that it adds to the rendering of the
preceding messages with the generation prompt, which is exactly what the model must write at inference. Time and memory
of a template are limited in `data/template_process.py`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.formats import Conversation, Message, strings
from data.sources import DataError, RowError

PRIVATE_USE = range(0xE000, 0xF900)
THINKING = ("<think>", "</think>")
# What a template can raise besides jinja's own errors: from arithmetic, calls or its compiled code.
FAULTS = (
    *(jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError),
    *(AssertionError, SyntaxError, MemoryError, OSError),
)


class Piece(NamedTuple):
    """A part of a document: plain text, or one control token."""

    text: str
    is_control: bool
    is_trained: bool


class TemplateText(NamedTuple):
    """A checkpoint's chat template with its variables, control tokens and place."""

    source: str
    variables: Mapping[str, str]
    control_tokens: Sequence[str]
    place: str


class Template:
    """A checkpoint's chat template, compiled as in transformers."""

    def __init__(self, text: TemplateText) -> None:
        self._source, self._variables = text.source, text.variables
        longest_first = sorted(text.control_tokens, key=len, reverse=True)
        self._control = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        try:
            self._template = _environment().from_string(text.source)
        except FAULTS as error:
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise DataError(f"{text.place}: chat template{line}: {described(error)}") from None

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, *, prompt: bool) -> str:
        """The text of `messages`, followed by the start of an assistant turn if `prompt`.

        Raises:
            RowError: the template rejects these messages.
        """
        variables = {**self._variables, "messages": messages, "tools": tools, "documents": None}
        try:
            return self._template.render(**variables, add_generation_prompt=prompt)
        except FAULTS as error:
            raise RowError("chat template", f"the chat template refuses this row ({described(error)})") from None

    def pieces(self, conversation: Conversation) -> list[Piece]:
        """The rendered conversation, split at control tokens and at the boundaries of supervised turns.

        Raises:
            RowError: the template rejects the row, or renders earlier turns differently once others follow, so that no
                mask is correct.
        """
        mark = self._unused_character(conversation)
        messages = [self._escape(message, mark, message["role"] == "assistant") for message in conversation.messages]
        tools = self._escape(conversation.tools, mark, False) if conversation.tools else None
        whole = self.render(messages, tools, prompt=False)
        pieces: list[Piece] = []
        position = 0
        for index in filter(conversation.trained, range(len(messages))):
            start, end = self._turn(messages, tools, index, whole)
            pieces += self._cut(whole[position:start], mark, is_trained=False)
            pieces += self._cut(whole[start:end], mark, is_trained=True)
            position = end
        return pieces + self._cut(whole[position:], mark, is_trained=False)

    def _turn(self, messages: list[Message], tools: Any, index: int, whole: str) -> tuple[int, int]:
        """Start and end in `whole` of the text that the model writes in turn `index`."""
        if index == 0:
            raise RowError("bad message", "messages[0]: the assistant speaks first; a turn needs something to answer")
        before = self.render(messages[:index], tools, prompt=True)
        after = whole if index + 1 == len(messages) else self.render(messages[: index + 1], tools, prompt=False)
        if not (whole.startswith(after) and after.startswith(before)):
            raise RowError(
                "rewritten turns",
                f"messages[{index}]: the chat template renders the turns up to here differently once others follow, "
                "so no single mask is right; split the conversation so that this turn is the last",
            )
        # Text after the control token that ends the turn is written by the template, never by the model.
        ends = [found.end() for found in self._control.finditer(after, len(before))]
        if not ends or after[ends[-1] :].strip():
            raise RowError(
                "unfinished turn", f"messages[{index}]: the chat template ends the turn without a control token"
            )
        return len(before), ends[-1]

    def _cut(self, text: str, mark: str, *, is_trained: bool) -> list[Piece]:
        parts = self._control.split(text)
        pieces = [Piece(part.replace(mark, ""), bool(i % 2), is_trained) for i, part in enumerate(parts)]
        return [piece for piece in pieces if piece.text]

    def _unused_character(self, conversation: Conversation) -> str:
        used = set(self._source).union(*strings([conversation.messages, conversation.tools]))
        found = next((chr(code) for code in PRIVATE_USE if chr(code) not in used), None)
        if found is None:
            raise RowError("bad message", "holds every private-use character there is")
        return found

    def _escape(self, value: Any, mark: str, is_assistant: bool) -> Any:
        """Insert `mark` into every control token within strings of `value`, so that it is treated as text.

        An assistant's own <think> block is excepted if the template handles thinking.
        """
        thinks = is_assistant and all(token in self._source for token in THINKING)

        def escape(found: re.Match[str]) -> str:
            token = found[0]
            return token if thinks and token in THINKING else token[0] + mark + token[1:]

        return _map_strings(value, lambda text: self._control.sub(escape, text))


def described(error: BaseException) -> str:
    """An error's message, as one line of bounded length."""
    text = " ".join(str(error)[:1000].split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return value


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks assistant text in some templates; renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that templates are written for: settings, filters and globals.

    Source: `_compile_jinja_template`, transformers 5.23.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
