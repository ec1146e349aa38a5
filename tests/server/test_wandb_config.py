"""The fields of a wandb_config that are kept, and those that are refused."""

import pytest
from pydantic import ValidationError
from tinsmith.server.errors import BadRequest
from tinsmith.server.events import EventByKind
from tinsmith.server.plugins.wandb import WandbRuns
from tinsmith.server.wire.requests import CreateModel


def test_the_key_is_not_in_what_is_kept_or_shown():
    body = CreateModel(base_model="tiny", wandb_config={"enabled": True, "api_key": "secret", "group": "g"})
    assert body.wandb_config is not None
    assert body.wandb_config.configuration == {"project": "rlve", "group": "g"}
    assert "secret" not in repr(body) + body.model_dump_json()


@pytest.mark.parametrize("project", ["", "a/b", "..", "x" * 129])
def test_a_project_is_a_name(project):
    with pytest.raises(ValidationError):
        CreateModel(base_model="tiny", wandb_config={"enabled": True, "project": project})


def test_a_server_may_refuse(tmp_path):
    with pytest.raises(BadRequest, match="does not write to Weights & Biases"):
        WandbRuns(tmp_path, "disabled", lambda _: None, EventByKind()).check()
