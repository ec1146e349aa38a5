"""Converts a GGUF file with the Llama architecture to a Hugging Face folder, without torch.

Weights are written in float32. A Q4_1 weight is `d * q + m` with float16 `d` and `m` and a 4-bit `q`,
computed in float32 by the `gguf` package. float32 holds every bit of it. bfloat16 (8 bits of mantissa) would
round nearly every weight, and so give another model than other readers get from the same file.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

# GGUF tensor name -> Hugging Face name; those with {} are per layer.
TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}

CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def write_folder(gguf_file: Path, folder: Path) -> None:
    """Write config, tokenizer and `model.safetensors` (float32) of `gguf_file` into the existing `folder`.

    Raises ValueError for any architecture or tokenizer other than Llama with SmolLM's byte-level BPE: GGUF
    metadata names a pre-tokenizer but does not describe it, so each one has to be known here.
    """
    import gguf  # here, so that importing this room stays cheap

    reader = gguf.GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = fields["general.architecture"], fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if kind != ("llama", "gpt2", "smollm"):
        raise ValueError(f"{gguf_file.name} is {'/'.join(kind)}; only llama/gpt2/smollm can be converted")

    _write_tokenizer(fields, folder)
    _write_json(folder / "config.json", _config(fields, tied="output.weight" not in _names(reader)))
    special = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    _write_json(
        folder / "generation_config.json",
        {f"{name}_token_id": i for name, i in special.items()}
        | {"pad_token_id": fields["tokenizer.ggml.padding_token_id"]},
    )
    _write_weights(reader, fields, folder / "model.safetensors")


def _names(reader: Any) -> set[str]:
    return {tensor.name for tensor in reader.tensors}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _float(value: float) -> float:
    """Return the decimal number that a float32 in the metadata stands for: 9.99999974e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": _float(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _float(fields["llama.rope.freq_base"]),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))

    special = {
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
    }
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        special
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": fields["llama.context_length"],
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": fields["tokenizer.chat_template"],
        },
    )


def _write_weights(reader: Any, fields: dict[str, Any], path: Path) -> None:
    import gguf
    from safetensors.numpy import save_file

    rotated = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        *block, name, suffix = tensor.name.split(".")  # "blk.7.attn_q.weight" or "output_norm.weight"
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if name in rotated:
            weight = _unpermute(weight, rotated[name])
        layer = block[1] if block else ""
        weights[f"{TENSOR_NAMES[name].format(layer)}.{suffix}"] = np.ascontiguousarray(weight)
    save_file(weights, path, metadata={"format": "pt"})


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows [heads * H, D] from llama.cpp's adjacent rotated pairs to Hugging Face's two halves."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
