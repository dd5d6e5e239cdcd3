"""Downloads from servers that are silent, cut off, redirect, or send something else; all of them on this machine."""

import hashlib
import http.server
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import soundfile
import torch

from common.errors import UserError
from models import downloads, get_model_entry, load_model, save_checkpoint
from models.downloads import download, file_name, transfer
from models.weight_sources import fetch
from probing.probe import probe
from run import Runner
from save_logits import save_logits
from tests.conftest import ROOT
from tests.models.strange import small
from training.evaluate import evaluate_command


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`, path -> content, as `server.ways` says of the path: a list of ways, one a request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        path = self.path.split("?")[0]
        ways = server.ways.get(path, [])
        way = ways.pop(0) if ways else "whole"
        content = server.files.get(self.path, server.files.get(path))
        if content is None:
            self.send_error(404)
        elif way == "silent":
            server.closing.wait(20)
        elif way == "503":
            self.send_error(503)
        elif way == "html":
            self._send(200, b"<html>log in</html>", {"Content-Type": "text/html"})
        elif way == "redirect":
            self.send_response(302)
            self.send_header("Location", "/elsewhere.pt")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send_file(content, way)

    def _send_file(self, content, way):
        etag = {"ETag": f'"{hashlib.md5(content).hexdigest()}"'} if way != "no etag" else {}
        asked, status, facts = self.headers.get("Range"), 200, {}
        n_bytes = len(content)
        if asked and self.headers.get("If-Range") == etag.get("ETag") and way != "no ranges":
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            content, status = content[start:], 206
            facts = {"Content-Range": f"bytes {start}-{n_bytes - 1}/{n_bytes}"}
            if way == "other part":
                facts = {"Content-Range": f"bytes 0-{n_bytes - 1}/{n_bytes}"}
        if way == "endless":
            facts["Content-Length"] = str(1 << 50)
        if way in ("cut", "slow"):
            self._send(status, content, facts | etag, n_sent=len(content) // 2)
            if way == "slow":
                self.wfile.flush()
                self.server.closing.wait(20)
            self.close_connection = True
        else:
            self._send(status, content, facts | etag)

    def _send(self, status, content, facts, n_sent=None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | facts).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:n_sent])
        self.wfile.flush()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server with a checkpoint at /a/model.pt and another one at /b/model.pt, and an empty cache; quick limits."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    monkeypatch.setattr(downloads, "PAUSES", (0.0, 0.0))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        running.requests, running.ways, running.closing = [], {}, threading.Event()
        running.files = {}
        for folder, label in (("a", "rain"), ("b", "wind")):
            save_checkpoint(tmp_path / "model.pt", small(labels=[label, "x", "y"]))
            running.files[f"/{folder}/model.pt"] = (tmp_path / "model.pt").read_bytes()
        running.files["/elsewhere.pt"] = running.files["/a/model.pt"]
        running.url = f"http://127.0.0.1:{running.server_port}"
        running.cache = tmp_path / "torch" / "hub" / "checkpoints"
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running
        running.closing.set()
        running.shutdown()


def names(server):
    return sorted(path.name for path in server.cache.iterdir())


def test_two_addresses_with_one_file_name_give_two_models(server):
    assert load_model(f"{server.url}/a/model.pt").labels[0] == "rain"
    assert load_model(f"{server.url}/b/model.pt").labels[0] == "wind"
    assert load_model(f"{server.url}/a/model.pt").labels[0] == "rain"
    assert len(server.requests) == 2


def test_an_address_with_another_query_is_another_file(server):
    server.files["/a/model.pt?version=2"] = server.files["/b/model.pt"]
    assert load_model(f"{server.url}/a/model.pt").labels[0] == "rain"
    assert load_model(f"{server.url}/a/model.pt?version=2").labels[0] == "wind"


@pytest.mark.parametrize("path", ["", "/", "/a/", "/a/..", "/%00", "?x=model.pt"])
def test_an_address_without_a_file_name_is_refused(server, path):
    server.cache.mkdir(parents=True)
    (server.cache / "model.pt").write_bytes(server.files["/a/model.pt"])
    with pytest.raises(UserError, match=r"names no file; expected an address such as https://HOST/FOLDER/NAME\.pt"):
        load_model(server.url + path)
    assert not server.requests


@pytest.mark.parametrize("url", ["http:///x.pt", "http://[::1/x.pt", "https://"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UserError, match="names no file"):
        file_name(url)


def test_a_silent_server_is_left_after_the_limit(server):
    server.ways["/a/model.pt"] = ["silent"] * 9
    with pytest.raises(UserError, match=r"cannot be downloaded \(no answer within 0\.3 s\): download the file to "):
        load_model(f"{server.url}/a/model.pt")
    assert len(server.requests) == 3


def test_a_server_that_accepts_and_says_nothing_is_left_after_the_limit(server):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with pytest.raises(UserError, match="no answer within"):
            download(f"http://127.0.0.1:{listening.getsockname()[1]}/x.pt")


@pytest.mark.parametrize(
    "ways", [["503"], ["cut"], ["slow"], ["silent"], ["cut", "cut"], ["cut", "503"], ["cut", "other part"]]
)
def test_what_fails_once_is_tried_again(server, ways):
    server.ways["/a/model.pt"] = ways
    assert load_model(f"{server.url}/a/model.pt").labels[0] == "rain"
    assert len(names(server)) == 1


def test_an_interrupted_download_goes_on_where_it_ended(server):
    server.ways["/a/model.pt"] = ["cut"]
    load_model(f"{server.url}/a/model.pt")
    half = len(server.files["/a/model.pt"]) // 2
    assert server.requests == [("/a/model.pt", None), ("/a/model.pt", f"bytes={half}-")]


def test_another_version_of_the_file_is_downloaded_from_its_beginning(server):
    server.ways["/a/model.pt"] = ["cut"] * 3
    with pytest.raises(UserError, match="the transfer ended after"):
        load_model(f"{server.url}/a/model.pt")
    server.files["/a/model.pt"] = server.files["/b/model.pt"]
    assert load_model(f"{server.url}/a/model.pt").labels[0] == "wind"


@pytest.mark.parametrize("way", ["no etag", "no ranges"])
def test_a_server_that_cannot_continue_sends_all(server, way):
    server.ways["/a/model.pt"] = ["cut", way]
    assert load_model(f"{server.url}/a/model.pt").labels[0] == "rain"


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("html", "the server sent a web page"),
        ("endless", r"it has \d+ bytes, and there is room for"),
        ("404", "HTTP Error 404"),
    ],
)
def test_another_answer_is_refused_at_once(server, way, message):
    server.ways["/a/model.pt"] = [way] * 3
    if way == "404":
        del server.files["/a/model.pt"]
    with pytest.raises(UserError, match=message):
        load_model(f"{server.url}/a/model.pt")
    assert len(server.requests) == 1
    assert not any(name.endswith("model.pt") for name in names(server))


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04rest", b"x" * 1000])
def test_content_that_is_no_checkpoint_is_refused_and_not_kept(server, content):
    server.files["/a/model.pt"] = content
    with pytest.raises(UserError, match="cannot be downloaded"):
        load_model(f"{server.url}/a/model.pt")
    assert names(server) == []


def test_a_redirection_is_followed(server):
    server.ways["/a/model.pt"] = ["redirect"]
    assert load_model(f"{server.url}/a/model.pt").labels[0] == "rain"


def test_a_hash_in_the_name_is_checked(server):
    content = server.files["/a/model.pt"]
    right = hashlib.sha256(content).hexdigest()[:8]
    wrong = "abcdef01"
    for name in (right, wrong):
        server.files[f"/model-{name}.pt"] = content
    if right.isdecimal():  # would be taken for a date
        pytest.skip("no letters in the hash")
    assert load_model(f"{server.url}/model-{right}.pt").labels[0] == "rain"
    with pytest.raises(UserError, match="SHA-256 does not begin with abcdef01"):
        load_model(f"{server.url}/model-{wrong}.pt")


def test_a_file_of_torch_hub_with_a_hash_in_its_name_is_found(server):
    content = server.files["/a/model.pt"]
    name = f"model-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    server.cache.mkdir(parents=True)
    (server.cache / name).write_bytes(content)
    assert download(f"{server.url}/{name}") == server.cache / name
    assert not server.requests


def test_published_weights_are_found_under_their_published_name(server):
    server.cache.mkdir(parents=True)
    (server.cache / "mn04_as_mAP_432.pt").write_bytes(server.files["/a/model.pt"])
    assert fetch(get_model_entry("mn04_as").weights) == server.cache / "mn04_as_mAP_432.pt"
    with pytest.raises(UserError, match="cannot be downloaded"):
        fetch("http://127.0.0.1:9/mn04_as_mAP_432.pt")


def test_without_a_server_the_message_has_what_to_fetch_and_where_to_put_it(server, monkeypatch):
    tries = []
    monkeypatch.setattr(downloads, "transfer", lambda *arguments: (tries.append(1), transfer(*arguments)))
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/x\.pt cannot be downloaded \(.*refused\)"):
        download("http://127.0.0.1:9/x.pt")
    assert len(tries) == 1


def _download_in_process(url, folder):
    os.environ["TORCH_HOME"] = folder
    return str(download(url))


def test_several_processes_download_a_file_once(server, tmp_path):
    server.ways["/a/model.pt"] = ["cut"]
    run = partial(_download_in_process, folder=str(tmp_path / "torch"))
    with multiprocessing.get_context("fork").Pool(3) as pool:
        paths = pool.map(run, [f"{server.url}/a/model.pt"] * 3)
    assert len(set(paths)) == 1
    assert len(server.requests) == 2  # one of them is the continuation
    assert torch.load(paths[0], weights_only=True)["config"]["labels"][0] == "rain"
    assert len(names(server)) == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_download_is_continued_by_the_next(server, tmp_path, how):
    server.ways["/a/model.pt"] = ["slow"]
    url = f"{server.url}/a/model.pt"
    code = f"from models.downloads import download; print('ready', flush=True); download({url!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TORCH_HOME": str(tmp_path / "torch")},
    )
    assert process.stdout.readline()
    half = len(server.files["/a/model.pt"]) // 2
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(path.stat().st_size >= half for path in server.cache.glob(".*.part.pt")):
            break
        time.sleep(0.01)
    process.send_signal(how)
    process.wait(60)
    assert load_model(url).labels[0] == "rain"
    assert server.requests[1:] == [("/a/model.pt", f"bytes={half}-")]
    assert len(names(server)) == 1


@pytest.mark.parametrize("start", ["evaluate", "probe", "store", "train"])
def test_nothing_is_downloaded_before_other_faults_are_mended(server, tmp_path, capsys, start):
    missing, url = str(tmp_path / "missing.tsv"), f"{server.url}/a/model.pt"
    (tmp_path / "store.yaml").write_text(f"train_data: {missing}\nmodel: {url}\noutputpath: {tmp_path}/logits\n")
    (tmp_path / "training.yaml").write_text(
        f"train_data: {missing}\neval_data: null\nselect_on: null\nmodel: resnet10_small\npretrained: {url}\n"
        f"outputpath: {tmp_path}/runs\n"
    )
    starts = {
        "evaluate": lambda: evaluate_command({"model": url, "test_data": missing}, pytest.fail),
        "probe": lambda: probe({"model": url, "data": missing, "name": "x"}, 1),
        "store": lambda: save_logits(str(tmp_path / "store.yaml")),
        "train": lambda: Runner(seed=1).train(str(tmp_path / "training.yaml")),
    }
    with pytest.raises((UserError, SystemExit)) as error:
        starts[start]()
    assert f"{missing} does not exist" in str(error.value) + capsys.readouterr().err
    assert not server.requests


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "address"),
    [
        (("inference.py", "{sound}", "-m", "ced_tiny"), "zenodo.org/record/8275347"),
        (("inference.py", "{sound}", "-m", "timm:deit_tiny_distilled_patch16_224"), "huggingface.co/timm/deit_tiny"),
        (("inference.py", "{sound}", "-m", "ced_tiny", "--head", "esc50"), "ssondo/resolve/main/heads/esc50.pth"),
        (("export_onnx.py", "-m", "mn04_as"), "EfficientAT/releases"),
    ],
)
def test_without_a_network_commands_say_what_they_wanted_to_fetch(command, tmp_path, words, address):
    soundfile.write(tmp_path / "a.wav", [0.1] * 16000, 16000)
    proxy = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    result = command(
        *[word.format(sound=tmp_path / "a.wav") for word in words],
        env={"TORCH_HOME": str(tmp_path / "torch"), "HF_HOME": str(tmp_path / "hf")} | proxy,
    )
    assert result.returncode == 1
    assert address in result.stderr
    assert "download the file to" in result.stderr
    assert "Traceback" not in result.stderr
