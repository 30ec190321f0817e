#!/bin/sh
# The role and the database of the service. PostgreSQL's image runs this once, as the superuser, on a new data folder.
# Elsewhere: DATABASE_PASSWORD=… sh postgres.sh, with libpq's variables (PGHOST, PGUSER, PGPASSWORD) for a superuser.
#
# The role `calmclip` owns one schema. It is no superuser, makes no database and no role, and no other role connects to
# its database. Only a superuser may install an extension, so the script does.
set -eu

refuse() {
    echo "postgres.sh: $1; then remove the new, unfinished volume: docker compose down, docker volume rm calmclip_postgres" >&2
    exit 1
}

[ -n "${DATABASE_PASSWORD:-}" ] || refuse "DATABASE_PASSWORD is not set; set it to the password of the role calmclip"
[ "$DATABASE_PASSWORD" != "${POSTGRES_PASSWORD:-}" ] ||
    refuse "DATABASE_PASSWORD is the superuser's POSTGRES_PASSWORD; choose two different passwords"

# \getenv, because an argument shows in the list of processes
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "${POSTGRES_USER:-${PGUSER:-postgres}}" --dbname postgres <<'SQL'
\getenv password DATABASE_PASSWORD
CREATE ROLE calmclip LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS PASSWORD :'password';
CREATE DATABASE calmclip ENCODING 'UTF8' TEMPLATE template0;
REVOKE ALL ON DATABASE calmclip, postgres, template1 FROM PUBLIC;
GRANT CONNECT ON DATABASE calmclip TO calmclip;
\connect calmclip
CREATE EXTENSION vector;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
CREATE SCHEMA calmclip AUTHORIZATION calmclip; -- first on the role's search_path, by its name
SQL
