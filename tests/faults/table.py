"""Promise, limit, seen: what the tests measured, printed after them."""

from collections.abc import Callable
from typing import Any

import pytest

Seen = Callable[[str, str, str], None]
_KIND = "seen"


def seen_by(request: pytest.FixtureRequest) -> Seen:
    """A function that keeps a figure; a property of the test, so that it also arrives from another process."""

    def keep(promise: str, limit: str, figure: str) -> None:
        request.node.user_properties.append((_KIND, (promise, limit, figure)))

    return keep


def print_table(reporter: Any) -> None:
    rows = [
        tuple(value)
        for reports in (reporter.stats.get("passed", []), reporter.stats.get("failed", []))
        for report in reports
        for kind, value in getattr(report, "user_properties", [])
        if kind == _KIND and report.when == "call"
    ]
    if not rows:
        return
    reporter.section("promises under faults")
    rows = [("promise", "limit", "seen"), ("---", "---", "---"), *rows]
    for row in rows:
        reporter.write_line("| " + " | ".join(row) + " |")
