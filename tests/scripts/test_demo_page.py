"""The demo page in a real browser, and what lies behind its button."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import inference
from common.errors import UserError
from models import create_model, save_checkpoint
from scripts import demo_page
from tagging.engines import open_engine
from tagging.files import TaggedWindow, TagOptions, tag_files
from tests.audio.odd_files import ODD_FILES

ROOT = Path(__file__).resolve().parents[2]
LABELS = ["Speech", "Chirp, tweet", "Bell", "Siren", "Rain", "Bow & arrow", "<i>Wind</i>", "Music"]
CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1400,1000"),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "pico.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("audiotransformer_pico", num_classes=len(LABELS), labels=LABELS).eval()
    with torch.no_grad():
        for weight in model.outputlayer.parameters():
            weight.mul_(4)  # opinions that differ from window to window
    save_checkpoint(path, model, {})
    return path


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    time = np.arange(3 * 44100) / 44100
    left = 0.4 * np.sin(2 * np.pi * (200 * time + 1000 * time**2))
    right = 0.2 * np.sin(2 * np.pi * 880 * time) * (time > 1.5)
    soundfile.write(folder / "schräger chirp.wav", np.stack([left, right], axis=1), 44100)
    soundfile.write(folder / "long.wav", np.zeros(6 * 8000), 8000)
    (folder / "words.wav").write_text("these are words")
    soundfile.write(folder / "cut.wav", 0.4 * np.sin(np.arange(4 * 8000)), 8000)
    (folder / "cut.wav").write_bytes((folder / "cut.wav").read_bytes()[: 44 + 2 * 2 * 8000])
    (folder / "big.wav").write_bytes(bytes(1_200_000))
    return folder


class Browser:
    """The page as a user sees it."""

    def __init__(self, driver, url):
        self.driver, self.url = driver, url
        self.driver.get(url)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def wait(self, selector, absent=False):
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 30, 0.05).until(lambda driver: bool(self.all(selector)) != absent, selector)
        return self.all(selector)

    def upload(self, path, waits_for="#sound audio, #sound #waveform"):
        if clear := self.all('#sound button[aria-label="Clear"]'):
            clear[0].click()
        self.wait("#sound input[type=file]")[0].send_keys(str(path))
        self.wait(waits_for)

    def set(self, control, value):
        from selenium.webdriver.common.keys import Keys

        (field,) = self.all(f"#{control} input[type=number]")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(f"{value}{Keys.TAB}")

    def get(self, control):
        (field,) = self.all(f"#{control} input[type=number]")
        return float(field.get_attribute("value"))

    def tag(self):
        self.all("#tag")[0].click()

    def complaint(self):
        """The sentence that the page shows; it is then closed."""
        (toast,) = self.wait("[data-testid=toast-text]")
        for _ in range(200):
            if sentence := toast.text:  # none while it is being faded in
                break
            time.sleep(0.05)
        assert "Traceback" not in self.driver.page_source
        for button in self.all("[data-testid=toast-close]"):
            button.click()
        self.wait("[data-testid=toast-text]", absent=True)
        return sentence

    def table(self):
        rows = self.wait("#strongest tbody tr")
        return [[cell.text for cell in row.find_elements("css selector", "td")] for row in rows]

    def picture_size(self):
        (picture,) = self.wait("#picture img")
        for _ in range(200):
            size = self.driver.execute_script("return [arguments[0].naturalWidth, arguments[0].naturalHeight]", picture)
            if size[0] > 0:
                return size
            time.sleep(0.05)
        return [0, 0]

    def requests(self):
        """Addresses that the page asked for."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in asked if params.get("documentURL", "").startswith(self.url)]


@pytest.fixture(scope="module")
def page(checkpoint, tmp_path_factory):
    """The page served by its command, open in a browser; afterwards both are gone, and so are temporary files."""
    pytest.importorskip("gradio")
    webdriver = pytest.importorskip("selenium.webdriver")
    for program in (CHROMIUM, DRIVER):
        if not program.exists():
            pytest.skip(f"needs {program}")
    folder = tmp_path_factory.mktemp("page")
    for name in ("temporary", "downloads", "profile"):
        (folder / name).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", checkpoint, "--port", port, "-c", 1, "--hop", 0.5, "--max_seconds", 5, "--max_mb", 1]
    command = [sys.executable, "scripts/demo_page.py", *map(str, words), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "temporary")}
    log = folder / "log.txt"
    with open(log, "w") as output:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    driver = None
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
        browser = Browser(driver, f"http://127.0.0.1:{port}/")
        browser.downloads = folder / "downloads"
        yield browser
    finally:
        if driver is not None:
            driver.quit()
        server.send_signal(signal.SIGTERM)
        try:
            status = server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            raise
    assert status == 0, log.read_text()
    assert "Traceback" not in log.read_text()
    assert not list((folder / "temporary").iterdir())


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def downloaded(folder):
    for _ in range(200):
        if (folder / "tags.csv").exists():
            return read_rows(folder / "tags.csv")
        time.sleep(0.05)
    raise AssertionError(f"no tags.csv, but {list(folder.iterdir())}")


