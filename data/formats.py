"""Conversion of a row, in any common format, to a conversation, a completion or a text."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from data.sources import BadRows, Format, RowError, Source, read_rows, source_files
from monitoring.json_file import FormError, load_text

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's format, with the arguments of tool calls as objects."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    first_trained: int = 0

    def trained(self, index: int) -> bool:
        """Whether message `index` is supervised: an assistant turn, not part of the prompt, not of weight 0."""
        message = self.messages[index]
        return index >= self.first_trained and message["role"] == "assistant" and message.get("weight") != 0


@dataclass(frozen=True)
class Completion:
    """A prompt and its continuation, without a chat template: only `completion` is supervised."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A text, supervised as a whole."""

    text: str


Content = Conversation | Completion | Text
TEXT_COLUMNS = ("text", "content", "code")
# Role names of other formats.
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "developer": "system", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"},
    **{"function": "tool", "observation": "tool", "tool_response": "tool"},
    **{"function_call": "assistant", "tool_call": "assistant"},
}
CALL_ROLES = ("function_call", "tool_call")


def size_of(content: Content) -> int:
    """The number of characters in a row."""
    if isinstance(content, Conversation):
        return sum(map(len, strings([content.messages, content.tools])))
    return len(content.text) if isinstance(content, Text) else len(content.prompt) + len(content.completion)


def strings(value: Any) -> Iterator[str]:
    """Every string in a value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in chain(value.keys(), value.values()) if isinstance(value, dict) else value:
            yield from strings(item)


def read_contents(
    sources: Iterable[Source], bad_rows: BadRows, *, skip: int = 0, progress: Callable[[], None] = lambda: None
) -> Iterator[tuple[str, Content]]:
    """The usable rows of all sources, each with its place; the others are added to `bad_rows`.

    Args:
        skip: number of rows, usable or not, to skip at the start.
        progress: called for every row.

    Raises:
        DataError: a source or a file cannot be read, or a bad row stops the run.
    """
    for source in sources:
        for path in source_files(source):
            for row in read_rows(path):
                progress()
                bad_rows.looked_at_a_row()
                if bad_rows.rows_seen <= skip:
                    continue
                if isinstance(row, RowError):
                    bad_rows.add(row)
                    continue
                try:
                    content = read_columns(row.columns, source.format)
                except RowError as error:
                    bad_rows.add(error.at(row.place))
                else:
                    yield row.place, content


def read_columns(columns: dict[str, Any], kind: Format = "auto") -> Content:
    """Convert the columns of one row.

    Raises:
        RowError: the columns do not match the format, or their values are invalid.
    """
    if kind == "auto":
        kind = _recognise(columns)
    if kind == "text":
        name = next((name for name in TEXT_COLUMNS if name in columns), TEXT_COLUMNS[0])
        return Text(_filled(_string(columns, name), name))
    if kind == "alpaca":
        return _conversation(list(_alpaca(columns)), columns, "row")
    if kind == "prompt_completion":
        return _prompt_completion(columns)
    name = (
        "conversations"
        if "conversations" in columns and (kind == "sharegpt" or "messages" not in columns)
        else "messages"
    )
    return _conversation(_list(columns, name), columns, name)


def _recognise(columns: dict[str, Any]) -> Format:
    filled = {name for name, value in columns.items() if value is not None}
    for kind, needed in (
        ("chat", {"messages"}),
        ("sharegpt", {"conversations"}),
        ("alpaca", {"instruction", "output"}),
        ("prompt_completion", {"prompt", "completion"}),
    ):
        if needed <= filled:
            return kind  # type: ignore[return-value]
    if filled & set(TEXT_COLUMNS):
        return "text"
    raise RowError(
        "unknown columns",
        f"columns {', '.join(sorted(columns)) or '(none)'} are no known format; known: messages, conversations, "
        "instruction + output, prompt + completion, text",
    )


def _alpaca(columns: dict[str, Any]) -> Iterator[Message]:
    for turn in _list(columns, "history") if columns.get("history") else []:
        if not (isinstance(turn, list) and len(turn) == 2):
            raise RowError("bad message", "history: expected pairs of a question and an answer")
        yield {"role": "user", "content": turn[0]}
        yield {"role": "assistant", "content": turn[1]}
    extra = columns.get("input")
    request = _string(columns, "instruction") + (f"\n\n{_string(columns, 'input')}" if extra else "")
    yield {"role": "user", "content": request}
    yield {"role": "assistant", "content": _string(columns, "output")}


def _prompt_completion(columns: dict[str, Any]) -> Content:
    prompt, completion = columns.get("prompt"), columns.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, _filled(completion, "completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(prompt + completion, columns, "prompt + completion", first_trained=len(prompt))
    raise RowError("bad message", "prompt and completion must both be text or both be lists of messages")


def _conversation(turns: list[Any], columns: dict[str, Any], name: str, first_trained: int = 0) -> Conversation:
    messages = [_message(turn, f"{name}[{index}]") for index, turn in enumerate(turns)]
    system = columns.get("system")
    if system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _string(columns, "system")})
        first_trained += first_trained > 0
    tools = _list(columns, "tools") if columns.get("tools") else None
    for index, tool in enumerate(tools or []):
        definition = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(definition, dict) or not isinstance(definition.get("name"), str):
            raise RowError("bad tool", f"tools[{index}]: expected an object with a name")
    _refuse_not_finite([messages, tools], name)
    conversation = Conversation(messages, tools, first_trained)
    if not any(map(conversation.trained, range(len(messages)))):
        raise RowError("no assistant turn", f"{name}: no assistant turn to learn from")
    return conversation


def _refuse_not_finite(value: Any, name: str) -> None:
    """Reject NaN and infinity in rendered values, which the model would learn; unused columns may hold them."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict | list):
            waiting += inner.values() if isinstance(inner, dict) else inner
        elif isinstance(inner, float) and not math.isfinite(inner):
            raise RowError("not JSON", f"{name}: holds the number {inner}, which JSON has no word for")


