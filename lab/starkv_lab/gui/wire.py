"""Reads TFRecord files and protocol buffers without TensorFlow, as far as AndroidControl needs it.

Sources: tensorflow.org, "TFRecord and tf.train.Example"; protobuf.dev, "Encoding".
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from starkv_compile import StarKVError

Message = dict[int, list["int | bytes"]]
"""The values of each field number in their order: unsigned numbers, or bytes."""


def read_records(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields ("file: record N", its bytes) for each record of a gzipped TFRecord file.

    The function checks the checksum of a record's length, which reveals a file that is no TFRecord
    or was cut. It does not check that of the contents, because gzip has its own checksum.

    Raises:
        StarKVError: the file is missing or damaged.
    """
    number = 0
    try:
        with gzip.open(path, "rb") as file:
            while head := file.read(12):
                where = f"{path}: record {number}"
                yield where, _contents(head, file, where)
                number += 1
    except (OSError, EOFError, zlib.error) as error:
        raise StarKVError(
            f"{path}: record {number} cannot be read ({error}); download the file again"
        ) from error


def _contents(head: bytes, file: gzip.GzipFile, where: str) -> bytes:
    if len(head) == 12:
        length, checksum = struct.unpack("<QI", head)
        if checksum == masked_crc(head[:8]):
            contents = file.read(length)
            if len(contents) == length and len(file.read(4)) == 4:
                return contents
    raise StarKVError(f"{where} is damaged or cut; download the file again")


def masked_crc(data: bytes) -> int:
    """Returns TFRecord's checksum: CRC-32C, rotated and shifted by a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def parse(data: bytes) -> Message:
    """Returns the fields of a message.

    Raises:
        ValueError: the bytes are no message.
    """
    fields: Message = {}
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        value: int | bytes
        if key & 7 == 0:
            value, place = _varint(data, place)
        elif key & 7 in (1, 2, 5):
            length = {1: 8, 5: 4}.get(key & 7)
            if length is None:
                length, place = _varint(data, place)
            value, place = data[place : place + length], place + length
        else:
            raise ValueError(f"wire type {key & 7} at byte {place}")
        if place > len(data):
            raise ValueError(f"field {key >> 3} ends beyond the message")
        fields.setdefault(key >> 3, []).append(value)
    return fields


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(data):
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
    raise ValueError("a number ends beyond the message")


def message(fields: Message, number: int) -> Message:
    """Returns the message in a field, or an empty message."""
    return parse(_last_bytes(fields, number))


def messages(fields: Message, number: int) -> list[Message]:
    """Returns the messages in a repeated field."""
    return [parse(value) for value in fields.get(number, []) if isinstance(value, bytes)]


def string(fields: Message, number: int) -> str:
    return _last_bytes(fields, number).decode()


def integer(fields: Message, number: int) -> int:
    """Returns a signed number, or 0 if the field is missing, as protocol buffers say."""
    value = fields.get(number, [0])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {number} is no number")
    return signed(value)


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def numbers(fields: Message, number: int) -> list[int]:
    """Returns the numbers of a repeated field, packed or not."""
    found: list[int] = []
    for value in fields.get(number, []):
        if isinstance(value, int):
            found.append(signed(value))
            continue
        place = 0
        while place < len(value):
            one, place = _varint(value, place)
            found.append(signed(one))
    return found


def _last_bytes(fields: Message, number: int) -> bytes:
    value = fields.get(number, [b""])[-1]
    if not isinstance(value, bytes):
        raise ValueError(f"field {number} is a number")
    return value
