"""The text of a model with a tokenizer of sentencepiece's kind, from every route that answers with text.

The model is a table: each token is followed by one other. Its tokenizer strips the first space of what it
decodes, writes characters that it does not know as bytes, and ends with a token that
config.json does not name.
"""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from conformance.server_process import ServerProcess
from safetensors.numpy import save_file
from tokenizer_folders import write_json, write_tokenizer_folder
from transformers import AutoTokenizer

VOCAB, WIDTH = 400, 400
PROMPT, SAID = "the tinker", " mends with 🙂!"
TEMPLATE = (
    "{% if messages[0].content == 'wrong' %}{{ messages[0].content + 1 }}{% endif %}"
    "{% if messages[0].content == 'refused' %}{{ raise_exception('not this') }}{% endif %}"
    "{{ bos_token }} " + PROMPT
)


def write_table(folder: Path, following: dict[int, int]) -> None:
    write_json(
        folder / "config.json",
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "eos_token_id": 0,
            "tie_word_embeddings": False,
        },
    )
    head = np.zeros((VOCAB, WIDTH), np.float32)
    for token, then in following.items():
        head[then, token] = 30 / np.sqrt(WIDTH)
    weights = {"model.embed_tokens.weight": np.eye(VOCAB, WIDTH, dtype=np.float32), "lm_head.weight": head}
    shapes = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (16, WIDTH), "mlp.up_proj": (16, WIDTH), "mlp.down_proj": (WIDTH, 16)}
    for name, shape in shapes.items():
        weights[f"model.layers.0.{name}.weight"] = np.zeros(shape, np.float32)
    for name in ("norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm"):
        weights[f"model.{name}.weight"] = np.ones(WIDTH, np.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def drawn() -> list[int]:
    return []


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, drawn: list[int]):
    folder = write_tokenizer_folder(
        tmp_path_factory.mktemp("text") / "text", "pieces", chat_template=TEMPLATE
    )
    reference = AutoTokenizer.from_pretrained(folder)
    prompt, whole = reference(PROMPT).input_ids, reference(PROMPT + SAID).input_ids
    assert whole[: len(prompt)] == prompt
    following = dict(
        zip(whole[len(prompt) - 1 :], [*whole[len(prompt) :], reference.eos_token_id], strict=True)
    )
    assert len(following) == len(whole) - len(prompt) + 1, "no token is there twice"
    drawn += whole[len(prompt) :]
    write_table(folder, following)
    running = ServerProcess(folder, tmp_path_factory.mktemp("text-server") / "data", cache_dir)
    running.start()
    yield running.url
    assert running.stop() == 0, running.log


def post(url: str, path: str, **body) -> httpx.Response:
    return httpx.post(url + path, json=body, headers={"Authorization": "Bearer tml-local"}, timeout=120)


def complete(url: str, **body) -> dict:
    asked = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 40} | body
    answer = post(url, "/v1/completions", **asked)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def streamed(url: str, path: str, **body) -> list[dict]:
    lines = post(url, path, stream=True, **body).text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def test_a_completion_goes_on_where_its_prompt_ends(url: str, drawn: list[int]) -> None:
    choice = complete(url, logprobs=1)
    assert (choice["text"], choice["finish_reason"]) == (SAID, "stop")
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert tokens[-1] == "</s>"
    raw = b"".join(
        bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:") else token.encode()
        for token in tokens[:-1]
    )
    assert raw.decode() == SAID
    for token, offset in zip(tokens, offsets, strict=True):
        assert token.startswith(("bytes:", "</s>")) or SAID[offset:].startswith(token)


def test_a_stream_says_the_same(url: str) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 40}
    parts = streamed(url, "/v1/completions", **asked)
    assert "".join(choice["text"] for part in parts for choice in part["choices"]) == SAID
    params = {"temperature": 0, "max_new_tokens": 40}
    assert streamed(url, "/generate", text=PROMPT, sampling_params=params)[-1]["text"] == SAID


