"""Names, URIs and directory keys from any text: below the data directory, or a ValueError."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fuzz.campaign import campaign
from fuzz.mutations import TEXTS
from tinsmith.ckpt import paths
from tinsmith.server import checkpoints
from tinsmith.server.errors import BadRequest

PIECES = [
    *("tinker://", "tinker:", "checkpoints", "weights", "sampler_weights", "external_weights", "s:train:0"),
    *("/", "//", "..", ".", "../", "\\", "%2e", "%2f", "~", ":", "@", "-", "_", " ", "\n", "\x00", "\ud800"),
    *("a", "step-100", "A" * 130, "9" * 200, "é", "٣", "ﬀ", "\u2024\u2024", "\uff0f", "C:", "con", "a.b"),
]


def text(rng: random.Random) -> object:
    """A path, a few of its pieces exchanged; or anything."""
    if rng.random() < 0.02:
        return rng.choice((None, 1, b"tinker://a/weights/b", [], Path("a"), *TEXTS))
    if rng.random() < 0.4:
        parts = ["tinker://", "s:train:0", "/", "weights", "/", "step-100"]
        if rng.random() < 0.5:
            parts = parts[1:] if rng.random() < 0.5 else ["checkpoints", "/", *parts[1:]]
        for _ in range(rng.randrange(4)):
            parts[rng.randrange(len(parts))] = rng.choice(PIECES)
        return "".join(parts)
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(9)))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data").resolve()


@campaign(text)
def test_names_and_uris(value: str, data_dir: Path) -> None:
    for check in (paths.check_name, paths.check_id, paths.check_segment):
        try:
            assert check(value) == value
        except ValueError:
            continue
        assert "/" not in value
        assert ".." not in value
        assert value.isascii()
        assert value.isprintable()
    for parse in (paths.parse_uri, checkpoints.parse, lambda name: checkpoints.named("run", "weights", name)):
        try:
            uri = parse(value)
        except (ValueError, BadRequest):
            continue
        assert paths.parse_uri(str(uri)) == uri
        directory = paths.new_directory(uri.run, uri.segment, uri.name)
        below = paths.resolve(data_dir, directory)
        assert below.relative_to(data_dir).parts[0] == "checkpoints"
        assert len(below.relative_to(data_dir).parts) == 4
    try:
        below = paths.resolve(data_dir, value)
    except ValueError:
        return
    assert below != data_dir
    assert data_dir in below.parents
