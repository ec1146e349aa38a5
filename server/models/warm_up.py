"""Programs of ordinary requests are compiled at the start, before a client waits for them (`--warm-up`).

The engine gets a model of the server's own, which trains a step of made-up tokens and is sampled. Clients do
not see it. What it compiles stays in JAX's cache, also for the next start.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from array import array
from itertools import product
from pathlib import Path

from ...ckpt import paths
from ...engine import messages
from ..base_models import BaseModel
from ..errors import Unavailable
from ..supervision.supervisor import Supervisor

log = logging.getLogger("tinsmith.warm_up")

LENGTHS = (16, 128, 512, 2048)  # tokens of a datum, and of a prompt
SAMPLES = (1, 16)  # of a prompt
_MODEL = "warm-up"
_NEW_TOKENS = 4


class WarmUp:
    """`rank`: of the adapter whose programs are compiled."""

    def __init__(self, engine: Supervisor, base_models: list[BaseModel], data_dir: Path, rank: int):
        self._engine = engine
        self._base_models = base_models
        self._data_dir = data_dir
        self._rank = rank

    async def run(self) -> None:
        """Wait for the engine, and compile. What cannot be compiled is logged; clients may still work."""
        await self._engine.ready.wait()
        began = time.monotonic()
        try:
            for number, base in enumerate(self._base_models):
                await self._warm(base, f"{_MODEL}:{number}")
        except Unavailable as error:
            log.warning("the warm-up is given up: %s", error.message)
            return
        seconds = time.monotonic() - began
        log.info("warmed up in %.0f s: adapters of rank %d train and sample", seconds, self._rank)

    async def _warm(self, base: BaseModel, model: str) -> None:
        lengths = sorted({min(length, base.max_sequence_length - _NEW_TOKENS) for length in LENGTHS})
        lora = messages.LoraSpec(self._rank, 32.0, 0)
        directory = paths.new_directory(_MODEL, "sampler_weights", "adapter")
        await self._ask(messages.CreateModel(model, model, base.name, lora))
        try:
            for length in lengths:
                data = [_datum(length, base.vocab_size)]
                await self._ask(messages.ForwardBackward(f"{model}:{length}", model, data, "cross_entropy"))
            await self._ask(messages.OptimStep(f"{model}:step", model))
            await self._ask(messages.SaveSampler(f"{model}:save", model, directory))
            for weights in (None, directory):
                sampler = messages.SamplerRef(base.name, weights)
                params = messages.SamplingParams(max_tokens=_NEW_TOKENS, stop_tokens=[])
                for length, samples in product(lengths, SAMPLES):
                    name = f"{model}:{weights}:{length}:{samples}"
                    prompt = _tokens(length, base.vocab_size)
                    await self._ask(messages.Sample(name, sampler, prompt, samples, params))
            await self._ask(messages.ReleaseSampler(f"{model}:release", directory))
        finally:
            await self._ask(messages.DeleteModel(f"{model}:delete", model))
            folder = paths.resolve(self._data_dir, directory)
            await asyncio.to_thread(shutil.rmtree, folder.parents[1], ignore_errors=True)

    async def _ask(self, message: messages.ToEngine) -> None:
        answer = await self._engine.request(message)
        if isinstance(answer, messages.Failed):
            log.warning("warm-up: %s failed: %s", type(message).__name__, answer.message)


def _ids(length: int, vocab_size: int) -> list[int]:
    """Other ones for each length: a prompt that begins like an earlier one is not computed again."""
    return [(length + at) % vocab_size for at in range(length)]


def _tokens(length: int, vocab_size: int) -> bytes:
    return array("i", _ids(length, vocab_size)).tobytes()


def _datum(length: int, vocab_size: int) -> messages.Datum:
    targets = messages.Tensor("int64", (length,), array("q", _ids(length, vocab_size)).tobytes())
    weights = messages.Tensor("float32", (length,), array("f", [1.0] * length).tobytes())
    return messages.Datum(_tokens(length, vocab_size), {"target_tokens": targets, "weights": weights})
