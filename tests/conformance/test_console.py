"""The console in a browser: headless Chromium, a real server, a run that trains meanwhile."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from conformance.conftest import ALICE
from conformance.server_process import ServerProcess, Wire
from tinker.lib import console_urls

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt install chromium")

PAGES = ("/", "/training_runs", "/checkpoints", "/samplers", "/sessions", "/usage", "/playground")
HOSTILE = '<img src=x onerror="alert(1)">'


@dataclass
class Trained:
    """A session of alice's with a model that has made some steps, and its checkpoints."""

    wire: Wire
    session: str
    model: str
    steps: int = 0
    number: int = 0
    sampler: str = ""

    def step(self) -> None:
        for submit in (self.wire.forward_backward, self._optim_step):
            self.number += 1
            self.wire.result(submit(self.model, self.number))
        self.steps += 1

    def _optim_step(self, model: str, number: int) -> httpx.Response:
        return self.wire.optim_step(model, number, learning_rate=1e-2)

    def save(self, name: str) -> str:
        self.number += 1
        submitted = self.wire.post(
            "save_weights_for_sampler", model_id=self.model, seq_id=self.number, path=name
        )
        return self.wire.result(submitted)["path"]


@pytest.fixture(scope="module")
def trained(server: ServerProcess) -> Iterator[Trained]:
    wire = Wire(server.url, ALICE)
    session = wire.post(
        "create_session", tags=[HOSTILE], user_metadata={HOSTILE: HOSTILE}, sdk_version=HOSTILE
    ).json()["session_id"]
    run = Trained(wire, session, wire.model(session))
    for _ in range(3):
        run.step()
    run.sampler = run.save("first")
    yield run
    wire.http.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: sync_api.Browser, server: ServerProcess) -> Iterator[sync_api.Page]:
    """A tab without a key. Errors in its console, and whatever it loads from elsewhere, fail the test."""
    context = browser.new_context(base_url=server.url, viewport={"width": 1200, "height": 800})
    tab = context.new_page()
    problems: list[str] = []
    tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda asked: None if _is_own(asked.url, server) else problems.append(asked.url))
    tab.on("dialog", lambda dialog: problems.append(dialog.message) if dialog.type == "alert" else None)
    tab.set_default_timeout(60_000)
    yield tab
    context.close()
    assert not problems


def _is_own(url: str, server: ServerProcess) -> bool:
    return url.startswith((server.url, "data:", "blob:"))


@pytest.fixture
def console(page: sync_api.Page) -> sync_api.Page:
    """A tab in which the key has been given."""
    page.goto("/")
    page.fill("input[name=key]", ALICE)
    page.keyboard.press("Enter")
    page.wait_for_selector("#state.good")
    return page


def test_nothing_is_shown_without_a_key(page: sync_api.Page, trained: Trained) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(urlsplit(request.url).path))
    for path in (*PAGES, f"/training_runs/{trained.model}", f"/sessions/{trained.session}"):
        page.goto(path)
        page.wait_for_selector("form.login")
        assert trained.session not in page.content()
    assert not [path for path in asked if path.startswith("/api")]


def test_a_wrong_key_is_refused_and_not_kept(browser: sync_api.Browser, server: ServerProcess) -> None:
    tab = browser.new_page(base_url=server.url)
    tab.goto("/")
    tab.fill("input[name=key]", "tml-wrong")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("text=invalid API key")
    assert tab.evaluate("Object.keys(sessionStorage).length") == 0
    tab.close()


def test_a_key_stays_in_its_tab_until_it_is_forgotten(console: sync_api.Page) -> None:
    console.reload()
    console.wait_for_selector("#state.good")
    other = console.context.new_page()
    other.goto("/")
    other.wait_for_selector("form.login")
    console.click("#forget")
    console.wait_for_selector("form.login")
    assert console.evaluate("Object.keys(sessionStorage).length") == 0


