"""What a create_model asks for that this server does not do."""

import pytest
from tinsmith.server.errors import BadRequest
from tinsmith.server.http.model_creations import model_spec, optimizer_of
from tinsmith.server.settings import Settings
from tinsmith.server.wire.models import CreateModel, OptimizerConfig


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
def test_what_xorls_client_asks_full_weights_with(tmp_path, dialect, config, full_weight, rank):
    """Its `create_training_client` sends a rank of 32, and nothing else."""
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
