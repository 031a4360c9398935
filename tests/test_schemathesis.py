"""Schemathesis reads /openapi.json and looks for where the real server does not do what it says, or breaks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Mailbox, Running, environment

from jobsys.settings import Settings
from jobsys.tokens import Tokens

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "3"))
SEED = int(os.environ.get("SCHEMATHESIS_SEED", "1"))
"""To look for longer: SCHEMATHESIS_EXAMPLES=500 SCHEMATHESIS_SEED=7 pytest tests/test_schemathesis.py"""

ACCESS = {
    "JWT_SECRET": "the secret key of these tests' tokens",
    "ADMIN_USER": "ada",
    "ADMIN_PASS": "correct horse battery staple",
    "RATE_LIMIT": "0",
}
CONFIGURATION = f"""
hooks = "schemathesis_hooks"
request-timeout = 30.0
output.sanitization.enabled = false
output.truncation.enabled = false

[generation]
database = "none"
max-examples = {EXAMPLES}

[phases.stateful]
generation.max-examples = {8 * EXAMPLES}

[checks]
enabled = true
# what is too long is refused, too
negative_data_rejection.expected-statuses = ["400", "401", "403", "404", "405", "409", "413", "414", "415", "422", "431"]

# wrong passwords are counted, and the sixth is no 401
[[operations]]
include-path-regex = "^/admin/"
checks.ignored_auth.enabled = false

# half of the time, for what /jobs and /api/jobs have been asked already
[[operations]]
include-path-regex = "/jobs/bulk$"
phases.coverage.enabled = false
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Schemathesis needs Python 3.11")
@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "open"])
def test_the_server_does_what_its_description_says(
    start_web: Callable[..., Running],
    start_worker: Callable[..., Running],
    mail: Mailbox,
    settings: Settings,
    tmp_path: Path,
    guarded: bool,
) -> None:
    web = start_web(WEB_PROCESSES=1, **(ACCESS if guarded else {"RATE_LIMIT": "1000000/minute"}))
    start_worker(SMTP_HOST="127.0.0.1", SMTP_PORT=mail.port, INGEST_RATE="0")
    configuration = CONFIGURATION
    if guarded:
        token, _ = Tokens(Settings(_env_file=None, jwt_secret=ACCESS["JWT_SECRET"])).issue("schemathesis", ["admin"], 24 * 3600)
        configuration += f'[auth.openapi.bearer]\nbearer = "{token}"\n'
    (tmp_path / "schemathesis.toml").write_text(configuration)
    command = [str(Path(sys.executable).parent / "schemathesis"), "--no-color", "run", f"{web.url}/openapi.json", f"--seed={SEED}"]
    command += [f"--report-har-path={tmp_path / 'exchanges.har'}"]
    command += [] if guarded else ["--phases=examples"]
    told = environment(settings, PYTHONPATH=Path(__file__).parent)
    ran = subprocess.run(command, cwd=tmp_path, env=told, capture_output=True, text=True, timeout=7200)
    assert ran.returncode == 0, f"seed {SEED}, {EXAMPLES} examples\n{ran.stdout}\n{ran.stderr}"
    assert "Traceback" not in web.output
