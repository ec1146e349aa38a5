"""Checkpoints leave the server: by the SDK's command line, by archive, by URLs that are signed."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pyrage
import pytest
import tinker
from conformance.batches import batch, logprobs
from conformance.conftest import ALICE
from conformance.sdk_command import cli
from conformance.server_process import ServerProcess, Wire
from conformance.test_sdk_training import step
from tinsmith.server.access import UrlSigner
from transformers import AutoModelForCausalLM, AutoTokenizer

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

FILES = {"adapter_config.json", "adapter_model.safetensors"}
EXPORTED = FILES | {"tokenizer.json", "tokenizer_config.json", "README.md"}


@pytest.fixture(scope="module")
def trained(server: ServerProcess) -> tinker.TrainingClient:
    service = tinker.ServiceClient(base_url=server.url, api_key=ALICE)
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
    step(training, batch())
    return training


@pytest.fixture(scope="module")
def exported(trained: tinker.TrainingClient) -> str:
    return trained.save_weights_for_sampler("exported").result().path


def by_peft(model: Path, adapter: Path, data: list[tinker.Datum]) -> np.ndarray:
    """Log-probs of the targets, computed by transformers and PEFT."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return by_torch(peft.PeftModel.from_pretrained(base, adapter).eval(), data)


def by_torch(model: torch.nn.Module, data: list[tinker.Datum]) -> np.ndarray:
    rows = []
    for datum in data:
        targets = torch.tensor(datum.loss_fn_inputs["target_tokens"].data)
        with torch.no_grad():
            logits = model(torch.tensor([datum.model_input.to_ints()])).logits[0]
        rows.append(torch.log_softmax(logits.double(), -1).gather(-1, targets[:, None])[:, 0].numpy())
    return np.concatenate(rows)


def test_the_sdk_s_command_downloads_what_peft_loads(
    server: ServerProcess, trained: tinker.TrainingClient, tiny_model: Path, tmp_path: Path
) -> None:
    data = batch(3, seed=5)
    path = trained.save_state("downloaded").result().path
    expected = np.concatenate(logprobs(trained.forward(data, "cross_entropy").result()))
    (done,) = cli(server, f"checkpoint download {path} --output {tmp_path}")
    assert done.code == 0, done.err
    (folder,) = tmp_path.iterdir()
    assert {file.name for file in folder.iterdir()} == EXPORTED
    np.testing.assert_allclose(by_peft(tiny_model, folder, data), expected, atol=1e-4)
    # The base model is found by what the adapter's config calls it, and the tokenizer is beside the adapter.
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    np.testing.assert_allclose(by_torch(alone, data), expected, atol=1e-4)
    text, own = "the tinker mends", AutoTokenizer.from_pretrained(tiny_model)
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == own(text)["input_ids"]
    assert "A LoRA adapter of rank 4 (alpha 32)" in (folder / "README.md").read_text()
    left = tinker.RestClient(base_url=server.url, api_key=ALICE).list_user_checkpoints().result().checkpoints
    assert not [each for each in left if each.checkpoint_type == "external"], "its export is deleted"


def test_the_archive_of_a_training_state_is_what_peft_loads(
    server: ServerProcess, trained: tinker.TrainingClient, tiny_model: Path, tmp_path: Path
) -> None:
    """SDKs up to 0.33 ask for it in `tinker checkpoint download`; nothing of it stays on the server."""
    data = batch(3, seed=5)
    run, _, checkpoint = trained.save_state("archived").result().path.removeprefix("tinker://").partition("/")
    expected = np.concatenate(logprobs(trained.forward(data, "cross_entropy").result()))
    url = f"/api/v1/training_runs/{run}/checkpoints/{checkpoint}/archive"
    answer = Wire(server.url, ALICE).http.get(url)
    assert answer.status_code == 302, answer.text
    with urllib.request.urlopen(answer.headers["location"], timeout=60) as response:
        archive = io.BytesIO(response.read())
        assert int(response.headers["Content-Length"]) == len(archive.getvalue())
    with tarfile.open(fileobj=archive) as tar:
        assert set(tar.getnames()) == EXPORTED | {"checkpoint_complete"}
        tar.extractall(tmp_path, filter="data")
    np.testing.assert_allclose(by_peft(tiny_model, tmp_path, data), expected, atol=1e-4)
    assert not [*server.data_dir.glob("checkpoints/*/archived/*")]


