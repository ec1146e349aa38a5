"""Every metric of docs/metrics.md is there under load, and moves."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from conformance.conftest import ALICE
from conformance.server_process import ServerProcess, Wire, datum
from docs.pages import block
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text()
DASHBOARD = ROOT / "deploy" / "grafana" / "tinsmith.json"
TOKEN = "scrape-me"
# What stays as it is on a machine without an accelerator, whose SGLang server never answers.
CONSTANT = {
    "tinsmith_disk_size_bytes",
    "tinsmith_device_memory_capacity_bytes",
    "tinsmith_device_memory_planned_bytes",
    "tinsmith_host_memory_waiting_bytes",
    "tinsmith_sglang_up",
    "tinsmith_sglang_samples_total",
}
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def documented() -> set[str]:
    """The names in the page's table."""
    return set(re.findall(r"^\| `(tinsmith_\w+)`", PAGE, re.MULTILINE))


def base_of(sample: str) -> str:
    """The name under which a sample is documented: histograms without the suffixes of their series."""
    name = re.sub(r"_(bucket|sum|count)$", "", sample)
    return name if name in documented() else sample


class Scraper:
    """Prometheus, in a hurry."""

    def __init__(self, url: str):
        self._url = url
        self.seen: defaultdict[tuple, set[float]] = defaultdict(set)
        self.newest: Samples = {}

    def scrape(self) -> Samples:
        answer = httpx.get(f"{self._url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30)
        assert answer.status_code == 200
        found = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
            if not sample.name.endswith("_created")
        }
        for key in self.seen.keys() | found.keys():
            self.seen[key].add(found.get(key, 0.0))
        self.newest = found
        return found

    def value(self, name: str, **labels: str) -> float:
        return self.newest.get((name, tuple(sorted(labels.items()))), 0.0)

    def moved(self) -> set[str]:
        return {base_of(name) for (name, _), values in self.seen.items() if len(values) > 1}

    @contextmanager
    def all_the_time(self) -> Iterator[None]:
        over = threading.Event()

        def scrape() -> None:
            while not over.wait(0.1):
                self.scrape()

        thread = threading.Thread(target=scrape)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@pytest.fixture(scope="module")
def measured(make_server: Callable[..., ServerProcess]) -> ServerProcess:
    running = make_server(
        *("--api-key", f"alice={ALICE}", "--sglang", "http://127.0.0.1:9"),
        TINSMITH_METRICS_TOKEN=TOKEN,
        TINSMITH_SNAPSHOT_OPERATIONS="4",
    )
    return running.start()


def until(condition: Callable[[], bool], seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
    return condition()


def test_every_metric_of_the_page_is_there_and_moves(measured: ServerProcess) -> None:
    scraper, wire = Scraper(measured.url), Wire(measured.url, ALICE)
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
        before = dict(scraper.newest)
        measured.engine.kill()
        waiting = wire.forward_backward(model, 8, [datum()])
        wire.result(waiting)
        wire.result(wire.optim_step(model, 9))
        wanted = documented() - CONSTANT
        until(lambda: wanted <= scraper.moved(), 60)
    of = scraper.value
    # The engine reports once a second.
    assert until(
        lambda: bool(scraper.scrape()) and of("tinsmith_training_positions_total", kind="token") >= 16
    )
    assert {base_of(name) for name, _ in scraper.newest} == documented()
    assert wanted - scraper.moved() == set()
    assert of("tinsmith_operations_total", kind="optim_step", state="done") == 4
    assert of("tinsmith_operations_total", kind="sample", state="done") == 2
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
