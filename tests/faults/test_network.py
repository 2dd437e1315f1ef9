"""An edit makes no network connection, and onnxruntime keeps no telemetry."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command_line import RUN

GUARD = """
import socket, sys

def refuse(*arguments, **more):
    raise AssertionError(f"a network call: {arguments}")

for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, refuse)
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse)
from qie.compiler.cli.main import main
try:
    main()
finally:
    clients = {"huggingface_hub", "requests", "httpx", "urllib3", "urllib.request"}
    assert not clients & set(sys.modules)
"""


def environment(home: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    return kept | {"HOME": str(home)}


def test_an_edit_makes_no_network_call(bundle: Path, workplace: Path, tmp_path: Path) -> None:
    home = tmp_path / "user"
    home.mkdir()
    words = ["run", "photo.png", "make it red", *RUN, "--bundle", str(bundle), "-o", "out.png"]
    done = subprocess.run(
        [sys.executable, "-c", GUARD, *words], capture_output=True, text=True, check=False, env=environment(home)
    )
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == []  # neither telemetry's device id nor its events


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_the_kernel_sees_no_socket(bundle: Path, workplace: Path) -> None:
    words = ["run", "photo.png", "make it red", *RUN, "--bundle", str(bundle), "-o", "out.png"]
    code = "from qie.compiler.cli.main import main; main()"
    command = ["strace", "-f", "-e", "trace=socket", "-o", "trace", sys.executable, "-c", code, *words]
    subprocess.run(command, check=True, capture_output=True, env=environment(workplace))
    assert "AF_INET" not in Path("trace").read_text()


def test_who_wants_telemetry_may_have_it() -> None:
    code = "import qie, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for value, expected in ((None, "1"), ("0", "0")):
        changed = environment(Path.cwd()) | ({} if value is None else {"ORT_DISABLE_TELEMETRY": value})
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=changed)
        assert told.stdout.strip() == expected
