"""The backup of deploy.md, made while a server trains, has every checkpoint."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("tinker")

import tinker
from docs.pages import ROOT, block
from docs.terminal import Terminal
from tinker import types
from tiny_models import write_model


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="no sqlite3 here: apt install sqlite3")
def test_a_server_on_a_backup_has_the_checkpoints_and_what_was_trained(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny", "llama")
    folders = {"/var/lib/tinsmith": str(tmp_path / "data"), "/backup": str(tmp_path / "backup")}
    terminal = Terminal(tmp_path, folders)
    terminal.environment["TINSMITH_CACHE_DIR"] = str(ROOT / ".cache" / "tests" / "servers")
    prompt = types.ModelInput.from_ints([1, 2, 3])
    datum = types.Datum(model_input=prompt, loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0] * 3})

    server = terminal.serve(f"tinsmith serve --model tiny={model} --data-dir /var/lib/tinsmith")
    try:
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
        client = service.create_lora_training_client(base_model="tiny", rank=4).result()
        client.forward_backward([datum], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        state = client.save_state("state").result().path
        weights = client.save_weights_for_sampler("weights").result().path
        expected = client.forward([datum], "cross_entropy").result().metrics["loss:sum"]
        scores = service.create_sampling_client(model_path=weights).result().compute_logprobs(prompt).result()
        terminal.run(block("deploy.md", "mkdir -p /backup"))
        client.optim_step(types.AdamParams(learning_rate=1e-2))  # is not in the backup
    finally:
        server.kill()
    (restored,) = re.findall(r"`(--data-dir /backup/\w+)`", (ROOT / "docs" / "deploy.md").read_text())

    server = terminal.serve(terminal.mine(f"tinsmith serve --model tiny={model} {restored}"))
    try:
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
        client = service.create_training_client_from_state_with_optimizer(state).result()
        assert client.forward([datum], "cross_entropy").result().metrics["loss:sum"] == expected
        again = service.create_sampling_client(model_path=weights).result().compute_logprobs(prompt).result()
        assert again == scores
    finally:
        server.kill()
