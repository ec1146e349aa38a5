"""docs/nginx.md: a server started as the page says, behind the page's nginx, if nginx is here."""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

pytest.importorskip("tinker")

import tinker
from docs.pages import ROOT, block
from docs.terminal import Serving, Terminal, free_port
from tinker import types
from tiny_models import write_model

PAGE, PUBLIC = "nginx.md", "https://train.example.org"
CONFIG = ROOT / "deploy" / "nginx.conf"
needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx here: apt install nginx")


@dataclass
class Served:
    """A server as step 1 of the page starts it."""

    terminal: Terminal
    serving: Serving
    key: str
    model: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("nginx")
    model = write_model(home / "tiny", "llama")
    terminal = Terminal(home, {"/var/lib/tinsmith": str(home / "data"), "Qwen/Qwen3-8B": str(model)})
    terminal.environment["TINSMITH_CACHE_DIR"] = str(ROOT / ".cache" / "tests" / "servers")
    made, command = block(PAGE, "tinsmith keys create").splitlines()
    (key,) = re.findall(r"tml-[\w-]+", terminal.run(made))
    serving = terminal.serve(command)
    yield Served(terminal, serving.wait_for_engine(), key, model.name)
    serving.kill()


def test_the_page_shows_the_file() -> None:
    assert block(PAGE, "# TLS in front of") == CONFIG.read_text()


def test_downloads_begin_with_the_public_address(served: Served) -> None:
    service = tinker.ServiceClient(base_url=served.serving.url, api_key=served.key)
    client = service.create_lora_training_client(base_model=served.model, rank=4).result()
    client.save_weights_for_sampler("first").result()
    with httpx.Client(base_url=served.serving.url, headers={"X-API-Key": served.key}) as direct:
        assert signed_url(direct).startswith(f"{PUBLIC}/api/v1/")


def signed_url(client: httpx.Client) -> str:
    """Return the signed URL of the newest checkpoint's archive."""
    newest = client.get("/api/v1/checkpoints").json()["checkpoints"][0]
    run, _, checkpoint = newest["tinker_path"].removeprefix("tinker://").partition("/")
    archive = client.get(f"/api/v1/training_runs/{run}/checkpoints/{checkpoint}/archive")
    return archive.headers["location"]


@dataclass
class Proxy:
    url: str
    log: Path
    main: Path
    authority: Path


