import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tinsmith.ckpt import training_state
from tinsmith.ckpt.digests import DamagedFiles


def some_arrays(seed: int = 0):
    rng = np.random.default_rng(seed)
    adapter = {
        "layers": {"q_proj": {"a": rng.normal(size=(2, 16, 8)), "b": rng.normal(size=(2, 8, 16))}},
        "unembed": {"a": rng.normal(size=(16, 8)), "b": rng.normal(size=(8, 32))},
    }
    weights = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), adapter)
    return {
        "weights": weights,
        "optimizer": {"mu": jax.tree.map(lambda x: x / 3, weights), "count": jnp.int32(7)},
        "gradients": jax.tree.map(lambda x: x * 1e-30, weights),
    }


def assert_bit_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_saved_state_comes_back_bit_for_bit(tmp_path):
    arrays, metadata = some_arrays(), {"step": 7, "lora": {"rank": 3, "alpha": 32.0}, "base_model": "tiny"}
    size = training_state.save(tmp_path / "run" / "a-1", arrays, metadata).result()
    assert size == sum(p.stat().st_size for p in (tmp_path / "run" / "a-1").rglob("*") if p.is_file())
    assert training_state.is_complete(tmp_path / "run" / "a-1")
    assert training_state.read_metadata(tmp_path / "run" / "a-1") == {"format_version": 1, **metadata}
    assert_bit_equal(training_state.restore(tmp_path / "run" / "a-1", arrays), arrays)


def test_weights_alone_can_be_restored(tmp_path):
    arrays = some_arrays()
    training_state.save(tmp_path / "a", arrays, {}).result()
    weights = {"weights": jax.eval_shape(lambda: arrays["weights"])}
    assert_bit_equal(training_state.restore(tmp_path / "a", weights), {"weights": arrays["weights"]})


def test_the_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    x = jnp.arange(4_000_000, dtype=jnp.float32)
    expected = np.array(x)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    jax.block_until_ready(overwrite(x + 0))
    saving = training_state.save(tmp_path / "a", {"x": x}, {})
    jax.block_until_ready(overwrite(x))
    saving.result()
    restored = training_state.restore(
        tmp_path / "a", {"x": jax.ShapeDtypeStruct(expected.shape, jnp.float32)}
    )
    np.testing.assert_array_equal(np.asarray(restored["x"]), expected)


def test_saving_again_under_the_same_directory_replaces_it(tmp_path):
    training_state.save(tmp_path / "a", some_arrays(0), {"step": 1}).result()
    training_state.save(tmp_path / "a", some_arrays(1), {"step": 2}).result()
    assert training_state.read_metadata(tmp_path / "a")["step"] == 2
    assert_bit_equal(training_state.restore(tmp_path / "a", some_arrays(0)), some_arrays(1))


def test_several_saves_go_on_at_once(tmp_path):
    saves = [training_state.save(tmp_path / f"m{i}", some_arrays(i), {"step": i}) for i in range(6)]
    for i, saving in enumerate(saves):
        saving.result()
        assert_bit_equal(training_state.restore(tmp_path / f"m{i}", some_arrays(i)), some_arrays(i))


def test_a_missing_directory_and_a_wrong_shape_are_reported_clearly(tmp_path):
    with pytest.raises(FileNotFoundError, match="no complete training state"):
        training_state.restore(tmp_path / "nothing", some_arrays())
    training_state.save(tmp_path / "a", {"x": jnp.zeros((2, 3))}, {}).result()
    with pytest.raises(ValueError, match=r"\['x'\] has shape \(2, 3\); expected shape \(3, 3\)"):
        training_state.restore(tmp_path / "a", {"x": jnp.zeros((3, 3))})
    with pytest.raises(ValueError, match=r"\['y'\] is missing"):
        training_state.restore(tmp_path / "a", {"y": jnp.zeros((3, 3))})


def test_a_bit_that_flips_in_any_file_is_noticed(tmp_path):
    arrays = some_arrays()
    training_state.save(tmp_path / "a", arrays, {"step": 1}).result()
    files = [path for path in (tmp_path / "a").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 3
    for path in files:
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DamagedFiles):
            training_state.restore(tmp_path / "a", arrays)
        path.write_bytes(whole)
    assert_bit_equal(training_state.restore(tmp_path / "a", arrays), arrays)


def test_a_state_of_a_later_version_is_refused(tmp_path):
    training_state.save(tmp_path / "a", {"x": jnp.zeros(1)}, {"format_version": 99}).result()
    with pytest.raises(ValueError, match="has format 99"):
        training_state.restore(tmp_path / "a", {"x": jnp.zeros(1)})


SAVE_ENDLESSLY = """
import sys, jax.numpy as jnp
from pathlib import Path
from tinsmith.ckpt import training_state
x = jnp.arange(8_000_000, dtype=jnp.float32)
for i in range(1000):
    saving = training_state.save(Path(sys.argv[1]) / f"c{i}", {"x": x}, {"step": i})
    print(i, flush=True)
    saving.result()
"""


def test_a_checkpoint_that_was_being_written_at_kill_9_is_not_there(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", SAVE_ENDLESSLY, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    for _ in range(3):
        last = int(child.stdout.readline())
    time.sleep(0.02)
    child.kill()
    child.wait()
    complete = [i for i in range(last + 1) if training_state.is_complete(tmp_path / f"c{i}")]
    assert complete[: last - 1] == list(range(last - 1))
    for i in complete:
        x = training_state.restore(tmp_path / f"c{i}", {"x": jax.ShapeDtypeStruct((8_000_000,), jnp.float32)})
        np.testing.assert_array_equal(np.asarray(x["x"]), np.arange(8_000_000, dtype=np.float32))
    # The same save, done again, leaves nothing of the first attempt.
    training_state.save(tmp_path / f"c{last}", {"x": jnp.zeros(1)}, {}).result()
    assert [p.name for p in tmp_path.glob(f"c{last}*")] == [f"c{last}"]


SHARDED = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from pathlib import Path
from tinsmith.ckpt import training_state
mesh = jax.make_mesh((8,), ("fsdp",))
x = np.arange(64 * 8, dtype=np.float32).reshape(64, 8)
directory = Path(sys.argv[1])
sharded = jax.device_put(x, NamedSharding(mesh, P("fsdp")))
training_state.save(directory / "eight", {"x": sharded}, {}).result()
turned = jax.make_mesh((2, 4), ("data", "fsdp"))
want = NamedSharding(turned, P(None, "fsdp"))
back = training_state.restore(
    directory / "eight", {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=want)}
)["x"]
assert back.sharding.is_equivalent_to(want, 2), back.sharding
assert np.array_equal(np.asarray(back), x)
"""


def test_a_sharded_state_is_restored_on_another_mesh(tmp_path):
    subprocess.run(
        [sys.executable, "-c", SHARDED, str(tmp_path)],
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        cwd=Path(tmp_path),
    )
    # ... and on the one device of this process.
    x = training_state.restore(tmp_path / "eight", {"x": jax.ShapeDtypeStruct((64, 8), jnp.float32)})["x"]
    np.testing.assert_array_equal(np.asarray(x), np.arange(512, dtype=np.float32).reshape(64, 8))
