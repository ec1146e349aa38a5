"""The console in a browser: headless Chromium, a real server, a run that trains meanwhile."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from conformance.browser import give_key, needs_chromium, running_browser, sync_api, tab
from conformance.conftest import ALICE, BOB
from conformance.server_process import ServerProcess, Wire, datum, tensor
from tinker.lib import console_urls

pytestmark = needs_chromium

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

    def step(self, learning_rate: float = 1e-2) -> None:
        self.number += 2
        self.wire.result(self.wire.forward_backward(self.model, self.number - 1))
        self.wire.result(self.wire.optim_step(self.model, self.number, learning_rate=learning_rate))
        self.steps += 1

    def reinforce(self) -> float:
        """A step on rewards; returns its KL divergence per token, as the trainer's own metrics have it."""
        rewarded = datum(logprobs=tensor([-3.0] * 4), advantages=tensor([1.0, -1.0, 0.5, 0.25]))
        del rewarded.loss_fn_inputs["weights"]
        self.number += 2
        passed = self.wire.forward_backward(self.model, self.number - 1, [rewarded], "importance_sampling")
        metrics = self.wire.result(passed)["metrics"]
        self.wire.result(self.wire.optim_step(self.model, self.number, learning_rate=1e-3))
        self.steps += 1
        return metrics["kl_sampled:sum"] / 4

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
    with running_browser() as started:
        yield started


@pytest.fixture
def page(browser: sync_api.Browser, server: ServerProcess) -> Iterator[sync_api.Page]:
    """A tab without a key."""
    with tab(browser, server.url) as page:
        yield page


@pytest.fixture
def console(page: sync_api.Page) -> sync_api.Page:
    """A tab in which the key has been given."""
    give_key(page, ALICE)
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
    for name in ("loss_per_token", "grad_norm", "learning_rate", "tokens_per_second"):
        assert any(title.startswith(name) for title in titles(console))
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
    kl = trained.reinforce()
    console.wait_for_selector(f"#step:has-text('step {trained.steps}, ')")
    heading = console.locator(".charts h2:has-text('kl_per_token')").inner_text()
    assert float(heading.removeprefix("kl_per_token")) == pytest.approx(kl, rel=1e-3)
    shown = {name: value for name, _, value in (each.partition(" ") for each in titles(console))}
    newest = trained.wire.http.get(f"/api/v1/training_runs/{trained.model}/metrics").json()["points"][-1]
    for name in ("grad_norm", "learning_rate", "tokens_per_second"):
        assert float(shown[name]) == pytest.approx(newest["metrics"][name], rel=1e-3)
    before = console.locator(".chart canvas").count() - 1
    console.get_by_label("by time").check()
    console.get_by_label("logarithmic").check()
    assert console.locator(".chart canvas").count() == before + 1


def titles(console: sync_api.Page) -> list[str]:
    """The names of the curves, each with its newest value."""
    return console.locator(".charts h2").all_inner_texts()


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


