"""The number of cases over all decoders, at the end of a campaign."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for of in ("passed", "failed") for r in terminalreporter.stats.get(of, [])]
    counts: dict[str, int] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", []):
            if name == "fuzz_cases" and report.when == "call":
                decoder = report.nodeid.rpartition("::")[2].partition("[")[0]
                counts[decoder] = counts.get(decoder, 0) + value
    if counts:
        terminalreporter.section("fuzz cases")
        for decoder, count in sorted(counts.items()):
            terminalreporter.line(f"{count:>10,}  {decoder}")
        terminalreporter.line(f"{sum(counts.values()):>10,}  in all")
