"""service/deploy/postgres.sh against a real PostgreSQL: what the service's role may do, and what it may not.

The contract of the stores (tests/families/test_stores.py) runs as the user `keeper`. The first test here proves that
`keeper` has the rights that the script grants, so the contract shows that they suffice.
"""

import os
import subprocess
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from psycopg import errors

from tests.postgres import Server

SCRIPT = Path(__file__).parents[2] / "service/deploy/postgres.sh"
SECRET, SUPERUSERS = 'it\'s a \\ "secret" $HOME', "another"
RIGHTS = """
SELECT rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls, rolcanlogin,
       has_database_privilege(rolname, current_database(), 'CONNECT'),
       has_database_privilege(rolname, current_database(), 'CREATE'),
       has_database_privilege(rolname, current_database(), 'TEMP'),
       (SELECT datdba = pg_roles.oid FROM pg_database WHERE datname = current_database()),
       (SELECT string_agg(concat(nspname = rolname, ' ', nspowner = pg_roles.oid), ',') FROM pg_namespace
        WHERE has_schema_privilege(pg_roles.oid, pg_namespace.oid, 'CREATE')),
       ARRAY(SELECT roleid::regrole::text FROM pg_auth_members WHERE member = pg_roles.oid)
FROM pg_roles WHERE rolname =
"""


def run(postgres: Server, **passwords: str) -> "subprocess.CompletedProcess[str]":
    there = {"PGHOST": str(postgres.folder), "PGPORT": str(postgres.port), "PGUSER": "owner"}
    environment = {"PATH": os.environ["PATH"], **there, **passwords}
    return subprocess.run(["sh", SCRIPT], env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture(scope="module")
def role(postgres):
    """The script has run: keyword arguments of a connection as the role that it made."""
    done = run(postgres, DATABASE_PASSWORD=SECRET, POSTGRES_PASSWORD=SUPERUSERS)
    assert (done.returncode, done.stderr) == (0, "")
    return {"host": "127.0.0.1", "port": postgres.port, "user": "calmclip", "password": SECRET, "dbname": "calmclip"}


def test_the_role_has_the_rights_with_which_the_contract_of_the_stores_runs(role, postgres):
    contract = postgres.database().rpartition("/")[2]
    rights = postgres.psql(f"{RIGHTS} 'calmclip'", "calmclip")
    assert rights == postgres.psql(f"{RIGHTS} 'keeper'", contract)
    assert rights == "f|f|f|f|f|t|t|f|f|f|t t|{}"


def test_the_store_opens_with_it_and_keeps_its_tables_in_its_schema(role, postgres, monkeypatch):
    from calmclip.service.stores import open_store

    monkeypatch.setenv("PGPASSWORD", SECRET)  # as docker-compose.scale.yml passes it
    with closing(open_store(f"pgvector:postgresql://calmclip@127.0.0.1:{postgres.port}/calmclip")) as store:
        assert store.names() == []
    schemas = "SELECT DISTINCT schemaname FROM pg_tables WHERE tableowner = 'calmclip'"
    assert postgres.psql(schemas, "calmclip") == "calmclip"


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE DATABASE another",
        "CREATE ROLE another",
        "ALTER ROLE calmclip SUPERUSER",
        "SET ROLE owner",
        "SET SESSION AUTHORIZATION owner",
        "GRANT pg_read_server_files TO calmclip",
        "SELECT rolpassword FROM pg_authid",
        "COPY (SELECT 1) TO PROGRAM 'cat'",
        "CREATE TEMP TABLE t (x int); COPY t FROM PROGRAM 'id'",
        "SELECT pg_read_file('/etc/passwd')",
        "SELECT lo_import('/etc/passwd')",
        "CREATE SCHEMA another",
        "CREATE TABLE public.t (x int)",
        "CREATE EXTENSION dblink",
        "DROP EXTENSION vector",
        "ALTER SYSTEM SET archive_command = 'id'",
        "DROP DATABASE calmclip",
    ],
)
def test_the_role_may_not(role, statement):
    with psycopg.connect(**role, autocommit=True) as connection, pytest.raises(errors.InsufficientPrivilege):
        connection.execute(statement)


def test_the_role_reaches_its_own_database_alone_and_no_other_role_reaches_it(role, postgres):
    for database in ("postgres", "template1"):
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            psycopg.connect(**{**role, "dbname": database})
    with pytest.raises(psycopg.OperationalError, match="authentication failed"):
        psycopg.connect(**{**role, "password": SUPERUSERS})
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        psycopg.connect(postgres.url("calmclip"))


@pytest.mark.parametrize(
    ("passwords", "message"),
    [
        ({}, "DATABASE_PASSWORD is not set; set it to"),
        ({"DATABASE_PASSWORD": "same", "POSTGRES_PASSWORD": "same"}, "choose two different passwords"),
    ],
)
def test_without_two_passwords_the_script_changes_nothing(postgres, passwords, message):
    before = postgres.psql("SELECT count(*) FROM pg_roles")
    done = run(postgres, **passwords)
    assert done.returncode == 1
    assert message in done.stderr
    assert "same" not in done.stderr
    assert postgres.psql("SELECT count(*) FROM pg_roles") == before
