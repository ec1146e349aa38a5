"""Which test runs which block of the documentation. Each is checked when the test has passed.

Blocks are named by their page and how they begin, tests by their file below tests/ and their name.
"""

from __future__ import annotations

from docs.pages import DEMO, EXECUTED, READ, Block

COMMANDS, BACKUP = "docs/test_commands.py::", "docs/test_backup.py::"
FIRST = COMMANDS + "test_from_the_first_command_to_a_stop_and_on"
KEYS = COMMANDS + "test_keys_and_clients_on_other_machines"
SERVERS = COMMANDS + "test_servers_of_other_pages"
SETTINGS = COMMANDS + "test_the_configuration_of_a_training_run_is_taken"
REAL = COMMANDS + "test_the_real_model_answers_what_the_pages_show"
PIP = COMMANDS + "test_accelerators_are_installed"
PLAN = COMMANDS + "test_the_plan_is_the_one_that_is_printed"
TESTS = COMMANDS + "test_the_tests_of_contributors_pass"
NGINX, SYSTEMD, MANIFESTS = (f"deploy/test_{name}.py::" for name in ("nginx", "systemd", "manifests"))
RECIPES = "cookbook/test_rl.py::test_the_page_s_commands_run_to_their_end"
TINSMITH = ".venv/bin/tinsmith"
SERVE = f"{TINSMITH} serve --model smollm2-135m"
PYTEST = ".venv/bin/python -m pytest -q tests/losses"

RUN = {
    ("README.md", "import tinker"): FIRST,
    ("README.md", SERVE): SERVERS,
    ("README.md", ".venv/bin/python -m pip install"): PIP,
    ("CONTRIBUTING.md", f"{PYTEST}/test_losses.py -k dro"): TESTS,
    ("CONTRIBUTING.md", f"{PYTEST}/test_losses.py tests/server"): TESTS,
    ("console.md", "curl -H"): FIRST,
    ("deploy.md", "tinsmith keys create alice"): KEYS,
    ("deploy.md", "mkdir -p /backup"): BACKUP
    + "test_a_server_on_a_backup_has_the_checkpoints_and_what_was_trained",
    ("export.md", "path = client.save_state"): FIRST,
    ("export.md", "export TINKER_BASE_URL"): FIRST,
    ("export.md", "from pathlib"): FIRST,
    ("export.md", f"{TINSMITH} checkpoints merge"): FIRST,
    ("export.md", "from transformers"): FIRST,
    ("migration.md", "export TINKER_BASE_URL"): SETTINGS,
    ("nginx.md", "export TINKER_BASE_URL"): NGINX + "test_the_page_s_checks_succeed",
    ("nginx.md", "nginx -t"): NGINX + "test_the_page_s_checks_succeed",
    ("nginx.md", "tinsmith keys create"): NGINX + "test_downloads_begin_with_the_public_address",
    ("placement.md", "export TINSMITH_DATABASE_URL"): SERVERS,
    ("plan.md", "tinsmith plan --model"): PLAN,
    ("quickstart.md", f"{SERVE} --data-dir runs"): FIRST,
    ("accounts.md", f"{SERVE} --data-dir runs --host 0.0.0.0"): KEYS,
    ("quickstart.md", f"{TINSMITH} checkpoints import"): FIRST,
    ("accounts.md", f"{TINSMITH} keys create alice"): KEYS,
    ("quickstart.md", "import tinker"): FIRST,
    ("quickstart.md", "client = service.create_training"): FIRST,
    ("quickstart.md", "path = client.save_state"): FIRST,
    ("ray.md", "export RAY_ADDRESS"): "deploy/test_ray.py::"
    "test_a_job_serves_stops_with_all_saved_and_the_next_one_goes_on",
    ("rl.md", ".venv/bin/python demo/brevity.py"): REAL,
    ("rl.md", "M=$("): SERVERS,
    ("rl.md", "curl -s"): FIRST,
    ("rl.md", "export TINKER_API_KEY"): SETTINGS,
    ("rl.md", "python -m tinker_cookbook.recipes.math_rl.train"): RECIPES
    + "[python -m tinker_cookbook.recipes.math_rl.train]",
    ("rl.md", "python -m tinker_cookbook.recipes.rl_loop"): RECIPES
    + "[python -m tinker_cookbook.recipes.rl_loop]",
    ("rl.md", SERVE): SERVERS,
    ("rl.md", "tinker.Datum("): "conformance/test_families.py::"
    "test_the_experts_of_a_sample_are_replayed_in_training",
    ("serving.md", "import openai"): FIRST,
    ("tpu.md", "python3 -m venv"): COMMANDS + "test_a_server_on_a_tpu_vm",
    ("tpu.md", "tinsmith plan --model"): PLAN,
}
"""Commands and programs, and the tests that run them."""