@pytest.fixture(scope="module")
def proxy(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The page's nginx, with a port, paths and a certificate of the test's own."""
    folder, port = tmp_path_factory.mktemp("proxy"), free_port()
    log, own, of_server = folder / "access.log", folder / "authority", folder / "server"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    signed = ["-CA", f"{own}.pem", "-CAkey", f"{own}.key", "-addext", "subjectAltName=DNS:localhost"]
    for name, options in ((own, ["-subj", "/CN=test"]), (of_server, ["-subj", "/CN=localhost", *signed])):
        options += ["-addext", f"basicConstraints=critical,CA:{'TRUE' if name == own else 'FALSE'}"]
        made = [*make, *options, "-out", f"{name}.pem", "-keyout", f"{name}.key"]
        subprocess.run(made, check=True, capture_output=True)
    text = CONFIG.read_text()
    for shown, here in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("127.0.0.1:8000", served.serving.url.removeprefix("http://")),
        ("/etc/letsencrypt/live/train.example.org/fullchain.pem", f"{of_server}.pem"),
        ("/etc/letsencrypt/live/train.example.org/privkey.pem", f"{of_server}.key"),
        ("/var/log/nginx/tinsmith.log", str(log)),
        ("train.example.org", "localhost"),
    ):
        assert shown in text
        text = text.replace(shown, here)
    (folder / "tinsmith.conf").write_text(text)
    temporary = "".join(
        f"{kind}_temp_path {folder / kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = folder / "nginx.conf"
    main.write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; user root;\n"
        f"events {{}}\nhttp {{ {temporary} include {folder}/tinsmith.conf; }}\n"
    )
    nginx = subprocess.Popen(["nginx", "-c", main], stderr=subprocess.PIPE, text=True)
    running = Proxy(f"https://localhost:{port}", log, main, Path(f"{own}.pem"))
    try:
        with client_of(running, served.key) as client:
            deadline = time.monotonic() + 30
            while True:
                assert nginx.poll() is None, nginx.stderr.read()  # type: ignore[union-attr]
                try:
                    client.get("/healthz")
                    break
                except httpx.TransportError:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
        yield running
    finally:
        nginx.terminate()
        nginx.wait(30)


def client_of(proxy: Proxy, key: str) -> httpx.Client:
    context = ssl.create_default_context(cafile=proxy.authority)
    return httpx.Client(base_url=proxy.url, headers={"X-API-Key": key}, verify=context, timeout=60)


@needs_nginx
def test_the_page_s_checks_succeed(served: Served, proxy: Proxy) -> None:
    tested, asked = block(PAGE, "nginx -t").splitlines()
    nginx, _, reload = tested.partition(" && ")
    assert reload == "systemctl reload nginx"
    subprocess.run([*nginx.split(), "-c", proxy.main], check=True, capture_output=True)
    known = {"CURL_CA_BUNDLE": str(proxy.authority), "SSL_CERT_FILE": str(proxy.authority)}
    assert '"status"' in served.terminal.run(asked.replace(PUBLIC, proxy.url), **known)
    commands = block(PAGE, "export TINKER_BASE_URL").replace("tml-...", served.key)
    assert "ready" in served.terminal.run(commands.replace(PUBLIC, proxy.url), **known)


@needs_nginx
def test_the_sdk_trains_and_samples_over_tls(
    served: Served, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(proxy.authority))
    service = tinker.ServiceClient(base_url=proxy.url, api_key=served.key)
    client = service.create_lora_training_client(base_model=served.model, rank=4).result(60)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0] * 3},
    )
    passed = client.forward_backward([datum], "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    assert passed.result().metrics["loss:sum"] > 0
    sampler = client.save_weights_and_get_sampling_client().result()
    drawn = sampler.sample(types.ModelInput.from_ints([1, 2]), 1, types.SamplingParams(max_tokens=4)).result()
    assert drawn.sequences[0].tokens


@needs_nginx
def test_streams_large_bodies_and_request_ids_pass(served: Served, proxy: Proxy) -> None:
    with client_of(proxy, served.key) as client:
        asked = {"model": served.model, "prompt": [1, 2], "max_tokens": 200, "stream": True, "logit_bias": {}}
        with client.stream("POST", "/v1/completions", json=asked) as stream:
            pieces = [*stream.iter_raw()]
        assert len(pieces) > 3
        assert b"[DONE]" not in pieces[0]

        large = client.post("/api/v1/forward_backward", json={"model_id": "unknown", "text": "x" * (2 << 20)})
        assert large.status_code in (400, 404), large.text
        assert large.headers["content-type"].startswith("application/json")
        assert large.headers["x-request-id"] in proxy.log.read_text()


@needs_nginx
def test_the_log_has_no_signature_and_metrics_are_for_this_machine(served: Served, proxy: Proxy) -> None:
    with client_of(proxy, served.key) as client:
        assert "tinsmith_engine_ready" in client.get("/metrics").text
        signed = signed_url(client).replace(PUBLIC, proxy.url)
        query = signed.partition("?")[2]
        assert httpx.get(signed, verify=ssl.create_default_context(cafile=proxy.authority)).is_success
    time.sleep(0.5)
    log = proxy.log.read_text()
    assert "/archive.tar" in log
    assert query
    assert query not in log


@needs_nginx
def test_a_mistake_in_the_file_would_be_noticed(proxy: Proxy, tmp_path: Path) -> None:
    wrong = proxy.main.parent / "wrong.conf"
    wrong.write_text(proxy.main.read_text().replace("tinsmith.conf", "broken.conf"))
    (proxy.main.parent / "broken.conf").write_text("upstream tinsmith { sever 127.0.0.1:1; }\n")
    done = subprocess.run(["nginx", "-t", "-c", wrong], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "sever" in done.stderr
