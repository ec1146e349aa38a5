"""The values of `--model`, and the checks before weights are downloaded or anything is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_hub import Hub, commit
from safetensors.numpy import load_file, save_file
from tinsmith.engine import host_memory
from tinsmith.model import folder as folders
from tinsmith.server import base_models
from tinsmith.server.cli import app
from tinsmith.server.settings import Settings
from tiny_models import hf_config, write_model
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)


# --- names and paths


@pytest.mark.parametrize(
    "name", ["lr=0.1,wd=0/checkpoint", "epoch=3", "a b?c%20d#e", "ä&ö", "org/name", "-x"]
)
def test_a_folder_that_exists_is_meant_as_it_stands(
    tmp_path: Path, model: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to(model)
    monkeypatch.chdir(tmp_path)
    (planned,) = base_models.plan([f"{folder}={folder}"])  # named by its path
    assert (planned.folder, planned.name) == (model, str(folder))
    for entry in (str(folder), name):
        (planned,) = base_models.plan([entry])
        assert (planned.folder, planned.name) == (model, "tiny")
        (planned,) = base_models.plan([f"mine={entry}"])
        assert (planned.folder, planned.name) == (model, "mine")
        monkeypatch.setenv("TINSMITH_MODEL", entry)
        assert Settings().model == [entry]
        monkeypatch.setenv("TINSMITH_MODEL", json.dumps([f"mine={entry}", "other"]))
        assert Settings().model == [f"mine={entry}", "other"]


@pytest.mark.parametrize(
    ("name", "path", "stated", "expected"),
    [
        ("mine", "m", None, None),
        ("mine", "m", "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("mine", "m", "/home/somebody/checkpoints/last", None),
        ("mine", "m", "./last", None),
        ("mine", "m", 7, None),
        ("mine", "models--org--a--b/snapshots/0a1b", "org/other", "org/a--b"),
        ("org/named", "m", "org/other", None),  # the SDK looks for a name like this on the hub by itself
    ],
)
def test_clients_elsewhere_are_told_the_hub_id_of_the_tokenizer(
    tmp_path: Path, model: Path, name: str, path: str, stated: object, expected: str | None
) -> None:
    folder = tmp_path / path
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": stated}))
    assert base_models.resolve(f"{name}={folder}", tmp_path, None).tokenizer_id == expected


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["/no/such/folder"], "model '/no/such/folder': there is no such folder"),
        (["~/no-such-folder"], "there is no such folder"),
        (["lr=0.1/missing"], "model 'lr=0.1/missing': there is no such folder"),
        (["m="], "--model 'm=': nothing follows the =; write NAME=FOLDER"),
        (["m=./lr=0.1/missing"], "model './lr=0.1/missing': there is no such folder"),
        (["missing"], "neither a folder, nor a hub id"),
        (["m=a/b/c"], "neither a folder, nor a hub id"),
        (["=org/name"], "the name before the = is ''"),
        ([" "], "--model is empty"),
        (["org/name@"], "no revision after the @"),
        (["a.gguf"], "a GGUF file, which is not supported"),
        (["a.bin"], "a file; give the folder"),
        (["MODEL", "tiny=MODEL"], "two models are called 'tiny'"),
        (["m=MODEL", "m=org/name"], "two models are called 'm'"),
    ],
)
def test_models_that_cannot_be_served_are_refused_before_the_hub_is_asked(
    tmp_path: Path, model: Path, entries: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lr=0.1").mkdir()
    for file in ("a.gguf", "a.bin"):
        (tmp_path / file).write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"^(?!.*hub:).*") as caught:
        base_models.plan([each.replace("MODEL", str(model)) for each in entries])
    assert message in str(caught.value)


# --- what the command answers


def serve(*options: str, folder: Path, **environment: str) -> str:
    """The one line with which `serve` refuses to start; nothing is written."""
    data_dir = folder / "data"
    refused = CliRunner().invoke(app, ["serve", "--data-dir", str(data_dir), "--port", "0", *options])
    assert refused.exit_code == 2, refused.output
    assert not data_dir.exists()
    assert refused.output.count("\n") == 1, refused.output
    return refused.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized (quantization_config: awq)"),
        ({"vocab_size": 321}, "model.embed_tokens.weight has shape (320, 32) in the file"),
        ({"num_hidden_layers": 2}, "no float tensor 'model.layers.1.input_layernorm.weight'"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25"),
    ],
)
def test_a_model_that_cannot_be_computed_is_refused_in_one_line(
    tmp_path: Path, change: dict, message: str
) -> None:
    folder = write_model(tmp_path / "m", num_hidden_layers=1)
    (folder / "config.json").write_text(json.dumps(hf_config(num_hidden_layers=1) | change))
    assert message in serve("--model", str(folder), folder=tmp_path)


def test_the_text_half_of_a_model_that_sees_can_be_served(tmp_path: Path) -> None:
    """The names of its tensors do not follow from config.json."""
    folder = write_model(tmp_path / "sees", "qwen3_5")
    (planned,) = base_models.plan([str(folder)])
    assert planned.config == folders.read_config(folder)
    assert planned.config.prefix == "model.language_model."
    assert not planned.obtain(tmp_path, None).is_tied


def test_a_model_larger_than_the_memory_is_refused_by_an_estimate(tmp_path: Path, model: Path) -> None:
    """It has as many parameters as transformers counts; the files are as long as they would be, and empty."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "huge"
    folder.mkdir()
    stated = {
        "hidden_size": 32768, "intermediate_size": 106496, "num_hidden_layers": 10,
        "num_attention_heads": 128,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(hf_config(**stated)))
    config, header, at = folders.stated_config(folder), {}, 0
    for name, shape in folders.tensor_shapes(config).items():
        size = int(np.prod(shape)) * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + at)
    said = serve("--model", f"tiny={model}", "--model", f"huge={folder}", folder=tmp_path)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    billions = sum(parameter.numel() for parameter in theirs.parameters()) / 1e9
    assert "too large: tiny, huge needs" in said
    assert f"({billions * 4:.0f} GB for {billions:.2f} billion parameters as float32, the rest" in said
    assert "; --dtype bfloat16 halves the weights" in said
    assert "as bfloat16" in serve("--model", f"huge={folder}", "--dtype", "bfloat16", folder=tmp_path)


