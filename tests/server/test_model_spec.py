"""What a create_model asks for that this server does not do."""

import pytest
from tinsmith.server.errors import BadRequest
from tinsmith.server.model_spec import model_spec
from tinsmith.server.settings import Settings
from tinsmith.server.wire.models import CreateModel


def test_server_side_rl_is_refused_by_name(tmp_path):
    asked = CreateModel(base_model="tiny", rlve_config={"enabled": True, "environment_list": ["add"]})
    with pytest.raises(BadRequest, match=r"rlve_config\.enabled: this server has no environments"):
        model_spec(asked, "model", "tinkercloud", Settings(data_dir=tmp_path))
