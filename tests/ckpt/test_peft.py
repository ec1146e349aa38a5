import json

import adapters
import numpy as np
import pytest
from adapters import parameters_with
from safetensors.numpy import load_file, save_file
from tinsmith.ckpt import peft
from tinsmith.model.folder import read_config

from tests.tiny_models import VARIANTS, write_model

RANK, ALPHA = 5, 12.0


def random_adapter(config, rank=RANK, **which):
    """Return an adapter whose B is random too (its padded rows stay zero)."""
    return adapters.random_adapter(config, 3, rank, size=0.3, **which)


def save(directory, config, alpha=ALPHA):
    peft.save_adapter(directory, random_adapter(config), config, rank=RANK, alpha=alpha, base_model="tiny")


def leaves(tree, path=""):
    if isinstance(tree, dict):
        return {k: v for key, sub in tree.items() for k, v in leaves(sub, f"{path}/{key}").items()}
    return {path: tree}


@pytest.mark.parametrize(
    "which",
    [{}, {"train_unembed": False}, {"train_attn": False}, {"train_mlp": False, "train_attn": False}],
    ids=lambda which: "-".join(which) or "all",
)
def test_an_adapter_survives_the_disk(tmp_path, which):
    config = read_config(write_model(tmp_path / "base", "qwen3", tokenizer=False))
    adapter = random_adapter(config, **which)
    size = peft.save_adapter(tmp_path / "a", adapter, config, rank=RANK, alpha=ALPHA, base_model="tiny")
    assert size == sum(path.stat().st_size for path in (tmp_path / "a").glob("[!.]*"))
    saved = peft.load_adapter(tmp_path / "a", config)
    assert (saved.rank, saved.alpha, saved.base_model) == (RANK, ALPHA, "tiny")
    before, after = leaves(adapter), leaves(saved.adapter)
    assert before.keys() == after.keys()
    for path, array in before.items():
        np.testing.assert_array_equal(array, after[path])


def test_files_hold_the_true_rank_and_name_every_target(tmp_path):
    config = read_config(write_model(tmp_path / "base", tokenizer=False))
    peft.save_adapter(
        tmp_path / "a", random_adapter(config), config, rank=RANK, alpha=ALPHA, base_model="tiny"
    )
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert written["r"] == RANK
    assert written["target_modules"] == sorted([*(site.name for site in config.layers[0].sites), "lm_head"])
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {RANK}
    assert len(tensors) == 2 * (7 * config.num_layers + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def test_a_failed_write_leaves_nothing_and_a_second_write_replaces_the_first(tmp_path, monkeypatch):
    config = read_config(write_model(tmp_path / "base", tokenizer=False))

    with monkeypatch.context() as patch:
        patch.setattr(peft.json, "dumps", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(tmp_path / "out" / "a", config)
    assert list((tmp_path / "out").iterdir()) == []
    save(tmp_path / "out" / "a", config, 1.0)
    save(tmp_path / "out" / "a", config, 2.0)
    assert peft.load_adapter(tmp_path / "out" / "a", config).alpha == 2.0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_only_plain_adapters_of_the_model_are_accepted(tmp_path):
    config = read_config(write_model(tmp_path / "base", tokenizer=False))
    with pytest.raises(FileNotFoundError, match="no PEFT adapter in a"):
        peft.load_adapter(tmp_path / "a", config)
    peft.save_adapter(
        tmp_path / "a", random_adapter(config), config, rank=RANK, alpha=ALPHA, base_model="tiny"
    )

    other = read_config(write_model(tmp_path / "other", tokenizer=False, hidden_size=64))
    with pytest.raises(ValueError, match=r"q_proj.lora_A has shape \(5, 32\); expected \(5, 64\)"):
        peft.load_adapter(tmp_path / "a", other)

    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.model.norm.weight": np.zeros(3, np.float32)}, file)
    with pytest.raises(ValueError, match=r"no place for base_model.model.model.norm.weight"):
        peft.load_adapter(tmp_path / "a", config)
    save_file(tensors, file)

    config_file = tmp_path / "a" / "adapter_config.json"
    written = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(written | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora is not supported"):
        peft.load_adapter(tmp_path / "a", config)
    config_file.write_text(json.dumps(written | {"use_rslora": True}))
    assert peft.load_adapter(tmp_path / "a", config).alpha / RANK == pytest.approx(ALPHA / np.sqrt(RANK))


def forms_of(variant):
    """Return the forms in which PEFT reads adapters of experts and delta nets."""
    mixture = VARIANTS[variant].keys() & {"num_experts", "num_local_experts", "n_routed_experts"}
    if variant == "qwen3_moe":
        return ["per_expert", "target_parameters"]
    return ["target_parameters"] if mixture or variant.startswith("qwen3_5") else ["shared"]


@pytest.mark.reference
@pytest.mark.parametrize(("variant", "form"), [(each, form) for each in VARIANTS for form in forms_of(each)])
@pytest.mark.parametrize("train_unembed", [True, False])
def test_peft_loads_it_with_the_log_probs_of_the_formula(tmp_path, variant, form, train_unembed):
    torch = pytest.importorskip("torch")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path / "base", variant)
    config = read_config(folder)
    # PEFT refuses adapters of a Mamba-2's out_proj
    adapter = random_adapter(config, train_unembed=train_unembed, train_attn=variant != "nemotron_h")
    names = {"rank": RANK, "alpha": ALPHA, "base_model": "tiny", "experts": form}
    peft.save_adapter(tmp_path / "a", adapter, config, **names)
    tokens = torch.tensor(np.random.default_rng(0).integers(0, config.vocab_size, (2, 24)))

    def base():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base(), tmp_path / "a")
        found = torch.log_softmax(loaded(tokens).logits, -1)
        expected = log_probs_of_the_formula(base(), adapter, config, tokens)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-4)
    assert (expected - torch.log_softmax(base()(tokens).logits, -1)).abs().max() > 0.1
    if form != "shared":
        # Saved again by PEFT, which stacks the experts' factors, it is still the same adapter.
        loaded.save_pretrained(tmp_path / "again", save_embedding_layers=False)
        again = leaves(peft.load_adapter(tmp_path / "again", config).adapter)
        for path, array in leaves(adapter).items():
            np.testing.assert_allclose(array, again[path], atol=1e-6)


