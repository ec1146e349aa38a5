"""Adapters that PEFT has written become checkpoints; what is not one, or does not fit, is refused."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
import tinker
from conformance import adapters
from conformance.batches import batch, logprobs
from conformance.conftest import ALICE, BOB
from conformance.server_process import ServerProcess, Wire
from conformance.test_downloads import by_peft
from tinker import types
from transformers import AutoModelForCausalLM

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "down_proj", "lm_head"]  # most leave some out


def written(tiny_model: Path, folder: Path, **fields: object) -> Path:
    """Write an adapter with PEFT, with a random B."""
    torch.manual_seed(3)
    plain = {"r": 3, "lora_alpha": 7, "target_modules": TARGETS, "init_lora_weights": False}
    config = peft.LoraConfig(**plain | fields, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tiny_model, tmp_path_factory.mktemp("peft") / "adapter")


def command(server: ServerProcess, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": ALICE}
    line = [sys.executable, "-m", "tinsmith.server.cli", "checkpoints", "import", *map(str, arguments)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)


def after_a_step_of_torch(model: Path, adapter: Path, data: list[types.Datum], rate: float) -> np.ndarray:
    """Log-probs after one step of PEFT and torch's AdamW on the sum of the weighted losses."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trained = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()

    def scores() -> list[torch.Tensor]:
        rows = []
        for datum in data:
            targets = torch.tensor(datum.loss_fn_inputs["target_tokens"].data)
            logits = trained(torch.tensor([datum.model_input.to_ints()])).logits[0]
            rows.append(torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0])
        return rows

    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    weights = [torch.tensor(datum.loss_fn_inputs["weights"].data) for datum in data]
    (-sum((row * weight).sum() for row, weight in zip(scores(), weights, strict=True))).backward()
    adam.step()
    return np.concatenate([row.detach().numpy() for row in scores()])


def test_adapters_saved_by_peft_are_sampled_and_trained_as_by_peft(
    server: ServerProcess, service: tinker.ServiceClient, tiny_model: Path, folder: Path
) -> None:
    done = command(server, folder, "--model", "tiny", "--name", "from-peft")
    assert done.returncode == 0, done.stderr
    path, sampler_path = done.stdout.split()
    assert path.endswith("/weights/from-peft")
    data = batch(3, seed=5)
    expected = by_peft(tiny_model, folder, data)

    training = service.create_training_client_from_state(path).result()
    assert training.get_info().lora_rank == 3
    output = training.forward_backward(data, "cross_entropy").result()
    np.testing.assert_allclose(np.concatenate(logprobs(output)), expected, atol=1e-4)
    training.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-8)).result()
    moved = np.concatenate(logprobs(training.forward(data, "cross_entropy").result()))
    np.testing.assert_allclose(moved, after_a_step_of_torch(tiny_model, folder, data, 1e-2), atol=1e-3)
    assert np.abs(moved - expected).max() > 0.01

    sampler = service.create_sampling_client(model_path=sampler_path).result()
    sampled = []
    for datum in data:
        tokens = [*datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].data[-1]]
        sampled += sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()[1:]
    np.testing.assert_allclose(sampled, expected, atol=1e-4)


def test_ranks_and_scales_of_single_modules_are_peft_s(
    server: ServerProcess, service: tinker.ServiceClient, tiny_model: Path, tmp_path: Path
) -> None:
    ranks, alphas = {"v_proj": 1, "layers.0.mlp.down_proj": 5}, {"q_proj": 2, "lm_head": 11}
    adapter = written(tiny_model, tmp_path / "a", rank_pattern=ranks, alpha_pattern=alphas, use_rslora=True)
    done = command(server, adapter, "--model", "tiny", "--name", "patterns")
    assert done.returncode == 0, done.stderr
    training = service.create_training_client_from_state(done.stdout.split()[0]).result()
    assert training.get_info().lora_rank == 5
    data = batch(2, seed=6)
    found = np.concatenate(logprobs(training.forward(data, "cross_entropy").result()))
    np.testing.assert_allclose(found, by_peft(tiny_model, adapter, data), atol=1e-4)


def post(server: ServerProcess, body: bytes, key: str = ALICE, **query: str) -> httpx.Response:
    where = {"base_model": "tiny", "name": "sent"} | query
    return Wire(server.url, key).http.post("/api/v1/import_weights", params=where, content=body)


def test_an_archive_belongs_to_who_sent_it(server: ServerProcess, folder: Path, tmp_path: Path) -> None:
    """Written by tar, in a folder, with what else lies there."""
    (folder / "README.md").write_text("of no use")
    subprocess.run(["tar", "cf", tmp_path / "a.tar", "-C", folder.parent, folder.name], check=True)
    answer = post(server, (tmp_path / "a.tar").read_bytes(), project_id="theirs")
    assert answer.status_code == 200, answer.text
    imported = answer.json()
    assert imported["path"] == f"tinker://{imported['training_run_id']}/weights/sent"
    alice, bob = (Wire(server.url, key) for key in (ALICE, BOB))
    known = alice.post("weights_info", tinker_path=imported["path"]).json()
    assert (known["lora_rank"], known["lora_alpha"], known["train_mlp"]) == (3, 7.0, True)
    assert bob.post("weights_info", tinker_path=imported["path"]).status_code == 404
    assert not list(server.data_dir.glob("checkpoints/*/imported/*/README.md"))


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, link, size
    return made


