"""Fields of create_model that ask for something which this server does not do."""

import pytest
from adapters import random_adapter
from tinsmith.ckpt.peft import save_adapter
from tinsmith.model.folder import adapter_modules, read_config
from tinsmith.server.checkpoints.archive import described
from tinsmith.server.errors import BadRequest
from tinsmith.server.http.model_creations import model_spec, optimizer_of
from tinsmith.server.settings import Settings
from tinsmith.server.wire.requests import CreateModel, OptimizerConfig
from tiny_models import VARIANTS, write_model


@pytest.mark.parametrize(
    ("dialect", "config", "full_weight", "rank"),
    [
        ("xorl", {"rank": 32}, True, None),
        ("xorl", {"rank": 32, "dropout": 0.0}, True, 32),
        ("xorl", {"rank": 16}, True, 16),
        ("xorl", {"rank": 32}, False, 32),
        ("tinkercloud", {"rank": 32}, True, 32),
    ],
)
def test_xorls_client_asks_for_full_weights_with_a_rank_alone(tmp_path, dialect, config, full_weight, rank):
    """xorl's `create_training_client` sends a rank of 32, and nothing else."""
    asked = CreateModel(base_model="tiny", lora_config=config)
    spec = model_spec(asked, "model", dialect, Settings(data_dir=tmp_path, full_weight=full_weight))
    lora = spec.message.lora
    assert (None if lora is None else lora.rank) == rank
    assert any("full weights" in each for each in spec.warnings) == (rank is None)


def test_muons_own_learning_rate_is_a_factor_of_the_other():
    config = OptimizerConfig(type="muon", learning_rate=1e-3, optimizer_kwargs={"muon_lr": 0.02})
    assert optimizer_of(config)["optimizer_kwargs"] == {"muon_lr_factor": pytest.approx(20)}
    with pytest.raises(BadRequest, match=r"beside optimizer_config\.learning_rate"):
        optimizer_of(OptimizerConfig(type="muon", optimizer_kwargs={"muon_lr": 0.02}))


PHI3 = {
    "attn": frozenset({"qkv_proj", "o_proj"}),
    "mlp": frozenset({"gate_up_proj", "down_proj"}),
}


@pytest.mark.parametrize(
    ("asked", "trained"),
    [
        (["qkv_proj", "o_proj"], (True, False)),
        (["gate_up_proj", "down_proj", "qkv_proj", "o_proj"], (True, True)),
        (["gate_proj", "up_proj", "down_proj"], (False, True)),
        (["o_proj"], "qkv_proj is missing"),
        (["c_attn"], "no such matrices: 'c_attn'"),
    ],
)
def test_target_modules_are_the_base_model_s_or_the_usual_ones(tmp_path, asked, trained):
    body = CreateModel(base_model="tiny", lora_config={"rank": 4, "target_modules": asked})

    def spec():
        return model_spec(body, "model", "xorl", Settings(data_dir=tmp_path), modules=PHI3).message.lora

    if isinstance(trained, str):
        with pytest.raises(BadRequest, match=trained):
            spec()
    else:
        assert (spec().train_attn, spec().train_mlp) == trained


@pytest.mark.parametrize(
    ("variant", "form"),
    [
        *((variant, "shared") for variant in VARIANTS),
        ("qwen3_moe", "per_expert"),
        ("nemotron_h", "per_expert"),
        ("nemotron_h", "target_parameters"),
        ("gpt_oss", "target_parameters"),
        ("qwen3_5_moe", "target_parameters"),
    ],
)
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_an_archived_adapter_says_which_parts_it_trains(tmp_path, variant, form, part):
    """The parts follow from the names of its tensors, whatever the family calls its matrices."""
    config = read_config(write_model(tmp_path / "model", variant, tokenizer=False))
    adapter = random_adapter(config, train_attn=part == "attn", train_mlp=part == "mlp", rank=4)
    save_adapter(tmp_path / part, adapter, config, rank=4, alpha=8.0, base_model="tiny", experts=form)
    found = described(tmp_path / part, adapter_modules(config))
    assert (found.train_attn, found.train_mlp, found.train_unembed) == (part == "attn", part == "mlp", True)
    assert (found.rank, found.alpha) == (4, 8.0)
