// The console: pages made of the server's JSON. Text from the server is only ever set as text, never as markup.

const KEY = "tinsmith-key";
const main = document.getElementById("main");
const state = document.getElementById("state");
const forget = document.getElementById("forget");

// --- elements

function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const card = (title, ...children) => h("section", { class: "card" }, title ? h("h2", {}, title) : null, ...children);
const link = (path, text) => h("a", { href: path }, text);
const part = (id) => encodeURIComponent(id).replaceAll("%3A", ":");
const runLink = (id, name) => link(`/training_runs/${part(id)}`, name ?? id);

function table(heads, rows, nothing = "Nothing here yet.") {
  if (!rows.length) return h("p", { class: "quiet" }, nothing);
  const head = heads.map((each) => h("th", each.endsWith("#") ? { class: "n" } : {}, each.replace("#", "")));
  const body = rows.map((cells) =>
    h("tr", {}, cells.map((cell, at) => h("td", heads[at].endsWith("#") ? { class: "n" } : {}, cell ?? "–"))));
  return h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
}

function facts(pairs) {
  return h("dl", { class: "facts" }, Object.entries(pairs).filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

function say(text, ok = false) {
  const message = h("div", ok ? { class: "ok" } : {}, text);
  document.getElementById("messages").append(message);
  setTimeout(() => message.remove(), ok ? 4000 : 12000);
}

// --- numbers and times

const number = (value) => (value === null || value === undefined ? "–"
  : Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(2)
  : String(+value.toPrecision(5)));

function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  for (; value >= 1024 && at < units.length - 1; at += 1) value /= 1024;
  return `${value >= 100 || at === 0 ? Math.round(value) : value.toFixed(1)} ${units[at]}`;
}

function ago(iso) {
  if (!iso) return "–";
  const seconds = (Date.now() - Date.parse(iso)) / 1000;
  const [size, unit] = seconds < 90 ? [1, "s"] : seconds < 5400 ? [60, "min"] : seconds < 129600 ? [3600, "h"] : [86400, "d"];
  return h("time", { dateTime: iso, title: new Date(iso).toLocaleString() }, `${Math.max(0, Math.round(seconds / size))} ${unit} ago`);
}

const until = (iso) => (iso ? h("time", { dateTime: iso }, new Date(iso).toLocaleString()) : "never");

// --- the API

class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function authorised(headers = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...headers, "X-API-Key": key } : headers;
}

