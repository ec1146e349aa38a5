"""The server's table of losses is the engine's."""

import pytest
from tinsmith.losses import REGISTRY
from tinsmith.server.errors import BadRequest
from tinsmith.server.wire.training import CONFIG_KEYS, check_loss


def test_the_table_is_the_registry():
    assert {name: set(keys) for name, keys in CONFIG_KEYS.items()} == {
        name: set(loss.keys) for name, loss in REGISTRY.items()
    }


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("ppa", "beta", "unknown loss 'ppa'; this server has cross_entropy, "),
        ("dro", "betta", "unknown key 'betta' for loss 'dro'; it takes: beta"),
        ("cross_entropy", "beta", "it takes: none"),
    ],
)
def test_unknown_losses_and_keys_are_refused_at_once(name, key, message):
    with pytest.raises(BadRequest, match=message):
        check_loss(name, [key])
