"""Looking for jobs where no index leads: in bounded time, and nothing left out."""

from __future__ import annotations

import contextlib

import psycopg2
import pytest
import webtest
from conftest import execute

from jobsys import search
from jobsys.app import create_app
from jobsys.errors import DatabaseUnavailable
from jobsys.settings import Settings
from jobsys.system import JobSystem

RARE = 700


@pytest.fixture
def many(database_url: str) -> str:
    """A database with 20,000 jobs, one in 700 of them of a type that the others aren't."""
    execute(
        database_url,
        """
        insert into jobs (type, queue, payload)
        select case when n %% %s = 0 then 'RARE' else 'COMMON' end, 'default', jsonb_build_object('n', n) from generate_series(1, 20000) n
        """,
        RARE,
    )
    execute(database_url, "analyze jobs")
    return database_url


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that finds nothing in its own way in time, and looks through little in one go."""
    monkeypatch.setattr(search, "HASTE", 0.001)
    monkeypatch.setattr(search, "TIME", 0.0)
    monkeypatch.setattr(search, "FIRST_PART", 3000)


def walk(system: JobSystem, **filters: object) -> tuple[list[int], list[int]]:
    """The numbers of the jobs found, page by page, and the sizes of the pages that were cut short."""
    found, short, cursor = [], [], None
    while True:
        page = system.jobs(**filters, cursor=cursor)  # type: ignore[arg-type]
        found += [job.payload["n"] for job in page.jobs]
        short += [len(page.jobs)] * page.cut_short
        cursor = page.next_cursor
        if cursor is None:
            return found, short


def test_a_search_that_takes_too_long_goes_on_from_page_to_page(many: str, hasty: None, system: JobSystem) -> None:
    # What one statement inserts has ids in any order within a millisecond: the order is the ids'.
    expected = [
        n for (n,) in execute(many, "select (payload ->> 'n')::integer from jobs where payload::text like '%700}' order by id desc")
    ]
    found, short = walk(system, q="700}", limit=15)
    assert found == expected
    assert short and max(short) < 15
    nothing, short = walk(system, q="nowhere", limit=15)
    assert nothing == [] and set(short) == {0} and len(short) == 20000 // 3000


def test_pages_are_full_where_the_time_permits(many: str, system: JobSystem) -> None:
    found, short = walk(system, type="RARE", limit=5)
    assert sorted(found) == list(range(RARE, 20001, RARE)) and short == []


def test_jobs_that_are_too_large_to_be_read_in_haste_are_listed_a_few_at_a_time(many: str, hasty: None, system: JobSystem) -> None:
    execute(
        many,
        """
        with large as materialized (select jsonb_agg('[]'::jsonb) as lists from generate_series(1, 50000))
        insert into jobs (type, queue, payload) select 'LARGE', 'default', jsonb_build_object('n', n, 'lists', lists)
        from large, generate_series(20001, 20040) n
        """,
    )
    expected = [n for (n,) in execute(many, "select (payload ->> 'n')::integer from jobs order by id desc limit 40")]
    found: list[int] = []
    cursor = None
    while len(found) < 40:
        page = system.jobs(limit=15, cursor=cursor)
        assert page.cut_short and 1 <= len(page.jobs) < 15
        found += [job.payload["n"] for job in page.jobs]
        cursor = page.next_cursor
    assert found[:40] == expected  # the last page may have gone on


def test_rows_that_take_long_to_unpack_make_short_pages(many: str, system: JobSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = walk(system, type="RARE", limit=5)
    monkeypatch.setattr(search, "UNPACK", -1.0)
    found, short = walk(system, type="RARE", limit=5)
    assert found == expected and set(short) == {1}
    monkeypatch.setattr(search, "HASTE", 0.001)
    found, short = walk(system, type="RARE", limit=5)
    assert found == expected and set(short) <= {0, 1}


def test_what_is_given_up_is_given_up_in_the_database_too(many: str, system: JobSystem) -> None:
    with pytest.raises(DatabaseUnavailable) as caught:
        search._read(system.database, search.Condition("pg_sleep(1) is not null", {}), 5, search.Condition("true", {}), 0.01)
    assert isinstance(caught.value.__cause__, psycopg2.errors.QueryCanceled)
    assert execute(
        many, "select count(*) from pg_stat_activity where state = 'active' and query like '%pg_sleep(1)%' and pid <> pg_backend_pid()"
    ) == [(0,)]
    assert system.jobs(limit=3).jobs, "the connection is as it was"


def test_only_so_many_look_through_the_jobs_at_the_same_time(
    many: str, hasty: None, settings: Settings, system: JobSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = webtest.TestApp(create_app(settings, system))
    with contextlib.ExitStack() as others:
        for _ in range(search.AT_ONCE):
            others.enter_context(search._free)
        assert web.get("/jobs?status=FAILED").json == {"jobs": [], "nextCursor": None}, "what an index finds"
        monkeypatch.setattr(search, "HASTED", 0.001)
        refused = web.get("/jobs?q=nowhere", status=503)
        assert "too many searches" in refused.json["detail"] and refused.headers["Retry-After"]
        web.get("/admin/ui/jobs?q=nowhere", status=503)
    assert web.get("/jobs?q=nowhere").json["nextCursor"]
    assert all(search._free.acquire(blocking=False) for _ in range(search.AT_ONCE)), "each was given back"
    search._free.release(search.AT_ONCE)


def test_the_list_and_the_page_say_that_there_may_be_more(many: str, hasty: None, settings: Settings, system: JobSystem) -> None:
    web = webtest.TestApp(create_app(settings, system))
    answer = web.get("/jobs", {"q": "nowhere"}).json
    assert answer["jobs"] == [] and answer["nextCursor"]
    page = web.get("/admin/ui/jobs", {"q": "nowhere"})
    assert "No job matches so far" in page.text
    some = web.get("/admin/ui/jobs", {"q": "RARE"})
    assert some.html.select("tbody tr") and "There are more jobs than can be looked through" in some.html.nav.find_next("nav").text
    while "Look further" in page.text:
        page = page.click("Look further")
    assert "There is nothing older" in page.text
