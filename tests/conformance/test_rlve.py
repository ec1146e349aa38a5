"""Training that the server runs itself, and the same by a client of its own: what both do is equal, whoever
was killed or stopped meanwhile."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conformance.server_process import ServerProcess, Wire
from tokenizers import Tokenizer

pytest.importorskip("reasoning_gym")

from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode
from reasoning_gym.factory import CURRICULA, DATASETS
from tinsmith.server.plugins.rlve.rollouts import Difficulty, draws
from tinsmith.server.wire.requests import RlveConfig

HIGHEST = {"spell_backward": 3, "chain_sum": 9}
ENVIRONMENTS = list(HIGHEST)
SAMPLES, STEPS, RATE, WAVES = 8, 6, 0.02, 8
RLVE = {
    "enabled": True,
    "environment_list": ENVIRONMENTS,
    "custom_prompt_preprocessor": "ChatTemplate_NoSystemPrompt",
    "answer_marker_type": "none",
    "difficulty_sliding_window_size": 2,
    # So that a random model masters a level as soon as it was asked for one.
    "min_metric_to_increase_difficulty": 0.0,
    "min_prompts_before_difficulty_check": 2,
    # One prompt at a time, until two are found whose samples differ: what is drawn together may differ by
    # rounding from what is not.
    "rollout_batch_size": 2,
    "over_sampling_batch_size": 1,
    "n_samples_per_prompt": SAMPLES,
    "rollout_max_response_len": 8,
    "num_rollout": STEPS,
    "learning_rate": RATE,
    "seed": 11,
}


def create(wire: Wire, **fields: Any) -> str:
    body = {"base_model": "tiny", "lora_config": {"rank": 4, "seed": 1}, "model_seq_id": 0}
    return wire.result(wire.post("create_model", session_id=wire.session(), **body, **fields))["model_id"]


def info(wire: Wire, model: str) -> dict[str, Any]:
    return wire.post("get_info", model_id=model).json()["rlve"]


def until(wire: Wire, model: str, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        told = info(wire, model)
        assert told["state"] != "failed", told
        if done(told):
            return told
        time.sleep(0.02)
    raise TimeoutError(told)


def weights(server: ServerProcess, wire: Wire, model: str) -> str:
    """A hash of the adapter as it is."""
    path = wire.result(wire.post("save_weights_for_sampler", model_id=model, path="end"))["path"]
    _run, segment, name = path.removeprefix("tinker://").split("/")
    (file,) = server.data_dir.rglob(f"{model.replace(':', '*')}/{segment}/{name}*/adapter_model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Client:
    """Does by hand what the server does, in its own words."""

    def __init__(self, wire: Wire, folder: Path):
        self._wire = wire
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tops = dict.fromkeys(ENVIRONMENTS, 0)
        self._asked = dict.fromkeys(ENVIRONMENTS, 0)  # samples at the top
        self.model = create(wire)

    def step(self, step: int) -> dict[str, Any]:
        saved = self._wire.post("save_weights_for_sampler", model_id=self.model, sampling_session_seq_id=step)
        sampler = self._wire.result(saved)["sampling_session_id"]
        difficulties = {name: Difficulty(top, 99) for name, top in self._tops.items()}
        data, rewards, problems = [], [], []
        while len(data) < 2 * SAMPLES and len(problems) < WAVES:
            draw = next(draws(RlveConfig(**RLVE), difficulties, step, len(problems)))
            prompt, request = self._ask(sampler, len(problems), draw)
            sequences = self._wire.result(request)["sequences"]
            texts = [self._tokenizer.decode(sequence["tokens"]).strip() for sequence in sequences]
            scores = [self._score(draw.problem, text) for text in texts]
            if len(set(scores)) > 1:
                data += map(datum, [prompt] * SAMPLES, sequences, advantages(scores))
            rewards += scores
            problems.append(draw.problem)
        if data:
            self._train(data)
        for name, level, _seed in problems:
            self._asked[name] += SAMPLES if level == self._tops[name] else 0
        for name in ENVIRONMENTS:
            if self._asked[name] >= 2 * SAMPLES:
                self._tops[name], self._asked[name] = min(self._tops[name] + 1, HIGHEST[name]), 0
        return {"reward_mean": statistics.fmean(rewards), "tops": dict(self._tops)}

    def _train(self, data: list[dict[str, Any]]) -> None:
        batch, adam = {"data": data, "loss_fn": "importance_sampling"}, {"learning_rate": RATE}
        trained = self._wire.post("forward_backward", model_id=self.model, forward_backward_input=batch)
        stepped = self._wire.post("optim_step", model_id=self.model, adam_params=adam)
        for each in (trained, stepped):
            self._wire.result(each)

    def _ask(self, sampler: str, number: int, draw: Any) -> tuple[list[int], Any]:
        question = problem(*draw.problem)[1]["question"]
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompt = self._tokenizer.encode(text, add_special_tokens=False).ids
        request = self._wire.post(
            "asample",
            sampling_session_id=sampler,
            seq_id=number,
            prompt={"tokens": prompt},
            num_samples=SAMPLES,
            sampling_params={"max_tokens": 8, "seed": draw.sampling_seed, "temperature": 1.0},
        )
        return prompt, request

    def _score(self, asked: Any, text: str) -> float:
        dataset, entry = problem(*asked)
        return dataset.score_answer(text, entry)


def problem(name: str, level: int, seed: int) -> tuple[Any, dict[str, Any]]:
    curriculum = CURRICULA[name]()
    curriculum.set_global_level(level)
    context = DefaultCurriculumContext(mode=RangeAttributeMode.UPPER_BOUND)
    dataset = DATASETS[name][0](curriculum.generate_configuration({"seed": seed, "size": 1}, context=context))
    return dataset, dataset[0]


def advantages(scores: list[float]) -> list[float]:
    return [(score - statistics.fmean(scores)) / (statistics.stdev(scores) + 1e-6) for score in scores]


def datum(prompt: list[int], sequence: dict[str, Any], advantage: float) -> dict[str, Any]:
    tokens, count = prompt + sequence["tokens"], len(sequence["tokens"])
    zeros = [0.0] * (len(prompt) - 1)
    return {
        "model_input": {"tokens": tokens[:-1]},
        "loss_fn_inputs": {
            "target_tokens": {"data": tokens[1:], "dtype": "int64"},
            "logprobs": {"data": zeros + sequence["logprobs"], "dtype": "float32"},
            "advantages": {"data": zeros + [advantage] * count, "dtype": "float32"},
        },
    }


@pytest.mark.slow
def test_it_is_what_a_client_would_do_whatever_dies_or_stops(make_server, tiny_model: Path) -> None:
    server: ServerProcess = make_server(TINSMITH_LONG_POLL_SECONDS="10").start()
    wire = Wire(server.url, "tml-local")
    wire.http.timeout = 300  # the library is imported meanwhile
    trained = create(wire, rlve_config=RLVE)
    refused = wire.optim_step(trained, 1)
    assert refused.status_code == 400
    assert "stop_rlve" in refused.json()["detail"]

    until(wire, trained, lambda told: told["step"] >= 2)
    engine = server.engine
    server.kill()
    engine.kill()
    server.start()
    at = until(wire, trained, lambda told: told["step"] >= 3)
    assert at["state"] == "running"

    stopped = wire.post("stop_rlve", model_id=trained).json()["rlve"]
    assert stopped["state"] == "stopped"
    assert 3 <= stopped["step"] < STEPS
    assert wire.post("abort_gradient_epoch", model_id=trained).status_code == 200, "it is the client's again"
    time.sleep(0.3)
    assert info(wire, trained)["step"] == stopped["step"]
    assert wire.post("resume_rlve", model_id=trained).json()["rlve"]["state"] == "running"
    finished = until(wire, trained, lambda told: told["state"] == "finished")
    assert [each["step"] for each in finished["steps"]] == list(range(1, STEPS + 1))
    assert wire.post("resume_rlve", model_id=trained).status_code == 400, "it has had all of its steps"

    client = Client(wire, tiny_model)
    for step, told in enumerate(finished["steps"], 1):
        done = client.step(step)
        assert told["reward_mean"] == pytest.approx(done["reward_mean"], abs=1e-12)
        tops = {name: each["difficulty"] for name, each in told["environments"].items()}
        assert tops == done["tops"]
    assert max(tops.values()) >= 1
    assert any(each.get("grad_norm", 0) > 0 for each in finished["steps"]), "there was something to learn"
    assert finished["environments"][ENVIRONMENTS[0]]["window"][1] == tops[ENVIRONMENTS[0]]
    assert weights(server, wire, trained) == weights(server, wire, client.model)
    assert wire.post("stop_rlve", model_id=client.model).status_code == 400, "the client's own"
    assert server.stop() == 0