def test_the_playground_marks_where_two_checkpoints_differ(console: sync_api.Page, trained: Trained) -> None:
    for _ in range(6):
        trained.step(learning_rate=0.2)
    models = [trained.sampler, trained.save("later")]
    asked = {"sampling_params": {"max_new_tokens": 12, "temperature": 0}, "return_logprob": True}

    def generate(model: str, **body: object) -> dict:
        answer = trained.wire.http.post("/generate", json=asked | {"model": model} | body)
        return answer.json()

    answers = [generate(model, text="Hello", logprob_start_len=0) for model in models]
    drawn = [[token for _, token, _ in each["meta_info"]["output_token_logprobs"]] for each in answers]
    assert drawn[0] != drawn[1]

    link = urlsplit(console_urls.checkpoint_playground_url(models[0]))
    console.goto(f"{link.path}?{link.query}")
    assert console.get_by_label("Model A").input_value() == models[0]
    assert console.get_by_label("Model B").input_value() == "tiny"
    console.get_by_label("Model B").fill(models[1])
    console.fill("#prompt", "Hello")
    console.fill("#tokens", "12")
    console.keyboard.press("Tab")
    console.click("#run")
    console.wait_for_selector(".text >> nth=1")
    shown = console.locator(".text").all_inner_texts()
    assert [text.strip() for text in shown] == [each["text"].strip() for each in answers]
    common = 0
    while drawn[0][common] == drawn[1][common]:
        common += 1
    for mine, other, side in ((0, 1, "A"), (1, 0, "B")):
        card = console.locator(f"section.card:has-text('{side}: {models[mine]}')")
        differing = [at for at, pair in enumerate(zip(*drawn, strict=False)) if pair[0] != pair[1]]
        differing += range(len(drawn[other]), len(drawn[mine]))
        marked = card.locator(".text span").evaluate_all(
            "(spans) => spans.flatMap((span, at) => span.classList.contains('differs') ? [at] : [])"
        )
        assert marked == differing
        assert f"the first {common}" in card.inner_text()
        prompt = [token for _, token, _ in answers[mine]["meta_info"]["input_token_logprobs"]]
        scored = generate(
            models[other],
            input_ids=prompt + drawn[mine],
            logprob_start_len=len(prompt) - 1,
            sampling_params={"max_new_tokens": 0, "temperature": 1},
        )
        own = answers[mine]["meta_info"]["output_token_logprobs"][0][0]
        others = scored["meta_info"]["input_token_logprobs"][1][0]
        title = card.locator(".text span").first.get_attribute("title") or ""
        said = re.search(r"log-prob (\S+), by the other model (\S+)", title)
        assert said is not None, title
        assert [float(each) for each in said.groups()] == pytest.approx([own, others], rel=1e-3)
        console.get_by_label("Colour").select_option("difference")
        background = card.locator(".text span").first.evaluate("(span) => span.style.background")
        assert ("var(--a)" if own >= others else "var(--b)") in background
        console.get_by_label("Colour").select_option("own")
        assert "var(--bad)" in card.locator(".text span").first.evaluate("(span) => span.style.background")


def test_the_overview_shows_the_queue_memory_and_compilations(
    console: sync_api.Page, trained: Trained
) -> None:
    def card(title: str) -> sync_api.Locator:
        return console.locator(f"section.card:has(h2:text-is('{title}'))")

    console.wait_for_selector(f"main section a:has-text('{trained.model}')")
    seen = trained.wire.http.get("/api/v1/console/overview").json()
    held = seen["memory"]["held_bytes"]
    rows = dict(
        card("Device memory")
        .locator("tbody tr")
        .evaluate_all("(rows) => rows.map((row) => [row.cells[0].innerText, row.cells[1].innerText])")
    )
    assert len(rows) == len(held)
    for kind, name in (("base", "base models"), ("tenants", "models in training"), ("kv_pages", "KV cache")):
        assert rows[name] == iec(held[kind])
    compiled = seen["compilations"]
    assert card("Compilations").locator(".number").inner_text() == str(compiled["count"])
    assert f"{compiled['from_cache']} read from the cache" in card("Compilations").inner_text()
    assert "ready" in card("Engine").inner_text()
    assert "GiB free" in card("Disk").inner_text()
    assert "No operation of yours is waiting." in card("Queue").inner_text()
    early = trained.wire.optim_step(trained.model, trained.number + 2)  # the number before it is missing
    row = card("Queue").locator(f"tr:has-text('{trained.model}')")
    row.wait_for()
    assert row.locator("td").nth(1).inner_text() == "1"
    trained.number += 2
    trained.wire.result(trained.wire.forward_backward(trained.model, trained.number - 1))
    trained.wire.result(early)
    trained.steps += 1
    card("Queue").locator("text=No operation of yours is waiting.").wait_for()


def iec(size: float) -> str:
    """Bytes as the console writes them."""
    units = ["B", "KiB", "MiB", "GiB"]
    while size >= 1024:
        size /= 1024
        units.pop(0)
    return f"{round(size) if size >= 100 or units[0] == 'B' else f'{size:.1f}'} {units[0]}"


