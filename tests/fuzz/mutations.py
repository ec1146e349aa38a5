"""Changes of valid inputs: of bytes, and of JSON values."""

from __future__ import annotations

import copy
import random
from typing import Any

INTEGERS = [
    *(0, 1, 2, 3, 4, 7, 8, 127, 128, 255, 256, 1 << 15, 1 << 16, -1, -2),
    *(1 << 20, (1 << 31) - 1, 1 << 31, -(1 << 31), (1 << 32) - 1, 1 << 32, 1 << 53, 1 << 62),
    *((1 << 63) - 1, -(1 << 63), -(1 << 63) + 1),
]
HUGE_INTEGERS = [1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 64), 10**30, -(10**40), 10**400]
FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e30, 1e308, float("nan"), float("inf"), float("-inf")]
TEXTS = [
    *("", " ", "a", "\x00", "a\x00b", "ü" * 300, "\ud800", "\u202e", "..", ".", "/", "../..", "a" * 5000),
    *("tinker://", "tinker://a/weights/b", "tinker://../weights/b", "%2e%2e", "\\", "~", "None", "nan", "-"),
    *("cross_entropy", "adamw", "tiny", "s:train:0", "s:train:0/weights/b", "file:///etc/passwd"),
]


def mutated_bytes(rng: random.Random, data: bytes, most: int = 4) -> bytes:
    """Up to `most` changes: flipped bytes, cuts, repeats, insertions, numbers of our list."""
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(7):
            case 0 if out:
                out[at % len(out)] = rng.randrange(256)
            case 1 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 2:
                del out[at : at + rng.choice((1, 2, 4, 8, 64))]
            case 3:
                out[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8, 32)))
            case 4:
                size = rng.choice((2, 8, 32, 128))
                out[at:at] = out[at : at + size] * rng.choice((1, 2, 50))
            case 5:
                number = rng.choice(INTEGERS) % (1 << 64)
                size = rng.choice((1, 2, 4, 8))
                out[at : at + size] = number.to_bytes(8, rng.choice(("little", "big")))[:size]
            case _:
                del out[at:]
    return bytes(out)


def any_json(rng: random.Random, depth: int = 3) -> Any:
    """A value that JSON can say, and some that only careless encoders do."""
    match rng.randrange(9 if depth else 7):
        case 0:
            return rng.choice((None, True, False))
        case 1 | 2:
            return rng.choice(INTEGERS)
        case 3:
            return rng.choice(HUGE_INTEGERS)
        case 4:
            return rng.choice(FLOATS)
        case 5 | 6:
            return rng.choice(TEXTS)
        case 7:
            return [any_json(rng, depth - 1) for _ in range(rng.randrange(4))]
        case _:
            return {rng.choice(TEXTS): any_json(rng, depth - 1) for _ in range(rng.randrange(4))}


def mutated_json(rng: random.Random, value: Any, most: int = 3) -> Any:
    """Up to `most` values at random places replaced, removed, doubled or nested."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.randint(0, most)):
        holder, key = rng.choice(_places(root))
        match rng.randrange(6):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 0 | 1 if isinstance(holder, list) and holder is not root:
                holder.insert(rng.randrange(len(holder) + 1), holder[key])
            case 2:
                holder[key] = [holder[key]]
            case 3 if isinstance(holder, dict):
                holder[rng.choice(TEXTS)] = any_json(rng)
            case 4 if isinstance(holder[key], int):
                holder[key] += rng.choice((-1, 1, 2, -2))
            case _:
                holder[key] = any_json(rng)
    return root[0]


def _places(root: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value below `root`."""
    places: list[tuple[Any, Any]] = []
    waiting = [root]
    while waiting:
        holder = waiting.pop()
        keys = holder.keys() if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            places.append((holder, key))
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])
    return places
