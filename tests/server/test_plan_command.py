"""`tinsmith plan` answers from config.json alone, without JAX and without the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import Hub
from tinsmith.server.cli import app
from tiny_models import hf_config
from typer.testing import CliRunner

QWEN3_8B = hf_config(
    "qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("models") / "qwen3-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    return folder


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[Hub]:
    hub = Hub({("org/qwen3-8b", "main"): folder})
    yield hub
    hub.close()


def plan(*options: object, code: int = 0) -> str:
    ran = CliRunner().invoke(app, ["plan", *map(str, options)])
    assert ran.exit_code == code, ran.output
    return ran.output


def planned(*options: object, code: int = 0) -> dict:
    return json.loads(plan(*options, "--json", code=code))


def test_the_json_answers_every_question(folder: Path) -> None:
    answer = planned("--model", folder, "--device", "v5p-8", "--seq", "32k", "--rank", 32, "--tenants", 20)
    assert answer["fits"]
    assert answer["hint"] is None
    assert (answer["device"], answer["devices"]) == ("v5p-8", 4)
    assert answer["parameters"] == 8_190_735_360  # of Qwen3-8B, as its model card says: 8.2 billion
    assert answer["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1, "expert": 1}
    assert answer["micro_batch"] == {"rows_per_device": 1, "tokens_per_row": 32768, "tokens": 4 * 32768}
    assert answer["remat"] == "attention"
    assert sum(answer["memory_bytes"].values()) <= answer["capacity_bytes"]
    assert answer["kv_tokens"] // 32768 == answer["slots"] > 0
    assert 0.7 < answer["useful_share_of_products"] <= answer["useful_share_of_flops"] < 1
    assert answer["training_tokens_per_second_upper_bound"] > 0


def test_the_text_says_the_same(folder: Path) -> None:
    options = ("--model", folder, "--device", "h200", "--tenants", 3)
    text, answer = plan(*options), planned(*options)
    assert "It fits." in text
    assert "3 models in training" in text
    assert f"{answer['kv_tokens']:,} tokens" in text
    assert f"upper bound: {answer['training_tokens_per_second_upper_bound']:,.0f} tokens/s" in text
    assert f"remat '{answer['remat']}'" in text
    assert "machines" not in text
    assert "v5e-16 is 4 machines." in plan("--model", folder, "--device", "v5e-16")


def test_a_plan_that_does_not_fit_ends_with_1_and_says_what_would_help(folder: Path) -> None:
    text = plan("--model", folder, "--device", "v5e-1", "--seq", 2048, code=1)
    assert "It does not fit: it needs" in text
    assert "; v5e-4 would do" in text
    assert planned("--model", folder, "--device", "v5e-4", "--seq", 2048)["fits"]


def test_options_change_what_they_are_about(folder: Path) -> None:
    common = ("--model", folder, "--device", "h200x8", "--mesh", "fsdp=8")
    lora, full = planned(*common), planned(*common, "--train", "full")
    wide, sgd = planned(*common, "--dtype", "float32"), planned(*common, "--optimizer", "signsgd")
    # Of full weights: themselves, their gradients and two moments, in float32, over eight devices.
    assert full["memory_bytes"]["tenants"] == 16 * 8_190_735_360 // 8
    assert wide["memory_bytes"]["base"] == 2 * lora["memory_bytes"]["base"] == 4 * 8_190_735_360 // 8
    assert sgd["memory_bytes"]["tenants"] * 2 == lora["memory_bytes"]["tenants"]
    twice = planned(*common, "--rank", 64)
    assert twice["memory_bytes"]["tenants"] == 2 * lora["memory_bytes"]["tenants"]
    assert planned("--model", folder, "--device", "h200x8", "--mesh", "data=2,fsdp=2,tensor=2")["mesh"] == {
        "data": 2, "fsdp": 2, "tensor": 2, "expert": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "h300"], "--device: unknown device 'h300' (did you mean h200?); known: h200, "),
        (["--seq", "many"], "--seq: 'many' is not a number of tokens; write 8192 or 32k"),
        (["--seq", "128k"], "--seq: 128k is longer than qwen3-8b's limit of 40,960 tokens"),
        (["--rank", "0"], "--rank: 0 is not between 1 and 512"),
        (["--tenants", "0"], "--tenants: 0 is not between 1 and 100,000"),
        (["--train", "half"], "--train: 'half' is not one of lora, full"),
        (["--optimizer", "adam"], "--optimizer: 'adam' is not one of adamw, "),
        (["--dtype", "fp8"], "--dtype: 'fp8' is not one of bfloat16, float32"),
        (["--mesh", "fsdp=2"], "--mesh: fsdp=2 is of 2 devices, and h200 has 1"),
        (["--mesh", "rows=1"], "--mesh: 'rows=1'; write data=2,fsdp=4,tensor=1"),
        (["--model", "/no/such"], "model '/no/such': there is no such folder"),
    ],
)
def test_mistakes_are_answered_in_one_line(folder: Path, options: list[str], message: str) -> None:
    given = {"--model": str(folder), "--device": "h200"} | {options[0]: options[1]}
    ran = CliRunner().invoke(app, ["plan", *(word for pair in given.items() for word in pair)])
    assert ran.exit_code == 2
    assert message in ran.output
    assert ran.output.count("\n") == 1


def test_only_config_json_of_a_hub_model_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    """The command runs in a separate process, which must not import an array library either."""
    code = (
        "import sys; from tinsmith.server.cli import app\n"
        "try: app()\n"
        "finally: assert not {'jax', 'flax', 'torch'} & set(sys.modules)"
    )
    command = ["plan", "--model", "org/qwen3-8b@main", "--device", "v6e-8", "--json"]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", code, *command], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["model"] == "org/qwen3-8b"
    assert set(hub.asked) == {"config.json"}


def test_a_compiler_that_is_missing_is_named_and_the_estimate_stands(folder: Path) -> None:
    from tinsmith.engine import device_catalogue
    from tinsmith.engine.memory import Workload
    from tinsmith.model.folder import counts, stated_config
    from tinsmith.server.cli import plan_command

    device = device_catalogue.find("v5e-4")
    if device.has_compiler:
        pytest.skip("libtpu is installed here")
    made = plan_command.report("m", counts(stated_config(folder)), Workload(512), device)
    with pytest.raises(ValueError, match=r"libtpu|TPU|topology"):
        plan_command.compiled(made, folder)
    assert planned("--model", folder, "--device", "v5e-4", "--seq", 512)["source"] == "estimated"
