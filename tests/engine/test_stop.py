"""Stop matching against a search of the whole text, over tokens that cut characters in two."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinsmith.ckpt.token_bytes import TokenBytes
from tinsmith.engine.sampling.stop import StopRule, implicit_stop_tokens
from tiny_models import write_tokenizer

# pieces that overlap, and the bytes of "é" and "€" one by one
PIECES = [
    b"a",
    b"b",
    b"ab",
    b"aab",
    b"ba",
    b"\n",
    b"\n\nUser",
    b":",
    b"\xc3",
    b"\xa9",
    b"\xe2\x82",
    b"\xac",
    b"",
]
STOPS = ["a", "ab", "aab", "abab", "\n\nUser:", "é", "€a", "bé", "ba\n"]


def naive_end(tokens, stop_tokens, stop_strings, max_tokens):
    """The number of tokens kept and why: after each token, search everything generated so far."""
    for count in range(1, len(tokens) + 1):
        text = b"".join(PIECES[t] for t in tokens[:count])
        if tokens[count - 1] in stop_tokens or any(s.encode() in text for s in stop_strings):
            return count, "stop"
        if count == max_tokens:
            return count, "length"
    return len(tokens), None


@settings(max_examples=500, deadline=None)
@given(
    tokens=st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=40),
    stop_tokens=st.sets(st.integers(0, len(PIECES) - 1), max_size=2),
    stop_strings=st.lists(st.sampled_from(STOPS), max_size=3),
    max_tokens=st.integers(1, 45),
)
def test_a_sequence_ends_where_a_search_of_the_whole_text_would_end_it(
    tokens, stop_tokens, stop_strings, max_tokens
):
    rule = StopRule(stop_tokens, stop_strings, max_tokens, PIECES.__getitem__)
    ended = (len(tokens), None)
    for count, token in enumerate(tokens, start=1):
        if reason := rule.after(token):
            ended = (count, reason)
            break
    assert ended == naive_end(tokens, stop_tokens, stop_strings, max_tokens)


def test_implicit_stops_hold_only_when_no_stop_is_named():
    assert implicit_stop_tokens(None, [], (2, 3)) == (2, 3)
    assert implicit_stop_tokens([], [], (2, 3)) == []
    assert implicit_stop_tokens([7], [], (2, 3)) == [7]
    assert implicit_stop_tokens(None, ["x"], (2, 3)) == ()


@pytest.fixture(scope="module")
def token_bytes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return TokenBytes.from_folder(folder)


def test_token_bytes_join_to_the_text(token_bytes):
    from tokenizers import Tokenizer

    tokenizer: Tokenizer = token_bytes.tokenizer
    for text in [
        "the tinsmith makes",
        " naïve café €5\n\n\tx",
        "日本語 🙂",
        "<|im_start|>user\nhi<|im_end|>",
    ]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert b"".join(map(token_bytes, ids)) == text.encode()
    assert token_bytes(100_000) == b"", "rows of the embedding beyond the vocabulary are silent"


def test_every_byte_has_a_token(token_bytes):
    single = {token_bytes(t) for t in range(320)}
    assert {bytes([b]) for b in range(256)} <= single


def test_a_string_across_tokens_of_a_real_tokenizer_ends_with_the_whole_token(token_bytes):
    ids = token_bytes.tokenizer.encode("a user asks and", add_special_tokens=False).ids
    rule = StopRule((), ["r a"], 100, token_bytes)
    reasons = [rule.after(token) for token in ids]
    end = reasons.index("stop")
    before = b"".join(map(token_bytes, np.array(ids[:end]).tolist()))
    through = b"".join(map(token_bytes, ids[: end + 1]))
    assert b"r a" not in before
    assert b"r a" in through