async function api(path, { method = "GET", body, signal } = {}) {
  const answer = await fetch(path, {
    method, signal, headers: authorised(body === undefined ? {} : { "Content-Type": "application/json" }),
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const read = await answer.json().catch((error) => {
    if (error.name === "AbortError") throw error;
    return {};
  });
  if (!answer.ok) throw new ApiError(answer.status, read.detail ?? `${answer.status} ${answer.statusText}`);
  return read;
}

// --- what is live: one stream of the overview for all pages

let overview = null;
let listeners = new Set();
let stream = null;

async function follow() {
  stream?.abort();
  const mine = (stream = new AbortController());
  while (!mine.signal.aborted) {
    try {
      const answer = await fetch("/api/v1/console/events", { headers: authorised(), signal: mine.signal });
      if (answer.status === 401) return locked("");
      if (!answer.ok) throw new ApiError(answer.status, (await answer.json()).detail);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = ""; ;) {
        const { value, done } = await reader.read();
        if (done) break;
        const events = (rest + value).split("\n\n");
        rest = events.pop();
        for (const event of events) {
          const data = event.split("\n").find((line) => line.startsWith("data: "));
          if (data) heard(JSON.parse(data.slice(6)));
        }
      }
    } catch (error) {
      if (mine.signal.aborted) return;
    }
    state.textContent = "not connected";
    state.className = "bad";
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

function heard(news) {
  const before = overview;
  overview = news;
  const { phase, text } = news.engine;
  state.textContent = phase === "ready" && news.queue.all_tenants ? "working" : phase;
  state.className = phase === "ready" ? "good" : phase === "dead" ? "bad" : "warn";
  state.title = text;
  for (const listener of listeners) listener(news, before);
}

function changedRuns(news, before) {
  return Object.keys(news.revisions).filter((id) => news.revisions[id] !== before?.revisions[id]);
}

// Calls `refresh` soon after it is asked to, never twice at once.
function soon(refresh, milliseconds) {
  let due = false, running = false;
  return async function ask() {
    if (running) return void (due = true);
    running = true;
    await new Promise((resolve) => setTimeout(resolve, milliseconds));
    try { await refresh(); } catch (error) { if (error.name !== "AbortError") say(error.message); }
    running = false;
    if (due) { due = false; ask(); }
  };
}

// --- charts

let charts = [];
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function chart(place, title, byTime, log) {
  const sync = uPlot.sync("steps");
  const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
  const value = h("span", { class: "quiet" });
  const box = h("div", { class: "chart" });
  place.append(card(null, h("h2", {}, title, " ", value), box));
  const plot = new uPlot({
    width: Math.max(200, box.clientWidth), height: 190, cursor: { sync: { key: sync.key } },
    scales: { x: { time: byTime }, y: { distr: log ? 3 : 1 } },
    axes: [{ ...axis }, { ...axis, size: 62, values: (_, splits) => splits.map((each) => (each === null ? "" : number(each))) }],
    series: [{}, { stroke: colour("--accent"), width: 1.5, spanGaps: true, points: { show: (it) => it.data[1].length < 30 } }],
    hooks: { setLegend: [(it) => { const at = it.legend.idxs?.[1]; value.textContent = at === null || at === undefined ? value.dataset.last ?? "" : number(it.data[1][at]); }] },
  }, [[], []], box);
  charts.push(plot);
  return {
    set(x, y) {
      const last = y.findLast((each) => each !== null);
      value.dataset.last = value.textContent = number(last);
      plot.root.querySelector(".u-over").setAttribute("aria-label", `${title}, now ${number(last)}`);
      plot.setData([x, log ? y.map((each) => (each > 0 ? each : null)) : y]);
    },
  };
}

addEventListener("resize", () => {
  for (const plot of charts) {
    const width = plot.root.parentElement.clientWidth;
    if (width) plot.setSize({ width, height: 190 });
  }
});

// --- pages

const FIRST = ["loss_per_token", "forward/loss_per_token", "kl_per_token", "reward", "rlve/reward_mean", "grad_norm",
  "learning_rate", "tokens_per_second"];

function waiting() {
  const { queue } = overview ?? { queue: { models: [], samples: 0, all_tenants: 0 } };
  return [
    table(["Model", "Waiting#"], [
      ...queue.models.map((each) => [runLink(each.id, each.name), each.waiting]),
      ...(queue.samples ? [["samples", queue.samples]] : []),
    ], "No operation of yours is waiting."),
    h("p", { class: "quiet" }, `All tenants: ${queue.all_tenants} waiting`),
  ];
}

function runRows(runs) {
  return runs.map((run) => [
    runLink(run.id, run.name), run.base_model, run.lora_rank ?? "full", status(run), run.step, number(run.metrics.loss_per_token ?? run.metrics["forward/loss_per_token"]),
    number(run.metrics.tokens_per_second), ago(run.last_request_at),
  ]);
}

const RUN_HEADS = ["Run", "Base model", "Rank#", "State", "Step#", "Loss per token#", "Tokens/s#", "Last request"];

function status(run) {
  const isHere = overview?.resident_models.includes(run.id);
  const text = run.state === "ready" ? (isHere ? "in the engine" : "saved") : run.state;
  return h("span", { class: run.state === "failed" ? "bad" : isHere ? "good" : "quiet" }, text);
}

const MEMORY = { base: "base models", programs: "programs", tenants: "models in training", zeros: "gradients under way",
  sampler_adapters: "samplers' weights", sampler_stacks: "samplers' weights, side by side", kv_pages: "KV cache" };

function memoryCard(news) {
  if (!news.memory) return null;
  const { capacity_bytes: capacity, held_bytes: held } = news.memory;
  const kinds = Object.entries(held).sort((a, b) => b[1] - a[1]);
  const total = capacity || kinds.reduce((sum, [, size]) => sum + size, 0);
  return card("Device memory", table(["Kind", "Bytes#", ""], kinds.map(([kind, size]) =>
    [MEMORY[kind] ?? kind.replaceAll("_", " "), bytes(size), h("meter", { min: 0, max: total || 1, value: size, title: kind })])));
}

function compilationCard(news) {
  const found = news.compilations;
  if (!found) return null;
  return card("Compilations", h("div", { class: "number" }, String(found.count)),
    h("p", { class: "quiet" }, `${number(found.seconds)} s; ${found.from_cache} read from the cache`));
}

async function overviewPage(signal) {
  const cards = h("div", { class: "grid" }), runs = h("section", { class: "card" });
  main.replaceChildren(h("h1", {}, "Overview"), cards, runs);
  const draw = (news) => {
    const { engine, disk } = news;
    const kinds = Object.entries(disk ?? {}).filter(([kind]) => !kind.endsWith("_bytes"));
    cards.replaceChildren(...[
      card("Engine", h("div", { class: `number ${engine.ready ? "good" : "warn"}` }, engine.phase),
        h("p", { class: "quiet" }, engine.text), h("p", { class: "quiet" }, `${engine.lives > 1 ? `started ${engine.lives} times; ` : ""}Tinsmith ${news.version}; tenant ${news.owner}`)),
      card("Queue", ...waiting()),
      memoryCard(news), compilationCard(news),
      disk && card("Disk", h("div", { class: "number" }, `${bytes(disk.free_bytes)} free`),
        h("meter", { min: 0, max: disk.total_bytes, value: disk.total_bytes - disk.free_bytes, title: "used" }),
        table(["Kind", "Bytes#"], kinds.map(([kind, size]) => [kind, bytes(size)]))),
    ].filter(Boolean));
  };
  const refresh = async () => {
    const found = await api("/api/v1/console/runs?limit=20", { signal });
    runs.replaceChildren(h("h2", {}, "Newest runs"), table(RUN_HEADS, runRows(found.runs),
      "No runs yet. Point a client at this server and train: its curves appear here."));
  };
  const again = soon(refresh, 1500);
  listeners.add((news, before) => { draw(news); if (changedRuns(news, before).length) again(); });
  if (overview) draw(overview);
  await refresh();
}

async function runsPage(signal) {
  const filter = h("input", { type: "search", placeholder: "Filter ( / )", ariaLabel: "Filter runs" });
  const place = h("section", { class: "card" }), more = h("button", { type: "button" }, "Older");
  let shown = 50, found = { runs: [], total: 0 };
  main.replaceChildren(h("h1", {}, "Runs"), h("div", { class: "row" }, filter), place, h("p", {}, more));
  const draw = () => {
    const wanted = filter.value.toLowerCase();
    const matching = found.runs.filter((run) =>
      [run.id, run.name, run.base_model, JSON.stringify(run.user_metadata ?? {})].join(" ").toLowerCase().includes(wanted));
    place.replaceChildren(table(RUN_HEADS, runRows(matching)), h("p", { class: "quiet" }, `${matching.length} of ${found.total}`));
    more.hidden = found.total <= shown;
  };
  const refresh = async () => { found = await api(`/api/v1/console/runs?limit=${shown}`, { signal }); draw(); };
  more.onclick = () => { shown = Math.min(1000, shown + 100); refresh(); };
  filter.oninput = draw;
  const again = soon(refresh, 1500);
  listeners.add((news, before) => { if (changedRuns(news, before).length) again(); });
  await refresh();
}

async function runPage(signal, id) {
  const run = await api(`/api/v1/training_runs/${part(id)}`, { signal });
  const place = h("div", { class: "charts" }), checkpoints = h("section", { class: "card" });
  const byTime = h("input", { type: "checkbox" }), log = h("input", { type: "checkbox" });
  const now = h("span", { class: "quiet", id: "step" });
  main.replaceChildren(h("h1", {}, id), card(null, facts({
    "base model": run.base_model, "rank": run.is_lora ? run.lora_rank : "full weights", "last request": ago(run.last_request_time),
    "session": link(`/sessions/${part(id.split(":")[0])}`, id.split(":")[0]),
    ...Object.fromEntries(Object.entries(run.user_metadata ?? {}).map(([name, value]) => [`metadata: ${name}`, value])),
  })), h("div", { class: "row" }), place, checkpoints);
  main.querySelector(".row").append(h("label", {}, byTime, "by time"), h("label", {}, log, "logarithmic"), now);
  let points = [], cursor = "0", drawn = new Map();
  const draw = () => {
    const names = [...new Set(points.flatMap((point) => Object.keys(point.metrics)))];
    const order = [...FIRST.filter((name) => names.includes(name)), ...names.filter((name) => !FIRST.includes(name)).sort()];
    if (order.join() !== [...drawn.keys()].join()) {
      charts.forEach((plot) => plot.destroy());
      charts = []; drawn = new Map(); place.replaceChildren();
      for (const name of order) drawn.set(name, chart(place, name, byTime.checked, log.checked));
    }
    const x = points.map((point) => (byTime.checked ? point.time : point.step));
    for (const [name, plot] of drawn) plot.set(x, points.map((point) => point.metrics[name] ?? null));
    const last = points.findLast((point) => point.complete);
    now.textContent = points.length ? `step ${last?.step ?? 0}, ${points.length} points` : "No step is finished yet.";
  };
  const refresh = async () => {
    const found = await api(`/api/v1/training_runs/${part(id)}/metrics?cursor=${encodeURIComponent(cursor)}`, { signal });
    cursor = found.cursor;
    const byStep = new Map(points.filter((point) => point.complete).map((point) => [point.step, point]));
    for (const point of found.points) {
      const earlier = byStep.get(point.step);
      byStep.set(point.step, earlier ? { ...point, metrics: { ...earlier.metrics, ...point.metrics } } : point);
    }
    points = [...byStep.values()].sort((a, b) => a.step - b.step);
    draw();
  };
  const redraw = () => { drawn = new Map([["", null]]); draw(); };
  byTime.onchange = log.onchange = redraw;
  addEventListener("themed", redraw, { signal });
  const again = soon(refresh, 300);
  listeners.add((news, before) => { if (changedRuns(news, before).includes(id)) again(); });
  await refresh();
  checkpoints.replaceChildren(h("h2", {}, "Checkpoints"), h("p", { class: "quiet" }, "Loading…"));
  const list = await api(`/api/v1/training_runs/${part(id)}/checkpoints`, { signal });
  checkpoints.replaceChildren(h("h2", {}, "Checkpoints"), checkpointTable(list.checkpoints, () => route()));
}

function checkpointTable(found, changed) {
  const act = (question, path, options, done) => async () => {
    if (question && !confirm(question)) return;
    try { await api(path, options); say(done, true); changed(); } catch (error) { say(error.message); }
  };
  return table(["Checkpoint", "Kind", "Size#", "Saved", "Expires", "Actions"], found.map((each) => {
    const [run, ...rest] = each.tinker_path.replace("tinker://", "").split("/");
    const base = `/api/v1/training_runs/${part(run)}/checkpoints/${rest.map(part).join("/")}`;
    const keep = async () => {
      const answer = prompt("Delete it after how many hours? Leave empty to keep it.", "");
      if (answer === null) return;
      const hours = answer.trim() === "" ? null : Number(answer);
      if (hours !== null && !(hours > 0)) return say(`${answer}: write a number of hours`);
      await act(null, `${base}/ttl`, { method: "PUT", body: { ttl_seconds: hours === null ? null : Math.round(hours * 3600) } }, "The expiry is set.")();
    };
    return [
      link(`/checkpoints/${part(run)}/${encodeURIComponent(rest.join("/"))}`, h("code", {}, each.tinker_path)),
      each.checkpoint_type, bytes(each.size_bytes), ago(each.created_at), until(each.expires_at),
      h("div", { class: "row" },
        h("button", { type: "button", onclick: () => download(each.tinker_path) }, "Download"),
        each.checkpoint_type === "sampler" ? link(`/playground?checkpoint=${encodeURIComponent(each.tinker_path)}`, "Play") : null,
        each.public
          ? h("button", { type: "button", onclick: act(null, `${base}/publish`, { method: "DELETE" }, "It is private again.") }, "Unpublish")
          : h("button", { type: "button", onclick: act("Publish it? Every tenant of this server can then read it.", `${base}/publish`, { method: "POST" }, "It is published.") }, "Publish"),
        h("button", { type: "button", onclick: keep }, "Expiry"),
        h("button", { type: "button", class: "bad", onclick: act(`Delete ${each.tinker_path}?`, base, { method: "DELETE" }, "It is deleted.") }, "Delete")),
    ];
  }), "No checkpoints.");
}

async function download(path) {
  try {
    const { url } = await api(`/api/v1/console/download?path=${encodeURIComponent(path)}`);
    const { pathname, search } = new URL(url, location);
    h("a", { href: pathname + search, download: "" }).click();
  } catch (error) { say(error.message); }
}

async function checkpointsPage(signal, run, name) {
  const place = h("section", { class: "card" });
  main.replaceChildren(h("h1", {}, run ? `Checkpoint ${name ?? ""} of ` : "Checkpoints", run ? runLink(run) : ""), place);
  const refresh = async () => {
    const path = run ? `/api/v1/training_runs/${part(run)}/checkpoints` : "/api/v1/checkpoints?limit=200";
    const { checkpoints } = await api(path, { signal });
    place.replaceChildren(checkpointTable(name ? checkpoints.filter((each) => each.checkpoint_id === name) : checkpoints, refresh));
  };
  await refresh();
}

async function samplersPage(signal) {
  const [{ samplers }, { endpoints, of_operator: shared }] = await Promise.all([
    api("/api/v1/console/samplers", { signal }), api("/list_inference_endpoints", { signal })]);
  const health = (each) => (each.healthy ? h("span", { class: "good" }, "healthy") : h("span", { class: "bad", title: each.problem ?? "" }, each.problem ?? "not healthy"));
  main.replaceChildren(h("h1", {}, "Samplers"),
    card("SGLang endpoints", table(["Address", "State", "Base model", "Weights", "Running#"],
      endpoints.map((each) => [`${each.host}:${each.port}`, health(each), each.base_model, each.weight_version, each.running]),
      "You have registered none."), h("p", { class: "quiet" }, `The operator has registered ${shared.count}; ${shared.healthy} of them are healthy.`)),
    card("Sampling sessions", table(["Sampler", "Weights", "Base model", "Session", "Created"], samplers.map((each) => [
      h("code", {}, each.id), each.model_path ? h("code", {}, each.model_path) : each.follows ? `newest of ${each.follows}` : "unnamed, or the base model",
      each.base_model, link(`/sessions/${part(each.session_id)}`, each.session_id.slice(0, 12)), ago(each.created_at)]))));
}

async function sessionsPage(signal) {
  const { sessions } = await api("/api/v1/console/sessions?limit=200", { signal });
  main.replaceChildren(h("h1", {}, "Sessions"), card(null, table(["Session", "Tags", "SDK", "Project", "Opened", "Last heartbeat", "Closed"],
    sessions.map((each) => [link(`/sessions/${part(each.id)}`, each.name),
      h("span", {}, each.tags.map((tag) => h("span", { class: "tag" }, tag))), each.sdk_version, each.project_id,
      ago(each.created_at), ago(each.last_heartbeat_at), each.finished_at ? [ago(each.finished_at), ` (${each.finish_reason ?? "finished"})`] : "open"]))));
}

async function sessionPage(signal, id) {
  const [session, trace] = await Promise.all([
    api(`/api/v1/sessions/${part(id)}`, { signal }), api(`/api/v1/sessions/${part(id)}/trace`, { signal })]);
  main.replaceChildren(h("h1", {}, session.display_name ?? id),
    card(null, facts({ session: id, ...(session.user_metadata ?? {}) })),
    card("Runs", table(["Run"], session.training_run_ids.map((run) => [runLink(run)]))),
    card("Timeline", h("div", { class: "scroll" }, timeline(trace)), h("p", { class: "quiet" }, "Light: from the submit to the answer. Dark: on the device. ",
      h("a", { href: URL.createObjectURL(new Blob([JSON.stringify(trace)])), download: `${id}.json` }, "Download the trace"), " for ui.perfetto.dev.")));
}

function timeline(trace) {
  const names = new Map(), slices = [], open = new Map();
  for (const event of trace.traceEvents) {
    if (event.ph === "M") names.set(event.pid, event.args.name);
    else if (event.ph === "b") open.set(event.id + event.name, event);
    else if (open.has(event.id + event.name)) slices.push([open.get(event.id + event.name), event.ts]);
  }
  const newest = slices.slice(-2000);
  if (!newest.length) return h("p", { class: "quiet" }, "The ledger has no operations of this session.");
  const begin = Math.min(...newest.map(([first]) => first.ts)), end = Math.max(...newest.map(([, last]) => last));
  const WIDTH = 1000, LANE = 34, lanes = [...names.keys()], scale = WIDTH / Math.max(1, end - begin);
  const drawn = svg("svg", { class: "timeline", viewBox: `0 0 ${WIDTH} ${lanes.length * LANE + 20}`, role: "img", "aria-label": "Timeline of the session" });
  lanes.forEach((pid, lane) => drawn.append(
    svg("line", { x1: 0, x2: WIDTH, y1: lane * LANE, y2: lane * LANE }),
    svg("text", { x: 2, y: lane * LANE + 11 }, names.get(pid))));
  for (const [first, last] of newest) {
    const isDevice = first.name === "on the device", y = lanes.indexOf(first.pid) * LANE + (isDevice ? 24 : 15);
    const kind = isDevice ? "device" : first.args?.state === "failed" ? "failed" : "";
    drawn.append(svg("rect", { class: kind, x: (first.ts - begin) * scale, y, width: Math.max(0.7, (last - first.ts) * scale), height: 8 },
      svg("title", {}, `${first.name} ${first.args?.seq_id ?? ""}: ${((last - first.ts) / 1e6).toFixed(3)} s`)));
  }
  drawn.append(svg("text", { x: 0, y: lanes.length * LANE + 16 }, new Date(begin / 1000).toLocaleTimeString()),
    svg("text", { x: WIDTH, y: lanes.length * LANE + 16, "text-anchor": "end" }, new Date(end / 1000).toLocaleTimeString()));
  return drawn;
}

async function usagePage(signal) {
  const hour = (at) => `${new Date(at).toISOString().slice(0, 13)}:00:00Z`;
  const next = Math.ceil(Date.now() / 3.6e6 + 1e-9) * 3.6e6;
  const [usage, storage, shares] = await Promise.all([
    api(`/api/v1/billing/usage/events?starting_on=${hour(next - 13 * 864e5)}&ending_before=${hour(next)}`, { signal }),
    api("/api/v1/billing/usage/checkpoints/current", { signal }), api("/api/v1/console/usage?days=13", { signal })]);
  const days = new Map(), models = new Map(), KINDS = ["trained", "prefilled", "cached", "sampled", "checkpoints"];
  for (const { bucket_start: start, event_info: info, base_model: model } of usage.data) {
    const kind = { training: "trained", sampling_sample: "sampled", checkpoint: "checkpoints" }[info.type] ?? (info.cached ? "cached" : "prefilled");
    for (const [sums, name] of [[days, start.slice(0, 10)], [models, model]]) {
      if (!sums.has(name)) sums.set(name, {});
      sums.get(name)[kind] = (sums.get(name)[kind] ?? 0) + (info.token_count ?? info.count ?? 0);
    }
  }
  const heads = ["", "Tokens trained#", "Prefilled#", "From the cache#", "Sampled#", "Checkpoints saved#"];
  const rows = (sums) => [...sums].sort().reverse().map(([name, kinds]) => [name, ...KINDS.map((kind) => (kinds[kind] ?? 0).toLocaleString())]);
  const most = Math.max(1, ...[...days.values()].map((kinds) => kinds.trained ?? 0));
  const bars = h("div", { class: "bars" }, [...days].sort().map(([day, kinds]) => {
    const bar = h("div", { title: `${day}: ${(kinds.trained ?? 0).toLocaleString()} tokens trained` });
    bar.style.height = `${(100 * (kinds.trained ?? 0)) / most}%`;
    return bar;
  }));
  main.replaceChildren(h("h1", {}, `Usage of ${overview?.owner ?? "this tenant"}, the last 13 days`),
    card("By day (UTC)", bars, table(heads, rows(days))), card("By base model", table(heads, rows(models))),
    shares.all_tenants ? card("By tenant", table(heads, shares.tenants.map((each) =>
      [each.tenant, ...["trained", "prefilled", "prefilled_cached", "sampled", "checkpoints"].map((kind) => each[kind].toLocaleString())]))) : "",
    card("Checkpoints stored", table(["Project", "Number#", "Size#"], storage.data.map((each) => [each.project_id, each.checkpoint_count, bytes(each.size_bytes)]))));
}

// --- playground

async function playgroundPage(signal, query) {
  const { data } = await api("/v1/models", { signal });
  const names = h("datalist", { id: "models" }, data.map((each) => h("option", { value: each.id })));
  const chosen = query.get("checkpoint"), bases = data.filter((each) => each.parent === null);
  const parent = data.find((each) => each.id === chosen)?.parent ?? bases[0]?.id ?? "";
  const field = (label, value) => h("input", { list: "models", value, ariaLabel: label, size: 38 });
  const one = field("Model A", chosen ?? bases[0]?.id ?? ""), other = field("Model B", chosen ? parent : (data.find((each) => each.parent)?.id ?? bases[0]?.id ?? ""));
  const text = h("textarea", { id: "prompt", ariaLabel: "Prompt", placeholder: "A prompt for both. Ctrl+Enter runs it." });
  const value = (label, id, initial, step, min) => h("label", {}, label, h("input", { id, type: "number", value: initial, step, min }));
  const colours = h("select", { ariaLabel: "Colour" }, h("option", { value: "own" }, "colour: log-prob"), h("option", { value: "difference" }, "colour: difference from the other model"));
  const run = h("button", { type: "button", class: "main", id: "run" }, "Run");
  const stop = h("button", { type: "button", disabled: true }, "Stop");
  const sides = h("div", { class: "two" });
  main.replaceChildren(h("h1", {}, "Playground"), card(null, names,
    h("div", { class: "row models" }, h("label", {}, "A", one), h("label", {}, "B", other)), text,
    h("div", { class: "row" }, value("tokens", "tokens", 48, 1, 1), value("temperature", "temperature", 0, 0.1, 0), value("seed", "seed", 1, 1, 0), colours, run, stop)), sides);
  const settings = () => Object.fromEntries(["tokens", "temperature", "seed"].map((id) => [id, Number(document.getElementById(id).value)]));
  let results = null, controller = null;

  const generate = (model, body) => api("/generate", {
    method: "POST", signal: controller.signal, body: { ...body, ...(model ? { model } : {}), return_logprob: true, return_text_in_logprobs: true } });
  const draw = () => {
    if (!results) return;
    const [a, b] = results;
    let split = 0;
    while (split < Math.min(a.tokens.length, b.tokens.length) && a.tokens[split][1] === b.tokens[split][1]) split += 1;
    sides.replaceChildren(side("A", a, b, split, colours.value), side("B", b, a, split, colours.value));
  };
  const play = async () => {
    controller = new AbortController();
    signal.addEventListener("abort", () => controller.abort(), { once: true });
    run.disabled = true; stop.disabled = false;
    sides.replaceChildren(card("A", h("p", { class: "quiet" }, "Running…")), card("B", h("p", { class: "quiet" }, "Running…")));
    try {
      const { tokens, temperature, seed } = settings();
      const models = [one.value, other.value];
      const sampled = await Promise.all(models.map((model) => generate(model, {
        text: text.value, logprob_start_len: 0, sampling_params: { max_new_tokens: tokens, temperature, sampling_seed: seed } })));
      // Each sample is scored by the other model, too.
      const scored = await Promise.all(sampled.map((answer, at) => {
        const prompt = answer.meta_info.input_token_logprobs.map((each) => each[1]), drawn = answer.meta_info.output_token_logprobs.map((each) => each[1]);
        // The first token from the start on has no log-prob, so that the start is one token before the drawn ones.
        return generate(models[1 - at], { input_ids: [...prompt, ...drawn], logprob_start_len: prompt.length - 1, sampling_params: { max_new_tokens: 0, temperature: 1 } });
      }));
      results = sampled.map((answer, at) => ({
        model: models[at], text: answer.text, tokens: answer.meta_info.output_token_logprobs,
        others: scored[at].meta_info.input_token_logprobs.slice(1).map((each) => each[0]), reason: answer.meta_info.finish_reason?.type }));
      draw();
    } catch (error) {
      sides.replaceChildren();
      if (error.name !== "AbortError") say(error.message);
    }
    run.disabled = false; stop.disabled = true;
  };
  colours.onchange = draw;
  run.onclick = play;
  stop.onclick = () => controller?.abort();
  text.onkeydown = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) play(); };
}

function side(label, mine, theirs, split, mode) {
  const spans = mine.tokens.map(([logprob, token, text], at) => {
    const other = mine.others[at], difference = other === null || other === undefined ? 0 : logprob - other;
    const piece = h("span", { title: `${JSON.stringify(text)} (${token})\nlog-prob ${number(logprob)}, by the other model ${number(other)}` }, text ?? "");
    piece.style.background = mode === "own"
      ? `color-mix(in srgb, var(--bad) ${Math.round(Math.min(1, -logprob / 8) * 70)}%, transparent)`
      : `color-mix(in srgb, var(${difference >= 0 ? "--a" : "--b"}) ${Math.round(Math.min(1, Math.abs(difference) / 4) * 80)}%, transparent)`;
    if (at >= split && mine.tokens[at]?.[1] !== theirs.tokens[at]?.[1]) piece.classList.add("differs");
    return piece;
  });
  const mean = (values) => number(values.reduce((sum, each) => sum + (each ?? 0), 0) / Math.max(1, values.length));
  return card(`${label}: ${mine.model}`, h("div", { class: "text" }, spans),
    facts({ tokens: mine.tokens.length, end: mine.reason, "mean log-prob": mean(mine.tokens.map((each) => each[0])), "by the other model": mean(mine.others),
      "same tokens": split === mine.tokens.length && split === theirs.tokens.length ? "all" : `the first ${split}` }));
}

// --- the key

function locked(why) {
  stream?.abort();
  overview = null;
  listeners = new Set();
  forget.hidden = true;
  state.textContent = "";
  const input = h("input", { type: "password", name: "key", autocomplete: "off", placeholder: "tml-…", ariaLabel: "API key", required: true });
  const form = h("form", { class: "card login" }, h("h2", {}, "This server needs a key"), h("p", { class: "quiet" },
    "It is kept in this tab until you close it. tinsmith keys create NAME makes a key."), input,
  h("button", { class: "main" }, "Open"), h("p", { class: "bad", role: "alert" }, why));
  form.onsubmit = (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, input.value.trim());
    begin();
  };
  main.replaceChildren(form);
  input.focus();
}

