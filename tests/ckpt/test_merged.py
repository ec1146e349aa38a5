import json
import tracemalloc

import numpy as np
import pytest
from adapters import parameters_with
from safetensors.numpy import save_file
from tinsmith.ckpt import stored_parameters, training_state
from tinsmith.ckpt.merged import in_memory, save_merged
from tinsmith.ckpt.peft import save_adapter
from tinsmith.model.families import parameters
from tinsmith.model.folder import read_config
from tinsmith.model.weight_files import copied

from tests.ckpt.test_peft import ALPHA, RANK, random_adapter
from tests.tiny_models import VARIANTS, hf_config, random_weights, write_model


def our_base(config, weights):
    """Return the base pytree of Hugging Face weights, stacked by hand."""
    base = {}
    for parameter in parameters(config):
        arrays = [parameter.taken(weights[name]) for name, _ in parameter.tensors()]
        *parents, leaf = parameter.path.split(".")
        at = base
        for key in parents:
            at = at.setdefault(key, {})
        if parameter.layers is None:
            (at[leaf],) = arrays
        else:
            experts = [parameter.experts] if parameter.is_by_expert else []
            at[leaf] = np.stack(arrays).reshape(len(parameter.layers), *experts, *arrays[0].shape)
    return base


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
def test_the_folder_holds_the_weights_under_their_own_names(tmp_path, variant, shard_bytes):
    from safetensors.numpy import load_file

    folder = write_model(tmp_path / "base", variant)
    config = read_config(folder)
    weights = random_weights(hf_config(variant), seed=7)
    base = in_memory(our_base(config, weights))
    size = save_merged(tmp_path / "out", base, config, base_folder=folder, shard_bytes=shard_bytes)
    assert size == sum(path.stat().st_size for path in (tmp_path / "out").glob("[!.]*"))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) == 1) == (shard_bytes == 1 << 30)
    found = {name: array for file in files for name, array in load_file(file).items()}
    assert found.keys() == weights.keys()
    beside = copied(folder, config)  # the base's, whatever was trained
    weights |= {name: load_file(folder / "model.safetensors")[name] for name in beside}
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array)
    assert read_config(tmp_path / "out") == config
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.reference
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_loads_it_with_equal_log_probs(tmp_path, variant):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path / "base", variant)
    trained = write_model(tmp_path / "trained", variant, seed=7)
    config = read_config(folder)
    base = in_memory(our_base(config, random_weights(hf_config(variant), seed=7)))
    out = tmp_path / "out"
    save_merged(out, base, config, base_folder=folder, shard_bytes=20_000)
    tokens = torch.tensor(np.random.default_rng(0).integers(0, config.vocab_size, (2, 24)))
    with torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (out, trained)]
        found, expected = (torch.log_softmax(model(tokens).logits, -1) for model in models)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_adapter_is_the_adapter_beside_its_model(tmp_path, variant):
    """Its log-probs are those of PEFT's unmerged adapter, also for tied embeddings with a trained
    unembedding."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path / "base", variant)
    config = read_config(folder)
    adapter = random_adapter(config)
    base = in_memory(our_base(config, random_weights(hf_config(variant))))
    out = tmp_path / "out"
    save_merged(
        out, base, config, base_folder=folder, adapter=adapter, scale=ALPHA / RANK, shard_bytes=20_000
    )
    tokens = torch.tensor(np.random.default_rng(0).integers(0, config.vocab_size, (2, 24)))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if variant in ("gpt_oss", "deepseek_v3", "qwen3_5", "qwen3_5_moe", "nemotron_h"):  # PEFT has no such
        changed = parameters_with(plain, adapter, config, ALPHA / RANK)

        def beside(tokens):
            return torch.func.functional_call(plain, changed, (tokens,))
    else:
        names = {"rank": RANK, "alpha": ALPHA, "base_model": "tiny", "experts": "per_expert"}
        save_adapter(tmp_path / "adapter", adapter, config, **names)
        beside = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        inside = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        expected, found = (torch.log_softmax(model(tokens).logits, -1) for model in (beside, inside))
        assert (
            AutoModelForCausalLM.from_pretrained(folder)(tokens).logits - beside(tokens).logits
        ).abs().max() > 0.1
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-4)
    assert not read_config(out).tie_embeddings


def test_a_head_that_config_json_denies_is_written_as_one(tmp_path):
    """The base model's config.json says tied, and its files hold a head: the export says what it is."""
    folder = write_model(tmp_path / "base", num_hidden_layers=1, tokenizer=False)
    weights = random_weights(hf_config(num_hidden_layers=1)) | {
        "lm_head.weight": np.ones((320, 32), np.float32)
    }
    save_file(weights, folder / "model.safetensors")
    config = read_config(folder)
    save_merged(tmp_path / "out", in_memory(our_base(config, weights)), config, base_folder=folder)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert read_config(tmp_path / "out") == config