def test_free_memory_is_what_the_machine_tells() -> None:
    import psutil

    free = host_memory.free_bytes()
    assert free is not None
    assert 0 < free <= psutil.virtual_memory().total


def test_devices_that_are_not_there(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = serve("--model", str(model), "--mesh", "data=2,fsdp=32", folder=tmp_path)
    assert "--mesh data=2,fsdp=32 is of 64 devices, and JAX finds 1 (cpu)" in said
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert "JAX finds no device" in serve("--model", str(model), folder=tmp_path)


# --- the hub


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    """One model at two revisions and sharded, others of a kind that is not computed or not readable."""
    good = write_model(tmp_path / "good", num_hidden_layers=1, shards=2)
    save_file({"x": np.ones(1)}, good / "consolidated.safetensors")
    older = write_model(tmp_path / "older", num_hidden_layers=1, seed=5)
    gpt2 = write_model(tmp_path / "gpt2", num_hidden_layers=1, model_type="llama")
    (gpt2 / "config.json").write_text('{"model_type": "gpt2"}')
    pickled = write_model(tmp_path / "pickled", num_hidden_layers=1)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    served = Hub(
        {
            ("org/good", "main"): good,
            ("org/good", "v1"): older,
            ("org/gpt2", "main"): gpt2,
            ("org/pickled", "main"): pickled,
        }
    )
    yield served
    served.close()


def obtained(hub: Hub, tmp_path: Path, entry: str) -> dict | str:
    """Obtain models in a separate process, because the hub's client reads the environment at its import."""
    code = (
        "import json, sys; from pathlib import Path; from tinsmith.server.base_models import plan\n"
        "try: (planned,) = plan([sys.argv[1]]); got = planned.obtain(Path('cache'), None)\n"
        "except ValueError as error: print(json.dumps(str(error))); sys.exit()\n"
        "print(json.dumps({'name': got.name, 'hub_id': got.hub_id, 'folder': str(got.folder)}))"
    )
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
    }
    ran = subprocess.run([sys.executable, "-c", code, entry], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def weights(asked: list[str]) -> list[str]:
    return sorted(name for name in set(asked) if name.endswith((".safetensors", ".bin")))


def test_config_json_is_read_before_weights_and_only_what_counts_is_downloaded(
    hub: Hub, tmp_path: Path
) -> None:
    got = obtained(hub, tmp_path, "org/good")
    assert (got["name"], got["hub_id"]) == ("org/good", "org/good")
    assert hub.asked[0] == "config.json"
    assert weights(hub.asked) == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert Path(got["folder"]).name == commit("org/good", "main")


def test_a_revision_can_be_named(hub: Hub, tmp_path: Path) -> None:
    got = obtained(hub, tmp_path, "mine=org/good@v1")
    assert (got["name"], got["hub_id"]) == ("mine", "org/good")
    assert Path(got["folder"]).name == commit("org/good", "v1")
    older, found = (load_file(Path(at) / "model.safetensors") for at in (tmp_path / "older", got["folder"]))
    assert all((older[name] == found[name]).all() for name in older)
    missing = obtained(hub, tmp_path, "org/good@v9")
    assert "model 'org/good@v9' is not a folder here, and cannot be loaded" in missing
    assert "RevisionNotFound" in missing


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("org/gpt2", "model_type 'gpt2' is not supported"),
        ("org/pickled", "it has pytorch_model.bin, which are not read"),
        ("org/unknown", "is not a folder here, and cannot be loaded from the Hugging Face hub"),
    ],
)
def test_no_weights_are_asked_for_of_a_model_that_cannot_be_served(
    hub: Hub, tmp_path: Path, entry: str, message: str
) -> None:
    said = obtained(hub, tmp_path, entry)
    assert message in said
    assert "\n" not in said
    assert weights(hub.asked) == []