async function begin() {
  if (document.documentElement.dataset.key === "required" && !sessionStorage.getItem(KEY)) return locked("");
  try {
    heard(await api("/api/v1/console/overview"));
  } catch (error) {
    const had = sessionStorage.getItem(KEY);
    if (error.status === 401) {
      sessionStorage.removeItem(KEY);
      return locked(had ? error.message : "");
    }
    main.replaceChildren(card("The server does not answer", h("p", { class: "bad" }, error.message), h("button", { type: "button", onclick: begin }, "Try again")));
    return;
  }
  forget.hidden = !sessionStorage.getItem(KEY);
  follow();
  route();
}

forget.onclick = () => { sessionStorage.removeItem(KEY); locked(""); };

// --- addresses

let leaving = new AbortController();

async function route() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  listeners = new Set();
  charts.forEach((plot) => plot.destroy());
  charts = [];
  const [page = "", ...rest] = location.pathname.slice(1).split("/").map(decodeURIComponent);
  for (const each of document.querySelectorAll("nav a")) {
    if (each.getAttribute("href") === `/${page}`) each.setAttribute("aria-current", "page"); else each.removeAttribute("aria-current");
  }
  document.title = `Tinsmith${page ? `: ${page.replace("_", " ")}` : ""}`;
  const one = rest.join("/");
  const pages = {
    "": overviewPage, samplers: samplersPage, usage: usagePage,
    training_runs: one ? (signal) => runPage(signal, one) : runsPage,
    checkpoints: (signal) => checkpointsPage(signal, rest[0], rest.slice(1).join("/")),
    sessions: one ? (signal) => sessionPage(signal, one) : sessionsPage,
    playground: (signal) => playgroundPage(signal, new URLSearchParams(location.search)),
  };
  try {
    await (pages[page] ?? overviewPage)(signal);
  } catch (error) {
    if (signal.aborted) return;
    if (error.status === 401) { sessionStorage.removeItem(KEY); return locked(error.message); }
    main.replaceChildren(card("This page could not be shown", h("p", { class: "bad" }, error.message)));
  }
}

