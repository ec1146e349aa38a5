"""The engine as the rest of the server sees it: one process after another.

An engine that ends by itself is started again, and then everything that was accepted and not answered is sent
to the new one. After a life in which it answered nothing there is a pause, each twice as long as the one
before, so that an engine that cannot live does not keep the machine busy.

With `--warm-up`, the programs of ordinary requests are compiled at the start, before a client waits for them.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import product
from pathlib import Path

from ...ckpt import paths
from ...engine import messages
from ..base_models import BaseModel
from ..errors import Unavailable
from ..events import Event
from .engine_process import EngineProcess, Outbox

log = logging.getLogger("tinsmith.supervisor")


async def nothing_stored(_request_id: str) -> None:
    """Return no payload, for an engine that needs none."""


_PAUSES_SECONDS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_HOPELESS_STARTS = 5  # in a row that did not get ready: submits are then refused


class Supervisor:
    """Keeps one engine running. What is put into its `outbox` is sent to the engine.

    Events: `answered(answer, encoded)` for each answer that `request` does not wait for, also as the engine
    encoded it; `drawn(tokens)` for a part of a streamed sample; `died(under_way)` with what the engine
    computed when it died; `started()` when there is an empty new engine; `lost(request_id, model_id, why)`
    for an operation whose payload cannot be read.
    """

    def __init__(
        self,
        config: messages.EngineConfig,
        silence_seconds: float = 60.0,
        module: str = "tinsmith.engine",
        inherited: tuple[int, ...] = (),
        load: Callable[[str], Awaitable[bytes | None]] = nothing_stored,
    ):
        """`inherited`: descriptors that each engine has open as long as it lives. `load` reads payloads."""
        self.answered: Event[[messages.Done | messages.Failed, bytes]] = Event()
        self.drawn: Event[[messages.Drawn]] = Event()
        self.died: Event[[list[tuple[str, str]]]] = Event()
        self.started: Event[[]] = Event()
        self.lost: Event[[str, str, str]] = Event()
        self.outbox = Outbox(load, self.lost)
        self.may_refuse_submits = False  # the server stops, or an engine has ended by itself
        self._make = lambda: EngineProcess(
            config, self.outbox, self.answered, self.drawn, silence_seconds, module, inherited
        )
        self._process = self._make()
        self._keeper: asyncio.Task | None = None
        self._stopping = False
        self._fruitless_lives = 0
        self._failed_starts = 0
        self._ended: Counter[str] = Counter()  # the counters of engines that have ended
        self.refused = asyncio.Event()  # the first one cannot start, and the next would not either

    async def start(self) -> None:
        """Start the first engine. Raises OSError if no process can be started at all."""
        await self._begin()
        self._keeper = asyncio.create_task(self._keep())

    async def _begin(self) -> None:
        process = self._make()
        await process.start()
        self._process = process

    async def _keep(self) -> None:
        was_ever_ready = False
        while True:
            process = self._process
            await process.ended.wait()
            if self._stopping:
                return
            self.may_refuse_submits = True
            was_ever_ready |= process.was_ready
            if process.refused and not was_ever_ready:
                self.refused.set()
                return
            self._failed_starts = 0 if process.was_ready else self._failed_starts + 1
            self._fruitless_lives = 0 if process.has_answered else self._fruitless_lives + 1
            under_way = process.under_way()
            self._ended.update(process.take_counters())
            await process.close()
            self.died(under_way)
            await self._begin_again()

    async def _begin_again(self) -> None:
        while True:
            pause = _PAUSES_SECONDS[min(self._fruitless_lives, len(_PAUSES_SECONDS) - 1)]
            log.warning("starting the engine again in %.0f s", pause)
            await asyncio.sleep(pause)
            try:
                await self._begin()
            except OSError as error:  # no memory or descriptors for a process; there may be some later
                log.error("the engine cannot be started: %s", error)
                self._fruitless_lives += 1
                continue
            self.started()
            return

    # --- what it is doing

    @property
    def phase(self) -> str:
        """A phase of messages.Status, or `starting`, `restarting`, `dead` or `stopped`."""
        if self._process.death is None:
            return self._process.phase
        return "dead" if self.death else "restarting"

    @property
    def text(self) -> str:
        """A sentence for people about what the engine is doing."""
        how = self._process.death
        return self._process.text if how is None else f"the engine is started again: {how}"

    @property
    def memory(self) -> messages.Memory | None:
        """The contents of the devices' memory, by the engine's newest report; None before the first."""
        return self._process.memory

    @property
    def counters(self) -> dict[str, float]:
        """Counters of all engines since the server's start (`engine/measurements.py`)."""
        return dict(self._ended + Counter(self._process.measured.counters))

    @property
    def gauges(self) -> dict[str, float]:
        """The engine's newest measurements, such as its pages of keys and values."""
        return self._process.measured.gauges

    @property
    def ready(self) -> asyncio.Event:
        return self._process.ready

    @property
    def alive(self) -> bool:
        """True if there is a process, ready or on its way to be."""
        return self._process.alive

    @property
    def death(self) -> str | None:
        """The reason why there will probably be no engine; None while there is hope."""
        hopeless = self.refused.is_set() or self._failed_starts >= _HOPELESS_STARTS
        if not hopeless or self._process.was_ready:
            return None
        return self._process.death or "it does not get ready"

    def require_submits(self) -> None:
        """Raise Unavailable when nothing can be submitted; between two engines, everything can.

        It never raises while `may_refuse_submits` is False.
        """
        if self._stopping:
            raise Unavailable("the server is stopping; try again later")
        if not self._process.was_ready and (death := self.death) is not None:
            raise Unavailable(f"the engine does not start ({death}); try again later")

    # --- messages

    @property
    def life(self) -> int:
        """How many engines there have been."""
        return self.outbox.life

    @property
    def is_asleep(self) -> bool:
        """True if `Sleep` was the last message to the engine."""
        return self.outbox.is_asleep

    async def request(self, message: messages.ToEngine) -> messages.Done | messages.Failed:
        """Send a message of the server's own and wait for the answer. Raises Unavailable on death."""
        self.outbox.requested(message)
        return await self._process.request(message)

    # --- the end

    def refuse_submits(self) -> None:
        """Have `require_submits` raise from now on; what was accepted still runs."""
        self._stopping = self.may_refuse_submits = True

    def kill(self) -> None:
        """End the engine at once, for good."""
        self._stopping = self.may_refuse_submits = True
        self._process.kill()

    async def stop(self, patience_seconds: float) -> None:
        """Let the engine finish what it has, then end it."""
        self._stopping = self.may_refuse_submits = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self.outbox.life:
            await self._process.stop(patience_seconds)


