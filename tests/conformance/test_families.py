"""Every family through the SDK, from its first step to its merged weights."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tinker
from conformance.batches import batch
from conformance.server_process import ServerProcess, Wire
from conformance.test_downloads import by_peft, by_torch
from conformance.test_kills import weights
from conformance.test_sdk_checkpoints import PROMPT, forward
from conformance.test_sdk_training import step
from docs.pages import block, executed
from safetensors.numpy import load_file
from tiny_models import write_model
from transformers import AutoModelForCausalLM

torch = pytest.importorskip("torch")

MIXTURES = ("qwen3_5_moe", "gpt_oss", "qwen3_moe", "deepseek_v3", "nemotron_h")
OTHERS = ("qwen3_5", "llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3_text")


def each_of(*families: str) -> pytest.MarkDecorator:
    """Run a test on a server for each family; all but the first two are slow."""
    quick = MIXTURES[:2]
    marked = [each if each in quick else pytest.param(each, marks=pytest.mark.slow) for each in families]
    return pytest.mark.parametrize("server", marked, indirect=True)


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("families")
    model = write_model(folder / "model", request.param)
    running = ServerProcess(model, folder / "data", cache_dir, TINSMITH_SNAPSHOT_OPERATIONS="5")
    yield running.start()
    running.kill()


def checkpoints(server: ServerProcess, *arguments: object) -> str:
    environment = os.environ | {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local"}
    line = [sys.executable, "-m", "tinsmith.server.cli", "checkpoints", *map(str, arguments)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@each_of(*MIXTURES, *OTHERS)
def test_a_family_from_its_first_step_to_its_merged_weights(
    server: ServerProcess, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    family = request.node.callspec.params["server"]
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
    data = batch()
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
    step(training, data)
    metrics = training.forward_backward(data, "cross_entropy").result().metrics
    training.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    if family in MIXTURES:
        assert 0 < metrics["e_frac_with_tokens:mean"] <= 1
        assert metrics["e_max_violation:max"] >= metrics["e_max_violation:mean"] > 0

    # The sampler scores as the trainer does.
    sampler = training.save_weights_and_get_sampling_client().result()
    scored = sampler.compute_logprobs(PROMPT).result()[1:]
    of_prompt = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(PROMPT.to_ints()[:-1]),
        loss_fn_inputs={"target_tokens": PROMPT.to_ints()[1:], "weights": [1.0] * (PROMPT.length - 1)},
    )
    np.testing.assert_allclose(forward(training, [of_prompt]), scored, atol=1e-4)

    # A stop and a start change nothing.
    path = training.save_state("kept").result().path
    training.save_weights_for_sampler("kept").result()
    expected = forward(training, data)
    assert server.stop() == 0
    server.start()
    np.testing.assert_array_equal(forward(training, data), expected)
    loaded = service.create_training_client_from_state(path).result()
    np.testing.assert_array_equal(forward(loaded, data), expected)

    # Merged weights are a model with the same log-probs for transformers.
    checkpoints(server, "merge", path, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    np.testing.assert_allclose(by_torch(merged, data), expected, atol=1e-4)

    # The adapter can be exported in every form that its readers have, and imported again.
    model = server.data_dir.parent / "model"
    for form in forms_of(family):
        adapter = tmp_path / form
        checkpoints(server, "export", path, adapter, "--experts", form)
        if form == "shared" and family in MIXTURES:
            tensors = load_file(adapter / "adapter_model.safetensors")
            of_experts = [tensors[name] for name in tensors if name.endswith(".experts.w1.lora_A.weight")]
            assert of_experts
            assert {each.shape[:2] for each in of_experts} == {(1, 4)}
        if form in forms_of_peft(family):
            np.testing.assert_allclose(by_peft(model, adapter, data), expected, atol=1e-4)
        printed = checkpoints(server, "import", adapter, "--model", "tiny", "--name", form)
        (imported,) = (word for word in printed.split() if "/weights/" in word)
        again = service.create_training_client_from_state(imported).result()
        assert again.get_info().lora_rank == 4
        np.testing.assert_allclose(forward(again, data), expected, atol=1e-5)

    # With the optimizer's state, the next step is the same one.
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    step(training, data)
    step(resumed, data)
    np.testing.assert_allclose(forward(resumed, data), forward(training, data), atol=1e-5)
    service.close("success").result()


def forms_of(family: str) -> list[str]:
    """The forms in which adapters of a family are written (docs/models.md)."""
    if family not in MIXTURES:
        return ["shared", "target-parameters"] if family == "qwen3_5" else ["shared"]
    # The experts of gpt-oss are no modules of their own.
    return ["shared", "target-parameters"] + ([] if family == "gpt_oss" else ["per-expert"])


def forms_of_peft(family: str) -> set[str]:
    """Return the forms that PEFT reads. It refuses adapters of a Mamba-2's out_proj."""
    if family == "nemotron_h":
        return set()
    if family == "qwen3_moe":
        return {"target-parameters", "per-expert"}
    return {"target-parameters"} if family in MIXTURES or family == "qwen3_5" else {"shared"}


