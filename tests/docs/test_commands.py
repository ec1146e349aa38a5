"""The documentation's commands are run as they stand: those of README.md and of docs/.

`smollm2-135m` is a tiny model here, which lies where that one is cached, and so are `MODEL` and
`/models/qwen3-8b`. Ports, folders of other machines and ids are replaced. docs/runs.py names the test of each
block; some are in other folders, because they have the server or the programs that the block needs.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

pytest.importorskip("tinker")

from docs.pages import DEMO, ROOT, block, blocks, executed, inline_commands
from docs.runs import COMPARED, NOT_RUN, PYTEST, RUN, SERVE, TINSMITH, check, covers
from docs.terminal import Serving, Terminal
from fake_hub import Hub
from postgresql import postgresql
from tinsmith.ckpt import smollm2
from tinsmith.server.settings import Settings
from tiny_models import hf_config, write_model

BLOCKS = {block.name: block for block in blocks()}
QUICKSTART, RL, DEPLOY, TPU, SYSTEMD = "quickstart.md", "rl.md", "deploy.md", "tpu.md", "systemd.md"
EXPORT, ACCOUNTS = "export.md", "accounts.md"
CONTRIBUTING, PLACEMENT = "CONTRIBUTING.md", "placement.md"


def test_every_block_is_run() -> None:
    """By the test that docs/runs.py names, which is checked when that has passed; or it is said why not."""
    listed = RUN | COMPARED | {name: by for name, (by, _why) in NOT_RUN.items()}
    assert len(listed) == len(RUN) + len(COMPARED) + len(NOT_RUN)
    assert not [each.name for each in BLOCKS.values() if not any(covers(name, each) for name in listed)]
    assert not [name for name in listed if not any(covers(name, each) for each in BLOCKS.values())]
    for test in listed.values():
        file, _, name = test.partition("[")[0].partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_a_block_that_its_test_does_not_run_would_be_noticed() -> None:
    with pytest.raises(AssertionError, match=r"test_a_server_on_a_tpu_vm does not run .*python3 -m venv"):
        check(RUN[TPU, "python3 -m venv"])
    executed("time " + block(TPU, "python3 -m venv").replace("v", "w").splitlines()[0])
    check(RUN[TPU, "python3 -m venv"])


@pytest.mark.parametrize("name", NOT_RUN, ids=" ".join)
def test_a_block_cannot_be_run_here(name: tuple[str, str]) -> None:
    """Shown among the skipped tests, for those who have such a machine."""
    pytest.skip(f"{name[0]}, {name[1]!r}: {NOT_RUN[name][1]}")


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    home = tmp_path_factory.mktemp("home")
    model = write_model(home / ".cache/tinsmith/models/SmolLM2-135M-Instruct", "llama")
    compiled = ROOT / ".cache" / "tests" / "servers" / "xla"
    compiled.mkdir(parents=True, exist_ok=True)
    (home / ".cache/tinsmith/xla").symlink_to(compiled)
    own = {
        "MODEL": str(model),
        "/models/qwen3-8b": str(model),
        "/mnt/disk": str(home / "disk"),
        "http://sampler-1:30000": "http://127.0.0.1:9",
    }
    own |= {
        "/var/lib/tinsmith": str(home / "lib"),
        "30000": "9",
        "/shared": str(home / "shared"),
        "/local/disk": str(home / "disk"),
    }
    return Terminal(home, own)


@pytest.fixture
def serve(terminal: Terminal) -> Iterator:
    started: list[Serving] = []

    def serve(text: str, **environment: str) -> Serving:
        started.append(terminal.serve(text, **environment))
        return started[-1]

    yield serve
    for each in started:
        each.kill()


class Python:
    """One interpreter for several blocks."""

    def __init__(self, terminal: Terminal):
        self._terminal = terminal
        self.names: dict = {}

    def run(self, text: str) -> str:
        """Run a block; return what it prints."""
        executed(text)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(self._terminal.mine(text), self.names)
        return printed.getvalue()


def test_from_the_first_command_to_a_stop_and_on(terminal: Terminal, serve) -> None:
    """README.md's loop, what the quickstart and the other pages do with it, and what is there afterwards."""
    server = serve(block(QUICKSTART, f"{SERVE} --data-dir runs\n"))
    banner = terminal.mine(block(QUICKSTART, "Tinsmith 0.1.0 on"))
    banner = banner.replace("8192", "512").replace("~", str(terminal.home))
    for line in banner.splitlines():
        assert line in server.log.splitlines()
    server.wait_for_engine()

    python = Python(terminal)
    for begins in ("import tinker", "0 4.259"):
        assert block(QUICKSTART, begins) == block("README.md", begins)
    executed(block("README.md", "import tinker"))
    *losses, answer = python.run(block(QUICKSTART, "import tinker")).split("\n", 8)
    steps, values = zip(*(line.split() for line in losses), strict=True)
    assert steps == tuple("01234567")
    assert [*values] == sorted(values, key=float, reverse=True), "each step lowers the loss"
    saved = python.run(block(QUICKSTART, "path = client.save_state")).split()
    shown = block(QUICKSTART, "tinker://").split()
    assert [re.sub("[0-9a-f]{32}", "", path) for path in saved] == [
        re.sub("[0-9a-f]{32}", "", path) for path in shown
    ]
    chunks = python.run(block("serving.md", "import openai"))
    assert all(isinstance(ast.literal_eval(line), str) for line in chunks.splitlines())
    with_rlve(terminal)
    run = saved[0].removeprefix("tinker://").partition("/")[0]
    assert json.loads(terminal.run(block("console.md", "curl -H"), RUN=run)) == {"status": "accepted"}
    shown_metrics = json.loads(block("console.md", '{"run_id"'))
    kept = httpx.get(f"{server.url}/api/v1/training_runs/{run}/metrics", timeout=60).json()
    assert kept.keys() == shown_metrics.keys()
    (point,) = shown_metrics["points"]
    assert kept["points"][0].keys() == point.keys()
    assert kept["points"][0]["metrics"].keys() >= point["metrics"].keys()
    assert any("reward" in each["metrics"] for each in kept["points"])
    sleeping, awake = block("serving.md", '{"success":true').splitlines()
    for path, line in (("sleep", sleeping), ("wake_up", awake)):
        answered = httpx.post(f"{server.url}/{path}", timeout=60).json()
        assert (answered["success"], answered["result"].keys()) == (True, json.loads(line)["result"].keys())
    assert server.interrupt() == 0
    assert server.log.splitlines()[-1:] == block(QUICKSTART, "stopped; everything").splitlines()

    server = serve(block(QUICKSTART, f"{SERVE} --data-dir runs\n")).wait_for_engine()
    python.names["service"] = python.names["tinker"].ServiceClient(base_url=server.url, api_key="tml-local")
    python.run(block(QUICKSTART, "client = service.create_training").replace(shown[1], saved[1]))
    again = "client.save_weights_and_get_sampling_client().result()"
    for sampler in ("sampler", again):
        asked = (
            f"{sampler}.sample(types.ModelInput.from_ints(prompt), 1, params).result().sequences[0].tokens"
        )
        assert python.run(f"print(tokenizer.decode({asked}))") == answer
    imported(terminal)
    exported(terminal, python, answer)
    assert server.interrupt() == 0


