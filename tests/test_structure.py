"""The shape of the code: who may import whom, and what a module of job types may know."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent

LAYERS: list[set[str]] = [
    {"concurrency", "errors", "ids", "interrupt", "outgoing", "trail"},
    {"settings"},
    {"logs", "local", "db", "measurements", "search", "secrecy"},
    {"migrations", "tokens", "passwords"},
    {"job_types", "submissions", "verbs"},
    {"jobs", "running"},
    {"attempts", "bulkheads", "outcomes", "middleware", "work_queue"},
    {"claims", "settlements", "tracing"},
    {"chores", "heart", "lookout", "presence", "straight"},
    {"broker"},
    {"system", "timeline"},
    {"openapi"},
    {"api", "admin_ui"},
    {"app", "worker", "gunicorn_conf", "gunicorn_request", "gunicorn_worker"},
    {"dev", "arguments", "terminal", "smoke", "chaos", "doctor", "cli"},
    {"__main__"},
]
"""Imports point from a later layer to an earlier one, or stay within one; those under TYPE_CHECKING and inside functions are free."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def unit(path: Path) -> str:
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    return "admin_ui" if parts[0] == "admin_ui" else parts[1]


def imports(path: Path) -> set[str]:
    """The units of jobsys that a module imports when it is imported."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" if node.module == "jobsys" else node.module for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "admin_ui":
                found.add("admin_ui")
            elif parts[0] == "jobsys" and len(parts) > 1 and parts[1] in LEVEL:
                found.add(parts[1])
    return found


MODULES = sorted(
    path
    for folder in ("jobsys", "admin_ui")
    for path in (CHECKOUT / folder).rglob("*.py")
    if path.name != "__init__.py" or folder == "admin_ui"
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_imports_point_down_only(path: Path) -> None:
    here = unit(path)
    assert here in LEVEL, f"{here} has no place in LAYERS"
    upward = {other for other in imports(path) if LEVEL[other] > LEVEL[here]}
    assert not upward, f"{here} imports {upward}, which stand above it"


def test_the_api_and_the_admin_ui_do_not_know_each_other() -> None:
    for path in MODULES:
        if unit(path) in ("api", "admin_ui"):
            assert not imports(path) & ({"api", "admin_ui"} - {unit(path)}), path


@pytest.mark.parametrize("path", sorted((CHECKOUT / "jobsys" / "jobs").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_a_job_type_that_ships_knows_only_what_a_job_needs(path: Path) -> None:
    assert imports(path) <= {"jobs", "job_types", "errors", "settings", "outgoing"}
