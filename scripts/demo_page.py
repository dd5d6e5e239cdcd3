"""A page to try a model: drop or record a sound, see its tags over time, download them as CSV.

    python scripts/demo_page.py -m ced_tiny
    python scripts/demo_page.py -m experiments/mine -c 10 --hop 2 --host 0.0.0.0 --port 8000

It requires `pip install -r requirements-demo.txt`, and no network: the page loads nothing from other servers, and
sounds never leave the machine that serves it. Sounds and results are deleted after an hour, and when the page stops.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import contextvars
import html
import itertools
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from common.errors import UserError

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in inference.py

import numpy as np
from pydantic import Field

from audio.errors import AudioReadError
from audio.isolation import IsolatedBlocks
from common.options import ModelOptions, parse_arguments
from common.temporary import temporary_folder
from scripts.page.hosts import HostCheck, list_names
from tagging.base import Engine
from tagging.engines import open_engine
from tagging.events import merge_events
from tagging.files import TaggedFile, TaggedWindow, TagOptions, tag_files
from tagging.pictures import draw
from tagging.rows import CSV

N_SHOWN = 8  # labels in the table
KEPT_SECONDS = 3600  # sounds and results
MAX_OVERLAP = 10  # windows over one moment: limits the cost of a click
CSS = """
.gradio-container {max-width: 1400px !important; margin: auto}
footer {display: none !important}
table.strongest {width: 100%; border: none !important; font-variant-numeric: tabular-nums}
table.strongest tr {border: none !important}
table.strongest th {border: none !important; padding: 6px 10px !important; text-align: left}
table.strongest td {border-width: 1px 0 0 0 !important; border-color: #8884 !important; padding: 6px 10px !important}
table.strongest i {display: inline-block; width: 160px; height: 10px; margin-right: 10px; border-radius: 5px;
  background: linear-gradient(to right, var(--color-accent) var(--share), var(--border-color-primary) var(--share))}
p.hint {opacity: .7; padding: 24px 10px; text-align: center}
"""
HINT = '<p class="hint">Drop a sound or record one, then press <b>Tag</b>.</p>'
BUSY = '<p class="hint">&nbsp;</p>'  # space for the progress bar


class PageOptions(ModelOptions):
    """The options of demo_page.py."""

    SHORT: ClassVar[Mapping[str, str]] = {"model": "m", "chunk_length": "c"}

    chunk_length: float = Field(2.0, gt=0)  # initial length of a window in seconds
    hop: float | None = Field(None, gt=0)  # initial seconds from window to window; null = the chunk length
    host: str = "127.0.0.1"  # 0.0.0.0 allows other machines
    port: int = Field(7860, ge=1, le=65535)  # of the page
    allowed_hosts: list[str] = Field([])  # further names the page may be opened by, such as that of a proxy
    max_seconds: float = Field(600.0, gt=0)  # length of the longest sound
    max_mb: float = Field(100.0, gt=0)  # size of the largest file, in MiB
    engine: Literal["torch", "onnx"] | None = None  # null = onnx for .onnx files, else torch
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the model


class Page:
    """Tags the sounds of all visitors, one sound at a time.

    Args:
        engine: computes the probabilities.
        max_seconds: length of the longest sound supported.
    """

    def __init__(self, engine: Engine, max_seconds: float) -> None:
        self.engine, self.max_seconds = engine, max_seconds
        self.lock = threading.Lock()
        self.stopping = False

    def stop(self) -> None:
        """Cancel the computation that is running and wait for its threads: Python must not exit before they end."""
        self.stopping = True
        with self.lock:
            pass

    def tag(
        self,
        path: Path,
        chunk_seconds: float,
        hop_seconds: float,
        options: TagOptions,
        on_window: Callable[[float], None],
    ) -> tuple[TaggedFile, np.ndarray]:
        """Tag a sound.

        Args:
            path: any sound file.
            chunk_seconds: length of a window.
            hop_seconds: from one window's start to the next.
            options: what to keep of a window.
            on_window: called with the fraction done, 0 to 1, from any thread.

        Returns:
            The file, and its samples (S,) at the engine's rate.

        Raises:
            UserError: a sound too long or not readable, or windows that overlap too much.
        """
        if chunk_seconds > MAX_OVERLAP * hop_seconds:
            raise UserError(
                f"Windows of {chunk_seconds:g} s every {hop_seconds:g} s overlap too much to compute here: "
                f"set a step of at least {chunk_seconds / MAX_OVERLAP:g} s."
            )
        with self.lock:
            waveform = self._decode(path)
            n_windows = max(len(waveform) / self.engine.sample_rate / hop_seconds, 1.0)
            done = itertools.count(1)

            def count(seconds: float) -> None:
                if self.stopping:
                    raise UserError("The page was stopped.")
                on_window(min(next(done) / n_windows, 1.0))

            (file,) = tag_files(
                self.engine,
                [path],
                options,
                chunk_seconds=chunk_seconds,
                hop_seconds=hop_seconds,
                batch_size=8,
                n_decoders=1,
                on_window=count,
            )
        if file.fault is not None:
            raise UserError(f"{path.name} {file.fault}.")
        return file, waveform

    def _decode(self, path: Path) -> np.ndarray:
        """Decode a sound, but never more than `max_seconds`."""
        if not path.exists():
            raise UserError(f"{path.name} was deleted, as all sounds are after an hour: drop or record it once more.")
        blocks, n_samples = [], 0
        try:
            for block in IsolatedBlocks(path, self.engine.sample_rate):
                blocks.append(block)
                n_samples += len(block)
                if n_samples > self.max_seconds * self.engine.sample_rate:
                    raise UserError(
                        f"{path.name} is longer than {self.max_seconds:g} s, the maximum of this page: "
                        "cut it, or tag it with inference.py, which supports any length."
                    )
        except AudioReadError as error:
            raise UserError(
                f"{path.name} is not a sound that can be read here: {error.reason}. Supported: wav, flac, ogg, opus, "
                "mp3, m4a, webm, wma, aiff or any other format of libsndfile or FFmpeg."
            ) from None
        return np.concatenate(blocks)


def find_strongest(windows: list[TaggedWindow], n_labels: int = N_SHOWN) -> list[tuple[str, float, float, float]]:
    """Sort labels by their highest probability: label, that probability, and start and end of its window."""
    best: dict[str, tuple[str, float, float, float]] = {}
    for window in windows:
        for label, value in window.tags:
            if label not in best or value > best[label][1]:
                best[label] = label, value, window.start, window.end
    return sorted(best.values(), key=lambda row: -row[1])[:n_labels]


def format_table(windows: list[TaggedWindow]) -> str:
    """Format the strongest labels as HTML."""
    rows = find_strongest(windows)
    if not rows:
        return '<p class="hint">No label reaches that probability in any window: lower it.</p>'
    lines = [
        f'<tr><td>{html.escape(label)}</td><td><i style="--share: {value:.1%}"></i>{value:.3f}</td>'
        f"<td>{start:.1f} to {end:.1f} s</td></tr>"
        for label, value, start, end in rows
    ]
    head = "<tr><th>Strongest labels</th><th>Highest probability</th><th>Window</th></tr>"
    return f'<table class="strongest"><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table>'


def build(page: Page, options: PageOptions, folder: Path) -> Any:
    """Lay out the page.

    Args:
        page: tags the sounds.
        options: the command line.
        folder: where results are written before gradio copies them.

    Returns:
        gradio's Blocks.
    """
    import gradio as gr

    progress_bar = gr.Progress()  # gradio finds it as the default of a parameter

    def tag(
        name: str | None, chunk: float, hop: float, top_k: float, threshold: float, progress: Any = progress_bar
    ) -> Iterator[tuple[Any, ...]]:
        if name is None:
            raise _error("There is no sound yet: drop one or record one first.")
        yield _clear(BUSY)
        context = contextvars.copy_context()  # progress finds its page in it, but is updated by other threads

        def show_progress(share: float) -> None:
            context.run(progress, share, desc="Tagging")

        tag_options = TagOptions(int(top_k), threshold or None)
        with tempfile.TemporaryDirectory(dir=folder) as results:
            # gradio copies the files of the results while the generator waits here
            yield _show(page, Path(name), Path(results), (chunk, hop), tag_options, show_progress)

    seconds = options.max_seconds
    longest = f"{seconds / 60:.3g} minutes" if seconds >= 60 else f"{seconds:g} seconds"
    with gr.Blocks(title="CED audio tagging", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS)) as blocks:
        gr.Markdown(
            "# Audio tagging\n"
            f"**{Path(page.engine.name).name}**, {len(page.engine.labels)} labels. Sounds of up to {longest} and "
            f"{options.max_mb:g} MB; they stay on the machine that serves this page and are deleted after an hour."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=340):
                sound, button, chunk, hop, top_k, threshold = _add_controls(page.engine, options)
            with gr.Column(scale=3, min_width=480):
                results = _add_results()
        chunk.release(None, chunk, hop, js="(seconds) => seconds")  # else a longer window would overlap
        sound.change(_clear, None, results, show_progress="hidden", queue=False, api_visibility="private")
        inputs = [sound, chunk, hop, top_k, threshold]
        button.click(tag, inputs, results, show_progress_on=results[1], concurrency_limit=1, api_visibility="private")
    return blocks.queue(default_concurrency_limit=8, max_size=64)


def _add_controls(engine: Engine, options: PageOptions) -> tuple[Any, ...]:
    """Add the sound, the button, and the sliders of window, step, number of labels and lowest probability."""
    import gradio as gr

    longest = engine.max_samples and engine.max_samples / engine.sample_rate
    chunk_seconds = min(options.chunk_length, longest or options.chunk_length)
    hop_seconds = options.hop or chunk_seconds
    most = longest or max(10.0, chunk_seconds)
    return (
        gr.Audio(
            sources=["upload", "microphone"],
            type="filepath",
            label="Sound",
            buttons=[],
            editable=False,
            elem_id="sound",
        ),
        gr.Button("Tag", variant="primary", size="lg", elem_id="tag"),
        gr.Slider(
            min(0.5, chunk_seconds),
            most,
            chunk_seconds,
            step=0.1,
            label="Window (seconds)",
            info="short: precise in time; long: more reliable",
            elem_id="chunk",
        ),
        gr.Slider(
            min(0.1, hop_seconds),
            max(most, hop_seconds),
            hop_seconds,
            step=0.1,
            label="Step (seconds)",
            info="from window to window",
            elem_id="hop",
        ),
        gr.Slider(1, 10, 3, step=1, label="Most labels of a window", elem_id="top_k"),
        gr.Slider(0, 0.95, 0, step=0.05, label="Lowest probability", elem_id="threshold"),
    )


def _add_results() -> list[Any]:
    """Add the picture, the table of labels and the download."""
    import gradio as gr

    return [
        gr.Image(show_label=False, buttons=["fullscreen", "download"], visible=False, elem_id="picture", format="png"),
        gr.HTML(HINT, elem_id="strongest"),
        gr.DownloadButton("Download all tags (CSV)", interactive=False, elem_id="download"),
    ]


def _clear(text: str = HINT) -> tuple[Any, ...]:
    """Return updates that empty the results."""
    import gradio as gr

    return gr.Image(value=None, visible=False), text, gr.DownloadButton(value=None, interactive=False)


def _error(sentence: str) -> Exception:
    import gradio as gr

    return gr.Error(html.escape(sentence, quote=False), duration=None, title="", print_exception=False)


def _show(
    page: Page,
    path: Path,
    folder: Path,
    times: tuple[float, float],
    tag_options: TagOptions,
    on_window: Callable[[float], None],
) -> tuple[Any, ...]:
    """Tag a sound, write its picture and its CSV into a folder, and return the updates of the results."""
    import gradio as gr

    picture, rows = folder / f"{path.stem}.png", folder / "tags.csv"
    try:
        file, waveform = page.tag(path, *times, tag_options, on_window)
        draw(file, picture, waveform)
        events = merge_events(file.windows) if tag_options.threshold is not None else file.windows
        named = replace(file, path=Path(path.name), windows=events)
        rows.write_text(CSV.header + CSV.format_file(named), encoding="utf-8")
    except UserError as error:
        raise _error(str(error)) from None
    except Exception:
        logging.exception("an error of the page")
        raise _error("An internal error occurred; the server's console has the details.") from None
    for sentence in file.warnings.values():
        gr.Warning(html.escape(f"{path.name} {sentence}.", quote=False), duration=None)
    download = gr.DownloadButton(value=rows, interactive=True)
    return gr.Image(value=str(picture), visible=True), format_table(file.windows), download


def check_port(host: str, port: int) -> None:
    """Raise `UserError` where a port is in use or a host is not this machine's."""
    try:
        with socket.create_server((host, port)):
            return
    except OSError as error:
        reason = str(error.strerror).split(" (while")[0]
        raise UserError(f"{host}:{port} cannot be served ({reason}): give another --port or --host") from None


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Serve the page until it is stopped."""
    options = parse_arguments(PageOptions, __doc__, arguments)
    with temporary_folder() as folder:
        local = ",".join(filter(None, (os.environ.get("NO_PROXY"), "localhost", "127.0.0.1", options.host)))
        os.environ |= {"GRADIO_TEMP_DIR": f"{folder}/cache", "GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": local}
        try:
            import gradio as gr
            from starlette.middleware import Middleware
        except ImportError:
            raise UserError("the page requires gradio: pip install -r requirements-demo.txt") from None
        check_port(options.host, options.port)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        chosen = {name: getattr(options, name) for name in ("engine", "weights", "device", "head")}
        engine = open_engine(options.model, **chosen)
        page = Page(engine, options.max_seconds)
        blocks = build(page, options, folder)
        # The default fonts would be loaded from another server.
        theme = gr.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        )
        names, any_address = list_names(options.host, options.allowed_hosts)
        print(f"Open http://{options.host}:{options.port} in a browser; Ctrl-C stops the page", flush=True)
        blocks.launch(
            server_name=options.host,
            server_port=options.port,
            share=False,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            run_history=False,
            footer_links=[],
            max_file_size=round(options.max_mb * 2**20),
            app_kwargs={"middleware": [Middleware(HostCheck, names, any_address)]},
            theme=theme,
            css=CSS,
        )
        page.stop()


if __name__ == "__main__":
    main()