@pytest.mark.slow
def test_the_real_model_answers_what_the_pages_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M in float32, and the reinforcement learning of brevity."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    terminal = Terminal(tmp_path, {})
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/tinsmith").symlink_to(smollm2.default_cache())
    server = terminal.serve(block("README.md", SERVE)).wait_for_engine()
    try:
        python = Python(terminal)
        *losses, answer = python.run(block("README.md", "import tinker")).split("\n", 8)
        *shown, shown_answer = block("README.md", "0 4.259").split("\n", 8)
        assert answer == shown_answer
        values, expected = ([float(line.split()[1]) for line in lines] for lines in (losses, shown))
        assert values[:3] == pytest.approx(expected[:3], rel=0.02)
        # Adam makes much of little: rounding, which depends on the machine, grows from step to step.
        assert values == pytest.approx(expected, rel=0.3, abs=0.01)
        pieces = [python.run(block("serving.md", "import openai")), block("serving.md", "'A tinsmith is")]
        text, shown_text = ("".join(map(ast.literal_eval, each.splitlines())) for each in pieces)
        assert text == shown_text
    finally:
        server.kill()
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    terminal.run(block(RL, ".venv/bin/python demo/brevity.py"))


def with_rlve(terminal: Terminal) -> None:
    pytest.importorskip("reasoning_gym")
    answers = terminal.run(block(RL, "curl -s"))
    created, described, stopped = [json.loads(each) for each in re.split(r"(?<=\})(?=\{)", answers)]
    assert "request_id" in created, answers
    assert described["rlve"]["state"] == "running", answers
    assert "error" not in stopped, answers


