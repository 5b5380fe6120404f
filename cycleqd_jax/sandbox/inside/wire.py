"""The bytes on the pipes, for both sides of the wall.

To the supervisor: one JSON object (the configuration), then jobs, each a head (number, snapshot
flag, length of the body) and a body that only the program's own process reads. It is packed by
hand because decoding JSON there would touch a hundred shared pages. From the supervisor: JSON
objects, each after four bytes of length.
"""

import json
import os
import struct
from collections.abc import Mapping
from typing import Any

_HEAD = struct.Struct("<I?I")
_BODY = struct.Struct("<?III")
_FILE = struct.Struct("<II")
_LENGTH = struct.Struct("<I")


def pack_message(message: dict[str, Any]) -> bytes:
    """A JSON object after its length."""
    body = json.dumps(message).encode()
    return _LENGTH.pack(len(body)) + body


def message_length(data: bytes | bytearray) -> int | None:
    """Bytes of the first message with its length; None while that is not known."""
    return _LENGTH.unpack_from(data)[0] + _LENGTH.size if len(data) >= _LENGTH.size else None


def unpack_message(data: bytes | bytearray) -> dict[str, Any]:
    """The object in one whole message."""
    return json.loads(bytes(data[_LENGTH.size :]))


def pack_job(number: int, snapshot: bool, body: bytes) -> bytes:
    """Head and body of a job."""
    return _HEAD.pack(number, snapshot, len(body)) + body


def pack_body(python: bool, source: str, files: Mapping[str, str], stdin: str) -> bytes:
    """What the program's own process needs to know."""
    text, standard_input = _encode(source), _encode(stdin)
    pieces = [_BODY.pack(python, len(text), len(standard_input), len(files)), text, standard_input]
    for path, content in files.items():
        name, data = _encode(path), _encode(content)
        pieces += [_FILE.pack(len(name), len(data)), name, data]
    return b"".join(pieces)


def unpack_body(body: bytes) -> tuple[bool, bytes, bytes, list[tuple[bytes, bytes]]]:
    """Is it Python, source, stdin, (path, content) of files."""
    python, source_size, stdin_size, count = _BODY.unpack_from(body)
    at = _BODY.size
    source = body[at : at + source_size]
    at += source_size
    stdin = body[at : at + stdin_size]
    at += stdin_size
    files = []
    for _ in range(count):
        name_size, size = _FILE.unpack_from(body, at)
        at += _FILE.size
        files.append((body[at : at + name_size], body[at + name_size : at + name_size + size]))
        at += name_size + size
    return python, source, stdin, files


def read_message(fd: int) -> dict[str, Any] | None:
    """The next JSON object, None at the end of the stream."""
    head = _read(fd, _LENGTH.size)
    body = head and _read(fd, _LENGTH.unpack(head)[0])
    return json.loads(body) if body else None


def read_job(fd: int) -> tuple[int, bool, bytes] | None:
    """Number, snapshot flag and body of the next job, None at the end of the stream."""
    head = _read(fd, _HEAD.size)
    if head is None:
        return None
    number, snapshot, size = _HEAD.unpack(head)
    body = _read(fd, size)
    return None if body is None else (number, snapshot, body)


def write_all(fd: int, data: bytes) -> None:
    """Write until nothing is left."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def _read(fd: int, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        piece = os.read(fd, min(count - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "replace")
