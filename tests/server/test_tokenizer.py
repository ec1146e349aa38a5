"""A model folder's tokenizer means to the server what it means to transformers."""

from __future__ import annotations

import json

import pytest
from tinsmith.ckpt.token_bytes import TokenBytes
from tinsmith.ckpt.tokenizer_files import end_tokens
from tinsmith.server.errors import BadRequest
from tinsmith.server.text import SampledText, of_folder
from tokenizer_folders import KINDS, change_json, write_json, write_tokenizer_folder
from transformers import AutoTokenizer

TEXTS = [
    "the tinsmith makes",
    " naïve café €5\n\n\tx",
    "日本語 🙂",
    "<|im_start|>user\nhi<|im_end|>",
    "</s> x <s>",
    "  two  spaces  ",
    "It 's . , n't",
    "a<extra>b <added> c",
    "",
]
CLIP = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PAD = {
    "strategy": {"Fixed": 64},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "x",
}
ADDED = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
CHANGES = {
    "as it is": {},
    "truncation": {"tokenizer.json": {"truncation": CLIP}},
    "padding": {"tokenizer.json": {"padding": PAD}},
    "extra special tokens": {"tokenizer_config.json": {"extra_special_tokens": ["<extra>"]}},
    "additional special tokens": {"tokenizer_config.json": {"additional_special_tokens": ["<extra>"]}},
    "special tokens by name": {"tokenizer_config.json": {"extra_special_tokens": {"image_token": "<extra>"}}},
    "added tokens in the config": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {"505": {"content": "<added>", "special": False} | ADDED}
        }
    },
    "added_tokens.json": {"added_tokens.json": {"<added>": 500, "<extra>": 501}},
    "special_tokens_map.json": {"special_tokens_map.json": {"eos_token": {"content": "<extra>"} | ADDED}},
    "bos and eos": {"tokenizer_config.json": {"add_bos_token": True, "add_eos_token": True}},
    "prefix space": {"tokenizer_config.json": {"add_prefix_space": True}},
    "no prefix space": {"tokenizer_config.json": {"add_prefix_space": False}},
    "not legacy": {"tokenizer_config.json": {"legacy": False}},
    "cleaned spaces": {"tokenizer_config.json": {"clean_up_tokenization_spaces": True}},
    "specials are text": {"tokenizer_config.json": {"split_special_tokens": True}},
    "another class": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}},
    "no class": {"tokenizer_config.json": {"tokenizer_class": None}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_text_has_the_tokens_that_transformers_gives_it(tmp_path, kind, change):
    folder = write_tokenizer_folder(tmp_path / "model", kind)
    for file, fields in CHANGES[change].items():
        if not (folder / file).exists():
            write_json(folder / file, {})
        change_json(folder / file, **fields)
    reference, ours = AutoTokenizer.from_pretrained(folder), of_folder(folder)
    for text in TEXTS:
        tokens = reference(text).input_ids
        assert ours.encode(text) == tokens, text
        for skip in (True, False):
            assert ours.decode(tokens, skip) == reference.decode(tokens, skip_special_tokens=skip)
        tokens = reference(text, add_special_tokens=False).input_ids
        whole = reference.decode(tokens, skip_special_tokens=True)
        for cut in range(len(tokens)):
            beginning = reference.decode(tokens[:cut], skip_special_tokens=True)
            if whole.startswith(beginning):  # else it ends within a character
                assert ours.continuation(tokens[:cut], tokens[cut:]) == whole[len(beginning) :]
    if reference.eos_token_id is not None:
        assert reference.eos_token_id in ours.end_tokens


def test_a_tokenizer_is_described_with_the_tokens_that_other_files_name(tmp_path):
    folder = write_tokenizer_folder(tmp_path / "model", extra_special_tokens=["<extra>"], pad_token="<pad>")
    change_json(folder / "tokenizer.json", truncation=CLIP)
    reference, described = AutoTokenizer.from_pretrained(folder), of_folder(folder).description()
    added = {token["content"]: token["id"] for token in described["added_tokens"]}
    assert added == {token.content: id_ for id_, token in reference.added_tokens_decoder.items()}
    assert "<extra>" in added
    assert described["truncation"] is None
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "vocab_size", "chat_template"):
        assert described[name] == getattr(reference, name)
    assert described["special_tokens"] == reference.special_tokens_map


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_all_tokens_are_the_text(tmp_path, kind):
    folder = write_tokenizer_folder(tmp_path / "model", kind, extra_special_tokens=["<extra>"])
    reference, token_bytes = AutoTokenizer.from_pretrained(folder), TokenBytes.from_folder(folder)
    for text in [*TEXTS, "a<extra>b"]:
        tokens = reference(text, add_special_tokens=False).input_ids
        joined = b"".join(map(token_bytes, tokens)).decode()
        # Decoders may strip a space at the beginning of a text, which a token elsewhere in it has.
        assert reference.decode(tokens) in (joined, joined.removeprefix(" "))


def test_a_piece_of_a_character_is_written_as_its_bytes(tmp_path):
    text = of_folder(write_tokenizer_folder(tmp_path / "model"))
    tokens = text.encode("🙂 x", add_special_tokens=False)
    assert b"".join(map(text.token_bytes, tokens)) == "🙂 x".encode()
    written = [text.token(token) for token in tokens]
    assert written[:4] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x99", "bytes:\\x82"]
    assert text.lengths(tokens) == [1, 0, 0, 0] + [len(each) for each in written[4:]]


