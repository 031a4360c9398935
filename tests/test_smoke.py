"""The smoke test itself: it passes on a system that works, and can fail."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from conftest import Mailbox, environment, eventually

from jobsys.settings import Settings


def smoke(settings: Settings, *arguments: str, **env: Any) -> tuple[int, str]:
    """Exit status, and all that was said."""
    done = subprocess.run(
        [sys.executable, "-m", "jobsys", "smoke", *arguments],
        env=environment(settings, **env),
        cwd=settings.data_dir.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    return done.returncode, done.stdout


def has_worker(url: str) -> bool:
    with urllib.request.urlopen(f"{url}/health") as answer:
        return bool(json.load(answer)["workers"])


def test_without_a_url_it_starts_a_system_checks_all_and_leaves_nothing(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    code, said = smoke(settings, INGEST_RATE="1/400ms", TMPDIR=tmp_path / "tmp")
    assert code == 0, said
    ticks = [line.split(":")[0] for line in said.splitlines() if line.startswith("✓")]
    assert {"✓ TEST_JOB", "✓ EMAIL_SEND", "✓ CSV_EXPORT", "✓ INGEST_BATCH", "✓ jobsys dev stops"} <= set(ticks)
    assert "the mail is in" in said and "3 batches completed, started 0.4 and 0.4 s apart" in said
    assert said.splitlines()[-1].startswith("all 8 checks passed in ")
    assert not list((tmp_path / "tmp").glob("jobsys-*"))


def test_with_a_url_it_checks_that_system(settings: Settings, start_web: Any, start_worker: Any, mail: Mailbox) -> None:
    sent_by = {"INGEST_RATE": "0", "SMTP_HOST": "127.0.0.1", "SMTP_PORT": mail.port}
    start_worker(**sent_by)
    url = start_web(**sent_by).url
    eventually(lambda: has_worker(url))
    code, said = smoke(settings, url, "--mail-to", "ann@example.org")
    assert code == 0, said
    assert "EMAIL_SEND: accepted by the mail server for ann@example.org" in said
    assert [message["To"] for message in mail.messages] == ["ann@example.org"]


def test_it_fails_for_what_does_not_work_and_goes_on_with_the_rest(
    settings: Settings, start_web: Any, start_worker: Any, closed_port: int
) -> None:
    code, said = smoke(settings, f"http://127.0.0.1:{closed_port}")
    assert code == 1 and "was not answered: [Errno" in said
    broken = {"INGEST_RATE": "0", "SMTP_HOST": "127.0.0.1", "SMTP_PORT": closed_port, "MAX_RETRIES": 0}
    url = start_web(**broken).url
    code, said = smoke(settings, url)
    assert code == 1 and "no worker is running" in said
    start_worker(**broken)
    eventually(lambda: has_worker(url))
    code, said = smoke(settings, url)
    assert code == 1
    assert "✗ EMAIL_SEND: job " in said and "is FAILED: ConnectionRefusedError" in said
    assert "✓ CSV_EXPORT" in said and "✓ INGEST_BATCH" in said
    assert said.splitlines()[-1].startswith("1 of 6 checks failed in ")