# --- the digest


def digest(folder: Path) -> str:
    return folders.digest(folder, folders.read_config(folder))


def test_the_digest_is_of_the_model_and_not_of_its_files(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", num_hidden_layers=1)
    many = write_model(tmp_path / "many", num_hidden_layers=1, shards=3)
    assert digest(one) == digest(many)
    config = json.loads((one / "config.json").read_text())
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": config.pop("rope_theta")}}
    same = config | rope | {"max_position_embeddings": 256, "eos_token_id": 7, "_name_or_path": "elsewhere"}
    (many / "config.json").write_text(json.dumps(same))
    (many / "generation_config.json").unlink()
    (many / "tokenizer.json").unlink()
    assert digest(one) == digest(many)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_one_number_changes_the_digest(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path, num_hidden_layers=1)
    before = digest(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].reshape(-1)[-2] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert digest(folder) != before


@pytest.mark.parametrize("change", [{"rope_theta": 9999.0}, {"rms_norm_eps": 1e-6}])
def test_other_arithmetic_changes_the_digest(tmp_path: Path, change: dict) -> None:
    folder = write_model(tmp_path, num_hidden_layers=1)
    before = digest(folder)
    (folder / "config.json").write_text(json.dumps(hf_config(num_hidden_layers=1) | change))
    assert digest(folder) != before


def test_a_part_of_every_tensor_of_large_models_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path, num_hidden_layers=1)
    monkeypatch.setattr(folders, "_BLOCK_BYTES", 256)
    monkeypatch.setattr(folders, "_HASHED_BYTES", 1024)
    before, tensors = digest(folder), load_file(folder / "model.safetensors")
    for name in tensors:
        changed = {each: array + (each == name) for each, array in tensors.items()}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        assert digest(folder) != before, name


def test_checkpoints_of_a_model_that_is_not_served_are_refused_by_its_name(model: Path) -> None:
    (planned,) = base_models.plan([f"m={model}"])
    now = planned.obtain(model.parent, None)
    served = base_models.BaseModels({"m": now})

    def changed(name: str, digest: str | None) -> str | None:
        return served.changed(SimpleNamespace(base_model=name, base_digest=digest))

    assert changed("m", now.digest) is None
    assert changed("m", None) is None, "of a ledger without digests"
    assert "other weights than those that base model 'm' has now" in (changed("m", "1-00") or "")
    assert "base model 'n' is not served now; this server has: m" in (changed("n", now.digest) or "")