def test_a_completion_may_finish_the_last_character_of_its_prompt(tmp_path):
    for kind in ("byte level", "pieces"):
        text = of_folder(write_tokenizer_folder(tmp_path / kind, kind))
        tokens = text.encode("a 🙂 b", add_special_tokens=False)
        cut = next(at for at in range(len(tokens)) if text.token(tokens[at]).startswith("bytes:")) + 2
        assert text.continuation(tokens[:cut], tokens[cut:]) == "🙂 b"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [None, " mends", "d with", "makes what the", "€"])
def test_a_stream_adds_up_to_the_whole_text(tmp_path, kind, stop):
    text = of_folder(write_tokenizer_folder(tmp_path / "model", kind))
    prompt = text.encode("the tinsmith")
    tokens = text.encode("the tinsmith makes what the tinker mends with 🙂 €5", add_special_tokens=False)
    tokens = tokens[len(text.encode("the tinsmith", add_special_tokens=False)) :]
    pieces = [text.token_bytes(token) for token in tokens]
    whole, reason = b"".join(pieces).decode(), "length"
    if stop is not None and (at := b"".join(pieces).find(stop.encode())) >= 0:
        ends = (count for count in range(len(pieces) + 1) if stop.encode() in b"".join(pieces[:count]))
        tokens, reason = tokens[: next(ends)], "stop"
        whole = b"".join(pieces)[:at].decode()
    said = {"skip_special_tokens": False, "prompt": prompt}
    stream = SampledText(text, [stop] if stop else [], [], **said)
    told = "".join(stream.add(at, [token]) for at, token in enumerate(tokens))
    assert told + stream.end(tokens, reason) == whole
    assert SampledText(text, [stop] if stop else [], [], **said).whole(tokens, reason) == whole


def test_a_stop_string_may_be_of_special_tokens(tmp_path):
    text = of_folder(write_tokenizer_folder(tmp_path / "model"))
    tokens = text.encode("hi\n<|im_end|>")
    sampled = SampledText(text, ["\n<|im_end|>"], [])
    assert sampled.matched(tokens, "stop") == "\n<|im_end|>"
    assert sampled.whole(tokens, "stop") == "hi"


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "want"),
    [
        (0, None, {"eos_token": "<|im_end|>"}, {0, 2}),
        ([0, 1], [1, 7], {"eos_token": {"content": "<|im_end|>"}}, {0, 1, 2, 7}),
        (None, 5, {"eos_token": None}, {5}),
        (True, "2", {"eos_token": None}, set()),
        (0, None, {"eos_token": None, "tokenizer_class": "Qwen2Tokenizer"}, {0}),
    ],
)
def test_a_model_ends_at_the_end_tokens_of_its_config_and_of_its_tokenizer(
    tmp_path, config, generation, tokenizer, want
):
    folder = write_tokenizer_folder(tmp_path / "model", **tokenizer)
    change_json(folder / "config.json", eos_token_id=config)
    write_json(folder / "generation_config.json", {"eos_token_id": generation})
    assert set(end_tokens(folder)) == want


def as_vocab_and_merges(folder):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (folder / "tokenizer.json").unlink()


def test_files_without_a_tokenizer_json_are_converted(tmp_path):
    folder = write_tokenizer_folder(tmp_path / "model", tokenizer_class="Qwen2Tokenizer")
    as_vocab_and_merges(folder)
    reference = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert of_folder(folder).encode(text) == reference(text).input_ids
    assert of_folder(folder).decode(reference(TEXTS[1]).input_ids) == TEXTS[1]


def test_a_tokenizer_that_cannot_be_read_is_refused_by_what_is_wrong(tmp_path):
    def refusal(name, kind="byte level", change=lambda folder: None, **config):
        folder = write_tokenizer_folder(tmp_path / name, kind, **config)
        change(folder)
        with pytest.raises(BadRequest) as refused:
            of_folder(folder)
        assert str(tmp_path) not in refused.value.message
        return refused.value.message

    def only_sentencepiece(folder):
        (folder / "tokenizer.json").rename(folder / "tokenizer.model")

    assert "no tokenizer.json" in refusal("none", change=lambda f: (f / "tokenizer.json").unlink())
    assert "tokenizer.json cannot be read" in refusal(
        "cut", change=lambda f: (f / "tokenizer.json").write_text("{")
    )
    assert "tokenizer_config.json cannot be read" in refusal(
        "cut config", change=lambda f: (f / "tokenizer_config.json").write_text("[")
    )
    assert "sentencepiece" in refusal("sentencepiece", "pieces", only_sentencepiece)
    assert "LlamaTokenizer" in refusal("wrong", change=as_vocab_and_merges, tokenizer_class="LlamaTokenizer")
    code = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    assert "does not run" in refusal("code", change=lambda f: (f / "own.py").write_text("1 / 0"), **code)


def test_a_text_that_the_vocabulary_cannot_write_is_refused(tmp_path):
    folder = write_tokenizer_folder(tmp_path / "model", "word pieces", tokenizer_class="TokenizersBackend")
    written = json.loads((folder / "tokenizer.json").read_text())
    written["model"]["unk_token"] = "<none>"
    write_json(folder / "tokenizer.json", written)
    with pytest.raises(BadRequest, match="cannot encode this text"):
        of_folder(folder).encode("€ 🙂 unknown")
