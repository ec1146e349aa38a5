"""Model folders with tokenizers of every common kind, made with the tokenizers library."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SENTENCES = [
    "the tinsmith makes what the tinker mends with; a user asks and an assistant answers.",
    "The capital is Paris. It's naïve, isn't it? 日本語 costs €5.",
] * 4
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content))


def byte_level() -> Tokenizer:
    """Write a tokenizer as GPT-2, Llama 3 and Qwen have it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(SENTENCES, trainer)
    return made


def pieces(vocab_size: int = 400) -> Tokenizer:
    """Write a tokenizer as Llama 2 and Mistral have it: BPE over sentencepiece's pieces, with byte
    fallback."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(
        SENTENCES[:1], trainers.BpeTrainer(vocab_size=vocab_size - 256, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *BYTES, *model["vocab"]]
    vocabulary = {name: at for at, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(merge) for merge in model["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = trained.normalizer
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(SENTENCES, trainer)
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=160, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"], show_progress=False
    )
    made.train_from_iterator(SENTENCES, trainer)
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    return made


KINDS = {
    "byte level": (byte_level, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}),
    "pieces": (pieces, {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}),
    "unigram": (unigram, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}),
    "word pieces": (word_piece, {"tokenizer_class": "PreTrainedTokenizerFast", "sep_token": "[SEP]"}),
}


def write_tokenizer_folder(folder: Path, kind: str = "byte level", **config: object) -> Path:
    """A folder with config.json and a tokenizer; `config` changes tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    make, said = KINDS[kind]
    make().save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", {"model_type": "llama", "vocab_size": 512, "eos_token_id": 0})
    write_json(folder / "tokenizer_config.json", said | {"chat_template": CHATML} | config)
    return folder


def change_json(file: Path, **fields: object) -> None:
    write_json(file, json.loads(file.read_text()) | fields)


__all__ = ["CHATML", "KINDS", "AddedToken", "change_json", "write_json", "write_tokenizer_folder"]
