"""Repair of an offline W&B run after a kill: rows of superseded steps are removed, and lost rows are found.

`wandb sync` sends the parts of a run one after another without merging, so a step held both by a killed part and by
the part that resumed it would be sent twice. Rows that W&B had not written when it was killed are in metrics.jsonl.

A .wandb file is a log of protobuf records in LevelDB's format: a header of 7 bytes, then blocks of 32 KiB with chunks
of (checksum, length, kind, data). A record is one chunk, or a first, middle ones and a last.
"""

import logging
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf.message import DecodeError
from wandb.proto import wandb_internal_pb2

from monitoring.files import replace_file
from monitoring.metrics import Record, read_metrics
from monitoring.supersede import ASIDE

HEADER = b":W&B\xe1\xbe\x00"
BLOCK = 32768
CHUNK = struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4

log = logging.getLogger(__name__)


def take_back_rows(wandb_folder: Path, run_id: str, after: int) -> int | None:
    """Remove history rows of steps after `after` from every offline part of this run.

    The original part is copied to `superseded/`. A part that was already sent, or cannot be read, is left unchanged;
    the latter is logged.

    Returns:
        The last step that the parts then hold: -1 if no part holds a row, None if unknown.
    """
    parts = sorted(wandb_folder.glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    online = any(wandb_folder.glob(f"run-*-{run_id}"))  # then some rows are only with W&B
    last: int | None = -1 if parts and not online else None
    for path in parts:
        try:
            records = [(record, _step_of_row(record)) for record in read_log(path.read_bytes())]
        except (DecodeError, ValueError) as error:
            log.warning("%s: cannot be read (%s), so W&B may show steps after %d twice", path, error, after)
            last = None
            continue
        kept = [(record, step) for record, step in records if step is None or 0 < after >= step]
        if last is not None:
            last = max(last, *(step for _, step in kept if step is not None), -1)
        if len(kept) < len(records) and not path.with_suffix(".wandb.synced").exists():
            _keep_aside(path, wandb_folder / ASIDE)
            replace_file(path, write_log(record for record, _ in kept))
    return last


def _keep_aside(path: Path, to: Path) -> None:
    aside = to / path.parent.name / path.name
    if not aside.exists():  # an existing copy holds at least as much
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, aside)


def lost_records(run: Path, held: int, after: int) -> Iterator[Record]:
    """Records of metrics.jsonl that become W&B rows, of steps after `held` and up to `after`."""
    for record in read_metrics(run / "metrics.jsonl"):
        if record["kind"] in ("train", "eval", "routing") and held < record["step"] <= after:
            yield record


def read_log(contents: bytes) -> Iterator[bytes]:
    """The records of a .wandb file; an incomplete last one is ignored.

    Raises:
        ValueError: not a .wandb file, or a wrong checksum.
    """
    if not contents.startswith(HEADER):
        raise ValueError("not a log of W&B")
    at, pending = len(HEADER), b""
    while at + CHUNK.size <= len(contents):
        left = BLOCK - at % BLOCK
        if left < CHUNK.size:  # the end of a block, too small for a chunk
            at += left
            continue
        checksum, size, kind = CHUNK.unpack_from(contents, at)
        data = contents[at + CHUNK.size : at + CHUNK.size + size]
        if kind == 0 or len(data) < size:
            return
        if checksum != _checksum(kind, data):
            raise ValueError(f"the checksum at byte {at} does not fit")
        at += CHUNK.size + size
        pending = data if kind in (WHOLE, FIRST) else pending + data
        if kind in (WHOLE, LAST):
            yield pending


def write_log(records: Iterable[bytes]) -> bytes:
    """The contents of a .wandb file with these records."""
    file = bytearray(HEADER)
    for record in records:
        rest, is_first = memoryview(record), True
        while is_first or rest:
            left = BLOCK - len(file) % BLOCK
            if left < CHUNK.size:
                file += bytes(left)
                left = BLOCK
            data, rest = rest[: left - CHUNK.size], rest[left - CHUNK.size :]
            kind = (FIRST if rest else WHOLE) if is_first else (MIDDLE if rest else LAST)
            file += CHUNK.pack(_checksum(kind, data), len(data), kind) + data
            is_first = False
    return bytes(file)


def _checksum(kind: int, data: bytes | memoryview) -> int:
    return zlib.crc32(data, zlib.crc32(bytes([kind])))


def _step_of_row(record: bytes) -> int | None:
    """The step of a history record; None for any other record."""
    read = wandb_internal_pb2.Record.FromString(record)
    return int(read.history.step.num) if read.WhichOneof("record_type") == "history" else None
