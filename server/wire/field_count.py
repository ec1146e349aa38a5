"""How many fields a protobuf message has, before it is parsed: one of 2 bytes may become 50 in memory."""

from __future__ import annotations

from google.protobuf.descriptor import Descriptor

from ..errors import BadRequest

UNCOUNTED_BYTES = 4 << 20  # a body up to this is small also when it is parsed
MAX_FIELDS = 1 << 20  # the largest honest request, 16 384 datums, has less than half


def check_field_count(body: bytes, descriptor: Descriptor, limit: int = MAX_FIELDS) -> None:
    """Raises BadRequest if `body` and the messages in it have more fields; says nothing of malformed ones."""
    waiting = [(0, len(body), descriptor)]
    count = 0
    while waiting:
        at, end, message = waiting.pop()
        kinds = message.fields_by_number
        while at < end:
            count += 1
            if count > limit:
                raise BadRequest(f"the body has over {limit} protobuf fields; send fewer datums per request")
            tag, at = _varint(body, at)
            wire_type = tag & 7
            if wire_type == 2:  # bytes, or a message
                size, at = _varint(body, at)
                field = kinds.get(tag >> 3) if size else None
                if field is not None and field.message_type is not None:
                    waiting.append((at, min(at + size, end), field.message_type))
                at += size
            elif wire_type == 0:
                _, at = _varint(body, at)
            elif wire_type == 1:
                at += 8
            elif wire_type == 5:
                at += 4
            # Else it is the begin or the end of a group, whose fields follow.


def _varint(body: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and the place after it; the body's end where there is none."""
    value = 0
    for shift, byte in enumerate(body[at : at + 10]):
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value, at + shift + 1
    return 0, len(body)