def imported(terminal: Terminal) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder = terminal.home / ".cache/tinsmith/models/SmolLM2-135M-Instruct"
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(terminal.home / "my-adapter")
    printed = terminal.run(block(QUICKSTART, f"{TINSMITH} checkpoints import"))
    assert [path.rpartition("/")[2] for path in printed.split()] == ["from-peft"] * 2


def exported(terminal: Terminal, python: Python, answer: str) -> None:
    """The adapter in PEFT and the merged model in transformers give the answer of the server's sampler."""
    for package in ("torch", "peft"):
        pytest.importorskip(package)
    path = python.run(block(EXPORT, "path = client.save_state"))
    shown = block(EXPORT, "tinker://")
    assert re.sub("[0-9a-f]{32}", "", path) == re.sub("[0-9a-f]{32}", "", shown)
    for command in ("export TINKER_BASE_URL", f"{TINSMITH} checkpoints merge"):
        terminal.run(block(EXPORT, command).replace(shown.strip(), path.strip()))
    with contextlib.chdir(terminal.home):
        for code in ("from pathlib", "from transformers"):
            assert python.run(block(EXPORT, code)).strip() == answer.strip()


def test_keys_and_clients_on_other_machines(terminal: Terminal, serve) -> None:
    """Without a key the server refuses as accounts.md says, and with one it serves. The SDK then finds
    the tokenizer on the hub, although the model has a name of its own here."""
    open_to_all = block(ACCOUNTS, f"{SERVE} --data-dir runs --host 0.0.0.0")
    refused = terminal.attempt(open_to_all.replace("runs", "others"))
    assert refused.returncode == 2
    assert refused.stderr == block(ACCOUNTS, "tinsmith: host 0.0.0.0").replace("runs", "others")
    create = block(ACCOUNTS, f"{TINSMITH} keys create alice").replace("runs", "others")
    (key,) = re.findall(r"tml-[\w-]+", terminal.run(create))
    for command in inline_commands(r"tinsmith keys (?:list|quota)(?:[^`]*)"):
        terminal.run(command, TINSMITH_DATA_DIR="others")
    assert "tml-" in terminal.run(block(DEPLOY, "tinsmith keys create alice"))
    server = serve(open_to_all.replace("runs", "others")).wait_for_engine()
    folder = terminal.home / ".cache/tinsmith/models/SmolLM2-135M-Instruct"
    hub = Hub({("HuggingFaceTB/SmolLM2-135M-Instruct", "main"): folder})
    code = (
        "import tinker; client = tinker.ServiceClient().create_lora_training_client('smollm2-135m', rank=4)\n"
        "print(client.result().get_tokenizer().encode('hello'))"
    )
    environment = terminal.environment | {"TINKER_API_KEY": key, "TINKER_BASE_URL": server.url}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=180
    )
    hub.close()
    assert done.returncode == 0, done.stderr
    from transformers import AutoTokenizer

    assert json.loads(done.stdout.splitlines()[-1]) == AutoTokenizer.from_pretrained(folder).encode("hello")
    assert "tokenizer.json" in hub.asked