@pytest.mark.reference
@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_it_is_what_merge_and_unload_makes(tmp_path, variant):
    """Models with tied embeddings have no adapter of the unembedding here: PEFT would change the embedding
    too."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path / "base", variant)
    config = read_config(folder)
    adapter = random_adapter(config, train_unembed=not config.tie_embeddings)
    base = in_memory(our_base(config, random_weights(hf_config(variant))))
    out = tmp_path / "out"
    save_merged(
        out, base, config, base_folder=folder, adapter=adapter, scale=ALPHA / RANK, shard_bytes=20_000
    )
    save_adapter(tmp_path / "adapter", adapter, config, rank=RANK, alpha=ALPHA, base_model="tiny")
    beside = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "adapter"
    )
    expected = beside.merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name].numpy(), weight.numpy(), atol=1e-5, err_msg=name)
    moved = (
        expected["model.layers.1.mlp.down_proj.weight"].numpy()
        - random_weights(hf_config(variant))["model.layers.1.mlp.down_proj.weight"]
    )
    assert np.abs(moved).max() > 0.1


def test_weights_on_disk_are_read_one_parameter_at_a_time(tmp_path):
    """This holds for a training state and for a folder that was written before; a few files' worth is in
    memory."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 64}
    folder = write_model(tmp_path / "base", "qwen3", **shape)
    config = read_config(folder)
    weights = random_weights(hf_config("qwen3", **shape), seed=7)
    metadata = {"lora": None, "base_model": "tiny"}
    training_state.save(tmp_path / "state", {"weights": our_base(config, weights)}, metadata).result()
    total, shard_bytes = sum(array.nbytes for array in weights.values()), 1 << 20
    del weights

    def written(name, parameters):
        save_merged(tmp_path / name, parameters, config, base_folder=folder, shard_bytes=shard_bytes)

    written("warm", stored_parameters.of_training_state(tmp_path / "state"))
    tracemalloc.start()
    written("from_state", stored_parameters.of_training_state(tmp_path / "state"))
    written("from_folder", stored_parameters.of_folder(tmp_path / "from_state", config))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = 8 * 256 * 512 * 4  # one parameter of all layers
    assert most < largest + 3 * shard_bytes < total / 2

    from safetensors.numpy import load_file

    for name in ("from_state", "from_folder"):
        files = sorted((tmp_path / name).glob("*.safetensors"))
        assert len(files) > 8
        found = {key: array for file in files for key, array in load_file(file).items()}
        for key, array in random_weights(hf_config("qwen3", **shape), seed=7).items():
            np.testing.assert_array_equal(found[key], array, err_msg=key)


def test_a_state_of_an_adapter_is_not_full_weights(tmp_path):
    metadata = {"lora": {"rank": 4}, "base_model": "tiny"}
    training_state.save(tmp_path / "state", {"weights": {"a": np.zeros(3)}}, metadata).result()
    with pytest.raises(ValueError, match="of an adapter"):
        stored_parameters.of_training_state(tmp_path / "state")
