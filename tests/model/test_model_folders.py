"""Folders mean what transformers loads from them: windows, rotary embeddings, heads, biases, files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tinsmith.ckpt import merged
from tinsmith.model import decoder, load, weight_files
from tinsmith.model.config import DeltaNet, Experts, GatedMlp, Mamba2, PlainMlp, UnsupportedModelError
from tinsmith.model.families import FAMILIES, tensor_shapes
from tinsmith.model.folder import read_config, stated_config
from tiny_models import hf_config, write_model

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference

TOKENS = np.random.default_rng(0).integers(3, 320, 40).astype(np.int32)


def ours(folder, dtype=jnp.float32):
    config = read_config(folder)
    weight_files.check(folder, config)
    base = load.load_base(folder, config, dtype)
    graph, _ = decoder.build(config, dtype)
    position = np.arange(len(TOKENS), dtype=np.int32)[None]
    hidden = jax.jit(decoder.trunk, static_argnums=0)(
        graph, base, TOKENS[None], position, np.zeros_like(position)
    )
    return np.asarray(jax.nn.log_softmax(hidden[0] @ decoder.unembed(base).T))


def reference(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor(TOKENS[None])).logits[0], -1).numpy()


def assert_as_transformers(folder):
    np.testing.assert_allclose(ours(folder), reference(folder), atol=1e-4)


def changed(folder, variant, removed=(), **changes):
    """A random model of two layers whose config.json has the changes, and lacks what is removed."""
    write_model(folder, variant, tokenizer=False, num_hidden_layers=2)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in removed}))
    return folder


WINDOW = {"use_sliding_window": True, "sliding_window": 4}
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("variant", "changes", "windows"),
    [
        ("qwen2", WINDOW, [None, None]),  # max_window_layers is 28 where it is not said
        ("qwen3", WINDOW | {"max_window_layers": 0}, [4, 4]),
        ("qwen2", WINDOW | {"max_window_layers": 1}, [None, 4]),
        ("qwen3", WINDOW | {"layer_types": [SLIDING, FULL], "max_window_layers": 28}, [4, None]),
        ("qwen2", WINDOW | {"layer_types": [SLIDING] * 2, "max_window_layers": 28}, [4, 4]),
        ("qwen3", WINDOW | {"layer_types": [FULL, "attention"], "max_window_layers": 0}, [None, None]),
        ("qwen2", WINDOW | {"sliding_window": None, "max_window_layers": 0}, [None, None]),
        ("qwen2", WINDOW | {"sliding_window": 512, "max_window_layers": 0}, [None, None]),
        ("qwen2", {"sliding_window": 4, "max_window_layers": 0}, [None, None]),
        ("llama", WINDOW | {"max_window_layers": 0}, [None, None]),
        ("llama", WINDOW | {"layer_types": [SLIDING, FULL]}, [None, None]),
    ],
)
def test_sliding_windows(tmp_path, variant, changes, windows):
    folder = changed(tmp_path, variant, **changes)
    config = read_config(folder)
    assert [layer.mixer.window for layer in config.layers] == windows
    assert_as_transformers(folder)


def test_gradients_through_windows_of_some_layers(tmp_path):
    """The sum of log-probs is differentiated by the embedding; torch has the row's two sequences one by
    one."""
    from transformers import AutoModelForCausalLM

    folder = changed(tmp_path, "qwen3", **WINDOW, layer_types=[SLIDING, FULL])
    config = read_config(folder)
    base, (graph, _) = load.load_base(folder, config, jnp.float32), decoder.build(config, jnp.float32)
    first, length = 15, len(TOKENS)
    start = np.where(np.arange(length) < first, 0, first)[None].astype(np.int32)
    targets = np.append(TOKENS[1:], 0)

    def total(base):
        position = np.arange(length, dtype=np.int32)[None] - start
        hidden = decoder.trunk(graph, base, *map(jnp.asarray, (TOKENS[None], position, start)))[0]
        values = jax.nn.log_softmax(hidden @ decoder.unembed(base).T)[np.arange(length), targets]
        return jnp.where(
            (np.arange(length) == first - 1) | (np.arange(length) == length - 1), 0, values
        ).sum()

    found = jax.jit(jax.grad(total))(base)["embed_tokens"]["weight"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for tokens in (TOKENS[:first], TOKENS[first:]):
        ids = torch.tensor(tokens[None]).long()
        values = torch.log_softmax(model(ids).logits[0, :-1], -1)
        values[torch.arange(len(tokens) - 1), ids[0, 1:]].sum().backward()
    np.testing.assert_allclose(found, model.model.embed_tokens.weight.grad, atol=1e-3, rtol=1e-3)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": YARN},
        {"rope_scaling": YARN | {"attention_factor": 0.7, "beta_fast": 4, "truncate": False}},
        {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "factor": None}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 1,
                "high_freq_factor": 4,
            }
        },
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}},
        {"rope_parameters": {"rope_theta": 500, "partial_rotary_factor": 1.0}},
        {"original_max_position_embeddings": 32, "rope_scaling": YARN},
    ],
)
def test_rotary_embeddings(tmp_path, changes):
    assert_as_transformers(changed(tmp_path, "qwen3", removed=["rope_theta"], **changes))


@pytest.mark.parametrize(
    ("variant", "others"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("qwen3_moe", {}),
        ("qwen3_5_moe", {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}),
    ],
)
def test_yarn_in_other_families(tmp_path, variant, others):
    removed = ["rope_theta", "rope_scaling"]
    assert_as_transformers(changed(tmp_path, variant, removed, rope_parameters=YARN | others))


KIMI_YARN = {"type": "yarn", "factor": 8.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0}
KIMI_YARN |= {"mscale_all_dim": 1.0, "original_max_position_embeddings": 16}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 4.0], "long_factor": [9.0] * 4}


@pytest.mark.parametrize("changes", [{}, {"attention_factor": 0.8}, {"factor": 2.0}])
def test_longrope_up_to_the_original_context(tmp_path, changes):
    """Longer sequences have other angles in transformers from their first token on: none are accepted."""
    folder = changed(
        tmp_path, "phi3", original_max_position_embeddings=48, rope_scaling=LONGROPE | changes
    )  # fmt: skip
    assert read_config(folder).max_sequence_length == 48
    assert_as_transformers(folder)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        (
            "llama",
            {"num_key_value_heads": None, "pretraining_tp": 2, "hidden_act": "swish", "head_dim": None},
        ),
    ],
)
def test_biases_and_values_that_change_nothing(tmp_path, variant, changes):
    folder = changed(tmp_path, variant, **changes)
    add_random_biases(folder)
    assert_as_transformers(folder)


def add_random_biases(folder):
    """Fill in tensors that the model has and `write_model` has not written, or not in this shape."""
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(1)
    for name, shape in tensor_shapes(stated_config(folder)).items():
        if name not in tensors or tensors[name].shape != shape:
            tensors[name] = rng.standard_normal(shape).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None, "attention_bias": True, "norm_topk_prob": False, "routed_scaling_factor": 2.5},
        {"n_group": 1, "topk_group": 1, "n_shared_experts": 2, "rope_interleave": False, "v_head_dim": 20},
        {"rope_scaling": None, "first_k_dense_replace": 0, "num_experts_per_tok": 4},
        # Kimi-K2's, where the ramp between fast and slow frequencies is a step
        {"rope_scaling": KIMI_YARN, "rope_theta": 50_000.0, "rms_norm_eps": 1e-5},
    ],
)
def test_latent_attention_and_sigmoid_routers(tmp_path, changes):
    folder = write_model(tmp_path, "deepseek_v3", tokenizer=False, num_hidden_layers=2, **changes)
    add_random_biases(folder)
    assert_as_transformers(folder)


GEMMA_ROPES = {
    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 30_000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 500.0},
}


@pytest.mark.parametrize(
    ("changes", "removed"),
    [
        ({"layer_types": [FULL, SLIDING], "attention_bias": True}, ()),
        ({"rope_parameters": GEMMA_ROPES}, ("rope_theta", "rope_local_base_freq", "rope_scaling")),
        ({"rope_parameters": {FULL: GEMMA_ROPES[FULL]}}, ("rope_theta", "rope_scaling")),
        ({"rope_scaling": YARN}, ("rope_theta", "rope_local_base_freq")),
        ({}, ("query_pre_attn_scalar", "hidden_activation", "sliding_window_pattern", "sliding_window")),
        ({"tie_word_embeddings": False}, ("rope_scaling",)),
    ],
)
def test_gemma_s_layers_and_ropes(tmp_path, changes, removed):
    folder = changed(tmp_path, "gemma3_text", removed, **changes)
    add_random_biases(folder)
    assert_as_transformers(folder)


@pytest.mark.parametrize("family", [each for each in FAMILIES if each != "kimi_k2"])
def test_keys_left_out_of_config_json_have_transformers_defaults(tmp_path, family):
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    config, theirs = read_config(tmp_path), AutoConfig.for_model(family).get_text_config()
    is_nemotron = family.startswith("nemotron_h")
    same = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "rms_norm_eps": "layer_norm_epsilon" if is_nemotron else "rms_norm_eps",
        "max_sequence_length": "max_position_embeddings",
        "tie_embeddings": "tie_word_embeddings",
    }
    if family.startswith("qwen3_vl"):
        del same["tie_embeddings"]  # said by the whole model's config alone
        assert not config.tie_embeddings
    assert {name: getattr(config, name) for name in same} == {
        name: getattr(theirs, their) for name, their in same.items()
    }
    mixer = config.attentions[0]
    eos = getattr(theirs, "eos_token_id", None)
    assert config.eos_token_ids == (() if eos is None else (eos,))
    if is_nemotron:
        assert_as_nemotron_s_defaults(config, theirs)
        return
    rope = theirs.rope_parameters.get(SLIDING, theirs.rope_parameters)
    assert (mixer.heads, mixer.rope.theta) == (theirs.num_attention_heads, rope["rope_theta"])
    if family.startswith("gemma3"):
        full = config.layers[5].mixer
        assert [layer.mixer.window is None for layer in config.layers] == [
            each == FULL for each in theirs.layer_types
        ]
        assert full.rope.theta == theirs.rope_parameters[FULL]["rope_theta"]
        assert mixer.scale == theirs.query_pre_attn_scalar**-0.5
    if family in ("deepseek_v3", "kimi_k25"):
        assert_as_deepseek_s_defaults(config, theirs)
        return
    if family.startswith("qwen3_5"):
        assert_as_qwen3_5_s_defaults(config, theirs)
    width = getattr(theirs, "moe_intermediate_size", None) or theirs.intermediate_size
    assert config.layers[0].mlp.width == width
    if family in ("qwen3_moe", "qwen3_vl_moe"):
        mlp, expected = (
            config.layers[0].mlp,
            (theirs.num_experts, theirs.num_experts_per_tok, getattr(theirs, "norm_topk_prob", True)),
        )
        assert (mlp.count, mlp.chosen, mlp.normalised) == expected
    window = getattr(theirs, "sliding_window", None)
    assert mixer.window == (window if window != theirs.max_position_embeddings else None)
    assert mixer.kv_heads == theirs.num_key_value_heads
    their_size = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert mixer.head_dim == their_size


def assert_as_qwen3_5_s_defaults(config, theirs):
    types = [
        "linear_attention" if isinstance(layer.mixer, DeltaNet) else "full_attention"
        for layer in config.layers
    ]
    assert types == theirs.layer_types
    net, full = config.layers[0].mixer, config.layers[3].mixer
    assert full.rope.dims == theirs.head_dim * theirs.rope_parameters["partial_rotary_factor"]
    assert (net.key_heads, net.value_heads, net.key_dim, net.value_dim, net.taps) == (
        theirs.linear_num_key_heads,
        theirs.linear_num_value_heads,
        theirs.linear_key_head_dim,
        theirs.linear_value_head_dim,
        theirs.linear_conv_kernel_dim,
    )
    if hasattr(theirs, "num_experts"):
        mlp = config.layers[0].mlp
        assert (mlp.count, mlp.chosen, mlp.shared) == (
            theirs.num_experts,
            theirs.num_experts_per_tok,
            theirs.shared_expert_intermediate_size,
        )


def assert_as_nemotron_s_defaults(config, theirs):
    parts = [layer.mixer or layer.mlp for layer in config.layers]
    of_type = {"linear_attention": Mamba2, "mlp": PlainMlp, "moe": Experts}
    assert [type(part) for part in parts if part not in config.attentions] == [
        of_type[each] for each in theirs.layers_block_type if each != "full_attention"
    ]
    by_type = dict(zip(theirs.layers_block_type, parts, strict=True))
    mamba, attention = by_type["linear_attention"], by_type["full_attention"]
    assert (mamba.heads, mamba.head_dim, mamba.groups, mamba.state_dim, mamba.taps, mamba.least_step) == (
        theirs.mamba_num_heads,
        theirs.mamba_head_dim,
        theirs.n_groups,
        theirs.ssm_state_size,
        theirs.conv_kernel,
        theirs.time_step_min,
    )
    assert mamba.conv_biased == theirs.use_conv_bias
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.rope.dims) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        theirs.head_dim,
        0,
    )
    assert by_type["mlp"].width == theirs.intermediate_size
    mlp = by_type["moe"]
    assert (mlp.count, mlp.chosen, mlp.width, mlp.shared, mlp.latent, mlp.normalised) == (
        theirs.n_routed_experts,
        theirs.num_experts_per_tok,
        theirs.moe_intermediate_size,
        theirs.moe_shared_expert_intermediate_size,
        theirs.moe_latent_size,
        theirs.norm_topk_prob,
    )
    assert (mlp.sigmoid.groups, mlp.sigmoid.groups_chosen, mlp.sigmoid.scaling) == (
        theirs.n_group,
        theirs.topk_group,
        theirs.routed_scaling_factor,
    )


def assert_as_deepseek_s_defaults(config, theirs):
    mixer, router = config.layers[0].mixer, config.layers[-1].mlp.sigmoid
    same = {
        "query_rank": "q_lora_rank",
        "kv_rank": "kv_lora_rank",
        "plain_dim": "qk_nope_head_dim",
        "rope_dim": "qk_rope_head_dim",
        "value_dim": "v_head_dim",
    }
    for ours, their in same.items():
        assert getattr(mixer, ours) == getattr(theirs, their), ours
    assert [isinstance(layer.mlp, GatedMlp) for layer in config.layers] == [
        layer < theirs.first_k_dense_replace for layer in range(theirs.num_hidden_layers)
    ]
    assert config.layers[0].mlp.width == theirs.intermediate_size
    mlp = config.layers[-1].mlp
    assert (mlp.count, mlp.chosen, mlp.width) == (
        theirs.n_routed_experts,
        theirs.num_experts_per_tok,
        theirs.moe_intermediate_size,
    )
    assert (router.groups, router.groups_chosen, router.scaling) == (
        theirs.n_group,
        theirs.topk_group,
        theirs.routed_scaling_factor,
    )
    assert (mlp.shared, mlp.normalised) == (mlp.width * theirs.n_shared_experts, theirs.norm_topk_prob)
    assert mixer.rope.interleaved == theirs.rope_interleave


PARTIAL = {"partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ("llama", {"model_type": None}, "model_type None"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias"),
        ("llama", PARTIAL, "partial_rotary_factor 0.5"),
        ("qwen2", {"rope_parameters": {"rope_type": "default"} | PARTIAL}, "partial_rotary_factor 0.5"),
        ("qwen3", {"rope_scaling": {"type": "linear", "factor": 2.0} | PARTIAL}, "partial_rotary_factor 0.5"),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "short_factor is None"),
        ("phi3", {"rope_scaling": LONGROPE | {"short_factor": [1.0]}}, "short_factor has 1 numbers"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear' is not supported"),
        ("phi3", {"attention_bias": True}, "attention_bias"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads is 2; with latent attention"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method 'greedy'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ("deepseek_v3", {"n_group": 3}, "n_group is 3, of 8 experts"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
        ("deepseek_v3", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7"),
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank is None"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"hidden_activation": "silu"}, "hidden_activation 'silu'"),
        ("gemma3_text", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar is None"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "an entry per layer type"),
        ("gemma3_text", {"layer_types": [SLIDING]}, "layer_types has 1 entries"),
        ("gemma3_text", {"sliding_window": None}, "there is no window"),
        ("kimi_k2", {"n_shared_experts": 0}, "n_shared_experts is 0"),
        ("phi3", PARTIAL, "partial_rotary_factor 0.5"),
        ("qwen2", {"rope_scaling": {"type": "mrope"}}, "rope_type 'mrope'"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ("qwen3", {"rope_parameters": {FULL: {"rope_theta": 1e4}}}, "an entry per layer type"),
        ("llama", {"rope_theta": None}, "rope_theta is None"),
        ("llama", {"hidden_size": "32"}, "hidden_size is '32'"),
        ("llama", {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ("llama", {"hidden_size": 34}, "hidden_size is not a multiple"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps is None"),
        ("llama", {"tie_word_embeddings": None}, "tie_word_embeddings is None"),
        ("llama", {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier 12.0"),
        ("qwen2", WINDOW | {"sliding_window": 0, "max_window_layers": 0}, "sliding_window is 0"),
        ("qwen2", {"layer_types": [SLIDING, FULL]}, "there is no window"),
        ("qwen3", WINDOW | {"layer_types": [SLIDING]}, "layer_types has 1 entries"),
        ("qwen3", {"layer_types": ["chunked_attention", FULL]}, "'chunked_attention' is not supported"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config: gptq"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config: fp8"),
        ("llama", {"quantization": {"group_size": 64, "bits": 4}}, "quantized"),
        ("qwen3_5_moe", {"layer_types": ["linear_attention"] * 2}, "layer_types has no full_attention"),
        ("qwen3_5_moe", {"linear_num_value_heads": 3}, "not a multiple of linear_num_key_heads"),
        ("qwen3_5_moe", {"attn_output_gate": False}, "attn_output_gate False"),
        ("qwen3_5", {"text_config": [1]}, "text_config is"),
        ("nemotron_h", {"hybrid_override_pattern": "MEME"}, "hybrid_override_pattern has no attention"),
        ("nemotron_h", {"hybrid_override_pattern": "MX*"}, "hybrid_override_pattern: 'X' is not supported"),
        ("nemotron_h", {"layers_block_type": ["mamba", 3]}, "layers_block_type: 3 is not supported"),
        ("nemotron_h", {"mamba_n_groups": 4}, r"mamba_num_heads \(6\) is not a multiple of n_groups \(4\)"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act 'silu'"),
        ("nemotron_h", {"use_bias": True}, "use_bias True"),
        ("nemotron_h", {"time_step_limit": [0.0, 0.1]}, "time_step_limit"),
        ("nemotron_h", {"sliding_window": 64}, "sliding_window 64"),
        ("nemotron_h", {"n_shared_experts": 2}, "n_shared_experts 2"),
    ],
)  # fmt: skip
def test_configs_that_we_would_compute_wrongly_are_refused_by_name(tmp_path, variant, change, message):
    if variant == "kimi_k2":
        variant, change = "deepseek_v3", change | {"model_type": "kimi_k2"}
    (tmp_path / "config.json").write_text(json.dumps(hf_config(variant, num_hidden_layers=2) | change))
    with pytest.raises(UnsupportedModelError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no config\.json"),
        ({"config.json": "{'"}, "cannot be read"),
        ({"config.json": "[1]"}, "does not hold a JSON object"),
        ({"adapter_config.json": '{"base_model_name_or_path": "org/base"}'}, "a PEFT adapter of org/base"),
        ({"model-Q4_K_M.gguf": "GGUF"}, "GGUF"),
        (
            {"config.json": '{"model_type": "llama"}', "adapter_config.json": "{}"},
            "adapter_config.json beside",
        ),
    ],
)
def test_folders_that_are_not_models_are_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UnsupportedModelError, match=message):
        read_config(tmp_path)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_head_of_its_own_although_config_json_says_tied(tmp_path):
    folder = write_model(tmp_path, "llama", num_hidden_layers=1)
    head = np.random.default_rng(1).standard_normal((320, 32)).astype(np.float32)
    rewrite(folder, lambda tensors: tensors.update({weight_files.HEAD: head}))
    assert not read_config(folder).tie_embeddings
    assert_as_transformers(folder)


def test_a_head_that_is_the_embedding_stays_tied(tmp_path):
    folder = write_model(tmp_path, "llama", num_hidden_layers=1)
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {weight_files.HEAD: tensors["model." + weight_files.EMBEDDING].copy()}
        ),
    )
    assert read_config(folder).tie_embeddings
    assert_as_transformers(folder)


def test_a_tied_model_stored_as_its_head_alone(tmp_path):
    folder = write_model(tmp_path, "llama", num_hidden_layers=1)
    rewrite(
        folder,
        lambda tensors: tensors.update({weight_files.HEAD: tensors.pop("model." + weight_files.EMBEDDING)}),
    )
    assert_as_transformers(folder)


def test_a_model_stored_without_its_prefix(tmp_path):
    from transformers import AutoModel

    folder = write_model(tmp_path / "whole", "qwen3", tie_word_embeddings=True, num_hidden_layers=1)
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "trunk")
    assert "embed_tokens.weight" in load_file(tmp_path / "trunk" / "model.safetensors")
    assert_as_transformers(tmp_path / "trunk")


def test_a_model_that_sees_with_its_experts_in_one_tensor(tmp_path):
    """The layout of the hub's files of Qwen3.5's mixtures, which are read and exported as they are."""
    folder = write_model(tmp_path / "hub", "qwen3_5_moe", tokenizer=False, num_hidden_layers=2)
    config = json.loads((folder / "config.json").read_text())
    above = {"model_type": "qwen3_5_moe", "tie_word_embeddings": False, "text_config": config}
    (folder / "config.json").write_text(json.dumps(above | {"vision_config": {"depth": 1}}))
    rewrite(folder, as_on_the_hub)
    assert_as_transformers(folder)
    stored, config = load_file(folder / "model.safetensors"), read_config(folder)
    base = merged.in_memory(load.load_base(folder, config, jnp.float32))
    merged.save_merged(tmp_path / "out", base, config, base_folder=folder)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == exported.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(exported[name], tensor, err_msg=name)


def as_on_the_hub(tensors):
    """Put the experts of each layer into two tensors, and everything below `language_model`."""
    experts = {}
    for name in [name for name in tensors if ".experts." in name]:
        before, _, after = name.partition(".experts.")
        number, matrix, _ = after.split(".")
        experts.setdefault(f"{before}.experts", {})[int(number), matrix] = tensors.pop(name)
    for at, of in experts.items():
        numbers = sorted({number for number, _ in of})
        both = [np.concatenate([of[n, "gate_proj"], of[n, "up_proj"]]) for n in numbers]
        tensors[f"{at}.gate_up_proj"] = np.stack(both)
        tensors[f"{at}.down_proj"] = np.stack([of[n, "down_proj"] for n in numbers])
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors[name.replace("model.", "model.language_model.", 1)] = tensors.pop(name)
    tensors["model.visual.merger.norm.bias"] = np.ones(3, np.float32)


def test_one_file_wins_over_an_index_and_an_index_over_other_files(tmp_path):
    """Older saves that a newer one left in place: shards with their index, and a file that no index names."""
    old = write_model(tmp_path, "llama", shards=2, seed=1, num_hidden_layers=1)
    (old / "zz.safetensors").write_bytes((old / "model-00001-of-00002.safetensors").read_bytes())
    garbage = {name: np.zeros_like(w) for name, w in load_file(old / "zz.safetensors").items()}
    save_file(garbage, old / "zz.safetensors", {"format": "pt"})
    assert_as_transformers(old)
    sharded = ours(old)
    write_model(tmp_path, "llama", seed=2, num_hidden_layers=1)
    assert_as_transformers(tmp_path)
    assert np.abs(ours(tmp_path) - sharded).max() > 0.1


def test_a_file_that_config_json_names_wins_over_all(tmp_path):
    folder = write_model(tmp_path, "llama", seed=1, num_hidden_layers=1)
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    write_model(tmp_path, "llama", seed=2, num_hidden_layers=1, transformers_weights="mine.safetensors")
    assert_as_transformers(tmp_path)


def test_extra_tensors_are_ignored_and_named_in_the_log(tmp_path, caplog):
    folder = write_model(tmp_path, "llama", num_hidden_layers=1)
    extra = {"model.layers.7.mlp.up_proj.weight": np.ones(3, np.float32), "score.bias": np.ones(2, np.int64)}
    rewrite(folder, lambda tensors: tensors.update(extra))
    assert_as_transformers(folder)
    assert "model.layers.7.mlp.up_proj.weight, score.bias" in caplog.text


def test_float64_weights(tmp_path):
    folder = write_model(tmp_path, "llama", num_hidden_layers=1)
    rewrite(folder, lambda tensors: tensors.update({k: w.astype(np.float64) for k, w in tensors.items()}))
    assert_as_transformers(folder)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("llama3", lambda w: w.pop("lm_head.weight"), "no float tensor 'lm_head.weight'.*not tied"),
        (
            "llama3",
            lambda w: w.pop("model.embed_tokens.weight"),
            "no float tensor 'model.embed_tokens.weight'",
        ),
        ("llama", lambda w: w.pop("model.embed_tokens.weight"), "no float tensor 'lm_head.weight'"),
        (
            "llama",
            lambda w: w.update({"model.norm.weight": w["model.norm.weight"].astype(np.int8)}),
            "model.norm.weight has dtype I8",
        ),
        (
            "llama",
            lambda w: w.update({"lm_head.weight": np.ones((9, 32), np.float32)}),
            r"lm_head.*\(9, 32\)",
        ),
    ],
)
def test_weights_are_never_made_up(tmp_path, variant, change, message):
    folder = write_model(tmp_path, variant, num_hidden_layers=1)
    rewrite(folder, change)
    config = read_config(folder)
    with pytest.raises(weight_files.WeightsError, match=message):
        weight_files.check(folder, config)
    with pytest.raises(weight_files.WeightsError):
        load.load_base(folder, config, jnp.float32)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model-00001-of-00002.safetensors": b""}, "neither model.safetensors nor"),
        ({"pytorch_model.bin": b""}, "pytorch_model.bin is not read: convert"),
        ({"model.safetensors.index.json": b"{}"}, "no weight_map"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../b.safetensors"}}'}, "is not inside"),
        (
            {"model.safetensors": b"version https://git-lfs.github.com/spec/v1"},
            "is a pointer of git-lfs, not the file itself: run git lfs pull",
        ),
        ({"model.safetensors": b"these are no weights"}, "not a whole safetensors file"),
        ({"model.safetensors": b"\2\0\0\0\0\0\0\0[]"}, "damaged"),
    ],
)
def test_errors_name_what_is_wrong_with_the_files(tmp_path, files, message):
    (tmp_path / "config.json").write_text(json.dumps(hf_config("llama")))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(weight_files.WeightsError, match=message):
        weight_files.headers(tmp_path)
