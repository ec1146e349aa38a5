"""`tinsmith serve` as a child process, for the length of a `with` block."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

TINSMITH = [sys.executable, "-m", "tinsmith.server.cli"]
STOP_SECONDS = 120


@contextlib.contextmanager
def running_server(model: str, progress: Callable[[str], object] = print, *options: str) -> Iterator[str]:
    """Fetch `model` if it is missing, serve it on a free port, and yield the URL once the server is ready.

    Its ledger and checkpoints are in a temporary directory, unless `options` (of `tinsmith serve`) name
    another one. At the end of the block it gets SIGTERM. Raises RuntimeError, with the end of the server's
    log, if it dies or does not stop with exit code 0.
    """
    subprocess.run([*TINSMITH, "models", "get", model], check=True, stdin=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory(prefix="tinsmith-demo-") as directory:
        log = Path(directory) / "server.log"
        command = [*TINSMITH, "serve", "--model", model, "--port", "0", "--data-dir", f"{directory}/data"]
        command += options
        progress(f"Starting tinsmith serve --model {model} …")
        with log.open("wb") as output:
            server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            yield _wait_until_ready(server, log, progress)
        except BaseException as error:
            server.kill()
            error.add_note(f"The end of the server's log:\n{_tail(log)}")
            raise
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            raise RuntimeError(f"the server did not stop within {STOP_SECONDS} s of SIGTERM") from None
        if server.returncode != 0:
            raise RuntimeError(f"the server stopped with exit code {server.returncode}:\n{_tail(log)}")


def download(path: str, url: str, key: str, folder: Path) -> Path:
    """Download what `save_weights_external` saved as `path` into a new folder, over signed URLs."""
    run_id, checkpoint = path.partition("://")[2].split("/", 1)
    address = f"{url}/api/v1/training_runs/{run_id}/checkpoints/{checkpoint}/external_weights_urls"
    request = urllib.request.Request(address, headers={"X-API-Key": key} if key else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        urls = json.load(response)["urls"]
    folder.mkdir(exist_ok=True)
    for name, signed in urls.items():
        urllib.request.urlretrieve(signed, folder / name)
    return folder


def _wait_until_ready(server: subprocess.Popen, log: Path, progress: Callable[[str], object]) -> str:
    url = ""
    told = ""
    while server.poll() is None:
        if not url:
            found = re.search(r"TINKER_BASE_URL=(\S+)", log.read_text(errors="replace"))
            url = found[1] if found else ""
        engine = _health(url)["engine"] if url else {"ready": False, "text": ""}
        if engine["ready"]:
            return url
        step = re.sub(r": [\d.]+ of [\d.]+ MB$", "", engine["text"])  # how much is loaded changes too often
        if step != told:
            told = step
            progress(f"  {told}")
        time.sleep(0.2)
    raise RuntimeError(f"the server stopped with exit code {server.returncode} before it was ready")


def _health(url: str) -> dict:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:  # 503 while the engine is down, with the same body
        return json.load(error)
    except OSError:  # not listening yet
        return {"engine": {"ready": False, "text": "opening the data directory"}}


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])
