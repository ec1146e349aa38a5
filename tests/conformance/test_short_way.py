"""The way of an operation through the server is short: one is traced, printed and counted."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import tinker
from conformance.batches import batch
from conformance.server_process import ServerProcess
from tinker import types

LAUNCHER = Path(__file__).with_name("traced_server.py")
MOST_FILES, MOST_FUNCTIONS = 14, 50


def test_a_forward_backward_passes_few_files_and_functions(
    make_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """The way goes from the SDK's submit, a protobuf, to its answer, by long poll. Counted are the modules
    and named functions of `server/`, in every thread, that each of several equal operations calls. So timers
    and heartbeats, which some of the operations meet, do not count; middleware, the ledger's thread, and what
    other parts of the server do at each answer do.
    """
    path = tmp_path / "trace.json"
    server = make_server("--api-key", "alice=tml-alice", launcher=LAUNCHER, TRACE=str(path)).start()
    process = server.process
    assert process is not None
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-alice")
    training = service.create_lora_training_client(base_model="tiny", rank=4).result()
    data = batch(2)

    def traced() -> list[tuple[str, str]]:
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.2)
        training.forward_backward(data, "cross_entropy").result()
        process.send_signal(signal.SIGUSR2)
        while not path.exists():
            time.sleep(0.05)
        called = json.loads(path.read_text())
        path.unlink()
        return [(file, function) for file, function in called]

    for _ in range(2):  # what is compiled, opened and looked up only once
        training.forward_backward(data, "cross_entropy").result()
        training.optim_step(types.AdamParams()).result()
    first, *others = (traced() for _ in range(4))
    called = [each for each in first if all(each in other for other in others)]
    files = list(dict.fromkeys(file for file, _function in called))
    print(f"{len(files)} files, {len(called)} functions:")
    for file in files:
        print(f"  {file}: {', '.join(function for of, function in called if of == file)}")
    assert 10 < len(files) <= MOST_FILES
    assert 30 < len(called) <= MOST_FUNCTIONS
