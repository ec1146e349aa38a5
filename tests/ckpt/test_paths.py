import os
import string
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinsmith.ckpt import paths

LETTERS = string.ascii_letters + string.digits
names = st.builds(
    lambda first, rest: first + rest,
    st.sampled_from(LETTERS),
    st.text(LETTERS + "._-", max_size=127),
).filter(lambda name: ".." not in name)
ids = st.builds(
    lambda first, rest: first + rest,
    st.sampled_from(LETTERS),
    st.text(LETTERS + "._:-", max_size=100),
).filter(lambda name: ".." not in name)
segments = st.sampled_from(paths.SEGMENTS)


@given(ids, segments, names)
def test_a_uri_survives_being_written_and_read(run, segment, name):
    uri = paths.CheckpointUri(run, segment, name)
    assert paths.parse_uri(str(uri)) == uri
    assert paths.parse_checkpoint_id(run, uri.checkpoint_id) == uri


@given(ids, segments, names)
def test_directory_keys_are_unique_and_lie_below_the_data_directory(run, segment, name):
    root = os.path.realpath("/tmp")
    first, second = (paths.resolve(root, paths.new_directory(run, segment, name)) for _ in range(2))
    assert first != second
    assert first.is_relative_to(root)
    assert len(first.relative_to(root).parts) == 4


@given(st.text(max_size=40))
def test_no_text_resolves_to_a_place_outside(tmp_path_factory, key):
    root = tmp_path_factory.getbasetemp()
    try:
        path = paths.resolve(root, key)
    except ValueError:
        return
    assert path != root
    assert path.is_relative_to(root)


@given(st.text(max_size=200))
def test_names_are_accepted_only_in_the_grammar(name):
    allowed = (
        0 < len(name) <= 128 and set(name) <= set(LETTERS + "._-") and name[0] in LETTERS and ".." not in name
    )
    if allowed:
        assert paths.check_name(name) == name
    else:
        with pytest.raises(ValueError, match="invalid checkpoint name"):
            paths.check_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a..b", "-a", "_a", "a\n", "a\0", "é", "x" * 129, "a b", 3]
)
def test_bad_names(name):
    with pytest.raises(ValueError, match="invalid checkpoint name"):
        paths.check_name(name)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "run/weights/a",
        "tinker://",
        "tinker://run/weights",
        "tinker://run/weights/a/b",
        "tinker://run/adapters/a",
        "tinker:///weights/a",
        "tinker://run/weights/",
        "tinker://../weights/a",
        "tinker://run/weights/../../etc",
        "http://run/weights/a",
        "file:///etc/passwd",
        None,
    ],
)
def test_bad_uris(uri):
    with pytest.raises(ValueError, match="invalid"):
        paths.parse_uri(uri)


@pytest.mark.parametrize(
    "key", ["", "/", "/etc", "..", "a/../../b", "a//b", "a/.", "a/", "./a", "a\\b", "a\0", "~"]
)
def test_bad_keys(tmp_path, key):
    with pytest.raises(ValueError, match="invalid directory key"):
        paths.resolve(tmp_path, key)


def test_a_symbolic_link_cannot_lead_out(tmp_path):
    root, outside = tmp_path / "data", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "checkpoints").symlink_to(outside)
    with pytest.raises(ValueError, match="leads out"):
        paths.resolve(root, "checkpoints/run/weights/a-1")


def test_a_message_never_carries_an_endless_name():
    with pytest.raises(ValueError, match="invalid checkpoint name") as error:
        paths.check_name("x" * 100_000)
    assert len(str(error.value)) < 400


def test_no_array_library_is_imported():
    program = (
        "import sys, tinsmith.ckpt.paths; "
        "sys.exit(any(name in sys.modules for name in ('jax', 'numpy', 'orbax', 'flax')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