def expected_table(checkpoint, path, wanted, **times):
    """What the page must show, from tag_files' own output."""
    (file,) = tag_files(open_engine(checkpoint, device="cpu"), [path], wanted, **times)
    best = {}
    for window in file.windows:
        for label, value in window.tags:
            best[label] = max(best.get(label, (0.0,)), (value, -window.start, window))
    rows = sorted(best.items(), key=lambda item: -item[1][0])
    return [[label, f"{value:.3f}", f"{w.start:.1f} to {w.end:.1f} s"] for label, (value, _, w) in rows]


def test_a_sound_dropped_is_tagged_as_the_command_tags_it(page, checkpoint, sounds, tmp_path):
    sound = sounds / "schräger chirp.wav"
    page.upload(sound)
    page.tag()
    shown = page.table()
    assert shown == expected_table(checkpoint, sound, TagOptions(3), chunk_seconds=1.0, hop_seconds=0.5)
    assert len(shown) >= 3
    width, height = page.picture_size()
    assert width > 1000
    assert 400 < height < width

    page.all("#download")[0].click()
    rows = downloaded(page.downloads)
    target = tmp_path / "tags.csv"
    inference.main([str(sound), "-m", str(checkpoint), "-c", "1", "--hop", "0.5", "--output", str(target), "--quiet"])
    assert rows == [[row[0].replace(str(sound), sound.name), *row[1:]] for row in read_rows(target)]
    assert len(rows) == 1 + 5 * 3  # windows from 0, 0.5, ... 2 s, three labels each


def test_the_settings_are_kept_to(page, checkpoint, sounds, tmp_path):
    sound = sounds / "schräger chirp.wav"
    page.upload(sound)
    page.wait("#strongest .hint")  # the last sound's results are gone
    page.set("chunk", 1.5)
    for _ in range(100):
        if page.get("hop") == 1.5:  # the step follows the window, so that windows overlap only where that is asked for
            break
        time.sleep(0.05)
    page.set("top_k", 8)
    page.set("threshold", 0.5)
    page.tag()
    assert page.table() == expected_table(checkpoint, sound, TagOptions(8, 0.5), chunk_seconds=1.5)[: demo_page.N_SHOWN]
    (page.downloads / "tags.csv").unlink()
    page.all("#download")[0].click()
    rows = downloaded(page.downloads)
    target = tmp_path / "tags.csv"
    words = [sound, "-m", checkpoint, "-c", 1.5, "-k", 8, "--threshold", 0.5, "--output", target, "--quiet"]
    inference.main([*map(str, words)])
    assert rows == [[row[0].replace(str(sound), sound.name), *row[1:]] for row in read_rows(target)]


def test_what_cannot_be_tagged_is_refused_with_a_sentence(page, sounds):
    page.upload(sounds / "words.wav")
    page.tag()
    assert page.complaint().startswith("words.wav is not a sound that can be read here: cannot be decoded (")
    page.upload(sounds / "long.wav")
    page.tag()
    assert page.complaint() == (
        "long.wav is longer than 5 s, the maximum of this page: cut it, or tag it with inference.py, which supports "
        "any length."
    )
    page.upload(sounds / "big.wav", waits_for="[data-testid=toast-text]")
    assert page.complaint() == 'File(s) exceed the maximum allowed size of 1.0 Mb: "big.wav"'
    page.tag()
    assert page.complaint() == "There is no sound yet: drop one or record one first."
    page.upload(sounds / "schräger chirp.wav")  # and the page works on
    page.tag()
    assert page.table()


def test_what_is_odd_about_a_sound_is_shown_beside_its_tags(page, sounds):
    page.upload(sounds / "cut.wav")
    page.tag()
    sentence = "cut.wav ends before the length that its header announces (2.00 of 4.00 s)."
    assert sentence in page.complaint()
    assert page.table()


def test_the_server_too_refuses_a_file_that_is_too_large(page):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.wav"\r\n\r\n%b\r\n--x--\r\n'
    for n_bytes, status in ((1_000_000, 200), (1_200_000, 413)):
        request = urllib.request.Request(f"{page.url}gradio_api/upload", body % bytes(n_bytes))
        request.add_header("Content-Type", "multipart/form-data; boundary=x")
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
                assert answer.status == status
        except urllib.error.HTTPError as error:
            assert error.code == status  # noqa: PT017 - so that both sizes are asked for alike


def test_nothing_on_the_page_comes_from_elsewhere(page):
    asked = page.requests()
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith((page.url, "data:", f"blob:{page.url}"))] == []