def log_probs_of_the_formula(model, adapter, config, tokens):
    """Return log-probs with W + (alpha / r) A B in every matrix; logits get (alpha / r) h A B on top."""
    import torch

    scale = ALPHA / RANK
    changed = parameters_with(model, {"layers": adapter["layers"]}, config, scale)
    weights = {
        name.removeprefix("model."): value for name, value in changed.items() if name != "lm_head.weight"
    }
    hidden = torch.func.functional_call(model.model, weights, (tokens,)).last_hidden_state
    logits = model.lm_head(hidden)
    if "unembed" in adapter:
        logits += scale * hidden @ torch.tensor(adapter["unembed"]["a"] @ adapter["unembed"]["b"])
    return torch.log_softmax(logits, -1)


def test_experts_in_the_form_of_the_hosted_service(tmp_path):
    """It has 3-D tensors; the first axis is 1 for the factor that the experts share."""
    config = read_config(write_model(tmp_path / "base", "qwen3_moe", tokenizer=False))
    adapter = random_adapter(config)
    peft.save_adapter(tmp_path / "a", adapter, config, rank=RANK, alpha=ALPHA, base_model="tiny")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    E, D, F = 8, 32, 24
    at = "base_model.model.model.layers.1.mlp.experts."
    shapes = {name.removeprefix(at): tensor.shape for name, tensor in tensors.items() if name.startswith(at)}
    assert shapes == {
        "w1.lora_A.weight": (1, RANK, D),
        "w1.lora_B.weight": (E, F, RANK),
        "w2.lora_A.weight": (E, RANK, F),
        "w2.lora_B.weight": (1, D, RANK),
        "w3.lora_A.weight": (1, RANK, D),
        "w3.lora_B.weight": (E, F, RANK),
    }
    up = adapter["layers"]["expert_up"]
    np.testing.assert_array_equal(tensors[f"{at}w3.lora_B.weight"][5].T, up["b"][1, 5, :RANK])


@pytest.mark.parametrize(
    ("variant", "form", "overrides"),
    [
        *((variant, "shared", {}) for variant in VARIANTS),
        ("qwen3_moe", "per_expert", {"mlp_only_layers": [1]}),
        ("qwen3_moe", "shared", {"mlp_only_layers": [1]}),
        ("qwen3_moe", "target_parameters", {}),
        ("qwen3_moe", "target_parameters", {"mlp_only_layers": [1]}),
        ("deepseek_v3", "per_expert", {}),
        ("deepseek_v3", "target_parameters", {}),
        ("gpt_oss", "target_parameters", {}),
        ("qwen3_5", "target_parameters", {}),
        ("qwen3_5_moe", "per_expert", {}),
        ("qwen3_5_moe", "target_parameters", {}),
        ("nemotron_h", "per_expert", {}),
        ("nemotron_h", "target_parameters", {}),
    ],
)
def test_adapters_survive_every_form(tmp_path, variant, form, overrides):
    config = read_config(write_model(tmp_path / "base", variant, tokenizer=False, **overrides))
    adapter = random_adapter(config)
    names = {"rank": RANK, "alpha": ALPHA, "base_model": "tiny", "experts": form}
    peft.save_adapter(tmp_path / "a", adapter, config, **names)
    before, after = leaves(adapter), leaves(peft.load_adapter(tmp_path / "a", config).adapter)
    assert before.keys() == after.keys()
    for path, array in before.items():
        np.testing.assert_array_equal(array, after[path])


