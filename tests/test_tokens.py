"""Bearer tokens and passwords by themselves: what is believed, what is revoked, how often one may be wrong."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import argon2
import jwt
import psycopg2
import pytest
from conftest import environment, eventually, execute
from test_cli import Said, jobsys  # noqa: F401

from jobsys import passwords, tokens
from jobsys.db import Database, run
from jobsys.errors import DatabaseUnavailable, InvalidToken, SettingsError, TooManyTries
from jobsys.passwords import Passwords, User
from jobsys.settings import Settings
from jobsys.tokens import Claims, Revocations, Tokens

SECRET = "correct horse battery staple, and some more of it"
OTHER = "another secret of another system, as long as this"
HASH = argon2.PasswordHasher(time_cost=1, memory_cost=64, parallelism=1).hash("open sesame")


def installation(**values: Any) -> Settings:
    return Settings(_env_file=None, **{"jwt_secret": SECRET} | values)


ISSUED_HERE = Tokens(installation())


def payload(**changes: Any) -> dict[str, Any]:
    now = time.time()
    good = {"iss": "jobsys", "aud": "jobsys", "sub": "billing", "jti": "1", "scope": "jobs:read", "iat": now, "nbf": now, "exp": now + 3600}
    return {name: value for name, value in (good | changes).items() if value is not ...}


def signed(claims: Any, header: dict[str, Any] | None = None, secret: str = SECRET) -> str:
    """A token made by hand: PyJWT would refuse to make most of these."""

    def encoded(value: Any) -> str:
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        return base64.urlsafe_b64encode(raw).decode().rstrip("=")

    text = f"{encoded({'alg': 'HS256', 'typ': 'JWT'} if header is None else header)}.{encoded(claims)}"
    return f"{text}.{encoded(hmac.new(secret.encode(), text.encode(), hashlib.sha256).digest())}"


def test_a_token_says_what_it_was_issued_with() -> None:
    token, issued = ISSUED_HERE.issue("billing", ["jobs:write", "jobs:read"], 3600)
    read = ISSUED_HERE.read(token)
    assert read == issued and read.sub == "billing" and 3599 <= read.expires_at - read.issued_at <= 3601
    assert read.allow("jobs:read") and read.allow("jobs:write") and not read.allow("admin")
    content = jwt.decode(token, options={"verify_signature": False})
    assert content["scope"] == "jobs:read jobs:write" and {"iss", "aud", "sub", "jti", "iat", "nbf", "exp"} <= set(content)
    assert jwt.get_unverified_header(token)["alg"] == "HS256"


def test_admin_includes_the_other_scopes_and_an_unknown_scope_nothing() -> None:
    assert all(ISSUED_HERE.read(signed(payload(scope="admin"))).allow(scope) for scope in tokens.SCOPES)
    for scope in ("", "jobs:reader", "ADMIN", "jobs:read,admin", "administrator", "jobs:read\tadmin", ...):
        claims = ISSUED_HERE.read(signed(payload(scope=scope)))
        assert not any(claims.allow(each) for each in tokens.SCOPES), scope


@pytest.mark.parametrize(
    "wrong",
    [("", ["admin"], 60), ("x" * 201, ["admin"], 60), ("a\nb", ["admin"], 60), ("a", [], 60), ("a", ["root"], 60), ("a", ["admin"], 0)],
)
def test_no_token_is_issued_that_would_not_be_believed(wrong: Any) -> None:
    with pytest.raises(ValueError):
        ISSUED_HERE.issue(*wrong)
    with pytest.raises(ValueError):
        ISSUED_HERE.issue("a", ["admin"], 366 * 86400)
    ISSUED_HERE.read(ISSUED_HERE.issue("a", ["admin"], 365 * 86400)[0])


@pytest.mark.parametrize(
    "good", [{"exp": -29}, {"nbf": 29}, {"iat": 29}, {"aud": ["other", "jobsys"]}, {"extra": 1}, {"scope": "jobs:read  x"}]
)
def test_clocks_may_differ_by_thirty_seconds(good: dict[str, Any]) -> None:
    now = time.time()
    ISSUED_HERE.read(signed(payload(**{name: now + value if name in ("exp", "nbf", "iat") else value for name, value in good.items()})))


TIMES = [{"exp": -31}, {"exp": -1e9}, {"nbf": 32}, {"iat": 32}]


@pytest.mark.parametrize("wrong", TIMES)
def test_a_token_that_is_not_good_now_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidToken, match="expired" if "exp" in wrong else "not good yet"):
        ISSUED_HERE.read(signed(payload(**{name: time.time() + value for name, value in wrong.items()})))


@pytest.mark.parametrize("claim", ["exp", "iat", "nbf", "iss", "aud", "sub", "jti"])
@pytest.mark.parametrize(
    "value", [..., None, True, "", [], {}, ["x"], float("nan"), float("inf"), -float("inf"), 10**400, "9999999999", "other"]
)
def test_no_claim_may_be_missing_or_of_another_kind(claim: str, value: Any) -> None:
    if claim in ("sub", "jti") and value in ("9999999999", "other"):
        return
    with pytest.raises(InvalidToken):
        ISSUED_HERE.read(signed(payload(**{claim: value})))


@pytest.mark.parametrize(
    "claims", [[], "text", 1, None, b"{", b"[" * 3000, b'{"exp": ' + b"9" * 5000 + b"}", b"\xff", payload(scope=["admin"])]
)
def test_what_is_signed_and_no_set_of_claims_is_refused(claims: Any) -> None:
    with pytest.raises(InvalidToken):
        ISSUED_HERE.read(signed(claims))


def test_a_token_that_outlives_the_memory_of_revocations_is_refused() -> None:
    with pytest.raises(InvalidToken, match="366 days"):
        ISSUED_HERE.read(signed(payload(exp=time.time() + 367 * 86400)))
    with pytest.raises(InvalidToken, match="366 days"):
        ISSUED_HERE.read(signed(payload(iat=0)))


FORGED = [
    *("", ".", "..", "a.b.c", "x" * 8000, "ä.ö.ü", "\0.\0.\0", "e30.e30.", "....", "[" * 3000 + ".e30.e30"),
    signed(payload(), {"alg": "none"}),
    signed(payload(), {"alg": "none"}).rpartition(".")[0] + ".",
    signed(payload(), {"alg": "None"}),
    signed(payload(), {"alg": "HS512"}),
    signed(payload(), {"alg": "RS256"}),
    signed(payload(), {"alg": "ES256"}),
    signed(payload(), {"alg": ["HS256"]}),
    signed(payload(), {"alg": None}),
    signed(payload(), {}),
    signed(payload(), {"alg": "HS256", "crit": ["exp"]}),
    signed(payload(), {"alg": "HS256", "kid": 5}),
    signed(payload(), {"alg": "HS256", "kid": "../../../dev/null"}, secret=""),
    signed(payload(), {"alg": "HS256", "kid": "' or 1=1 --"}, secret=OTHER),
    signed(payload(), {"alg": "HS256", "jwk": {"kty": "oct", "k": base64.urlsafe_b64encode(OTHER.encode()).decode()}}, secret=OTHER),
    signed(payload(), {"alg": "HS256", "jku": "http://127.0.0.1:1/keys"}, secret=OTHER),
    signed(payload(), b"[" * 3000),
    signed(payload(), b"{" + b'"a":' * 3000),
    signed(payload(), b'{"alg": ' + b"9" * 5000 + b"}"),
    signed(payload(), secret=""),
    signed(payload(), secret=OTHER),
    signed(payload(), secret=SECRET.upper()),
    signed(payload()) + "x",
    signed(payload())[:-4],
    signed(payload()).replace(".", "", 1),
    " " + signed(payload()),
    jwt.encode(payload(), SECRET * 2, algorithm="HS512"),
]


@pytest.mark.parametrize("token", FORGED, ids=range(len(FORGED)))
def test_a_forged_token_is_refused_in_words_of_ours(token: str) -> None:
    with pytest.raises(InvalidToken) as refusal:
        ISSUED_HERE.read(token)
    assert str(refusal.value) in ("this is no token of this system", "the token was not signed with this system's key")
    assert refusal.value.__cause__ is None and (refusal.value.__suppress_context__ or refusal.value.__context__ is None)


def test_a_token_that_was_believed_is_verified_again_once_it_may_have_expired(monkeypatch: pytest.MonkeyPatch) -> None:
    here, now, verified = Tokens(installation()), time.time(), Counter[str]()
    token, real = signed(payload(exp=now + 60)), here._verified
    monkeypatch.setattr(here, "_verified", lambda token: [verified.update([token]), real(token)][1])
    for later, times in ((0, 1), (0, 1), (89, 1), (91, 2)):
        monkeypatch.setattr(time, "time", lambda later=later: now + later)
        assert here.read(token).sub == "billing" and verified[token] == times


def test_what_was_believed_is_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "REMEMBERED", 10)
    here = Tokens(installation())
    for number in range(35):
        assert here.read(signed(payload(jti=f"{number}"))).jti == f"{number}"
        assert len(here._believed) <= 10
    for token in ("a.b.c", signed(payload(), secret=OTHER)):
        with pytest.raises(InvalidToken):
            here.read(token)
        assert token not in here._believed


def test_a_header_that_names_another_key_changes_nothing() -> None:
    assert ISSUED_HERE.read(signed(payload(), {"alg": "HS256", "kid": "../../etc/passwd", "jku": "http://127.0.0.1:1"})).sub == "billing"


def test_the_key_before_still_counts_and_signs_nothing() -> None:
    old, rotated = Tokens(installation(jwt_secret=OTHER)), Tokens(installation(jwt_secret_previous=OTHER))
    assert rotated.read(old.issue("billing", ["admin"], 60)[0]).sub == "billing"
    with pytest.raises(InvalidToken, match="signed"):
        old.read(rotated.issue("billing", ["admin"], 60)[0])
    with pytest.raises(InvalidToken, match="expired"):
        rotated.read(signed(payload(exp=1), secret=OTHER))


@pytest.mark.parametrize(
    ("secrets", "said"),
    [
        ({"jwt_secret": None}, "JWT_SECRET is not set"),
        ({"jwt_secret": "x" * 31}, "JWT_SECRET has 31 bytes, and at least 32"),
        ({"jwt_secret_previous": "short"}, "JWT_SECRET_PREVIOUS has 5 bytes"),
        ({"jwt_secret": "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqh\n-----END PUBLIC KEY-----"}, "random characters"),
        ({"jwt_secret": "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABgQ"}, "random characters"),
    ],
)
def test_a_secret_that_is_none_is_refused_with_how_to_make_one(secrets: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said) as refusal:
        Tokens(installation(**secrets))
    assert "openssl rand -base64 48" in str(refusal.value) and "xxx" not in str(refusal.value) and "MIIB" not in str(refusal.value)
    Tokens(installation(jwt_secret="ä" * 16))


# Revocation


def claims(sub: str = "billing", jti: str = "1", issued_at: float | None = None) -> Claims:
    return Claims(sub, frozenset(["admin"]), jti, time.time() if issued_at is None else issued_at, time.time() + 60)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url, wait=2.0)
    yield database
    database.close()


def test_a_revocation_counts_in_every_process_soon_and_for_what_it_says(database: Database) -> None:
    process, another = Revocations(database), Revocations(database)
    mine, same_name, else_one = claims(jti="a"), claims(jti="b"), claims("shipping", "c")
    assert not any(each.cover(token) for each in (process, another) for token in (mine, same_name, else_one))
    tokens.revoke(database, jti="a")
    eventually(lambda: process.cover(mine) and another.cover(mine), timeout=5)
    assert not process.cover(same_name) and not another.cover(else_one)
    tokens.revoke(database, sub="billing")
    eventually(lambda: process.cover(same_name) and another.cover(same_name), timeout=5)
    assert not process.cover(else_one) and not process.cover(claims(jti="new"))


def test_a_process_that_was_idle_waits_for_the_list_and_one_that_is_busy_does_not_ask_each_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    run = database.run
    monkeypatch.setattr(database, "run", lambda name, **values: [asked.append(name), run(name, **values)][1])
    known = Revocations(database)
    for _ in range(1000):
        assert not known.cover(claims(jti="a"))
    assert asked == ["revocations"]
    tokens.revoke(database, jti="a")
    known._read_at = known._tried_at = time.monotonic() - 3600
    # Who finds another at it waits as well.
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(known.cover, [claims(jti="a")] * 8))


def test_while_the_database_is_away_what_was_known_counts_on_and_nobody_waits(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens.revoke(database, jti="a")
    known = Revocations(database)
    assert known.cover(claims(jti="a")) and not known.cover(claims(jti="b"))
    release = threading.Event()

    def away(*_: Any, **__: Any) -> Any:
        release.wait(20)
        raise DatabaseUnavailable("away")

    monkeypatch.setattr(database, "run", away)
    known._read_at = known._tried_at = time.monotonic() - 3600
    assert known.cover(claims(jti="a")) and not known.cover(claims(jti="b"))
    release.set()
    eventually(lambda: known._failed)
    for _ in range(100):
        assert known.cover(claims(jti="a")) and not known.cover(claims(jti="b"))
    fresh = Revocations(database)
    with pytest.raises(DatabaseUnavailable, match="revoked can't be read"):
        fresh.cover(claims(jti="b"))


def test_what_was_revoked_once_is_revoked_anew(database: Database) -> None:
    tokens.revoke(database, sub="billing")
    later = claims()
    tokens.revoke(database, sub="billing")
    assert Revocations(database).cover(later) and not Revocations(database).cover(claims())


def test_revocations_are_forgotten_when_no_token_can_be_left(database: Database, database_url: str) -> None:
    execute(
        database_url,
        "insert into revocations select 'jti', days, now() - days::integer * interval '1 day' from unnest(array['366', '368']) as days",
    )
    execute(
        database_url,
        """insert into logins values ('wrong', array[now()], null), ('long ago', array[now() - interval '2 min'], null),
        ('right', '{}', now() - interval '29 days'), ('was right', '{}', now() - interval '31 days')""",
    )
    database.run("prune_revocations")
    database.run("prune_logins")
    assert execute(database_url, "select value from revocations") == [("366",)]
    assert execute(database_url, "select key from logins order by key") == [("right",), ("wrong",)]


def test_forgetting_waits_for_nobody_who_tries_a_password(database: Database, database_url: str) -> None:
    execute(database_url, "insert into logins (key) values ('trying'), ('long ago')")
    with database.transaction() as connection:
        run(connection, "lock_logins", keys=["trying"])
        with contextlib.closing(psycopg2.connect(database_url, options="-c lock_timeout=2s")) as other, other:
            run(other, "prune_logins")
    assert execute(database_url, "select key from logins") == [("trying",)]


# Passwords


@pytest.fixture
def keeper(database: Database) -> Callable[..., Passwords]:
    def make(**values: Any) -> Passwords:
        users = {"admin_user": "ada", "admin_pass": "open sesame", "viewer_user": "vic", "viewer_pass": HASH}
        return Passwords(installation(**users | values), database)

    return make


def test_a_password_says_who_it_is_whether_it_is_given_or_its_hash(keeper: Callable[..., Passwords]) -> None:
    doors = keeper(viewer_pass="look around")
    assert doors.verify(b"ada", b"open sesame", "192.0.2.1") == User("ada", may_act=True)
    assert doors.verify(b"vic", b"look around", "192.0.2.1") == User("vic", may_act=False)
    doors = keeper(admin_pass=HASH, viewer_pass="look around")
    assert doors.verify(b"ada", b"open sesame", "192.0.2.1") == User("ada", may_act=True)
    for name, password in ((b"ada", b"look around"), (b"vic", b"open sesame"), (b"ada", HASH.encode()), (b"", b""), (b"\xff", b"\0")):
        assert doors.verify(name, password, "192.0.2.2") is None


def test_all_passwords_are_looked_at_whatever_is_wrong(keeper: Callable[..., Passwords], monkeypatch: pytest.MonkeyPatch) -> None:
    doors, looked = keeper(admin_pass=HASH), Counter[bytes]()
    fits = Passwords._fits
    monkeypatch.setattr(Passwords, "_fits", lambda self, secret, password: [looked.update([password]), fits(self, secret, password)][1])
    for number, (name, password) in enumerate(((b"ada", b"wrong"), (b"nobody", b"guess"), (b"nobody", b"open sesame"), (b"vic", b"so so"))):
        doors.verify(name, password, f"192.0.2.{number}")
    assert looked == {b"wrong": 2, b"guess": 2, b"open sesame": 2, b"so so": 2}


def test_what_was_right_is_not_hashed_again_and_asks_nothing(keeper: Callable[..., Passwords], monkeypatch: pytest.MonkeyPatch) -> None:
    doors = keeper(admin_pass=HASH)
    assert doors.verify(b"ada", b"open sesame", "192.0.2.1")
    monkeypatch.setattr(Passwords, "_fits", lambda *_: pytest.fail("looked at again"))
    monkeypatch.setattr(doors._database, "run", lambda *_, **__: pytest.fail("asked again"))
    assert doors.verify(b"ada", b"open sesame", "192.0.2.1")
    assert b"open sesame" not in repr(doors.__dict__).encode()


def test_of_many_at_once_five_are_looked_at_over_all_processes(keeper: Callable[..., Passwords], monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[bytes] = []
    match = Passwords._match
    monkeypatch.setattr(Passwords, "_match", lambda self, name, password: [looked.append(password), match(self, name, password)][1])
    processes = [keeper(), keeper()]

    def guess(number: int) -> float | None:
        try:
            assert processes[number % 2].verify(b"ada", b"%d" % number, "192.0.2.1") is None
            return None
        except TooManyTries as error:
            return error.seconds

    with ThreadPoolExecutor(16) as threads:
        waits = list(threads.map(guess, range(100)))
    assert len(looked) == waits.count(None) == 5
    assert all(0 < wait <= 60 for wait in waits if wait is not None)


def test_right_passwords_do_not_add_up(keeper: Callable[..., Passwords], database_url: str) -> None:
    for _ in range(20):
        assert keeper().verify(b"ada", b"open sesame", "192.0.2.1")
    with ThreadPoolExecutor(4) as threads:
        processes = [keeper() for _ in range(4)]
        assert all(threads.map(lambda each: each.verify(b"ada", b"open sesame", "192.0.2.1"), processes))
    assert execute(database_url, "select count(*) from logins where wrong_at <> '{}'") == [(0,)]


def test_a_minute_later_five_more_may_be_wrong(keeper: Callable[..., Passwords], database_url: str) -> None:
    def guesses() -> int:
        looked, doors = 0, keeper()
        with contextlib.suppress(TooManyTries):
            while True:
                doors.verify(b"ada", b"wrong", "192.0.2.1")
                looked += 1
        return looked

    earlier = "update logins set wrong_at = array(select at - %s * interval '1 second' from unnest(wrong_at) at)"
    assert guesses() == 5
    execute(database_url, earlier, 59)
    assert guesses() == 0
    execute(database_url, earlier, 2)
    assert guesses() == 5


def test_a_flood_against_a_name_keeps_out_the_flood_and_not_its_owner(keeper: Callable[..., Passwords]) -> None:
    home, flood = "192.0.2.1", [f"198.51.100.{number}" for number in range(20)]
    assert keeper().verify(b"ada", b"open sesame", home)
    refused = 0
    for address in flood:
        try:
            assert keeper().verify(b"ada", b"wrong", address) is None
        except TooManyTries:
            refused += 1
    assert refused == 15
    for doors in (keeper(), keeper()):  # other processes, or the same after a restart
        assert doors.verify(b"ada", b"open sesame", home)
        with pytest.raises(TooManyTries):
            doors.verify(b"ada", b"open sesame", "203.0.113.9")  # nobody knows that this is the owner
    assert keeper().verify(b"vic", b"open sesame", "203.0.113.9")  # another name is another matter


def test_a_name_that_nobody_has_is_throttled_as_one_that_somebody_has(keeper: Callable[..., Passwords]) -> None:
    for name in (b"ada", b"nobody"):
        for number in range(5):
            assert keeper().verify(name, b"wrong", f"198.51.100.{number + 10 * len(name)}") is None
        with pytest.raises(TooManyTries):
            keeper().verify(name, b"wrong", f"198.51.100.{9 + 10 * len(name)}")


def test_all_addresses_and_names_together_have_a_limit(keeper: Callable[..., Passwords]) -> None:
    doors = keeper()
    for number in range(30):
        assert doors.verify(b"name %d" % number, b"wrong", f"198.51.100.{number}") is None
    with pytest.raises(TooManyTries):
        doors.verify(b"name 31", b"wrong", "198.51.100.31")


def test_once_refused_the_memory_of_the_right_password_is_no_way_to_guess_it(keeper: Callable[..., Passwords]) -> None:
    doors = keeper()
    assert doors.verify(b"ada", b"open sesame", "192.0.2.1")
    for _ in range(5):
        assert doors.verify(b"ada", b"wrong", "192.0.2.1") is None
    for password in (b"wrong", b"open sesame"):
        with pytest.raises(TooManyTries):
            doors.verify(b"ada", password, "192.0.2.1")


def test_no_name_and_no_password_is_kept(keeper: Callable[..., Passwords], database_url: str) -> None:
    keeper().verify(b"hunter2", b"hunter3", "192.0.2.77")
    kept = str(execute(database_url, "select * from logins"))
    assert len(kept) > 100 and not any(text in kept for text in ("hunter", "192.0.2.77"))


@pytest.mark.parametrize(
    ("half", "said"),
    [
        ({"admin_user": "ada"}, "ADMIN_USER and ADMIN_PASS belong together"),
        ({"admin_pass": "secret phrase"}, "ADMIN_USER and ADMIN_PASS belong together"),
        ({"viewer_user": "vic"}, "VIEWER_USER and VIEWER_PASS belong together"),
        ({"viewer_pass": "secret phrase"}, "VIEWER_USER and VIEWER_PASS belong together"),
        ({"admin_user": "a:b", "admin_pass": "secret phrase"}, "without a colon"),
        ({"admin_user": "ada", "admin_pass": "x", "viewer_user": "ada", "viewer_pass": "y"}, "another name"),
        ({"admin_password": "x", "viewer_user": "admin", "viewer_pass": "y"}, "another name"),
        ({"admin_user": "ada", "admin_pass": "$argon2id$v=19$secret phrase"}, "ADMIN_PASS looks like an argon2 hash"),
        ({"admin_user": "ada", "admin_pass": HASH[:-9] + "!"}, "ADMIN_PASS looks like an argon2 hash"),
        ({"viewer_user": "ada", "viewer_pass": argon2.PasswordHasher(1, 64, 1).hash("")}, "empty password"),
    ],
)
def test_half_a_user_is_refused(half: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said) as refusal:
        passwords.users(installation(**half))
    assert "secret phrase" not in str(refusal.value) and HASH[20:40] not in str(refusal.value)


# The command line


Command = Callable[..., Said]


def test_the_command_prints_a_token_and_nothing_else(jobsys: Command) -> None:  # noqa: F811
    words = ("token", "--sub", "billing", "--scope", "jobs:write", "--scope", "jobs:read", "--expires", "90d")
    said = jobsys(*words, JWT_SECRET=SECRET, DATABASE_URL="postgresql://127.0.0.1:1/none")
    assert said.code == 0
    read = ISSUED_HERE.read(said.out.strip())
    assert read.sub == "billing" and read.scopes == {"jobs:read", "jobs:write"} and 89 < (read.expires_at - time.time()) / 86400 < 90.1
    assert read.jti in said.err and "billing" in said.err and said.out.strip() not in said.err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--sub", "a"), 2, "--scope"),
        (("--scope", "admin"), 2, "--sub"),
        (("--sub", "a", "--scope", "root"), 2, "jobs:read"),
        (("--sub", "a", "--scope", "admin", "--expires", "400d"), 2, "365 days"),
        (("--sub", "a", "--scope", "admin", "--expires", "soon"), 2, "duration"),
        (("--sub", "", "--scope", "admin"), 2, "200"),
        (("revoke",), 2, "--jti"),
    ],
)
def test_a_wrong_command_says_what_would_be_right(jobsys: Command, words: tuple[str, ...], code: int, text: str) -> None:  # noqa: F811
    said = jobsys("token", *words, JWT_SECRET=SECRET)
    assert said.code == code and text in said.err and not said.out


def test_the_command_revokes(jobsys: Command, database: Database) -> None:  # noqa: F811
    assert jobsys("token", "--sub", "a", "--scope", "admin").err.count("JWT_SECRET is not set") == 1
    said = jobsys("token", "revoke", "--sub", "billing", "--jti", "77")
    assert said.code == 0 and "billing" in said.out and "77" in said.out
    known = Revocations(database)
    assert known.cover(claims(jti="77", sub="shipping")) and known.cover(claims(issued_at=time.time() - 60)) and not known.cover(claims())


def test_no_secret_is_in_what_settings_show(settings: Settings) -> None:
    given = environment(settings, JWT_SECRET=SECRET, JWT_SECRET_PREVIOUS=OTHER, VIEWER_USER="vic", VIEWER_PASS="look around")
    shown = repr(
        Settings(_env_file=None, **{name.lower(): value for name, value in given.items() if name.lower() in Settings.model_fields})
    )
    assert not any(secret in shown for secret in (SECRET, OTHER, "look around"))
