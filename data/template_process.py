"""Rendering of chat templates in a separate process, since a template is a third-party program.

Nested loops, powers or repeated doubling could take hours or all memory, much of it inside a single operation of the
interpreter, which no thread can interrupt. The kernel kills this process when a row takes more processor time than
`SECONDS_A_ROW` or more memory than `MOST_MEMORY_BYTES`. That row is rejected, and a new process renders the next ones.
"""

import os
import pickle
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

from data.formats import Conversation, Message
from data.json_stream import MOST_ROW_BYTES
from data.sources import DataError, RowError
from data.template import Piece, Template, TemplateText

SECONDS_A_ROW = 4.0  # of processor time
MOST_ENDINGS = 2  # the template is rejected after this number of killed processes
MOST_MEMORY_BYTES = 4 << 30
_CHECKOUT = Path(__file__).resolve().parents[1]
_TOO_MUCH = "the chat template takes more than {} for this row; shorten the row, or correct the template"

Request = tuple[str, Any]
# The process's answer: a value, or reason and detail of the RowError of a rejected row.
Answer = tuple[Any, None] | tuple[None, tuple[str, str]]


class TemplateProcess:
    """A process that renders one template, killed when this object is deleted."""

    def __init__(self, text: TemplateText) -> None:
        """Start the process and compile the template.

        Raises:
            DataError: the template is invalid.
        """
        self._text = text
        self._endings = 0
        self._start()

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, *, prompt: bool) -> str:
        """The text of `messages`, followed by the start of an assistant turn if `prompt`.

        Raises:
            RowError: the template rejects these messages.
        """
        [text] = self._ask([("render", (messages, tools, prompt))])
        if isinstance(text, RowError):
            raise text
        return cast(str, text)

    def pieces(self, conversations: Sequence[Conversation]) -> list[list[Piece] | RowError]:
        """The pieces of each conversation, or the RowError of a rejected one.

        Raises:
            DataError: the template exceeds the limits for a second row.
        """
        return self._ask([("pieces", conversation) for conversation in conversations])

    def _start(self) -> None:
        code = f"import sys; sys.path.insert(0, {str(_CHECKOUT)!r}); from data.template_process import serve; serve()"
        command = [sys.executable, "-P", "-c", code]  # -P: does not import a package `data` from the current folder
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._end = weakref.finalize(self, _end, self._process)
        try:
            self._send((self._text, SECONDS_A_ROW))
            value, refused = self._receive()
        except (OSError, EOFError):
            raise DataError(f"{self._text.place}: {self._why_it_ended('to be compiled')}") from None
        if refused is not None:
            raise DataError(refused[1])
        assert value is None

    def _ask(self, requests: Sequence[Request]) -> list[Any]:
        """The answer to each request; all are sent before the first answer is read."""
        answers: list[Any] = []
        while len(answers) < len(requests):
            try:
                self._send(requests[len(answers) :])
                while len(answers) < len(requests):
                    value, refused = self._receive()
                    answers.append(value if refused is None else RowError(*refused))
            except (OSError, EOFError):
                why = self._why_it_ended("for this row")
                self._end()
                self._endings += 1
                if self._endings == MOST_ENDINGS:
                    raise DataError(f"{self._text.place}: {why}, as for another one") from None
                answers.append(RowError("chat template", why))
                self._start()
        return answers

    def _send(self, value: Any) -> None:
        stream = cast(IO[bytes], self._process.stdin)
        pickle.dump(value, stream)
        stream.flush()

    def _receive(self) -> Answer:
        return cast(Answer, pickle.load(cast(IO[bytes], self._process.stdout)))

    def _why_it_ended(self, what_for: str) -> str:
        code = self._process.wait()
        if code == -signal.SIGPROF:
            return f"the chat template takes more than {SECONDS_A_ROW:g} s of processor time {what_for}"
        gib = MOST_MEMORY_BYTES >> 30
        return f"the chat template ended its process {what_for} (code {code}; it may take {gib} GiB of memory)"


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        try:
            cast(IO[bytes], stream).close()
        except OSError:  # some data could no longer be sent
            continue
    process.wait()


def serve() -> None:
    """Answer requests of the parent process until it closes the pipe."""
    for unwanted in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(unwanted, signal.SIG_IGN)  # sent to the training process; this one ends with it
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    text, seconds = pickle.load(source)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        template = Template(text)
    except DataError as error:
        _answer(sink, (None, ("chat template", str(error))))
        return
    _answer(sink, (None, None))
    while True:
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            requests = pickle.load(source)
        except EOFError:
            return
        for request in requests:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            _answer(sink, _answer_to(template, request))


def _answer_to(template: Template, request: Request) -> Answer:
    kind, asked = request
    try:
        if kind == "render":
            messages, tools, prompt = asked
            text = template.render(messages, tools, prompt=prompt)
            return _bounded(text, len(text))
        pieces = template.pieces(asked)
        return _bounded(pieces, sum(len(piece.text) for piece in pieces))
    except RowError as error:
        return None, (error.reason, error.detail)
    except MemoryError:
        return None, ("chat template", _TOO_MUCH.format(f"{MOST_MEMORY_BYTES >> 30} GiB of memory"))


def _bounded(value: Any, length: int) -> Answer:
    if length > MOST_ROW_BYTES:
        most = f"{MOST_ROW_BYTES >> 20} Mi characters"
        return None, ("chat template", f"the chat template makes more than {most} of this row; split the row")
    return value, None


def _answer(sink: IO[bytes], answer: Answer) -> None:
    pickle.dump(answer, sink)
    sink.flush()