def changed_adapter(folder, change):
    """Change the tensors of an adapter's file."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_adapters_of_a_mamba_as_others_write_them(tmp_path):
    """The hosted service writes an empty w3 for experts without a gate. PEFT knows the model as `backbone`,
    and in_proj as one matrix, of which B, C and the time steps have no adapter here."""
    config = read_config(write_model(tmp_path / "base", "nemotron_h", tokenizer=False))
    adapter = random_adapter(config)
    names = {"rank": RANK, "alpha": ALPHA, "base_model": "tiny"}
    peft.save_adapter(tmp_path / "hosted", adapter, config, **names)
    first = "base_model.model.model.layers."

    def with_empty_w3(tensors):
        assert f"{first}1.mixer.experts.w1.lora_A.weight" in tensors
        assert f"{first}0.mixer.x_proj.lora_A.weight" in tensors
        for side in "AB":
            tensors[f"{first}1.mixer.experts.w3.lora_{side}.weight"] = np.zeros((0, RANK, 0), np.float32)
        for name in [*tensors]:
            tensors[name.replace("base_model.model.model.", "base_model.model.backbone.")] = tensors.pop(name)

    changed_adapter(tmp_path / "hosted", with_empty_w3)
    found = peft.load_adapter(tmp_path / "hosted", config).adapter
    assert leaves(found).keys() == leaves(adapter).keys()
    for path, array in leaves(adapter).items():
        np.testing.assert_array_equal(array, leaves(found)[path])

    peft.save_adapter(tmp_path / "whole", adapter, config, experts="target_parameters", **names)
    (width,) = {
        x.shape[0] for n, x in load_file(tmp_path / "base" / "model.safetensors").items() if "in_proj" in n
    }

    def with_changed_steps(tensors):
        b = tensors[f"{first}0.mixer.in_proj.lora_B.weight"]
        assert b.shape == (width, 2 * RANK)
        b[-1] = 1

    changed_adapter(tmp_path / "whole", with_changed_steps)
    with pytest.raises(peft.AdapterError, match=r"in_proj\.lora_B changes rows that are never trained"):
        peft.load_adapter(tmp_path / "whole", config)


@pytest.mark.parametrize(
    ("form", "module", "side", "reason"),
    [
        ("per_expert", "3.up_proj", "A", "3.up_proj.lora_A.weight differs from those of the other experts"),
        ("target_parameters", "base_layer", "A", "base_layer.lora_A differs from those of the other experts"),
        ("target_parameters", "base_layer", "B", "base_layer.lora_B is not block-diagonal"),
    ],
)
def test_experts_that_share_nothing_are_refused(tmp_path, form, module, side, reason):
    config = read_config(write_model(tmp_path / "base", "qwen3_moe", tokenizer=False))
    names = {"rank": RANK, "alpha": ALPHA, "base_model": "tiny", "experts": form}
    peft.save_adapter(tmp_path / "a", random_adapter(config), config, **names)
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensor = tensors[f"base_model.model.model.layers.0.mlp.experts.{module}.lora_{side}.weight"]
    tensor[0, :] += 1
    save_file(tensors, file)
    with pytest.raises(peft.AdapterError, match=reason):
        peft.load_adapter(tmp_path / "a", config)


def test_a_form_that_no_reader_has_for_the_model_is_refused(tmp_path):
    config = read_config(write_model(tmp_path / "base", "gpt_oss", tokenizer=False))
    names = {"rank": RANK, "alpha": ALPHA, "base_model": "tiny", "experts": "per_expert"}
    with pytest.raises(ValueError, match="gpt_oss have no modules of their own"):
        peft.save_adapter(tmp_path / "a", random_adapter(config), config, **names)


@pytest.mark.reference
def test_an_adapter_that_peft_wrote_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path / "base", "llama")
    config = read_config(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(base, lora)
    model.save_pretrained(tmp_path / "a")
    saved = peft.load_adapter(tmp_path / "a", config)
    assert (saved.rank, saved.alpha) == (4, 8.0)
    assert saved.adapter["layers"].keys() == {"q_proj", "down_proj"}
    module = model.base_model.model.model.layers[1].mlp.down_proj
    found = saved.adapter["layers"]["down_proj"]
    np.testing.assert_array_equal(found["a"][1, :, :4], module.lora_A["default"].weight.detach().numpy().T)
    np.testing.assert_array_equal(found["b"][1, :4], module.lora_B["default"].weight.detach().numpy().T)
    assert not found["a"][..., 4:].any()
    assert not found["b"][:, 4:].any()


@pytest.mark.parametrize(
    ("reference", "name", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@0123abc", "org/name", "0123abc"),
        ("/models/a@b", "/models/a@b", None),
        ("tiny", "tiny", None),
    ],
)
def test_the_config_names_the_base_model_as_its_readers_do(tmp_path, reference, name, revision):
    folder = write_model(tmp_path / "base")
    config = read_config(folder)
    adapter = random_adapter(config, train_unembed=False)
    where = tmp_path / "a"
    peft.save_adapter(
        where, adapter, config, rank=RANK, alpha=ALPHA, base_model=reference, tokenizer_of=folder
    )
    written = json.loads((where / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == (name, revision)
    assert (where / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
