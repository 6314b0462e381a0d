#!/bin/sh
# Run by PostgreSQL's image at its first start: a database for Airflow and one for MLflow, each with a user of its own.
set -eu
for name in airflow mlflow; do
  case $name in airflow) password=$AIRFLOW_DB_PASSWORD ;; mlflow) password=$MLFLOW_DB_PASSWORD ;; esac
  psql --username "$POSTGRES_USER" --dbname postgres --set ON_ERROR_STOP=1 --set name="$name" --set password="$password" <<'SQL'
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
done
