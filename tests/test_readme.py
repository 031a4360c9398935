"""What the README says is so: its settings, its example, its commands."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import readme_settings
from conftest import CHECKOUT, Launcher, Running, environment, execute

from jobsys.settings import Settings
from jobsys.system import JobSystem

README = (CHECKOUT / "README.md").read_text()
EXAMPLE = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "@job(" in block)


def test_the_table_of_settings_is_the_one_of_settings_py() -> None:
    assert readme_settings.table() in README


def test_every_file_and_command_it_names_exists() -> None:
    for name in re.findall(r"\bbin/[a-z]+", README):
        assert (CHECKOUT / name).exists() or name in ("bin/jobsys", "bin/python"), name
    for name in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (CHECKOUT / name).is_file(), name


def test_every_library_it_depends_on_has_its_reason() -> None:
    setup = configparser.ConfigParser()
    setup.read(CHECKOUT / "setup.cfg")
    extras = setup["options.extras_require"]
    for requirement in "\n".join([setup["options"]["install_requires"], extras["local"], extras["test"]]).split("\n"):
        name = re.split(r"[ <>=]", requirement)[0]
        if name and not name.startswith(("#", "types-")):
            assert name.lower() in README.split("## What it is built on")[1].lower(), name


@pytest.fixture
def my_jobs(tmp_path: Path) -> Path:
    (tmp_path / "my_jobs.py").write_text(EXAMPLE)
    (tmp_path / "README.md").write_text("hello\n")
    return tmp_path


def test_the_example_of_a_job_type_runs_as_it_says(
    my_jobs: Path, start_worker: Callable[..., Running], settings: Settings, system: JobSystem, database_url: str
) -> None:
    # Workers, like the command line, have the directory they are started in on their path.
    start_worker(JOB_MODULES="my_jobs")
    jobsys = [sys.executable, "-m", "jobsys"]
    env = environment(settings, JOB_MODULES="my_jobs")
    listed = subprocess.run([*jobsys, "types"], cwd=my_jobs, env=env, capture_output=True, text=True, check=True)
    assert "CHECKSUM" in listed.stdout and "Compute the SHA-256 of a file." in listed.stdout
    command = [*jobsys, "submit", "CHECKSUM", "path=README.md", "--wait"]
    done = subprocess.run(command, cwd=my_jobs, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03" in done.stdout
    [(id,)] = execute(database_url, "insert into jobs (type, payload) values ('CHECKSUM', '{\"path\": \"nowhere\"}') returning id::text")
    failed = system.wait(id, 20)
    assert failed.status == "FAILED" and (failed.error or {})["message"] == "there is no file nowhere"


def test_the_example_of_a_job_type_is_held_to_the_contract_of_all(my_jobs: Path, settings: Settings) -> None:
    env = environment(settings, JOB_MODULES="my_jobs", DATABASE_URL=None)
    env["PYTHONPATH"] += f":{my_jobs}"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(CHECKOUT / "tests" / "test_job_types.py"),
        "-k",
        "CHECKSUM",
    ]
    run = subprocess.run(command, cwd=my_jobs, env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout
    assert re.search(r"[4-9] passed", run.stdout), run.stdout


def test_the_example_of_a_plain_actor_runs_as_it_says(
    tmp_path: Path, launcher: Launcher, settings: Settings, start_worker: Callable[..., Running]
) -> None:
    actor = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "@dramatiq.actor" in block)
    (tmp_path / "sums.py").write_text(actor)
    start_worker(JOB_MODULES="sums")
    env = environment(settings)
    program = "import sums; print(sums.add.send(1, 2).get_result(block=True, timeout=20_000))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=40)
    assert done.stdout == "3\n", done.stderr
    listed = subprocess.run(
        [sys.executable, "-m", "jobsys", "types"], cwd=tmp_path, env=env | {"JOB_MODULES": "sums"}, capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr


def test_the_example_of_a_program_runs_as_it_says(
    my_jobs: Path, settings: Settings, start_worker: Callable[..., Running], database_url: str
) -> None:
    program = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "system.wait" in block)
    (my_jobs / "LICENSE").write_text("free\n")
    start_worker(JOB_MODULES="my_jobs")
    command = [sys.executable, "-c", program.replace("delay=60", "delay=0.2")]
    done = subprocess.run(
        command, cwd=my_jobs, env=environment(settings, JOB_MODULES="my_jobs"), capture_output=True, text=True, timeout=60
    )
    assert "5891b5b5" in done.stdout, done.stderr
    assert execute(database_url, "select count(*) from jobs where type = 'CHECKSUM'") == [(2,)]


def test_every_endpoint_it_lists_is_there(system: JobSystem, settings: Settings) -> None:
    from webtest import TestApp

    from jobsys.app import create_app

    app = TestApp(create_app(settings, system))
    table = README.split("## The endpoints")[1].split("##")[0]
    paths = re.findall(r"`(GET|POST|DELETE) (/[^`]*)`", table)
    assert len(paths) >= 14
    for method, path in paths:
        answer = app.request(re.sub(r"{.*?}", "0", path), method=method, status="*", headers={"Host": "localhost"})
        assert answer.status_int not in (405, 500), f"{method} {path}"
        assert "nothing at this path" not in answer.text, f"{method} {path}"