@each_of(*MIXTURES)
def test_the_experts_of_a_sample_are_replayed_in_training(server: ServerProcess) -> None:
    """The sample over plain HTTP, because the SDK's has no field for them; the training through the SDK."""
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
    wire = Wire(server.url, "tml-local")
    body = {
        "base_model": "tiny",
        "prompt": {"chunks": [{"tokens": PROMPT.to_ints()}]},
        "sampling_params": {"max_tokens": 12, "seed": 1, "stop": []},
        "record_routing": True,
    }
    submitted = wire.post("asample", **body)
    assert submitted.status_code == 200, submitted.text
    answer = wire.result(submitted)
    (sequence,) = answer["sequences"]
    tokens = PROMPT.to_ints() + sequence["tokens"]
    found = sequence["routed_experts"]
    experts = np.frombuffer(base64.b64decode(found["data"]), found["dtype"]).reshape(found["shape"])
    assert len(experts) == len(tokens) - 1
    shown = json.loads("{" + block("rl.md", '"routed_experts"') + "}")["routed_experts"]
    assert found.keys() == shown.keys()
    assert (found["dtype"], len(found["shape"])) == (shown["dtype"], len(shown["shape"]))

    def datum(**inputs: tinker.TensorData) -> tinker.Datum:
        targets = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
        model_input = tinker.ModelInput.from_ints(tokens[:-1])
        return tinker.Datum(model_input=model_input, loss_fn_inputs=targets | inputs)

    def given(experts: np.ndarray) -> tinker.TensorData:
        return tinker.TensorData.from_numpy(experts.reshape(len(experts), -1).astype(np.int64))

    free, replayed = (forward(training, [each]) for each in (datum(), datum(routed_experts=given(experts))))
    np.testing.assert_allclose(replayed, free, atol=1e-5)
    names = {"tinker": tinker, "tokens": tokens, "weights": [1.0] * (len(tokens) - 1)}
    made = block("rl.md", "tinker.Datum(")
    executed(made)
    of_the_page = eval(made, names | {"experts": given(experts)})
    np.testing.assert_array_equal(forward(training, [of_the_page]), replayed)
    np.testing.assert_allclose(replayed[-len(sequence["tokens"]) :], sequence["logprobs"], atol=1e-4)
    config = json.loads((server.data_dir.parent / "model" / "config.json").read_text())
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next(config[key] for key in keys if key in config)
    others = forward(training, [datum(routed_experts=given((experts + 1) % count))])
    assert np.abs(others - free).max() > 1e-2
    with pytest.raises(tinker.RequestFailedError, match="routed_experts"):
        forward(training, [datum(routed_experts=given(experts[:, :1]))])
    service.close("success").result()


@each_of(*MIXTURES, *OTHERS)
def test_sft_and_a_loop_of_rl_go_on_after_kill_9_with_the_same_bits(server: ServerProcess) -> None:
    """The engine dies during SFT, and the server with its engine during RL, each time between the gradients
    and the step that takes them."""

    def loop(killed: bool) -> tuple[list[list[int]], np.ndarray, bytes]:
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
        training = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
        sampled = []
        for turn in range(3):
            training.forward_backward(batch(seed=turn), "cross_entropy").result()
            if killed and turn == 1:
                server.engine.kill()
            training.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
        for turn in range(3):
            sampler = training.save_weights_and_get_sampling_client().result()
            params = tinker.SamplingParams(max_tokens=8, seed=turn, stop=[])
            samples = sampler.sample(PROMPT, 2, params).result().sequences
            sampled += [each.tokens for each in samples]
            data = [rewarded(each.tokens, each.logprobs, 1.0 - 2 * at) for at, each in enumerate(samples)]
            training.forward_backward(data, "importance_sampling").result()
            if killed and turn == 1:
                server.kill()  # the engine dies with it
                server.start(wait_for_engine=False)
            training.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
        logprobs = forward(training, batch())
        adapter = weights(server, training.save_weights_for_sampler("final").result().path)
        service.close("success").result()
        return sampled, logprobs, adapter

    with_kills, without = loop(killed=True), loop(killed=False)
    assert with_kills[0] == without[0]
    np.testing.assert_array_equal(with_kills[1], without[1])
    assert with_kills[2] == without[2], "the adapters' files"


def rewarded(tokens: list[int], logprobs: list[float], advantage: float) -> tinker.Datum:
    """A sample behind the prompt, with the same advantage for each of its tokens."""
    whole, before = PROMPT.to_ints() + list(tokens), [0.0] * (PROMPT.length - 1)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(whole[:-1]),
        loss_fn_inputs={
            "target_tokens": whole[1:],
            "logprobs": before + list(logprobs),
            "advantages": before + [advantage] * len(tokens),
        },
    )
