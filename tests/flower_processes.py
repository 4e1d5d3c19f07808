"""Flower's own programs on loopback: a SuperLink with TLS and node authentication, and SuperNodes.

    with Machines(folder) as machines:
        machines.start_superlink()
        machines.start_node("client-0", partition=0)
        run = machines.run(app, {"num-rounds": 3})

Certificates and keys are made here. Every program is the leader of a process group, which dies with it.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from programs import free_port, untraced


BIN = Path(sys.executable).parent
START_SECONDS = 120


class Machines:
    """One coordinator and its clients' nodes.

    Args:
        folder: For certificates, keys, logs and Flower's own files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen] = {}
        (folder / "flwr").mkdir(parents=True)
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "lab"\n\n[superlink.lab]\naddress = "{self.address}"\n'
            f'root-certificates = "{folder / "ca.crt"}"\n'
        )
        self.environment = untraced() | {
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "NO_COLOR": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        _write_certificates(folder)

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *exception: object) -> None:
        for name in list(self.processes):
            self.kill(name)

    def start_superlink(self) -> None:
        self._start(
            "superlink",
            "flower-superlink",
            *("--host", "127.0.0.1", "--port", self.address.rpartition(":")[2]),
            *("--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key"),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        )
        self.wait_for("superlink", "Application startup complete")

    def register(self, name: str) -> None:
        """Make a key for a node, and have the SuperLink take it in under its name."""
        write_key(self.folder / name)
        self.flwr("supernode", "register", str(self.folder / f"{name}.pub"), "lab", "--name", name)

    def start_node(self, name: str, partition: int) -> None:
        """A SuperNode with the key of that name."""
        self._start(
            name,
            "flower-supernode",
            *("--superlink", self.address, "--root-certificates", "ca.crt", "--port", str(free_port())),
            *("--auth-supernode-private-key", name, "--node-config", f"partition-id={partition}"),
        )

    def flwr(self, *words: str) -> str:
        done = subprocess.run(
            [BIN / "flwr", *words], env=self.environment, capture_output=True, text=True, timeout=START_SECONDS
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, app: Path, config: Mapping[str, Any]) -> None:
        """Start a run and follow its log as `run`."""
        told = " ".join(f"{key}={_toml(value)}" for key, value in config.items())
        self._start("run", "flwr", "run", str(app), "lab", "--stream", "--run-config", told)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait_for(self, name: str, pattern: str, seconds: float = 300) -> str:
        """Wait until a program's log has a match."""
        return self.wait_until(lambda: re.search(pattern, self.log(name)), f"{pattern!r} of {name}", seconds)[0]

    def wait_until(self, condition: Callable[[], Any], what: str, seconds: float = 300) -> Any:
        end = time.monotonic() + seconds
        while not (result := condition()):
            assert time.monotonic() < end, f"{what} did not come:\n" + "\n".join(
                f"--- {name}\n{self.log(name)[-3000:]}" for name in self.processes
            )
            time.sleep(0.2)
        return result

    def kill(self, name: str) -> None:
        """SIGKILL to a program and all that it has started."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _start(self, name: str, program: str, *words: str) -> None:
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                [BIN / program, *words],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def write_key(path: Path) -> None:
    """An ECDSA key pair in OpenSSH's format, as `ssh-keygen -t ecdsa -b 384` makes it: `path` and `path.pub`."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    path.write_bytes(private)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public)


def _write_certificates(folder: Path) -> None:
    """`ca.crt`, and `server.pem` with `server.key` for 127.0.0.1, signed by it."""
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Test authority")])
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "coordinator")])
    now = datetime.datetime.now(datetime.timezone.utc)

    def certificate(name: x509.Name, key: ec.EllipticCurvePrivateKey, is_authority: bool) -> bytes:
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        return builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    (folder / "ca.crt").write_bytes(certificate(issuer, authority, True))
    (folder / "server.pem").write_bytes(certificate(subject, server, False))
    (folder / "server.key").write_bytes(
        server.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def _toml(value: Any) -> str:
    return f"'{value}'" if isinstance(value, (str, Path)) else str(value).lower()
