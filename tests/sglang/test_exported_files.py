"""SGLang computes what our files mean: adapters, and full weights, against PEFT and transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from tinsmith.ckpt.merged import in_memory, save_merged
from tinsmith.ckpt.peft import save_adapter
from tinsmith.model.folder import read_config

from tests.ckpt.test_merged import our_base
from tests.ckpt.test_peft import ALPHA, RANK, random_adapter
from tests.tiny_models import hf_config, random_weights, write_model

from .sglang_process import SglangProcess

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

TOKENS = np.random.default_rng(0).integers(0, 320, 32).tolist()


@pytest.fixture(scope="module")
def http(sglang: SglangProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=sglang.url, timeout=60) as client:
        yield client


def scored(http: httpx.Client, adapter: str | None = None) -> np.ndarray:
    """Log-probs of the tokens after the first, by SGLang."""
    body = {
        "input_ids": TOKENS,
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answer = http.post("/generate", json=body | ({} if adapter is None else {"lora_path": adapter}))
    assert answer.status_code == 200, answer.text
    return np.array([each[0] for each in answer.json()["meta_info"]["input_token_logprobs"][1:]])


def by_torch(model) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0]
    targets = torch.tensor(TOKENS[1:])[:, None]
    return torch.log_softmax(logits[:-1].double(), -1).gather(-1, targets)[:, 0].numpy()


def transformers_model(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _only(adapter: dict, *names: str) -> dict:
    return {"layers": {name: adapter["layers"][name] for name in names}}


@pytest.mark.parametrize("which", ["all", "no_unembed", "unembed", "attention", "query", "up"])
def test_an_adapter_is_peft_s_on_sglang(
    sglang: SglangProcess, http: httpx.Client, tmp_path: Path, which: str
) -> None:
    """Also of some of the matrices that SGLang reads as one, which it would not survive."""
    config = read_config(sglang.model)
    whole = random_adapter(config)
    layers = {"layers": whole["layers"]}
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    adapter = {
        "all": whole,
        "no_unembed": layers,
        "unembed": {"layers": {}, "unembed": whole["unembed"]},
        "attention": _only(whole, *attention),
        "query": _only(whole, "q_proj"),
        "up": _only(whole, "up_proj", "down_proj"),
    }[which]
    folder = tmp_path / which
    save_adapter(folder, adapter, config, rank=RANK, alpha=ALPHA, base_model="tiny")
    beside = peft.PeftModel.from_pretrained(transformers_model(sglang.model), folder).eval()
    loaded = http.post("/load_lora_adapter", json={"lora_name": which, "lora_path": str(folder)})
    assert loaded.status_code == 200, loaded.text
    try:
        expected, before = by_torch(beside), scored(http)
        assert np.abs(expected - before).max() > 0.01
        np.testing.assert_allclose(scored(http, which), expected, atol=1e-4)
    finally:
        http.post("/unload_lora_adapter", json={"lora_name": which})


def test_merged_weights_are_transformers_and_peft_s_on_sglang(
    sglang: SglangProcess, http: httpx.Client, tmp_path: Path
) -> None:
    """The weights are in several files; then come the base model's again."""
    config = read_config(sglang.model)
    base = in_memory(our_base(config, random_weights(hf_config("llama"))))
    adapter = random_adapter(config, train_unembed=False)
    scale = ALPHA / RANK
    options = {"base_folder": sglang.model, "shard_bytes": 20_000}
    save_merged(tmp_path / "merged", base, config, adapter=adapter, scale=scale, **options)
    save_merged(tmp_path / "base", base, config, **options)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 3
    save_adapter(tmp_path / "adapter", adapter, config, rank=RANK, alpha=ALPHA, base_model="tiny")
    beside = peft.PeftModel.from_pretrained(transformers_model(sglang.model), tmp_path / "adapter").eval()
    before = scored(http)
    try:
        sglang.load_weights(tmp_path / "merged", "merged")
        np.testing.assert_allclose(scored(http), by_torch(beside), atol=1e-4)
        np.testing.assert_allclose(scored(http), by_torch(transformers_model(tmp_path / "merged")), atol=1e-5)
        assert np.abs(scored(http) - before).max() > 0.01
    finally:
        sglang.load_weights(tmp_path / "base", "default")
    np.testing.assert_allclose(scored(http), before, atol=1e-6)


@pytest.mark.slow
def test_a_merged_mixture_is_transformers_on_sglang(sglang_python: Path, tmp_path: Path) -> None:
    """SGLang is not sent the adapters of experts, but the model into which they are merged."""
    model, merged = write_model(tmp_path / "model", "qwen3_moe"), tmp_path / "merged"
    config = read_config(model)
    base = in_memory(our_base(config, random_weights(hf_config("qwen3_moe"))))
    adapter = random_adapter(config)
    save_merged(merged, base, config, base_folder=model, adapter=adapter, scale=ALPHA / RANK)
    running = SglangProcess(sglang_python, model, tmp_path / "log").start()
    try:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            before = scored(client)
            running.load_weights(merged, "merged")
            found = scored(client)
    finally:
        running.stop()
    np.testing.assert_allclose(before, by_torch(transformers_model(model)), atol=1e-4)
    np.testing.assert_allclose(found, by_torch(transformers_model(merged)), atol=1e-4)
    assert np.abs(found - before).max() > 0.01