def test_without_gradio_a_message_has_what_to_install(checkpoint, command, tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('no gradio here')\n")
    result = command("scripts/demo_page.py", "-m", checkpoint, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1
    assert result.stderr == "error: the page requires gradio: pip install -r requirements-demo.txt\n"


class Counting:
    """An engine that notes how many calls of it are under way at once."""

    name, sample_rate, labels, max_samples, n_threads = "counting", 8000, ["Loud", "Silent"], None, 1

    def __init__(self):
        self.n_now = self.most = self.n_calls = 0

    def predict(self, clips):
        self.n_now, self.n_calls = self.n_now + 1, self.n_calls + 1
        self.most = max(self.most, self.n_now)
        time.sleep(0.01)
        self.n_now -= 1
        loud = np.array([np.abs(clip).max() for clip in clips], np.float32)
        return np.stack([loud, 1 - loud], axis=1)


@pytest.mark.parametrize("row", ODD_FILES[::3], ids=lambda row: row.name)
def test_every_kind_of_file_is_tagged_with_its_warnings_or_refused(tmp_path, row):
    page = demo_page.Page(Counting(), 20.0)
    (tmp_path / row.name).write_bytes(row.data)
    if row.seconds is None:
        with pytest.raises(UserError, match=f"{row.name} is not a sound that can be read here: .*{row.refusal}"):
            page.tag(tmp_path / row.name, 20.0, 20.0, TagOptions(1), lambda share: None)
        return
    file, waveform = page.tag(tmp_path / row.name, 20.0, 20.0, TagOptions(1), lambda share: None)
    assert len(waveform) / 8000 == pytest.approx(row.seconds, abs=0.1)
    assert tuple(file.warnings) == row.warnings


def test_one_sound_is_computed_at_a_time(tmp_path):
    engine, heard = Counting(), []
    page = demo_page.Page(engine, 10.0)
    for name, level in (("a.wav", 0.25), ("b.wav", 0.75)):
        soundfile.write(tmp_path / name, np.full(8 * 8000, level), 8000, "FLOAT")

    def tag(name):
        file, waveform = page.tag(tmp_path / name, 1.0, 0.25, TagOptions(1), lambda share: heard.append((name, share)))
        assert {window.tags[0] for window in file.windows} == {("Silent", 0.75) if name == "a.wav" else ("Loud", 0.75)}
        assert waveform.shape == (64000,)

    threads = [threading.Thread(target=tag, args=(name,)) for name in ("a.wav", "b.wav")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.most == 1
    first = heard[0][0]
    assert [name for name, _ in heard] == sorted((name for name, _ in heard), key=lambda name: name != first)
    for name in ("a.wav", "b.wav"):
        shares = [share for message, share in heard if message == name]
        assert shares == sorted(shares)
        assert 0.9 < shares[-1] <= 1


def test_windows_that_overlap_too_much_are_refused_before_anything_is_computed(tmp_path):
    engine = Counting()
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 8000)
    page = demo_page.Page(engine, 10.0)
    with pytest.raises(UserError, match=r"overlap too much .* at least 1 s"):
        page.tag(tmp_path / "a.wav", 10.0, 0.9, TagOptions(1), lambda share: None)
    assert engine.n_calls == 0
    page.tag(tmp_path / "a.wav", 10.0, 1.0, TagOptions(1), lambda share: None)
    assert engine.n_calls == 1


def test_a_sound_deleted_meanwhile_is_requested_again(tmp_path):
    page = demo_page.Page(Counting(), 10.0)
    with pytest.raises(UserError, match=r"a\.wav was deleted, .* once more"):
        page.tag(tmp_path / "a.wav", 1.0, 1.0, TagOptions(1), lambda share: None)


def test_stopping_ends_a_computation_under_way(tmp_path):
    engine = Counting()
    soundfile.write(tmp_path / "a.wav", np.zeros(10 * 8000), 8000)
    page = demo_page.Page(engine, 10.0)
    begun = threading.Event()
    outcomes = []

    def tag():
        try:
            page.tag(tmp_path / "a.wav", 0.1, 0.01, TagOptions(1), lambda share: begun.set())
        except UserError as error:
            outcomes.append(str(error))

    thread = threading.Thread(target=tag)
    thread.start()
    assert begun.wait(30)
    page.stop()
    thread.join(30)
    assert outcomes == ["The page was stopped."]
    assert engine.n_calls < 50  # of some 125


def test_the_strongest_labels_are_those_of_their_best_windows():
    windows = [
        TaggedWindow(0, 2, [("Rain", 0.5), ("<b>", 0.25)]),
        TaggedWindow(2, 4, [("Dog", 0.75), ("Rain", 0.625)]),
        TaggedWindow(4, 5, [("Rain", 0.625)]),
    ]
    assert demo_page.find_strongest(windows) == [("Dog", 0.75, 2, 4), ("Rain", 0.625, 2, 4), ("<b>", 0.25, 0, 2)]
    assert demo_page.find_strongest(windows, 1) == [("Dog", 0.75, 2, 4)]
    assert "<td>&lt;b&gt;</td>" in demo_page.format_table(windows)
    assert "<table" not in demo_page.format_table([TaggedWindow(0, 2)])