def test_servers_of_other_pages(terminal: Terminal, serve) -> None:
    """Each listens, with the models and the settings that its page names."""

    def names(server: Serving) -> list[str]:
        listed = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"]
        server.kill()
        return [model["id"] for model in listed]

    folder = terminal.home / ".cache/tinsmith/models/SmolLM2-135M-Instruct"
    assert names(serve(block("README.md", SERVE))) == ["smollm2-135m"]
    of_rl = block(RL, SERVE)
    assert of_rl == block("README.md", SERVE)
    executed(of_rl)
    assert names(serve(block(RL, "M=$("))) == [str(folder), "meta-llama/Llama-3.2-1B"]
    (terminal.home / "tinsmith.toml").write_text(terminal.mine(block("settings.md", "model = ")))
    eight = "--xla_force_host_platform_device_count=8"
    configured = serve("exec tinsmith serve --config tinsmith.toml", XLA_FLAGS=eight)
    assert names(configured) == ["smollm2-135m"]
    (terminal.home / "shared").mkdir()
    (terminal.home / "disk/tinsmith").mkdir(parents=True)
    sqlite, _postgresql, command = block(PLACEMENT, "export TINSMITH_DATABASE_URL").splitlines()
    of_sglang = (
        block("sglang.md", "python -m sglang"),
        block(PLACEMENT, "python -m sglang"),
        block(PLACEMENT, "CUDA_VISIBLE_DEVICES=1"),
    )
    for text in (sqlite + "\n" + command, *(each[each.rindex("\n", 0, -1) :] for each in of_sglang)):
        assert names(serve(text)) == ["SmolLM2-135M-Instruct"]
    assert (terminal.home / "disk/tinsmith/ledger.db").exists()


def test_a_ledger_in_postgresql(terminal: Terminal, serve) -> None:
    _sqlite, exported, command = block(PLACEMENT, "export TINSMITH_DATABASE_URL").splitlines()
    (terminal.home / "shared").mkdir(exist_ok=True)
    command = command.replace("/shared/tinsmith", "/shared/of-postgresql")
    with postgresql(terminal.home / "database") as url:
        address = "postgresql://tinsmith:PASSWORD@db/tinsmith"
        exported = exported.partition("#")[0].replace(address, f"'{url}'")
        server = serve(exported + "\n" + command).wait_for_engine()
        assert httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"]
        assert not list((terminal.home / "shared/of-postgresql").glob("ledger.db*"))
        server.kill()


def test_a_server_on_a_tpu_vm(terminal: Terminal, serve) -> None:
    """tpu.md's, with eight devices of a CPU. `test_accelerators_are_installed` runs pip's line."""
    made, _installed, examined, served = block(TPU, "python3 -m venv").splitlines()
    terminal.run(made + " --without-pip")
    (terminal.home / "tinsmith/bin/tinsmith").symlink_to(Path(sys.executable).with_name("tinsmith"))
    eight = "--xla_force_host_platform_device_count=8"
    found = terminal.run(examined.replace("Qwen/Qwen3-8B", "MODEL"), XLA_FLAGS=eight)
    assert "finds 8 x cpu" in found
    server = serve("exec " + served.replace("Qwen/Qwen3-8B", "MODEL"), XLA_FLAGS=eight)
    assert httpx.get(f"{server.url}/health", timeout=60).json()["engine_running"]


@pytest.mark.slow
def test_accelerators_are_installed(terminal: Terminal) -> None:
    """pip finds a version of everything and installs nothing; it needs a package index."""
    _made, of_tpu, *_rest = block(TPU, "python3 -m venv").splitlines()
    of_service = block(SYSTEMD, "useradd").splitlines()[-1]
    for command in (block("README.md", ".venv/bin/python -m pip install"), of_tpu, of_service):
        options = command.partition(" install ")[2].strip()
        printed = terminal.run(f"{sys.executable} -m pip install --dry-run " + options, folder=ROOT)
        assert "Would install" in printed


def test_models_that_cannot_be_served_are_refused_as_models_md_shows(terminal: Terminal) -> None:
    rope, mesh, size = block("models.md", "tinsmith: model").splitlines()

    def refusal(command: str, **environment: str) -> str:
        refused = terminal.attempt(command, **environment)
        assert refused.returncode == 2, refused.stdout
        return refused.stderr.strip()

    folder = write_model(terminal.home / "m", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"partial_rotary_factor": 0.25}))
    assert refusal(f"{TINSMITH} serve --model m={folder}") == rope.replace("/models/m", str(folder))
    assert refusal(f"{SERVE} --mesh fsdp=8") == mesh

    if psutil.virtual_memory().total > 300e9:
        pytest.skip("this machine has room for it")
    large = terminal.home / "large"
    large.mkdir()
    sizes = {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "vocab_size": 128_256}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
    config = hf_config("llama") | sizes | heads | {"tie_word_embeddings": False}
    (large / "config.json").write_text(json.dumps(config))
    (large / "model.safetensors").touch()  # it is listed, and never downloaded
    hub = Hub({("org/large", "main"): large})
    refused = refusal(
        f"{TINSMITH} serve --model m=org/large", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0"
    ).splitlines()[-1]
    hub.close()
    free = r"[\d.]+ [GM]B are free"  # depends on the machine
    assert re.sub(free, "", refused) == re.sub(free, "", size)


