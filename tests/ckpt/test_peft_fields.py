"""Every field of `peft.LoraConfig`: an adapter that uses it is computed as PEFT does, or refused by name.

PEFT writes the adapters, and its log-probs of them are the reference.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tinsmith.ckpt import merged, peft, peft_config
from tinsmith.model import decoder, load, lora
from tinsmith.model.folder import read_config
from tiny_models import write_model
from transformers import AutoModelForCausalLM

torch = pytest.importorskip("torch")
reference = pytest.importorskip("peft")
pytestmark = pytest.mark.reference

RANK, ALPHA = 4, 6
TARGETS = ["q_proj", "v_proj", "down_proj", "lm_head"]
TOKENS = np.random.default_rng(0).integers(0, 320, (2, 12)).astype(np.int32)

# What a plain LoRA computes, by field. Each is an adapter that PEFT writes with these fields.
COMPUTED: dict[str, list[dict[str, Any]]] = {
    "task_type": [{"task_type": "CAUSAL_LM"}],
    "base_model_name_or_path": [{"base_model_name_or_path": "org/name"}],
    "revision": [{"revision": "main"}],
    "inference_mode": [{"inference_mode": True}],
    "r": [{"r": 1}, {"r": 9}],
    "lora_alpha": [{"lora_alpha": 0.5}],
    "lora_dropout": [{"lora_dropout": 0.3}],
    "use_rslora": [{"use_rslora": True}],
    "target_modules": [
        {"target_modules": ["model.layers.1.mlp.up_proj", "k_proj"]},
        {"target_modules": r".*\.(q|k)_proj"},
        {"target_modules": "all-linear"},
    ],
    "exclude_modules": [
        {"exclude_modules": ["lm_head", "layers.0.mlp.down_proj"]},
        {"exclude_modules": r".*\.0\..*"},
    ],
    "layers_to_transform": [{"layers_to_transform": [0, 2]}, {"layers_to_transform": 1}],
    "layers_pattern": [{"layers_to_transform": [1], "layers_pattern": "layers"}],
    "rank_pattern": [
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}},
        {"rank_pattern": {"^model.layers.0.self_attn.v_proj": 1}, "use_rslora": True},
        {"rank_pattern": dict.fromkeys(TARGETS, 9)},
    ],
    "target_parameters": [
        {"target_parameters": ["mlp.up_proj.weight"]},
        {"target_parameters": ["mlp.up_proj.weight"], "rank_pattern": {"up_proj": 2, "gate_proj.weight": 3}},
        {"target_parameters": ["gate_proj.weight"], "alpha_pattern": {"mlp.gate_proj.weight": 20}},
    ],
    "alpha_pattern": [
        {"alpha_pattern": {"v_proj": 1.5, r"model\.layers\.2\.mlp\.down_proj": 20}},
        {"alpha_pattern": {"lm_head": 3}, "rank_pattern": {"lm_head": 2, "q_proj": 8}, "use_rslora": True},
    ],
    "init_lora_weights": [
        {"init_lora_weights": init} for init in (True, "gaussian", "eva", "orthogonal", "mica")
    ],
    "fan_in_fan_out": [{"fan_in_fan_out": True}],
    "eva_config": [{"init_lora_weights": "eva", "eva_config": reference.EvaConfig()}],
}
# What changes the model. PEFT writes the first kind; of the second, whose making needs other data or other
# libraries, the field alone is written into the config of a plain adapter.
WRITTEN: dict[str, list[dict[str, Any]]] = {
    "use_dora": [{"use_dora": True}],
    "bias": [{"bias": "all"}, {"bias": "lora_only"}],
    "lora_bias": [{"lora_bias": True, "init_lora_weights": False}],
    "modules_to_save": [{"modules_to_save": ["norm"]}, {"modules_to_save": ["embed_tokens"]}],
    "trainable_token_indices": [{"trainable_token_indices": [5, 6]}],
    "layer_replication": [{"layer_replication": [[0, 2], [1, 3]]}],
    "alora_invocation_tokens": [{"alora_invocation_tokens": [5, 6]}],
    "init_lora_weights": [
        {"init_lora_weights": init, "target_modules": ["q_proj"]}
        for init in ("pissa", "pissa_niter_4", "olora")
    ],
    "velora_config": [{"velora_config": reference.VeloraConfig(num_groups=4)}],
    "kasa_config": [{"kasa_config": reference.KasaConfig(), "target_modules": ["q_proj"]}],
}
EDITED: dict[str, list[dict[str, Any]]] = {
    "peft_type": [{"peft_type": kind} for kind in ("IA3", "BOFT", "ADALORA", "LOHA", "VERA", "XLORA", None)],
    "init_lora_weights": [{"init_lora_weights": init} for init in ("loftq", "corda", "lora_ga", "new")],
    "megatron_config": [{"megatron_config": {"hidden_size": 32}}],
    "use_qalora": [{"use_qalora": True}],
    "use_bdlora": [{"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}}],
    "arrow_config": [{"arrow_config": {"top_k": 2}}],
    "monteclora_config": [{"monteclora_config": {"num_samples": 4}}],
    "ensure_weight_tying": [{"ensure_weight_tying": True}],
    "target_parameters": [{"target_parameters": ["self_attn.sinks"]}, {"target_parameters": "up_proj"}],
    "a_field_of_later": [{"a_field_of_later": 1}],
    "rank_pattern": [
        {"rank_pattern": {r"layers\.\d+\.mlp": 2}},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": ["q_proj"]},
    ],
    "alpha_pattern": [{"alpha_pattern": {"(a|a)*b": 2}}, {"alpha_pattern": {"q_proj": float("inf")}}],
    "target_modules": [{"target_modules": [1]}, {"target_modules": {}}],
    "layers_to_transform": [{"layers_to_transform": "all"}],
    "layers_pattern": [{"layers_pattern": "(a|a)*"}],
    "r": [{"r": 0}, {"r": "4"}, {"r": True}],
    "lora_alpha": [{"lora_alpha": -1}, {"lora_alpha": "1"}, {"lora_alpha": 1e9}],
}
# What PEFT reads nothing from when it loads an adapter.
UNREAD = {
    *("auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "runtime_config"),
    *("loftq_config", "corda_config", "lora_ga_config"),
}


def cases(table: dict[str, list[dict[str, Any]]]) -> list[Any]:
    return [
        pytest.param(name, fields, id=f"{name}-{index}")
        for name, each in table.items()
        for index, fields in enumerate(each)
    ]


def test_every_field_has_its_verdict() -> None:
    fields = {field.name for field in dataclasses.fields(reference.LoraConfig)}
    assert fields <= COMPUTED.keys() | WRITTEN.keys() | EDITED.keys() | UNREAD


class Tiny:
    def __init__(self, folder: Path):
        self.folder, self.config = folder, read_config(folder)
        self._graph, _ = decoder.build(self.config, jnp.float32)
        self.base = load.load_base(folder, self.config, jnp.float32)
        self.unchanged = merged.in_memory(self.base)
        self._run = jax.jit(self._logprobs)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.logprobs_without = self._of(self._model)

    def _logprobs(self, adapter: dict[str, Any], scale: jax.Array) -> jax.Array:
        stack = lora.stack_adapters((adapter,), scale[None])
        position = jnp.tile(jnp.arange(TOKENS.shape[1]), (len(TOKENS), 1))
        x = decoder.trunk(
            self._graph, self.base, jnp.asarray(TOKENS), position, jnp.zeros_like(position), stack
        )
        logits = x @ decoder.unembed(self.base).T + lora.delta(x, stack["unembed"], stack["scale"], None)
        return jax.nn.log_softmax(logits)

    def logprobs(self, saved: peft.SavedAdapter) -> np.ndarray:
        """Return an adapter's log-probs, with zeros for the matrices and ranks that it lacks: one program for
        all."""
        whole = lora.init_lora(self.config, 0, 16)

        def padded(path: Any, leaf: np.ndarray) -> np.ndarray:
            given = dict(jax.tree_util.tree_leaves_with_path(saved.adapter)).get(path)
            if given is None:
                return np.zeros_like(leaf)
            return np.pad(
                given, [(0, size - have) for size, have in zip(leaf.shape, given.shape, strict=True)]
            )

        return np.asarray(
            self._run(jax.tree_util.tree_map_with_path(padded, whole), jnp.float32(saved.alpha / saved.rank))
        )

    def model(self) -> Any:
        """The base model, which PEFT may change."""
        return copy.deepcopy(self._model)

    def write(self, folder: Path, **fields: Any) -> None:
        """An adapter of PEFT's, its B random."""
        torch.manual_seed(1)
        config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        model = reference.get_peft_model(self.model(), reference.LoraConfig(**config | fields))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)

    def by_peft(self, folder: Path) -> np.ndarray:
        return self._of(reference.PeftModel.from_pretrained(self.model(), folder).eval())

    @staticmethod
    def _of(model: Any) -> np.ndarray:
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor(TOKENS).long()).logits, -1).numpy()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(write_model(tmp_path_factory.mktemp("fields") / "tied", "llama"))