def test_samplers_and_usage(console: sync_api.Page, trained: Trained, server: ServerProcess) -> None:
    wire = trained.wire
    session = wire.post(
        "create_sampling_session",
        session_id=trained.session,
        sampling_session_seq_id=0,
        model_path=trained.sampler,
    ).json()["sampling_session_id"]
    console.goto("/samplers")
    row = console.locator(f"tr:has-text('{session}')")
    row.wait_for()
    assert row.locator("td").nth(1).inner_text() == trained.sampler
    assert row.locator("td").nth(2).inner_text() == "tiny"
    assert "You have registered none." in console.inner_text("main")

    bob = Wire(server.url, BOB)
    prompt = {"tokens": [5, 6, 7]}
    bob.result(bob.post("asample", base_model="tiny", prompt=prompt, num_samples=1, sampling_params={}))
    console.goto("/usage")
    console.wait_for_selector("h2:text-is('By tenant')")
    used = {each["tenant"]: each for each in wire.http.get("/api/v1/console/usage").json()["tenants"]}
    assert used["bob"]["sampled"] > 0

    def cells(title: str, row: str) -> list[str]:
        card = console.locator(f"section.card:has(h2:text-is('{title}'))")
        return card.locator(f"tr:has(td:text-is('{row}')) td").all_inner_texts()[1:]

    kinds = ("trained", "prefilled", "prefilled_cached", "sampled", "checkpoints")
    assert cells("By tenant", "bob") == [f"{used['bob'][kind]:,}" for kind in kinds]
    alices = [f"{used['alice'][kind]:,}" for kind in kinds]
    assert cells("By tenant", "alice") == alices
    assert cells("By base model", "tiny") == alices
    assert int(alices[0].replace(",", "")) >= 4 * trained.steps
    number, size = cells("Checkpoints stored", "default")
    assert int(number) >= 1
    assert size.endswith("iB")


def test_others_than_administrators_see_their_own_usage_alone(page: sync_api.Page, trained: Trained) -> None:
    give_key(page, BOB)
    page.goto("/usage")
    page.wait_for_selector("h1:has-text('Usage of bob')")
    assert page.locator("h2:text-is('By tenant')").count() == 0
    assert "alice" not in page.inner_text("body")


def test_text_can_be_read_in_the_dark_and_in_the_light(console: sync_api.Page, trained: Trained) -> None:
    """The system decides until `t` is pressed, which is remembered. WCAG asks for a contrast of 4.5."""
    grounds = {}
    for scheme in ("light", "dark"):
        console.emulate_media(color_scheme=scheme)
        grounds[scheme] = console.evaluate("getComputedStyle(document.body).backgroundColor")
    assert luminance(grounds["dark"]) < 0.1 < 0.8 < luminance(grounds["light"])
    for theme in ("dark", "light"):
        console.keyboard.press("t")
        assert console.evaluate("document.documentElement.dataset.theme") == theme
        for path in ("/", f"/training_runs/{trained.model}", "/usage"):
            console.goto(path)
            console.wait_for_selector("main .card")
            assert console.evaluate("getComputedStyle(document.body).backgroundColor") == grounds[theme]
            pairs = console.evaluate(COLOURS_OF_TEXT)
            assert len(pairs) > 20
            for color, ground, html in pairs:
                lighter, darker = sorted((luminance(color), luminance(ground)), reverse=True)
                assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (theme, path, html)


# Of each element with text of its own: its colour, that behind it, and the element.
COLOURS_OF_TEXT = """() => {
  const style = (element, name) => getComputedStyle(element)[name];
  const isText = (node) => node.nodeType === 3 && node.data.trim();
  const hasText = (element) => [...element.childNodes].some(isText);
  return [...document.querySelectorAll("main *, header *")].filter(hasText).map((element) => {
    let behind = element;
    while (style(behind, "backgroundColor") === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    return [style(element, "color"), style(behind, "backgroundColor"), element.outerHTML];
  });
}"""


def luminance(color: str) -> float:
    """The relative luminance of WCAG 2, of `rgb(...)`."""
    channels = [int(each) / 255 for each in re.findall(r"\d+", color)[:3]]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


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
        fits = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        console.wait_for_function(fits)  # it may be drawn again when its data is there


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