def _message(turn: Any, name: str) -> Message:
    """One message with the keys `role` and `content` that templates use; nulls are dropped, other keys kept."""
    if not isinstance(turn, dict):
        raise RowError("bad message", f"{name}: expected an object with role and content")
    message = {key: value for key, value in turn.items() if value is not None and key not in ("from", "value")}
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise RowError("bad message", f"{name}.role: {role!r} is not one of {', '.join(ROLES)}")
    message["role"] = ROLES[role]
    content = turn.get("content", turn.get("value"))
    if role in CALL_ROLES:
        calls = _parsed(content, f"{name}.content")
        message["tool_calls"], content = calls if isinstance(calls, list) else [calls], None
    if message.get("tool_calls"):
        if message["role"] != "assistant":
            raise RowError("bad message", f"{name}.tool_calls: only an assistant calls tools")
        calls = _list(message, "tool_calls", f"{name}.tool_calls")
        message["tool_calls"] = [_call(call, f"{name}.tool_calls[{i}]") for i, call in enumerate(calls)]
    else:
        message.pop("tool_calls", None)
    if message.get("weight", 1) not in (0, 1):
        raise RowError("bad message", f"{name}.weight: {message['weight']!r} is not 0 or 1")
    message["content"] = _content(content, name, optional="tool_calls" in message)
    reasoning = message.pop("reasoning", message.pop("thinking", None))
    if reasoning is not None:
        message.setdefault("reasoning_content", reasoning)
    return message


def _content(content: Any, name: str, *, optional: bool) -> str:
    if isinstance(content, list):
        if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        raise RowError("bad message", f"{name}.content: only parts of type text are supported")
    if content is None and optional:
        return ""
    if not isinstance(content, str):
        raise RowError("bad message", f"{name}.content: expected text, found {type(content).__name__}")
    return content


def _call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("bad tool call", f"{name}: expected a function with a name")
    arguments = _parsed(function.get("arguments") or {}, f"{name}.function.arguments")
    if not isinstance(arguments, dict):
        raise RowError("bad tool call", f"{name}.function.arguments: expected an object")
    described = {"name": function["name"], "arguments": arguments}
    return {key: call[key] for key in ("id",) if call.get(key)} | {"type": "function", "function": described}


def _parsed(value: Any, name: str) -> Any:
    """`value`, decoded if it is a string of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return load_text(value, unique_keys=True, half_characters=True)
    except FormError as error:
        where = f" at character {error.column}" if error.line == 1 else f" at line {error.line}" if error.line else ""
        raise RowError("not JSON", f"{name}: {error}{where}") from None


def _list(columns: dict[str, Any], name: str, place: str | None = None) -> list[Any]:
    value = _parsed(columns.get(name), place or name)
    if not isinstance(value, list):
        raise RowError("bad message", f"{place or name}: expected a list, found {type(value).__name__}")
    return value


def _string(columns: dict[str, Any], name: str) -> str:
    value = columns.get(name)
    if not isinstance(value, str):
        raise RowError("bad column", f"{name}: expected text, found {type(value).__name__}")
    return value


def _filled(text: str, name: str) -> str:
    if not text.strip():
        raise RowError("empty", f"{name}: empty")
    return text
