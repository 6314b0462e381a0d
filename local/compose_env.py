"""``make env``: the secrets of ``docker-compose.yaml``, random, in a file ``.env`` that only its owner reads.

The standard library alone, so that Docker is all a machine needs. A caller's key for the gateway is printed once; the file
holds its salted digest, as ``cvf gateway-key`` makes it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import secrets
import sys
from pathlib import Path

RANDOM = (
    "POSTGRES_PASSWORD",
    "AIRFLOW_DB_PASSWORD",
    "AIRFLOW_ADMIN_PASSWORD",
    "AIRFLOW_API_SECRET",
    "AIRFLOW_JWT_SECRET",
    "MLFLOW_DB_PASSWORD",
    "MLFLOW_ADMIN_PASSWORD",
    "MLFLOW_SESSION_SECRET",
    "S3_ACCESS_KEY",
    "S3_SECRET_KEY",
    "GRAFANA_ADMIN_PASSWORD",
    "CVF_PSEUDONYM_KEY",
)
"""Of hexadecimal digits, which need no escaping in an address."""


def write(path: Path, caller: str) -> str:
    """Write the file; returns the caller's key.

    Raises:
        FileExistsError: there is one already.
    """
    key, line = gateway_key(caller)
    values = {name: secrets.token_hex(24) for name in RANDOM}
    values["AIRFLOW_FERNET_KEY"] = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    values["CVF_GATEWAY_KEYS"] = f"'{line}'"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.writelines(f"{name}={value}\n" for name, value in values.items())
    return key


def gateway_key(caller: str) -> tuple[str, str]:
    """A key, and the line by which the gateway knows it."""
    key, salt = f"cvf_{caller}_{secrets.token_urlsafe(32)}", secrets.token_bytes(16)
    digest = hashlib.sha256(salt + key.encode()).hexdigest()
    return key, json.dumps({"name": caller, "salt": salt.hex(), "digest": digest})


def main() -> int:
    parser = argparse.ArgumentParser(prog="make env", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--file", type=Path, default=Path(".env"))
    options = parser.parse_args()
    try:
        key = write(options.file, "consumer")
    except FileExistsError:
        print(f"{options.file}: is there already; volumes keep the passwords of their first start", file=sys.stderr)
        return 1
    print(f"{options.file}: written. The gateway's key for X-API-Key, which is kept nowhere:\n{key}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
