"""A Prometheus in a hurry, and the metrics that docs/metrics.md promises."""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

PAGE = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def documented() -> set[str]:
    """The names in the page's table."""
    return set(re.findall(r"^\| `(tinsmith_\w+)`", PAGE, re.MULTILINE))


def base_of(sample: str) -> str:
    """The name under which a sample is documented: histograms without the suffixes of their series."""
    name = re.sub(r"_(bucket|sum|count)$", "", sample)
    return name if name in documented() else sample


def of_sglang() -> set[str]:
    """The metrics that only a real SGLang moves, in tests/sglang."""
    return {name for name in documented() if name.startswith(("tinsmith_sglang_", "tinsmith_sampler_"))}


class Scraper:
    """Scrapes a server's metrics, and keeps the values that each series has had."""

    def __init__(self, url: str, key: str):
        self._url, self._headers = url, {"Authorization": f"Bearer {key}"}
        self.seen: defaultdict[tuple, set[float]] = defaultdict(set)
        self.newest: Samples = {}

    def scrape(self) -> Samples:
        answer = httpx.get(f"{self._url}/metrics", headers=self._headers, timeout=30)
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
