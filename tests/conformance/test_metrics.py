"""Every metric of docs/metrics.md is there under load, and moves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import yaml
from conformance.conftest import ALICE, BOB
from conformance.server_process import ServerProcess, Wire, datum
from docs.pages import block
from scraper import Scraper, base_of, documented, of_sglang
from small_disk import small_disk

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "tinsmith.json"
TOKEN = "scrape-me"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A disk that can be enlarged; None where none can be mounted."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(small_disk(tmp_path_factory.mktemp("disk") / "disk", "64m"))
        except pytest.skip.Exception:
            folder = None
        yield folder


@pytest.fixture(scope="module")
def measured(make_server: Callable[..., ServerProcess], disk: Path | None) -> ServerProcess:
    running = make_server(
        *("--api-key", f"alice={ALICE}", "--api-key", f"bob={BOB}", "--admin", "alice"),
        *("--sglang", "http://127.0.0.1:9"),
        TINSMITH_METRICS_TOKEN=TOKEN,
        TINSMITH_SNAPSHOT_OPERATIONS="4",
        TINSMITH_DISK_RESERVE_BYTES="1MB",
    )
    if disk is not None:
        running.data_dir.symlink_to(disk)
    return running.start()


def until(condition: Callable[[], bool], seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
    return condition()


def test_every_metric_of_the_page_is_there_and_moves(measured: ServerProcess, disk: Path | None) -> None:
    """But those of SGLang, which `sglang/test_weights.py` moves with a real one. The disk is enlarged."""
    scraper, wire = Scraper(measured.url, TOKEN), Wire(measured.url, ALICE)
    scraper.scrape()
    prompt = [5 + at % 90 for at in range(300)]
    with scraper.all_the_time():
        model = wire.model()
        for step in range(3):
            wire.result(wire.forward_backward(model, 2 * step + 1, [datum()]))
            wire.result(wire.optim_step(model, 2 * step + 2))
        saving = wire.post("save_weights_for_sampler", model_id=model, seq_id=7, path="one")
        saved = wire.result(saving)["path"]
        for _ in range(2):
            asked = {"max_tokens": 160, "stop": []}
            sampled = wire.post(
                "asample", model_path=saved, prompt={"tokens": prompt}, num_samples=8, sampling_params=asked
            )
            wire.result(sampled)
        assert until(lambda: scraper.value("tinsmith_decode_slots_total", state="used") > 0)
        for path in ("/sleep", "/wake_up"):
            assert wire.http.post(path).json()["success"]
            scraper.scrape()
        if disk is not None:
            subprocess.run(["mount", "-o", "remount,size=80m", str(disk)], check=True)
        before = dict(scraper.newest)
        measured.engine.kill()
        waiting = wire.forward_backward(model, 8, [datum()])
        wire.result(waiting)
        wire.result(wire.optim_step(model, 9))
        wanted = documented() - of_sglang() - ({"tinsmith_disk_size_bytes"} if disk is None else set())
        until(lambda: wanted <= scraper.moved(), 60)
    of = scraper.value
    # The engine reports once a second.
    assert until(
        lambda: bool(scraper.scrape()) and of("tinsmith_training_positions_total", kind="token") >= 16
    )
    there = {base_of(name) for name, _ in scraper.newest}
    assert there <= documented()
    assert wanted <= there
    assert wanted - scraper.moved() == set()
    done = {"state": "done", "tenant_class": "admin"}
    assert of("tinsmith_operations_total", kind="optim_step", **done) == 4
    assert of("tinsmith_operations_total", kind="sample", **done) == 2
    assert of("tinsmith_tokens_total", kind="trained") == 4 * 4  # datums of four tokens
    assert of("tinsmith_tokens_total", kind="sampled") == 2 * 8 * 160
    cached = of("tinsmith_tokens_total", kind="prefilled_cached")
    assert 0 < cached < 300
    assert of("tinsmith_tokens_total", kind="prefilled") == 2 * 300 - cached
    assert of("tinsmith_operation_device_seconds_count", kind="optim_step") == 4
    assert of("tinsmith_engine_lives_total") == 2
    assert of("tinsmith_disk_used_bytes", kind="checkpoints") > 0
    for (name, labels), value in before.items():
        if name.endswith(("_total", "_count")):
            assert scraper.newest[name, labels] >= value, f"{name} {labels} went back when the engine died"
    assert ALICE not in str(scraper.newest)
    assert model not in str(scraper.newest)
    wire.http.close()


def test_tenants_are_told_apart_by_their_class_alone(measured: ServerProcess) -> None:
    scraper, bob = Scraper(measured.url, TOKEN), Wire(measured.url, BOB)

    def sampled(tenant_class: str) -> bool:
        prompt, asked = {"tokens": [5, 6, 7]}, {"max_tokens": 2}
        bob.result(
            bob.post("asample", base_model="tiny", prompt=prompt, num_samples=1, sampling_params=asked)
        )
        scraper.scrape()
        labels = {"kind": "sample", "state": "done", "tenant_class": tenant_class}
        return scraper.value("tinsmith_operations_total", **labels) > 0

    assert sampled("standard")
    quota = [sys.executable, "-m", "tinsmith.server.cli", "keys", "quota", "bob", "--models", "3"]
    subprocess.run([*quota, "--data-dir", str(measured.data_dir)], check=True, capture_output=True)
    assert until(lambda: sampled("own_quota"), 30)
    assert "bob" not in str(scraper.newest)

    def usage(wire: Wire) -> dict:
        return wire.http.get("/api/v1/console/usage", params={"days": 1}).json()

    used = usage(bob)
    assert (used["all_tenants"], [each["tenant"] for each in used["tenants"]]) == (False, ["bob"])
    used = usage(Wire(measured.url, ALICE))
    assert (used["all_tenants"], [each["tenant"] for each in used["tenants"]]) == (True, ["alice", "bob"])
    assert used["tenants"][0]["trained"] == 4 * 4
    assert used["tenants"][1]["sampled"] >= 2


def test_the_scrape_token_opens_the_metrics_and_nothing_else(measured: ServerProcess) -> None:
    def status(path: str, key: str | None) -> int:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.get(f"{measured.url}{path}", headers=headers).status_code

    assert status("/metrics", TOKEN) == 200
    assert status("/metrics", ALICE) == status("/metrics", None) == status("/metrics", "scrape-you") == 401
    for path in ("/", "/api/v1/sessions", "/openapi.json", "/api/v1/console/overview"):
        assert status(path, TOKEN) == 401
        assert status(path, ALICE) == 200


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    named = {base_of(name) for query in queries for name in re.findall(r"tinsmith_\w+", query)}
    assert named <= documented()
    assert len(named) > 15
    examples = block("metrics.md", "# tokens trained")
    assert {base_of(name) for name in re.findall(r"tinsmith_\w+", examples)} <= documented()
    promql = pytest.importorskip("promql_parser")
    variables = re.compile(r"\$__?\w+")  # Grafana fills them in
    for query in [*queries, *re.findall("^[^#].*", examples, re.MULTILINE)]:
        promql.parse(variables.sub("5m", query))


def test_prometheus_scrapes_with_the_configuration_of_the_page(
    measured: ServerProcess, tmp_path: Path
) -> None:
    """The address, the path and the header that Prometheus makes of it."""
    (job,) = yaml.safe_load(block("metrics.md", "scrape_configs:"))["scrape_configs"]
    (target,) = (each for group in job["static_configs"] for each in group["targets"])
    host, _, port = target.partition(":")
    assert (host, port) == ("tinsmith.example.org", "8000")
    file = tmp_path / Path(job["authorization"]["credentials_file"]).name
    file.write_text(f"{TOKEN}\n")
    url = f"{job.get('scheme', 'http')}://127.0.0.1:{measured.port}{job.get('metrics_path', '/metrics')}"
    kind = job["authorization"].get("type", "Bearer")
    answer = httpx.get(url, headers={"Authorization": f"{kind} {file.read_text().strip()}"})
    assert answer.status_code == 200
    assert "tinsmith_engine_ready" in answer.text