def test_generate_and_chat_say_the_same(url: str) -> None:
    params = {"temperature": 0, "max_new_tokens": 40}
    answer = post(url, "/generate", text=PROMPT, sampling_params=params).json()
    assert answer["text"] == SAID
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": 2}
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    chat = post(url, "/v1/chat/completions", max_tokens=40, logprobs=True, **asked).json()["choices"][0]
    assert (chat["message"]["content"], chat["finish_reason"]) == (SAID, "stop")
    spoken = [entry["bytes"] for entry in chat["logprobs"]["content"]]
    assert bytes(byte for each in spoken for byte in each).decode() == SAID + "</s>"


def test_a_sample_that_names_no_stop_ends_at_the_tokenizer_s_end_token(url: str, drawn: list[int]) -> None:
    prompt = post(url, "/generate", text=PROMPT, sampling_params={"max_new_tokens": 1}, return_logprob=True,
                  logprob_start_len=0).json()  # fmt: skip
    tokens = [entry[1] for entry in prompt["meta_info"]["input_token_logprobs"]]
    body = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": tokens}]}, "base_model": "tiny"}
    headers = {"X-API-Key": "tml-local", "X-API-Dialect": "tinker"}
    params = {"sampling_params": {"max_tokens": 40, "temperature": 0.0}, "num_samples": 1}
    asked = httpx.post(url + "/api/v1/asample", json=body | params, headers=headers, timeout=60).json()
    for _ in range(30):
        answer = httpx.post(url + "/api/v1/retrieve_future", json={"request_id": asked["request_id"]},
                            headers=headers, timeout=60)  # fmt: skip
        if answer.status_code != 408:
            break
    (sequence,) = answer.json()["sequences"]
    assert sequence["tokens"] == [*drawn, 2]
    assert sequence["stop_reason"] == "stop"


def test_a_sample_s_text_goes_on_where_its_prompt_ends(url: str) -> None:
    scored = post(url, "/generate", text=PROMPT, sampling_params={"max_new_tokens": 1}, return_logprob=True,
                  logprob_start_len=0).json()  # fmt: skip
    tokens = [entry[1] for entry in scored["meta_info"]["input_token_logprobs"]]
    headers = {"X-API-Key": "tml-local", "X-API-Dialect": "tinkercloud"}
    body = {
        "prompt": {"tokens": tokens},
        "base_model": "tiny",
        "sampling_params": {"max_tokens": 40, "temperature": 0},
    }
    asked = httpx.post(url + "/api/v1/asample", json=body, headers=headers, timeout=60).json()
    for _ in range(100):
        polled = {"request_id": asked["request_id"]}
        answer = httpx.post(url + "/api/v1/retrieve_future", json=polled, headers=headers, timeout=60).json()
        if "sequences" in answer:
            break
    assert answer["sequences"][0]["text"] == SAID
    assert "prompt_end" not in answer


@pytest.mark.parametrize("stop", [" mends", "ends w", "🙂", "!"])
def test_stop_strings_are_matched_in_the_text_that_is_answered(url: str, stop: str) -> None:
    want = SAID[: SAID.find(stop)]
    assert complete(url, stop=stop)["text"] == want
    params = {"temperature": 0, "max_new_tokens": 40, "stop": stop}
    answer = post(url, "/generate", text=PROMPT, sampling_params=params).json()
    assert (answer["text"], answer["meta_info"]["finish_reason"]["matched"]) == (want, stop)


@pytest.mark.parametrize(("content", "said"), [("wrong", "TypeError"), ("refused", "not this")])
def test_errors_in_a_template_are_bad_requests(url: str, content: str, said: str) -> None:
    messages = [{"role": "user", "content": content}]
    answer = post(url, "/v1/chat/completions", model="tiny", messages=messages)
    assert answer.status_code == 400
    assert said in answer.text
