"""Certificates and keys of a federation: an authority of its own, the server's certificate, a key for each client.

What is there already is kept: names of servers and clients can be added later. Private keys are readable by their owner only.

    ca.crt, ca.key            the authority; every client needs ca.crt, and nobody but the server ca.key
    server.crt, server.key    the server's
    clients/NAME, NAME.pub    a client's: the first goes to the client, and to nobody else
"""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from anyrank.errors import ConfigError
from anyrank.flower.programs import check_name

__all__ = ["make_keys"]

_YEARS, _YEARS_OF_AUTHORITY = 2, 20  # clients have the authority's certificate, which is not easily replaced
_CURVE = ec.SECP384R1()  # one that Flower takes for its nodes


def make_keys(folder: Path, *, hosts: Sequence[str], clients: Sequence[str]) -> list[Path]:
    """Make what is not there yet.

    Args:
        folder: where it is kept.
        hosts: names and addresses by which clients reach the server; new ones give it a new certificate, which has those of
            the present one too.
        clients: names of clients.

    Returns:
        what was written.

    Raises:
        ConfigError: a client's name that is none, or no host for a new certificate.
    """
    for name in clients:
        check_name("--client", name)
    hosts = [_ascii(host) for host in hosts]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if not (folder / "ca.key").exists():
        written += _authority(folder)
    if hosts or not (folder / "server.crt").exists():
        if not hosts:
            raise ConfigError("--host: name at least one name or address by which clients reach the server.")
        # The last is that by which its own parts meet.
        written += _server(folder, [*dict.fromkeys([*hosts, *_present(folder / "server.crt"), "127.0.0.1"])])
    for name in clients:
        if not (folder / "clients" / name).exists():
            written += _client(folder / "clients" / name)
    return written


def _ascii(host: str) -> str:
    """A name as certificates write it."""
    try:
        written = host.encode("idna").decode()
    except UnicodeError as error:
        written, reason = "", f" ({error})"
    else:
        reason = ""
    if not written or not written.isprintable() or " " in written:
        raise ConfigError(f"--host {host!r}: expected a name or an address, such as fed.example.org{reason}.")
    return written


def _present(certificate: Path) -> list[str]:
    """The names and addresses in a certificate that is there."""
    if not certificate.exists():
        return []
    names = x509.load_pem_x509_certificate(certificate.read_bytes()).extensions
    found = names.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]


def _authority(folder: Path) -> list[Path]:
    key = ec.generate_private_key(_CURVE)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "anyrank federation")])
    usage = x509.KeyUsage(
        False, False, False, False, False, True, True, False, False
    )  # signs certificates, and no more
    made = (
        _certificate(name, name, key.public_key(), datetime.now(UTC) + timedelta(days=365 * _YEARS_OF_AUTHORITY))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    return _written(folder / "ca", key, made)


def _server(folder: Path, hosts: Sequence[str]) -> list[Path]:
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    signer = load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(_CURVE)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    until = min(datetime.now(UTC) + timedelta(days=365 * _YEARS), authority.not_valid_after_utc)
    made = (
        _certificate(name, authority.subject, key.public_key(), until)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA384())
    )
    return _written(folder / "server", key, made)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, until: datetime
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _client(file: Path) -> list[Path]:
    key = ec.generate_private_key(_CURVE)
    file.parent.mkdir(exist_ok=True)
    _write_private(file, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = file.with_name(file.name + ".pub")
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")
    return [file, public]


def _written(stem: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> list[Path]:
    files = [stem.with_suffix(".crt"), stem.with_suffix(".key")]
    files[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    _write_private(files[1], key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


def _write_private(file: Path, content: bytes) -> None:
    file.unlink(missing_ok=True)
    file.touch(mode=0o600)
    file.write_bytes(content)