def test_sglang_takes_the_options_that_it_is_given() -> None:
    """It is started for real, on the CPU and with other options, by tests/sglang."""
    venv = Path(os.environ.get("TINSMITH_SGLANG_VENV") or ROOT / ".cache" / "sglang" / "venv")
    fields = [*venv.glob("lib/python*/site-packages/sglang/srt/arg_groups/fields/*.py")]
    if not fields:
        pytest.skip("no SGLang here")
    taken = "".join(each.read_text() for each in fields)
    commands = [each.text for each in BLOCKS.values() if "sglang.launch_server" in each.text]
    of_sglang = [
        line for text in commands for line in text.replace("\\\n", "").splitlines() if "launch" in line
    ]
    options = {option for line in of_sglang for option in re.findall(r"--([a-z-]+)", line)}
    assert "enable-lora" in options
    for option in options:
        assert re.search(rf"^    {option.replace('-', '_')}: ", taken, re.MULTILINE), option


def test_the_plan_is_the_one_that_is_printed(terminal: Terminal) -> None:
    """It is made from the config.json of Qwen3-8B, on a hub that has nothing else."""
    folder = terminal.home / "hub"
    folder.mkdir()
    config = hf_config("qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36) | {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    hub = Hub({("Qwen/Qwen3-8B", "main"): folder})
    command = block("plan.md", "tinsmith plan --model")
    printed = terminal.run(command, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
    on_tpu = terminal.run(block(TPU, "tinsmith plan --model"), HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
    hub.close()
    assert "It fits with --mesh" in on_tpu
    shown = block("plan.md", "Qwen/Qwen3-8B: 8.19 billion")
    until = "Sizes are"  # what they are from depends on the compilers that are installed
    assert printed.partition(until)[0].split() == shown.partition(until)[0].split()


def test_targets_of_make_are_there(terminal: Terminal) -> None:
    targets = [line.partition("#")[0] for line in block("README.md", "make demo").splitlines()]
    for command in [*targets, block(QUICKSTART, "make install"), *inline_commands("make")]:
        planned = str(command).replace("make ", "make -n ", 1)
        terminal.run(planned, folder=ROOT)


@pytest.mark.slow
def test_the_tests_of_contributors_pass(terminal: Terminal) -> None:
    for begins in (f"{PYTEST}/test_losses.py -k dro", f"{PYTEST}/test_losses.py tests/server"):
        for line in block(CONTRIBUTING, begins).splitlines():
            assert " passed" in terminal.run(line, folder=ROOT, HOME=str(Path.home()))


def test_the_page_of_the_demo_s_data_shows_a_conversation_of_its_file() -> None:
    conversation = block(DEMO, '{"messages": ')
    assert conversation in (ROOT / "demo/data/tinsmith.jsonl").read_text()


def test_the_configuration_of_a_training_run_is_taken(terminal: Terminal) -> None:
    """rl.md's `rlve_config`, and its environment for the cookbook's programs."""
    from tinsmith.server.wire.requests import RlveConfig

    RlveConfig.model_validate_json(block(RL, '{"enabled": true'))
    exported = terminal.run(block(RL, "export TINKER_API_KEY") + "echo $U")
    assert exported.startswith("http://127.0.0.1:")
    exported = terminal.run(block("migration.md", "export TINKER_BASE_URL") + "env")
    assert f"TINKER_BASE_URL=http://your-server:{terminal.port}" in exported


def test_the_settings_of_a_service_are_taken() -> None:
    """systemd.md's file; the model that it names is not here."""
    settings = Settings(**tomllib.loads(block(SYSTEMD, "# /etc/tinsmith.toml")))
    assert settings.model == ["Qwen/Qwen3-8B"]