def test_programs_get_json_and_browsers_a_page_that_runs_only_its_own_scripts(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url) as program:
        assert program.get("/").status_code == 401
        named = program.get("/", headers={"X-API-Key": ALICE}).json()
        assert named["name"] == "Tinsmith"
        page = program.get("/", headers={"Accept": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"})
        assert page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'" in policy
        assert "unsafe" not in policy
        assert "<script>" not in page.text
        assert " on" not in "".join(re.findall(r"<[a-z][^>]*>", page.text))
        again = program.get("/", headers={"Accept": "text/html", "If-None-Match": page.headers["etag"]})
        assert again.status_code == 304
        for path in ("/console/none.js", "/console/../app.py", "/console/%2e%2e/console_pages.py"):
            assert program.get(path).status_code in (401, 404)


def test_the_page_is_small(console: sync_api.Page, trained: Trained) -> None:
    """300 kB in all, with the library for charts."""
    console.goto("/")
    console.wait_for_selector("table")
    sizes = console.evaluate(
        "[...performance.getEntriesByType('resource'), ...performance.getEntriesByType('navigation')]"
        ".filter((each) => !each.name.includes('/api/')).map((each) => each.decodedBodySize)"
    )
    assert len(sizes) >= 5
    assert sum(sizes) <= 300_000


def test_curves_grow_while_a_run_trains(console: sync_api.Page, trained: Trained) -> None:
    console.goto(f"/training_runs/{trained.model}")
    console.wait_for_selector(f"#step:has-text('step {trained.steps}')")
    before = console.locator(".chart canvas").count()
    assert before >= 4
    titles = console.locator(".charts h2").all_inner_texts()
    for name in ("loss_per_token", "grad_norm", "learning_rate", "tokens_per_second"):
        assert any(title.startswith(name) for title in titles)
    for _ in range(3):
        trained.step()
    console.wait_for_selector(f"#step:has-text('step {trained.steps}, {trained.steps} points')")
    metrics = trained.wire.http.get(f"/api/v1/training_runs/{trained.model}/metrics").json()["points"]
    losses = [point["metrics"]["loss_per_token"] for point in metrics]
    assert losses[-1] < losses[0]
    shown = console.locator(".charts h2").first.inner_text().removeprefix("loss_per_token").strip()
    assert float(shown) == pytest.approx(losses[-1], rel=1e-3)
    report = f"/api/v1/training_runs/{trained.model}/metrics"
    reported = trained.wire.http.post(report, json={"step": trained.steps, "metrics": {"reward": 0.75}})
    assert reported.json() == {"status": "accepted"}
    console.wait_for_selector(".charts h2:has-text('reward 0.75')")
    console.get_by_label("by time").check()
    console.get_by_label("logarithmic").check()
    assert console.locator(".chart canvas").count() == before + 1


def test_reports_that_are_wrong_are_refused_by_the_name_of_their_field(trained: Trained) -> None:
    path = f"/api/v1/training_runs/{trained.model}/metrics"
    for body, named in (
        ({"step": -1, "metrics": {"reward": 1.0}}, "step"),
        ({"step": 1, "metrics": {"reward": "high"}}, "metrics.reward"),
        ({"step": 1, "metrics": {}}, "metrics"),
        ({"step": 1, "metrics": {f"m{at}": 1.0 for at in range(65)}}, "metrics"),
    ):
        answer = trained.wire.http.post(path, json=body)
        assert answer.status_code == 422
        assert named in answer.json()["detail"]
    answer = trained.wire.http.get(path, params={"cursor": "x"})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("cursor: ")


def test_text_of_clients_is_never_markup(console: sync_api.Page, trained: Trained) -> None:
    for path in ("/sessions", f"/sessions/{trained.session}"):
        console.goto(path)
        console.wait_for_selector(f"main :text('{HOSTILE}')")
        assert console.locator("main img").count() == 0
    assert console.locator("svg.timeline rect").count() >= 6


def test_a_checkpoint_is_downloaded_kept_published_and_deleted(
    console: sync_api.Page, trained: Trained
) -> None:
    doomed = trained.save("doomed")
    console.goto("/checkpoints")
    row = console.locator(f"tr:has-text('{doomed}')")
    with console.expect_download() as downloading:
        row.get_by_text("Download").click()
    with tarfile.open(fileobj=io.BytesIO(Path(downloading.value.path()).read_bytes())) as archive:
        assert "adapter_config.json" in {Path(name).name for name in archive.getnames()}
    console.once("dialog", lambda dialog: dialog.accept("48"))
    row.get_by_text("Expiry").click()
    console.wait_for_selector("text=The expiry is set.")
    console.once("dialog", lambda dialog: dialog.accept())
    row.get_by_text("Publish", exact=True).click()
    row.get_by_text("Unpublish").wait_for()
    listed = trained.wire.http.get("/api/v1/checkpoints").json()["checkpoints"]
    (found,) = [each for each in listed if each["tinker_path"] == doomed]
    assert found["public"]
    assert found["expires_at"] is not None
    console.once("dialog", lambda dialog: dialog.dismiss())
    row.get_by_text("Delete").click()
    console.once("dialog", lambda dialog: dialog.accept())
    row.get_by_text("Delete").click()
    row.wait_for(state="detached")
    listed = trained.wire.http.get("/api/v1/checkpoints").json()["checkpoints"]
    assert doomed not in [each["tinker_path"] for each in listed]


def test_the_playground_compares_two_models_token_by_token(console: sync_api.Page, trained: Trained) -> None:
    link = urlsplit(console_urls.checkpoint_playground_url(trained.sampler))
    console.goto(f"{link.path}?{link.query}")
    console.fill("#prompt", "Hello")
    console.fill("#tokens", "12")
    console.keyboard.press("Tab")
    console.click("#run")
    console.wait_for_selector(".text >> nth=1")
    assert console.get_by_label("Model A").input_value() == trained.sampler
    assert console.get_by_label("Model B").input_value() == "tiny"
    asked = {"text": "Hello", "sampling_params": {"max_new_tokens": 12, "temperature": 0}}
    sampled = [
        trained.wire.http.post("/generate", json=asked | {"model": model}).json()["text"]
        for model in (trained.sampler, "tiny")
    ]
    shown = console.locator(".text").all_inner_texts()
    assert [text.strip() for text in shown] == [text.strip() for text in sampled]
    pieces = console.locator(".text").nth(0).locator("span")
    assert "by the other model" in (pieces.nth(0).get_attribute("title") or "")
    if sampled[0] != sampled[1]:
        assert console.locator(".text span.differs").count() > 0
    console.get_by_label("Colour").select_option("difference")
    assert "color-mix" in console.locator(".text span").first.evaluate("(span) => span.style.background")


def test_links_that_the_sdk_prints_lead_to_their_pages(console: sync_api.Page, trained: Trained) -> None:
    run, checkpoint = trained.sampler.removeprefix("tinker://").split("/", 1)
    for url, text in (
        (console_urls.sessions_console_url(), trained.session[:12]),
        (console_urls.session_console_url(trained.session), trained.session),
        (console_urls.training_run_console_url(trained.model), trained.model),
        (console_urls.checkpoint_console_url(run, checkpoint), trained.sampler),
    ):
        console.goto(urlsplit(url).path)
        console.wait_for_selector(f"main :text('{text}')")


def test_every_page_fits_a_phone_and_is_reached_by_keyboard(console: sync_api.Page, trained: Trained) -> None:
    for number, path in enumerate(PAGES, 1):
        console.keyboard.press(str(number))
        console.wait_for_url(f"**{path}")
        console.wait_for_selector("main h1")
    console.keyboard.press("1")
    console.wait_for_selector(f"main section a:has-text('{trained.model}')")
    console.keyboard.press("t")
    assert console.evaluate("document.documentElement.dataset.theme") == "dark"
    console.goto(f"/training_runs/{trained.model}")
    console.wait_for_selector(".chart canvas")
    console.set_viewport_size({"width": 390, "height": 800})
    for path in (*PAGES, f"/training_runs/{trained.model}", f"/sessions/{trained.session}"):
        console.goto(path)
        console.wait_for_selector("main h1")
        wide = console.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, path


def test_the_api_is_documented_offline(console: sync_api.Page) -> None:
    console.goto("/docs")
    console.wait_for_selector("[data-path='/api/v1/forward_backward']")


def test_an_overview_streams_what_changes(server: ServerProcess, trained: Trained) -> None:
    headers = {"X-API-Key": ALICE}
    with httpx.stream("GET", f"{server.url}/api/v1/console/events", headers=headers, timeout=60) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data: "))
        first = next(lines)
        assert '"owner":"alice"' in first
        trained.step()
        assert any(trained.model in line for line in lines)