LENGTHS = (16, 128, 512, 2048)  # tokens of a datum, and of a prompt
SAMPLES = (1, 16)  # of a prompt
_MODEL = "warm-up"
_NEW_TOKENS = 4


class WarmUp:
    """Trains and samples a model of the server's own, so that its programs are compiled and cached.

    Clients do not see the model. The programs stay in JAX's cache, also for the next start. `rank` is that of
    the model's adapter.
    """

    def __init__(self, engine: Supervisor, base_models: list[BaseModel], data_dir: Path, rank: int):
        self._engine = engine
        self._base_models = base_models
        self._data_dir = data_dir
        self._rank = rank

    async def run(self) -> None:
        """Wait for the engine, and compile. Failures are logged; clients may still work."""
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
    """Make token ids that differ for each length, so that no prompt is found in the cache of prefixes."""
    return [(length + at) % vocab_size for at in range(length)]


def _tokens(length: int, vocab_size: int) -> bytes:
    return array("i", _ids(length, vocab_size)).tobytes()


def _datum(length: int, vocab_size: int) -> messages.Datum:
    targets = messages.Tensor("int64", (length,), array("q", _ids(length, vocab_size)).tobytes())
    weights = messages.Tensor("float32", (length,), array("f", [1.0] * length).tobytes())
    return messages.Datum(_tokens(length, vocab_size), {"target_tokens": targets, "weights": weights})