function go(path) {
  history.pushState(null, "", path);
  route();
  main.focus();
  scrollTo(0, 0);
}

document.addEventListener("click", (event) => {
  const anchor = event.target.closest("a");
  if (!anchor || anchor.hasAttribute("download") || anchor.origin !== location.origin || anchor.pathname === "/docs" || anchor.hash
    || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  event.preventDefault();
  if (overview) go(anchor.pathname + anchor.search);
});
addEventListener("popstate", () => overview && route());

// --- keys and colours

const THEMES = ["", "dark", "light"];
function theme(name) {
  document.documentElement.dataset.theme = name;
  try { localStorage.setItem("tinsmith-theme", name); } catch { /* a private window */ }
  dispatchEvent(new Event("themed"));
}
const nextTheme = () => theme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "") + 1) % THEMES.length]);
document.documentElement.dataset.theme = localStorage.getItem("tinsmith-theme") ?? "";
document.getElementById("theme").onclick = nextTheme;

addEventListener("keydown", (event) => {
  if (event.target.matches("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const pages = [...document.querySelectorAll("nav a")];
  if (event.key === "t") nextTheme();
  else if (event.key === "/") { const filter = document.querySelector("input[type=search]"); if (filter) { event.preventDefault(); filter.focus(); } }
  else if (event.key >= "1" && event.key <= "7" && overview) go(pages[event.key - 1].getAttribute("href"));
});

begin();