COMPARED = {
    ("README.md", "0 4.259"): REAL,
    ("console.md", '{"run_id"'): FIRST,
    (DEMO, '{"messages": '): COMMANDS + "test_the_page_of_the_demo_s_data_shows_a_conversation_of_its_file",
    ("export.md", "tinker://"): FIRST,
    ("metrics.md", "# tokens trained"): "conformance/test_metrics.py::"
    "test_the_dashboard_asks_for_metrics_that_there_are",
    ("metrics.md", "scrape_configs:"): "conformance/test_metrics.py::"
    "test_prometheus_scrapes_with_the_configuration_of_the_page",
    ("models.md", "tinsmith: model"): COMMANDS
    + "test_models_that_cannot_be_served_are_refused_as_models_md_shows",
    ("nginx.md", "# TLS in front of"): NGINX + "test_the_page_shows_the_file",
    ("plan.md", "Qwen/Qwen3-8B: 8.19 billion"): PLAN,
    ("plan.md", "tinsmith: too large"): "server/test_memory_check.py::"
    "test_the_refusal_says_what_is_needed_and_what_would_do",
    ("quickstart.md", "Tinsmith 0.1.0 on"): FIRST,
    ("quickstart.md", "stopped; everything"): FIRST,
    ("quickstart.md", "tinker://"): FIRST,
    ("accounts.md", "tinsmith: host 0.0.0.0"): KEYS,
    ("quickstart.md", "0 4.259"): FIRST,
    ("rl.md", '"routed_experts"'): "conformance/test_families.py::"
    "test_the_experts_of_a_sample_are_replayed_in_training",
    ("rl.md", '{"enabled": true'): SETTINGS,
    ("serving.md", "'A tinsmith is"): REAL,
    ("serving.md", '{"success":true'): FIRST,
    ("settings.md", "model = "): SERVERS,
    ("systemd.md", "# /etc/tinsmith.env"): SYSTEMD + "test_the_secrets_are_variables_that_are_read",
    ("systemd.md", "# /etc/tinsmith.toml"): COMMANDS + "test_the_settings_of_a_service_are_taken",
    ("systemd.md", "# A unit of systemd"): SYSTEMD + "test_the_page_shows_the_file_and_names_its_places",
}
"""Outputs, requests and files, and the tests that compare them with the real ones, or use them."""

UNIT = SYSTEMD + "test_the_page_shows_the_file_and_names_its_places"
KUBECTL = MANIFESTS + "test_the_page_s_commands_name_what_the_manifests_have"
ON_GPUS = (
    "SGLang's line is for a GPU: its options are looked up, and tests/sglang starts it on the CPU. "
    "Tinsmith's line, which follows, is run"
)
NOT_RUN = {
    ("placement.md", "CUDA_VISIBLE_DEVICES=1"): (SERVERS, ON_GPUS),
    ("placement.md", "python -m sglang"): (SERVERS, ON_GPUS),
    ("sglang.md", "python -m sglang"): (SERVERS, ON_GPUS),
    ("README.md", "make demo"): (
        COMMANDS + "test_targets_of_make_are_there",
        "the demo takes minutes, with the real model, and the tests are these; make plans both",
    ),
    ("quickstart.md", "make install"): (
        COMMANDS + "test_targets_of_make_are_there",
        "it would make the environment of these tests again; bench/newcomer.py runs it in a fresh clone",
    ),
    ("kubernetes.md", "docker build"): (KUBECTL, "there is no builder of images here"),
    ("kubernetes.md", "kubectl"): (KUBECTL, "there is no cluster here"),
    ("systemd.md", "/opt/tinsmith/bin/python"): (UNIT, "it needs systemd, and changes the machine"),
    ("systemd.md", "systemctl daemon-reload"): (UNIT, "it needs systemd, and changes the machine"),
    ("systemd.md", "useradd"): (UNIT, "it changes the machine; pip's line is resolved by " + PIP),
}
"""Commands that cannot be run where the tests run: the test that checks their names, and why."""


def covers(name: tuple[str, str], block: Block) -> bool:
    return block.page == name[0] and block.text.startswith(name[1])


_before_tests: tuple[set[Block], set[Block]] = set(), set()  # read and executed by fixtures, so far


def set_up() -> None:
    """Note what fixtures have read and run, which other tests may have caused to be made."""
    for kept, found in zip(_before_tests, (READ, EXECUTED), strict=True):
        kept |= found
        found.clear()


def check(test: str) -> None:
    """Fail a test that has not run, or not read, a block that is on its list."""
    read, executed = (kept | now for kept, now in zip(_before_tests, (READ, EXECUTED), strict=True))
    checked = {name: by for name, (by, _why) in NOT_RUN.items()}
    for listed, found in ((RUN, executed), (COMPARED | checked, read)):
        mine = [name for name, by in listed.items() if by in (test, test.partition("[")[0])]
        missing = [name for name in mine if not any(covers(name, each) for each in found)]
        assert not missing, f"{test} does not run {missing}, which docs/runs.py says that it runs"
