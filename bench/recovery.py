"""Measures a training run whose engine and server are killed again and again: `python bench/recovery.py`.

A client of the official SDK trains a model without a pause, twice: undisturbed, and while the engine and the
whole server get SIGKILL in turns. The server is started again at once, as a service manager does. Prints how
long each kill held the run up, and whether both runs gave the same losses to the bit; `--json` writes every
step's time too.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import tinker
from latency import ROOT, start
from tinker import types


class KilledServer:
    """A server on a port of its own, which can be killed and started again on its data."""

    def __init__(self, model: str, data_dir: Path):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._options = ("--port", str(listener.getsockname()[1]))
        self._model, self._data_dir = model, data_dir
        self._process: subprocess.Popen[bytes]
        self.url = ""
        self.start()

    def start(self) -> None:
        """Return once the engine is ready."""
        self._process, self.url = start(self._model, self._data_dir, *self._options)

    def kill_engine(self) -> None:
        """Kill the engine; the server starts another one."""
        for child in psutil.Process(self._process.pid).children():
            if "tinsmith.engine" in child.cmdline():
                child.kill()

    def kill_server(self) -> None:
        """Kill the server (its engine ends by itself) and start it again."""
        self._process.kill()
        self._process.wait()
        self.start()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(120)


def train(url: str, steps: int, length: int, times: list[float]) -> list[float]:
    """Train `steps` steps; note the time of each answer in `times`. Return the losses."""
    service = tinker.ServiceClient(base_url=url, api_key="tml-local")
    client = service.create_lora_training_client(base_model="base", rank=8, seed=7).result()
    tokens = [5 + 7 * i % 300 for i in range(length + 1)]
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * length},
    )
    losses = []
    for _ in range(steps):
        passed = client.forward_backward([datum], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-4)).result()
        losses.append(passed.result().metrics["loss:sum"])
        times.append(time.monotonic())
    return losses


def run(model: str, folder: Path, steps: int, length: int, kills: int) -> dict[str, Any]:
    """One run: `losses`; `seconds` of each step since the first; `kills` as (kind, seconds, held up for)."""
    server = KilledServer(model, folder)
    times: list[float] = []
    result: list[list[float]] = []
    client = threading.Thread(target=lambda: result.append(train(server.url, steps, length, times)))
    client.start()
    noted: list[tuple[str, float, float]] = []
    for number in range(kills):
        while len(times) < (number + 1) * steps // (kills + 1) and client.is_alive():
            time.sleep(0.005)
        kind = ("engine", "server")[number % 2]
        seen, at = len(times), time.monotonic()
        server.kill_engine() if kind == "engine" else server.kill_server()
        while len(times) <= seen + 1 and client.is_alive():  # one answer may have been on its way
            time.sleep(0.005)
        noted.append((kind, at, time.monotonic() - at))
    client.join()
    server.stop()
    first = times[0]
    return {
        "losses": result[0],
        "seconds": [round(each - first, 3) for each in times],
        "kills": [(kind, round(at - first, 3), round(held, 3)) for kind, at, held in noted],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a folder, a hub id or smollm2-135m (default: a tiny random model)")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--length", type=int, default=128, help="tokens of the one datum of each step")
    parser.add_argument("--kills", type=int, default=6, help="of engine and server in turns")
    parser.add_argument("--json", type=Path, help="also write the numbers to this JSON file")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder, model = Path(directory), asked.model
        if model is None:
            sys.path.insert(0, str(ROOT / "tests"))
            from tiny_models import write_model

            model = str(write_model(folder / "tiny", "llama"))
        calm = run(model, folder / "calm", asked.steps, asked.length, 0)
        killed = run(model, folder / "killed", asked.steps, asked.length, asked.kills)
    equal = calm.pop("losses") == killed.pop("losses")
    for kind, at, held in killed["kills"]:
        print(f"{kind} killed after {at:6.1f} s: the run went on {held:5.2f} s later")
    print(f"undisturbed {calm['seconds'][-1]:.1f} s, with kills {killed['seconds'][-1]:.1f} s")
    print(f"losses equal to the bit: {equal}; load average {os.getloadavg()[0]:.1f}")
    if asked.json:
        report = {"model": asked.model or "tiny", "steps": asked.steps, "equal": equal}
        asked.json.write_text(json.dumps(report | {"undisturbed": calm, "killed": killed}))
    sys.exit(not equal)


if __name__ == "__main__":
    main()
