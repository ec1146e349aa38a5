"""Takes the console's pictures in docs/images: `make screenshots`. Needs Playwright and Chromium.

Starts a server with SmolLM2-135M, trains it on the demo's conversations, saves two sampler checkpoints on the
way, and visits the console's pages in headless Chromium.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx
import tinker
from playwright.sync_api import Page, sync_playwright
from tinker import types

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT / "demo"))

from local_server import running_server  # noqa: E402
from sft import MODEL, datum, mean_nll, read  # noqa: E402

KEY = "tml-pictures"
STEPS, BATCH = 24, 4
QUESTION = "How do I fix a hole in a rusty bucket?"  # not in the training data
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Trained:
    """A run with two sampler checkpoints: `early`, before it has learned, and `late`."""

    run: str
    early: str
    late: str


def train(url: str) -> Trained:
    service = tinker.ServiceClient(base_url=url, api_key=KEY, user_metadata={"data": "tinsmith.jsonl"})
    client = service.create_lora_training_client(base_model=MODEL, rank=16, seed=0).result()
    tokenizer = client.get_tokenizer()
    data = [datum(tokenizer, each) for each in read("tinsmith.jsonl")]
    held_out = [datum(tokenizer, each) for each in read("held_out.jsonl")[:BATCH]]
    reports = f"{url}/api/v1/training_runs/{client.model_id}/metrics"
    early = ""
    for step in range(1, STEPS + 1):
        passed = client.forward_backward(data[(step - 1) * BATCH : step * BATCH], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-3 * (1 - (step - 1) / STEPS))).result()
        passed.result()
        if step % 4 == 0:
            value = mean_nll(client.forward(held_out, "cross_entropy").result(), held_out)
            report = {"step": step, "metrics": {"held_out_nll": value}}
            httpx.post(reports, json=report, headers={"X-API-Key": KEY}).raise_for_status()
        if step == STEPS // 3:
            early = client.save_weights_for_sampler("early").result().path
    client.save_state("evening").result()
    return Trained(client.model_id, early, client.save_weights_for_sampler("late").result().path)


def take(page: Page, name: str) -> None:
    page.screenshot(path=IMAGES / f"console-{name}.png")


def visit(page: Page, trained: Trained) -> None:
    page.goto("/")
    page.fill("input[name=key]", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector(f"main section a:has-text('{trained.run}')")
    take(page, "overview")
    page.goto(f"/training_runs/{trained.run}")
    page.wait_for_selector(".charts h2:has-text('held_out_nll')")
    take(page, "run")
    page.keyboard.press("t")  # dark
    page.wait_for_selector(".chart canvas")
    take(page, "run-dark")
    page.keyboard.press("t")  # light
    page.goto("/checkpoints")
    page.wait_for_selector(f"tr:has-text('{trained.late}')")
    take(page, "checkpoints")
    page.goto(f"/sessions/{trained.run.partition(':')[0]}")
    page.wait_for_selector("svg.timeline rect")
    take(page, "session")
    page.goto(f"/playground?checkpoint={quote(trained.late, safe='')}")
    page.get_by_label("Model B").fill(trained.early)
    page.fill("#prompt", PROMPT)
    page.get_by_label("Colour").select_option("difference")
    page.click("#run")
    page.wait_for_selector(".text >> nth=1", timeout=600_000)
    take(page, "playground")
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"/training_runs/{trained.run}")
    page.wait_for_selector(".charts h2:has-text('held_out_nll')")
    take(page, "phone")


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with running_server(MODEL, print, "--api-key", f"alice={KEY}") as url:
        trained = train(url)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(
                base_url=url, viewport={"width": 1200, "height": 800}, color_scheme="light"
            )
            visit(page, trained)
            browser.close()


if __name__ == "__main__":
    main()
