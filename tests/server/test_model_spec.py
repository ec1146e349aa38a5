"""What a create_model asks for that this server does not do."""

import pytest
from tinsmith.server.errors import BadRequest
from tinsmith.server.live.model_spec import model_spec, optimizer_of
from tinsmith.server.settings import Settings
from tinsmith.server.wire.models import CreateModel, OptimizerConfig


def test_server_side_rl_is_refused_by_name(tmp_path):
    asked = CreateModel(base_model="tiny", rlve_config={"enabled": True, "environment_list": ["add"]})
    with pytest.raises(BadRequest, match=r"rlve_config\.enabled: this server has no environments"):
        model_spec(asked, "model", "tinkercloud", Settings(data_dir=tmp_path))


def test_muons_own_learning_rate_is_a_factor_of_the_other():
    config = OptimizerConfig(type="muon", learning_rate=1e-3, optimizer_kwargs={"muon_lr": 0.02})
    assert optimizer_of(config)["optimizer_kwargs"] == {"muon_lr_factor": pytest.approx(20)}
    with pytest.raises(BadRequest, match=r"beside optimizer_config\.learning_rate"):
        optimizer_of(OptimizerConfig(type="muon", optimizer_kwargs={"muon_lr": 0.02}))