def test_merged_weights_are_untied(
    server: ServerProcess, trained: tinker.TrainingClient, tiny_model: Path, tmp_path: Path
) -> None:
    """An adapter inside tied embeddings cannot be right: the unembedding's would change the embedding too."""
    data, folder = batch(3, seed=5), tmp_path / "merged"
    path = trained.save_state("to-merge").result().path
    line = [sys.executable, "-m", "tinsmith.server.cli", "checkpoints", "merge"]
    environment = os.environ | {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": ALICE}

    def merge(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*line, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    done = merge(path, str(folder))
    assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = np.concatenate(logprobs(trained.forward(data, "cross_entropy").result()))
    np.testing.assert_allclose(by_torch(merged, data), expected, atol=1e-4)
    before = by_torch(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), data)
    assert np.abs(before - expected).max() > 1e-2
    assert json.loads((tiny_model / "config.json").read_text())["tie_word_embeddings"]
    assert not merged.config.tie_word_embeddings
    assert "AutoModelForCausalLM.from_pretrained" in (folder / "README.md").read_text()
    left = tinker.RestClient(base_url=server.url, api_key=ALICE).list_user_checkpoints().result().checkpoints
    assert not [each for each in left if each.checkpoint_type == "external"], "its export is deleted"

    again, unknown = merge(path, str(folder)), merge(path + "-not", str(tmp_path / "new"))
    assert (again.returncode, unknown.returncode) == (2, 2)
    assert "is not empty" in again.stderr
    assert "was not merged (404)" in unknown.stderr
    assert not (tmp_path / "new").exists()


def test_external_weights_come_over_urls_without_a_key(
    server: ServerProcess, trained: tinker.TrainingClient
) -> None:
    saved = trained.save_weights_external("outside", ttl_seconds=3600).result()
    assert saved.path == f"tinker://{trained.model_id}/external_weights/outside"
    rest = tinker.RestClient(base_url=server.url, api_key=ALICE)
    answer = rest.get_external_weights_urls(saved.path).result()
    assert set(answer.urls) == EXPORTED
    sizes = 0
    for url in answer.urls.values():
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
            assert int(response.headers["Content-Length"]) == len(content)
            sizes += len(content)
    (listed,) = (
        c for c in rest.list_checkpoints(trained.model_id).result().checkpoints if c.size_bytes == sizes
    )
    assert listed.checkpoint_type == "external"
    rest.delete_checkpoint_from_tinker_path(saved.path).result()
    assert httpx.get(answer.urls["adapter_config.json"]).status_code == 404
    again = trained.save_weights_external("outside").result()
    assert again.path == saved.path
    old = httpx.get(answer.urls["adapter_config.json"])
    assert old.status_code == 404, "the URL was for the one before"


def test_external_weights_are_encrypted_to_all_their_recipients(
    server: ServerProcess, trained: tinker.TrainingClient, tmp_path: Path
) -> None:
    first, second, other = (pyrage.x25519.Identity.generate() for _ in range(3))
    ssh_keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")]
    recipients = [str(first.to_public()), str(second.to_public())]
    identities = [first, second]
    if shutil.which("ssh-keygen"):
        subprocess.run(ssh_keygen, check=True)
        recipients.append((tmp_path / "key.pub").read_text())
        identities.append(pyrage.ssh.Identity.from_buffer((tmp_path / "key").read_bytes()))
    plain = trained.save_weights_external("plain").result().path
    sealed = trained.save_weights_external("sealed", age_encryption_recipients=recipients).result().path
    downloads = [
        f"checkpoint download {path} --output {tmp_path}/{i}" for i, path in enumerate((plain, sealed))
    ]
    assert [done.code for done in cli(server, *downloads)] == [0, 0]
    (expected,), (folder,) = ((tmp_path / str(i)).iterdir() for i in range(2))
    assert {file.name for file in folder.iterdir()} == {f"{name}.age" for name in EXPORTED}
    for name in EXPORTED:
        content = (folder / f"{name}.age").read_bytes()
        assert b"lora" not in content
        for identity in identities:
            assert pyrage.decrypt(content, [identity]) == (expected / name).read_bytes()
        with pytest.raises(pyrage.DecryptError):
            pyrage.decrypt(content, [other])
    on_disk = [path for path in server.data_dir.rglob("*") if "sealed" in str(path) and path.is_file()]
    assert {path.name for path in on_disk} - {".digests.json"} == {f"{name}.age" for name in EXPORTED}


def test_invalid_recipients(trained: tinker.TrainingClient) -> None:
    public = str(pyrage.x25519.Identity.generate().to_public())
    secret = str(pyrage.x25519.Identity.generate())
    for recipients, reason in (
        ([], "1 to 10"),
        ([public] * 11, "1 to 10"),
        ([public, secret], "recipient 1 is not a public key"),
        ([public[:-1]], "recipient 0 is not a public key"),
        (["ssh-ed25519 AAAA"], "recipient 0 is not a public key"),
    ):
        with pytest.raises(tinker.BadRequestError, match=reason) as refused:
            trained.save_weights_external("bad", age_encryption_recipients=recipients).result()
        assert secret not in str(refused.value)


def test_the_archive_is_a_redirect_to_a_tar(server: ServerProcess, exported: str) -> None:
    """The route of SDKs up to 0.33."""
    run, checkpoint = exported.removeprefix("tinker://").split("/", 1)
    url = f"/api/v1/training_runs/{run}/checkpoints/{checkpoint}/archive"
    redirect = Wire(server.url, ALICE).http.get(url)
    assert redirect.status_code == 302
    assert redirect.headers["expires"].endswith("GMT")
    tar = httpx.get(redirect.headers["location"])
    assert tar.status_code == 200
    assert int(tar.headers["content-length"]) == len(tar.content)
    with tarfile.open(fileobj=io.BytesIO(tar.content)) as opened:
        assert set(opened.getnames()) == EXPORTED | {"checkpoint_complete"}


def test_a_sampler_s_adapter_is_loaded_without_knowing_its_base_model(
    server: ServerProcess, trained: tinker.TrainingClient, exported: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Its archive, and its files one by one, have what the download of a training state has."""
    run, checkpoint = exported.removeprefix("tinker://").split("/", 1)
    alice = Wire(server.url, ALICE)
    tar = alice.http.get(
        f"/api/v1/training_runs/{run}/checkpoints/{checkpoint}/archive", follow_redirects=True
    )
    with tarfile.open(fileobj=io.BytesIO(tar.content)) as opened:
        opened.extractall(tmp_path, filter="data")
    data = batch(3, seed=5)
    expected = np.concatenate(logprobs(trained.forward(data, "cross_entropy").result()))
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    np.testing.assert_allclose(by_torch(model, data), expected, atol=1e-4)
    text = "the tinker mends"
    ids = [AutoTokenizer.from_pretrained(each)(text)["input_ids"] for each in (tmp_path, tiny_model)]
    assert ids[0] == ids[1]
    assert "A LoRA adapter of rank 4 (alpha 32)" in (tmp_path / "README.md").read_text()
    urls = alice.http.get(
        f"/api/v1/training_runs/{run}/checkpoints/{checkpoint}/external_weights_urls"
    ).json()
    assert urls["urls"].keys() == EXPORTED
    for name, url in urls["urls"].items():
        assert httpx.get(url).content == (tmp_path / name).read_bytes()


def test_signed_urls_of_others_and_of_the_past(server: ServerProcess, exported: str) -> None:
    run, checkpoint = exported.removeprefix("tinker://").split("/", 1)
    one = f"/api/v1/training_runs/{run}/checkpoints/{checkpoint}"
    location = Wire(server.url, ALICE).http.get(one + "/archive").headers["location"]
    path, query = urlsplit(location).path, urlsplit(location).query
    nobody = httpx.Client(base_url=server.url)
    assert nobody.get(f"{path}?{query}").status_code == 200
    refused = {
        "another path": f"{one}/files/adapter_config.json?{query}",
        "another tenant": f"{path}?{query.replace('tenant=alice', 'tenant=bob')}",
        "longer": f"{path}?{query.replace('expires=1', 'expires=2')}",
        "unsigned": f"{path}?{query.rpartition('signature=')[0]}signature=",
    }
    for what, url in refused.items():
        assert nobody.get(url).status_code == 403, what
    assert nobody.get(path).status_code == 401
    assert nobody.delete(f"{one}?{query}").status_code == 403
    # Genuine ones, as this server would have signed them.
    save = dict(pair.split("=") for pair in query.split("&"))["save"]
    past = UrlSigner(server.data_dir, -1.0)
    expired = nobody.get(past.sign(path, "alice", save, past.expiry()))
    assert expired.status_code == 403
    assert "expired" in expired.json()["error"]
    signer = UrlSigner(server.data_dir, 60.0)
    assert nobody.get(signer.sign(path, "alice", save, signer.expiry())).status_code == 200
    assert nobody.get(signer.sign(path, "bob", save, signer.expiry())).status_code == 404, "not bob's"
    Wire(server.url, ALICE).http.delete(one)
    assert nobody.get(f"{path}?{query}").status_code == 404, "deleted"