@pytest.fixture(scope="module")
def plain(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    tiny.write(folder)
    return folder


@pytest.mark.parametrize(("name", "fields"), cases(COMPUTED))
def test_a_plain_lora_is_computed_as_peft_computes_it(
    tiny: Tiny, tmp_path: Path, name: str, fields: dict[str, Any]
) -> None:
    tiny.write(tmp_path / "a", **fields)
    saved = peft.load_adapter(tmp_path / "a", tiny.config, tiny.unchanged)
    ours, theirs = tiny.logprobs(saved), tiny.by_peft(tmp_path / "a")
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(theirs - tiny.logprobs_without).max() > 0.01, "the adapter does something"


@pytest.mark.parametrize(("name", "fields"), cases(WRITTEN))
def test_options_that_change_the_model_are_refused_by_name(
    tiny: Tiny, tmp_path: Path, name: str, fields: dict[str, Any]
) -> None:
    tiny.write(tmp_path / "a", **fields)
    with pytest.raises(peft.AdapterError, match=name):
        peft.load_adapter(tmp_path / "a", tiny.config, tiny.unchanged)


@pytest.mark.parametrize(("name", "fields"), cases(EDITED))
def test_a_config_that_asks_for_more_is_refused_by_name(
    plain: Path, name: str, fields: dict[str, Any]
) -> None:
    config = json.loads((plain / "adapter_config.json").read_text()) | fields
    with pytest.raises(peft.AdapterError, match=name):
        peft_config.read(json.dumps(config).encode())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_modules", ["q_proj", "down_proj", "lm_head"]),
        ("target_modules", "all-linear"),
        ("exclude_modules", ["v_proj"]),
        ("layers_to_transform", [0]),
        ("layers_to_transform", 1),
    ],
)
def test_tensors_that_the_config_leaves_out_are_refused(
    tiny: Tiny, plain: Path, tmp_path: Path, name: str, value: Any
) -> None:
    """PEFT would not load them."""
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((plain / "adapter_config.json").read_text()) | {name: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(peft.AdapterError, match=f"{name} leaves out"):
        peft.load_adapter(tmp_path, tiny.config, tiny.unchanged)


@pytest.mark.parametrize("variant", ["llama", "qwen2_untied"])
def test_copies_of_the_base_must_be_the_base_s(tmp_path: Path, variant: str) -> None:
    """PEFT loads such copies over the base model's weights; it writes them beside an adapter of `lm_head`."""
    tiny = Tiny(write_model(tmp_path / "base", variant))
    tiny.write(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    copies = [name for name in tensors if name.endswith(".base_layer.weight")]
    copies.append("base_model.model.model.embed_tokens.weight")
    tensors.setdefault(copies[-1], np.asarray(tiny.unchanged("embed_tokens.weight")))
    save_file(tensors, file)
    saved = peft.load_adapter(tmp_path / "a", tiny.config, tiny.unchanged)
    np.testing.assert_allclose(tiny.logprobs(saved), tiny.by_peft(tmp_path / "a"), atol=1e-4)
    for name in copies:
        save_file(tensors | {name: tensors[name] + np.float32(0.5)}, file)
        with pytest.raises(peft.AdapterError, match=f"{name} is not the base model's"):
            peft.load_adapter(tmp_path / "a", tiny.config, tiny.unchanged)


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (-np.inf, "float16"), (1e300, "float64")])
def test_values_that_are_not_finite_are_refused(
    tiny: Tiny, plain: Path, tmp_path: Path, value: float, dtype: str
) -> None:
    (tmp_path / "adapter_config.json").write_bytes((plain / "adapter_config.json").read_bytes())
    tensors = load_file(plain / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.lora_B.weight"))
    tensors[name] = tensors[name].astype(dtype)
    tensors[name][3, 1] = value
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        peft.AdapterError, match=r"layers\.1\.mlp\.down_proj\.lora_B has values that are not finite"
    ):
        peft.load_adapter(tmp_path, tiny.config, tiny.unchanged)
