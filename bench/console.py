"""Measures what an open console costs: `python bench/console.py`. Needs Playwright and Chromium.

A client trains steps at a steady rate, in turns with and without a browser that shows the run and the
overview. Prints, as JSON, the time to the first contentful paint, the bytes of the page, and the CPU seconds
per second of the server's process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import psutil
import tinker
from latency import start
from playwright.sync_api import Page, sync_playwright
from tinker import types


def train(url: str, run_id: list[str], steps_per_second: float, over: threading.Event) -> None:
    service = tinker.ServiceClient(base_url=url, api_key="tml-local")
    client = service.create_lora_training_client(base_model="base", rank=8).result()
    run_id.append(client.model_id)
    tokens = list(range(10, 42))
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )
    while not over.is_set():
        began = time.monotonic()
        passed = client.forward_backward([datum], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-4)).result()
        passed.result()
        over.wait(max(0.0, 1 / steps_per_second - (time.monotonic() - began)))


def cpu(process: psutil.Process, seconds: float) -> float:
    """CPU seconds per second of a process, over so many seconds."""

    def used() -> float:
        times = process.cpu_times()
        return times.user + times.system

    began, before = time.monotonic(), used()
    time.sleep(seconds)
    return (used() - before) / (time.monotonic() - began)


def paint(page: Page, url: str) -> float:
    """Milliseconds to the first contentful paint."""
    page.goto(url)
    page.wait_for_selector("main table")
    entry = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
    page.wait_for_function(entry)
    return page.evaluate(entry)


def size(page: Page) -> int:
    """Bytes of the page and its files."""
    return page.evaluate(
        "[...performance.getEntriesByType('resource'), ...performance.getEntriesByType('navigation')]"
        ".filter((each) => !each.name.includes('/api/')).reduce((sum, each) => sum + each.decodedBodySize, 0)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps-per-second", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server, url = start(asked.model, Path(folder) / "data")
        over, run_id = threading.Event(), []
        try:
            trainer = threading.Thread(
                target=train, args=(url, run_id, asked.steps_per_second, over), daemon=True
            )
            trainer.start()
            time.sleep(20)  # compiles
            process = psutil.Process(server.pid)
            chromium = shutil.which("chromium") or shutil.which("google-chrome")
            paints, sizes, alone, watched = [], [], [], []
            with sync_playwright() as playwright:
                for _ in range(asked.turns):
                    alone.append(cpu(process, asked.seconds))
                    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                    overview, run = browser.new_page(), browser.new_page()
                    paints.append(paint(overview, url))
                    sizes.append(size(overview))
                    run.goto(f"{url}/training_runs/{run_id[0]}")
                    run.wait_for_selector(".chart canvas")
                    watched.append(cpu(process, asked.seconds))
                    browser.close()
        finally:
            over.set()
            server.terminate()
            server.wait(60)
    print(
        json.dumps(
            {
                "first_contentful_paint_ms": [round(each) for each in paints],
                "page_bytes": max(sizes),
                "server_cpu_alone": round(statistics.median(alone), 4),
                "server_cpu_with_two_pages_open": round(statistics.median(watched), 4),
                "difference": round(statistics.median(watched) - statistics.median(alone), 4),
            }
        )
    )


if __name__ == "__main__":
    main()
