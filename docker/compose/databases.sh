#!/bin/sh
# Run by PostgreSQL's image at its first start: a database for Airflow and one for MLflow, each with a user of its own. The
# passwords are no arguments: the host's users see those.
set -eu
for name in airflow mlflow; do
  case $name in airflow) PASSWORD=$AIRFLOW_DB_PASSWORD ;; mlflow) PASSWORD=$MLFLOW_DB_PASSWORD ;; esac
  export PASSWORD
  psql --username "$POSTGRES_USER" --dbname postgres --set ON_ERROR_STOP=1 --set name="$name" <<'SQL'
\getenv password PASSWORD
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
done
