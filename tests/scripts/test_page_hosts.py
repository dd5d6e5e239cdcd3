"""Which requests the demo page answers, and that it answers many at once."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from models import create_model, save_checkpoint
from scripts.page.hosts import HostCheck, list_names

ROOT = Path(__file__).resolve().parents[2]
N_REQUESTS = 200


def answer(host: str, *headers: tuple[str, str], allowed: tuple[str, ...] = (), kind: str = "http") -> int:
    """Return the status of a request to a page that listens to `host`."""
    sent: list[dict] = []

    async def app(scope: object, receive: object, send: object) -> None:
        sent.append({"status": 200})

    async def send(message: dict) -> None:
        sent.append(message)

    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    check = HostCheck(app, *list_names(host, allowed))
    asyncio.run(check({"type": kind, "headers": encoded}, None, send))
    return sent[0].get("status", sent[0].get("code"))


@pytest.mark.parametrize("name", ["localhost:7860", "127.0.0.1:7860", "[::1]:7860", "LOCALHOST", "127.0.0.1"])
def test_the_page_answers_to_its_own_names(name: str) -> None:
    assert answer("127.0.0.1", ("host", name)) == 200
    assert answer("127.0.0.1", ("host", name), ("origin", f"http://{name}")) == 200


@pytest.mark.parametrize(
    "name", ["evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "",
             "user@evil.example", "localhost@evil.example", "[::1", "\xff", "2130706433"],
)  # fmt: skip
def test_the_page_of_this_machine_answers_to_no_other_name(name: str) -> None:
    assert answer("127.0.0.1", ("host", name)) == 421
    assert answer("127.0.0.1", ("host", name), kind="websocket") == 1008


def test_requests_from_pages_of_other_sites_are_refused() -> None:
    for origin in ("http://evil.example", "null", "http://localhost.evil.example:7860", "file://"):
        assert answer("127.0.0.1", ("host", "localhost:7860"), ("origin", origin)) == 421


def test_no_host_and_two_hosts_are_refused() -> None:
    assert answer("127.0.0.1") == 421
    assert answer("127.0.0.1", ("host", "localhost"), ("host", "evil.example")) == 421


def test_a_page_for_other_machines_answers_to_addresses_and_given_names() -> None:
    for name in ("192.168.1.7:7860", "[fe80::1]:7860", "localhost", socket.gethostname()):
        assert answer("0.0.0.0", ("host", name)) == 200
    assert answer("0.0.0.0", ("host", "evil.example")) == 421
    assert answer("0.0.0.0", ("host", "demo.example"), allowed=("demo.example",)) == 200
    assert answer("127.0.0.1", ("host", "Demo.Example:80"), allowed=("demo.example",)) == 200


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("gradio")
    with torch.random.fork_rng():
        save_checkpoint(
            tmp_path / "pico.pt", create_model("audiotransformer_pico", num_classes=3, labels=list("abc")), {}
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["scripts/demo_page.py", "-m", str(tmp_path / "pico.pt"), "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 90
    while socket.socket().connect_ex(("127.0.0.1", port)):
        assert server.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
    yield f"http://127.0.0.1:{port}"
    memory = next(line for line in Path(f"/proc/{server.pid}/status").read_text().splitlines() if "VmHWM" in line)
    server.send_signal(signal.SIGTERM)
    server.wait(30)
    assert int(memory.split()[1]) < 2_000_000, memory  # kB
    assert "Traceback" not in (tmp_path / "log").read_text()


def fetch(url: str, path: str, **headers: str) -> int:
    request = urllib.request.Request(url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            reply.read()
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.long
def test_the_page_answers_200_requests_at_once_and_none_of_other_sites(url: str) -> None:
    with ThreadPoolExecutor(N_REQUESTS) as pool:
        paths = ["/", "/config", "/gradio_api/info", "/theme.css"]
        start = time.monotonic()
        found = list(pool.map(lambda number: fetch(url, paths[number % len(paths)]), range(N_REQUESTS)))
        assert found == [200] * N_REQUESTS
        assert time.monotonic() - start < 60
        refused = list(pool.map(lambda _: fetch(url, "/config", Host="evil.example"), range(N_REQUESTS)))
    assert refused == [421] * N_REQUESTS
    assert fetch(url, "/config", Origin="http://evil.example") == 421
    assert fetch(url, "/") == 200