def huge(files: dict[str, bytes]) -> bytes:
    """A member that says it has a terabyte."""
    return member("adapter_model.safetensors", size=1 << 40).tobuf(tarfile.GNU_FORMAT) + adapters.tarred(
        files
    )


def renamed(prefix: str) -> Callable[[dict[str, bytes]], bytes]:
    return lambda files: adapters.tarred({prefix + name: content for name, content in files.items()})


def with_config(**changes: object) -> Callable[[dict[str, bytes]], bytes]:
    def change(files: dict[str, bytes]) -> bytes:
        config = json.loads(files["adapter_config.json"]) | changes
        return adapters.tarred(files | {"adapter_config.json": json.dumps(config).encode()})

    return change


def with_tensors(content: bytes) -> Callable[[dict[str, bytes]], bytes]:
    return lambda files: adapters.tarred(files | {"adapter_model.safetensors": content})


def with_members(*members: tarfile.TarInfo) -> Callable[[dict[str, bytes]], bytes]:
    return lambda files: adapters.tarred(files, *members)


def of_another_size(files: dict[str, bytes]) -> bytes:
    return adapters.tarred(adapters.lm_head(8))


def elsewhere(files: dict[str, bytes]) -> bytes:
    changed = files["adapter_model.safetensors"].replace(b"model.lm_head", b"model.xx_head")
    return adapters.tarred(files | {"adapter_model.safetensors": changed})


REFUSED: dict[str, tuple[Callable[[dict[str, bytes]], bytes], str]] = {
    "nothing": (lambda files: b"", "not a tar"),
    "noise": (lambda files: os.urandom(2048), "not a tar"),
    "gzip": (lambda files: adapters.tarred(files, mode="w:gz"), "gzip"),
    "cut off": (lambda files: adapters.tarred(files)[:2000], "cut off"),
    "no tensors": (lambda files: adapters.tarred({"adapter_config.json": b"{}"}), "no adapter_model"),
    "absolute": (renamed("/tmp/"), "leads out"),
    "above": (renamed("../"), "leads out"),
    "link": (with_members(member("adapter_config.json", tarfile.SYMTYPE, "/etc/passwd")), "not a plain file"),
    "hard link": (with_members(member("a", tarfile.LNKTYPE, "/etc/passwd")), "not a plain file"),
    "device": (with_members(member("a", tarfile.CHRTYPE)), "not a plain file"),
    "pickle": (lambda files: adapters.tarred({"adapter_model.bin": b""} | files), "pickle"),
    "twice": (lambda files: adapters.tarred(files | {"b/adapter_config.json": b"{}"}), "two adapters"),
    "terabyte": (huge, "cut off"),
    "long config": (with_config(note="x" * (1 << 20)), "bytes"),
    "many": (with_members(*(member(f"f{i}") for i in range(1001))), "over 1000 members"),
    "no JSON": (lambda files: adapters.tarred(files | {"adapter_config.json": b"[" * 9999}), "JSON"),
    "not LoRA": (with_config(peft_type="IA3"), "IA3"),
    "rank": (with_config(r=17), "maximum of 16"),
    "no rank": (with_config(r=True), "a whole number from 1 to"),
    "another rank": (with_config(r=4), "shape"),
    "alpha": (with_config(lora_alpha=-1), "positive"),
    "dora": (with_config(use_dora=True), "use_dora"),
    "ranks": (with_config(rank_pattern={"lm_head": 3}), "shape"),
    "PiSSA": (with_config(init_lora_weights="pissa"), "init_lora_weights"),
    "activated": (with_config(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "header": (with_tensors(struct.pack("<Q", 1 << 60)), "not safetensors"),
    "tensors": (with_tensors(struct.pack("<Q", 2) + b"[]"), "object"),
    "another model": (of_another_size, "shape"),
    "another module": (elsewhere, "nothing would be trained"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(REFUSED))
def test_adapters_that_do_not_fit_are_refused(server: ServerProcess, tiny_model: Path, what: str) -> None:
    hidden_size = json.loads((tiny_model / "config.json").read_text())["hidden_size"]
    build, reason = REFUSED[what]
    answer = post(server, build(adapters.lm_head(hidden_size)))
    assert answer.status_code == 400, answer.text
    assert reason in answer.json()["error"]


def test_names_sizes_and_the_command_s_errors(
    server: ServerProcess, tiny_model: Path, tmp_path: Path
) -> None:
    for query in ({"name": "../up"}, {"base_model": "none"}, {"name": "a/b"}):
        assert post(server, b"", **query).status_code == 400
    over = post(server, bytes((16 << 20) + 1))
    assert over.status_code == 413
    refused = command(server, tmp_path, "--model", "tiny")
    assert refused.returncode == 2
    assert "no adapter_config.json" in refused.stderr
    (tmp_path / "noise.tar").write_bytes(bytes(range(256)) * 4)
    refused = command(server, tmp_path / "noise.tar", "--model", "tiny")
    assert "not a tar" in refused.stderr
    left = [path for path in server.data_dir.glob("checkpoints/*/imported/*") if path.is_dir()]
    assert not left, "nothing stays of what was refused, nor of runs that are over"
