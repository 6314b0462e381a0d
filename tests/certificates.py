"""Certificates of this machine that sign themselves, for tests with encryption."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

NAMES = [
    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    *(x509.DNSName(name) for name in ("localhost", "*.blob.tests.invalid")),
]


class Certificate:
    """A certificate and its key, each in a file as PEM; it is its own authority."""

    def __init__(self, folder: Path, name: str, passphrase: bytes = b"") -> None:
        self.path, self.key = folder / f"{name}.pem", folder / f"{name}.key"
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = (
            x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName(NAMES), critical=False)
            .sign(key, hashes.SHA256())
        )
        locked = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self.key.write_bytes(key.private_bytes(*form))
