"""Tools of the sampler's tests: a tiny model, a sampler over it, requests, and brute-force log-probs.

The caller writes the model; the sampler is small enough that requests fight for slots and pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from adapters import random_adapter as random_adapter
from tinsmith.ckpt.token_bytes import TokenBytes
from tinsmith.engine import messages
from tinsmith.engine.sampling.sampler import Sampler
from tinsmith.model import decoder, load, lora
from tinsmith.model.config import ModelConfig
from tinsmith.model.folder import read_config
from tiny_models import write_model


class Model(NamedTuple):
    folder: object
    config: ModelConfig
    graph: object
    base: dict


def load_tiny(folder, variant="llama", **overrides) -> Model:
    folder = write_model(folder, variant, **{"num_hidden_layers": 2, **overrides})
    config = read_config(folder)
    graph, _ = decoder.build(config, jnp.float32)
    return Model(folder, config, graph, load.load_base(folder, config, jnp.float32))


def make_sampler(model: Model, **options) -> Sampler:
    defaults = {
        "kv_cache_tokens": 704, "max_slots": 4, "page_size": 16, "prefill_tokens": 64, "decode_steps": 8
    }  # fmt: skip
    options = defaults | options
    tokenizer = TokenBytes.from_folder(model.folder)
    return Sampler(model.graph, model.base, model.config, token_bytes=tokenizer, **options)


def request(request_id, prompt, num_samples=1, *, logprobs=False, topk_prompt=0, topk=0, **params):
    return messages.Sample(
        request_id=str(request_id),
        sampler=messages.SamplerRef("tiny"),
        prompt=np.asarray(prompt, np.int32).tobytes(),
        num_samples=num_samples,
        params=messages.SamplingParams(**params),
        prompt_logprobs=logprobs,
        topk_prompt_logprobs=topk_prompt,
        topk_sample_logprobs=topk,
    )


class Sampled(NamedTuple):
    tokens: list[int]
    logprobs: np.ndarray
    stop_reason: str


def run_all(sampler: Sampler) -> dict[str, messages.SampleOutput | messages.Failed]:
    """Step until nothing is left; answers by request id."""
    answers = {}
    while sampler.has_work:
        for answer in sampler.step():
            assert answer.request_id not in answers, "answered twice"
            answers[answer.request_id] = answer.output if isinstance(answer, messages.Done) else answer
    return answers


def sample(sampler: Sampler, asked: messages.Sample, key=None) -> messages.SampleOutput:
    sampler.add(asked, key)
    return run_all(sampler)[asked.request_id]


def alone_and_together(
    sampler: Sampler, asked: list[messages.Sample], keys: Sequence[str | None] = ()
) -> tuple[list, list, list]:
    """Each request's sequences when it runs alone, and when all run together, and who lost its pages then.

    `keys` are the weights of each; by default all use the base model."""
    pairs = list(zip(asked, keys or [None] * len(asked), strict=True))
    alone = [sequences(sample(sampler, *pair)) for pair in pairs]
    lost: list = []
    original = sampler._queue.preempt_newest
    sampler._queue.preempt_newest = lambda: lost.append(original()) or lost[-1]
    for pair in pairs:
        sampler.add(*pair)
    answers = run_all(sampler)
    return alone, [sequences(answers[one.request_id]) for one in asked], lost


def sequences(output: messages.SampleOutput) -> list[Sampled]:
    return [
        Sampled(
            np.frombuffer(s.tokens, np.int32).tolist(), np.frombuffer(s.logprobs, np.float32), s.stop_reason
        )
        for s in output.sequences
    ]


def full_forward_logprobs(model: Model, tokens, temperature=1.0, adapter=None, scale=1.0) -> np.ndarray:
    """[len(tokens), V] log-probs of every next token, by one pass of the trainer's trunk."""
    return np.asarray(jax.nn.log_softmax(full_forward_logits(model, tokens, adapter, scale) / temperature))


def full_forward_logits(model: Model, tokens, adapter=None, scale=1.0) -> np.ndarray:
    """[len(tokens), V] logits of every next token."""
    T = len(tokens)
    padded = np.zeros((1, -(-T // 128) * 128), np.int32)
    padded[0, :T] = tokens
    position = np.arange(padded.shape[1], dtype=np.int32)[None]
    stack = None if adapter is None else lora.stack_adapters((adapter,), jnp.asarray([scale]))
    return np.asarray(_logits(model.graph, model.base, padded, position, stack)[0, :T])


@partial(jax.jit, static_argnums=0)
def _logits(graph, base, tokens, position, stack):
    hidden = decoder.trunk(graph, base, tokens, position, jnp.zeros_like(position), stack, None)
    z = hidden @ decoder.unembed(base).T
    if stack is not None and "unembed" in stack:
        z = z + lora.delta(hidden, stack["unembed"], stack["scale"], None)
    return z
