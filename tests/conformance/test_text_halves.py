"""The text halves of models that see, through the SDK: from the first step to their merged weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from conformance.batches import batch
from conformance.server_process import ServerProcess
from conformance.test_downloads import by_torch
from conformance.test_families import checkpoints
from conformance.test_sdk_checkpoints import GREEDY, PROMPT, forward
from conformance.test_sdk_training import step
from models_that_see import WHOLES, write_model_that_sees
from safetensors.numpy import load_file
from tiny_models import write_tokenizer
from transformers import AutoModelForImageTextToText

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

IMAGE = tinker.types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=2)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folders and models, by model type."""
    found = {}
    for model_type in WHOLES:
        folder = tmp_path_factory.mktemp("wholes") / model_type
        found[model_type] = folder, write_model_that_sees(folder, model_type)
        write_tokenizer(folder)
    return found


@pytest.fixture(scope="module")
def server(
    tiny_model: Path,
    wholes: dict[str, tuple[Path, Any]],
    cache_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    options = [f"--model={name}={folder}" for name, (folder, _) in wholes.items()]
    running = ServerProcess(tiny_model, tmp_path_factory.mktemp("server") / "data", cache_dir, *options)
    yield running.start()
    running.kill()


@pytest.mark.parametrize(
    "model_type",
    [
        "gemma3",
        pytest.param("qwen3_vl_moe", marks=pytest.mark.slow),
        pytest.param("kimi_k25", marks=pytest.mark.slow),
        pytest.param("qwen3_vl", marks=pytest.mark.slow),
    ],
)
def test_a_text_half_from_the_first_step_to_its_merged_weights(
    server: ServerProcess, wholes: dict[str, tuple[Path, Any]], model_type: str, tmp_path: Path
) -> None:
    folder, whole = wholes[model_type]
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
    training = service.create_lora_training_client(base_model=model_type, rank=4, seed=7).result()
    data = batch()
    np.testing.assert_allclose(forward(training, data), by_torch(whole, data), atol=1e-4)
    step(training, data)
    trained = forward(training, data)
    assert np.abs(trained - by_torch(whole, data)).max() > 1e-2

    sampler = training.save_weights_and_get_sampling_client().result()
    (sample,) = sampler.sample(PROMPT, 1, GREEDY).result().sequences
    tokens = PROMPT.to_ints() + list(sample.tokens)
    of_sample = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )
    logprobs = forward(training, [of_sample])
    np.testing.assert_allclose(logprobs[-len(sample.tokens) :], sample.logprobs, atol=1e-4)

    path = training.save_state("kept").result().path
    loaded = service.create_training_client_from_state(path).result()
    np.testing.assert_array_equal(forward(loaded, data), trained)

    # The merged model is whole again: its tower is the base model's, and transformers loads it.
    checkpoints(server, "merge", path, tmp_path / "merged")
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "merged"))
    assert before.keys() <= after.keys()
    of_tower = [name for name in before if "vision" in name or "visual" in name]
    assert of_tower
    for name in of_tower:
        np.testing.assert_array_equal(after[name], before[name])
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    np.testing.assert_allclose(by_torch(merged, data), trained, atol=1e-4)

    # PEFT reads the adapter beside the whole model.
    checkpoints(server, "export", path, tmp_path / "adapter", "--experts", "target-parameters")
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    beside = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    np.testing.assert_allclose(by_torch(beside, data), trained, atol=1e-4)
    printed = checkpoints(server, "import", tmp_path / "adapter", "--model", model_type, "--name", "again")
    (imported,) = (word for word in printed.split() if "/weights/" in word)
    again = service.create_training_client_from_state(imported).result()
    np.testing.assert_allclose(forward(again, data), trained, atol=1e-5)
    service.close("success").result()


def test_an_image_is_refused_by_name(server: ServerProcess) -> None:
    """It is refused in a datum and in a prompt; the rest of the request has no effect."""
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
    training = service.create_lora_training_client(base_model="gemma3", rank=4, seed=7).result()
    seen = tinker.ModelInput(chunks=[tinker.EncodedTextChunk(tokens=[5, 6]), IMAGE])
    datum = tinker.Datum(
        model_input=seen, loss_fn_inputs={"target_tokens": [6, 7, 8, 9], "weights": [1.0] * 4}
    )
    with pytest.raises(tinker.BadRequestError, match="datum 1: model_input chunk 1: image is not supported"):
        training.forward_backward([batch()[0], datum], "cross_entropy").result()
    sampler = service.create_sampling_client(base_model="gemma3").result()
    with pytest.raises(tinker.BadRequestError, match="prompt: chunk 1: image is not supported"):
        sampler.sample(seen, 1, GREEDY).result()
    service.close("success").result()
