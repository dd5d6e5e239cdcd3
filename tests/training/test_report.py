import base64
import io
import shlex
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from training import report
from training.figures import confusion_figure, curves_figure, downsample_line
from training.metrics import evaluate_scores
from training.report import collect_versions, draw_curves, find_most_confused, write_report

FACTS = {"model": "ced_tiny", "seed": "42", "device": "<cpu>"}
MEASURES = ("AP", "AUC", "EER")
CONFIG = {"model": "ced_tiny", "optimizer_args": {"lr": 0.001}, "train_data": "a & b.tsv"}


def entries_of(epochs, steps=20, every=5, valid=True, start=1.0):
    entries = []
    for epoch in range(1, epochs + 1):
        for number in range((epoch - 1) * steps + every, epoch * steps + 1, every):
            losses = {"loss": start / number, "distillation": 0.7 * start / number}
            entries.append({"kind": "step", "step": number, "epoch": epoch, **losses, "lr": 1e-3})
        entry = {"kind": "epoch", "step": epoch * steps, "epoch": epoch, "loss": start / epoch, "lr": 1e-3}
        entry |= {"clips_per_second": 800.0 + epoch, "wait_share": 0.04}
        entries.append(entry | ({"valid_mAP": 0.5 - abs(epoch - 3) / 10, "best": epoch <= 3} if valid else {}))
    return entries


def single_label(n_classes, n_clips=400, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, n_classes, n_clips)
    scores = rng.random((n_clips, n_classes)) + 0.5 * np.eye(n_classes)[truth]
    return scores, truth


class Page(HTMLParser):
    """What a browser would find: texts by tag, rows of tables, pictures, everything that refers elsewhere."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.rows, self.references, self.pictures = [], [], [], [], []
        self.open = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        for name, value in attributes:
            if name in ("src", "href", "data", "srcset", "action"):
                (self.pictures if value.startswith("data:image/png;base64,") else self.references).append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # well formed

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def picture(self, index):
        return matplotlib.image.imread(io.BytesIO(base64.b64decode(self.pictures[index].split(",", 1)[1])))


def page_of(folder, results, entries=None, **more):
    arguments = {"title": "A <run>", "facts": FACTS, "config": CONFIG, "results_name": "eval.tsv"}
    arguments |= {"selection": "The best of 4 validations was taken.", "results": results}
    arguments |= {"entries": entries_of(4) if entries is None else entries}
    path = write_report(folder, **(arguments | more))
    assert path == folder / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert page.open == []
    assert page.references == []
    assert not {"script", "link", "iframe"} & set(page.tags)
    for picture in page.pictures:
        html = html.replace(picture, "")
    assert "http" not in html
    assert "url(" not in html
    assert "@import" not in html
    return page


@pytest.mark.parametrize(
    "entries",
    [
        entries_of(4),
        entries_of(1),
        entries_of(3, valid=False),
        entries_of(1)[:1],
        entries_of(1)[-1:],
        entries_of(2, start=0.0),
        [],
    ],
    ids=["run", "one epoch", "no validation", "one step", "one epoch line", "losses of 0", "nothing"],
)
def test_curves_are_a_picture_whatever_there_is_to_draw(tmp_path, entries):
    draw_curves(tmp_path, entries)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    height, width = matplotlib.image.imread(tmp_path / "curves.png").shape[:2]
    assert 900 < width < 1600
    assert 300 < height < 1600
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_curves_show_the_values_of_the_entries():
    figure = curves_figure(entries_of(4))
    losses, validation, rate, speed = figure.axes
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss", "mAP", "learning rate", "clips/s"]
    thin, bold = losses.lines[:2]
    assert thin.get_xdata().tolist() == list(range(5, 81, 5))
    assert thin.get_ydata().tolist() == [1 / number for number in range(5, 81, 5)]
    assert bold.get_xydata().tolist() == [[20, 1], [40, 1 / 2], [60, 1 / 3], [80, 1 / 4]]
    assert thin.get_linewidth() < bold.get_linewidth()
    assert validation.lines[0].get_xydata().tolist() == [[20, 0.3], [40, 0.4], [60, 0.5], [80, 0.4]]
    assert validation.lines[1].get_xydata().tolist() == [[60, 0.5]]
    assert validation.lines[1].get_label() == "best: 0.5000\n(epoch 3)"
    assert rate.lines[0].get_ydata().tolist() == [1e-3] * 16
    assert speed.lines[0].get_ydata().tolist() == [801, 802, 803, 804]
    epochs = losses.child_axes[0]
    assert [text.get_text() for text in epochs.get_xticklabels()] == ["1", "2", "3", "4"]
    assert epochs.get_xticks().tolist() == [20, 40, 60, 80]


def test_losses_over_more_than_a_decade_have_a_logarithmic_scale():
    wide, narrow = entries_of(4), [entry | {"loss": 0.5 + 0.1 * entry["epoch"]} for entry in entries_of(4)]
    narrow = [{name: value for name, value in entry.items() if name != "distillation"} for entry in narrow]
    assert curves_figure(wide).axes[0].get_yscale() == "log"
    assert curves_figure(narrow).axes[0].get_yscale() == "linear"


def test_a_loss_that_is_not_finite_leaves_the_rest_of_the_line():
    entries = entries_of(4)
    entries[2]["loss"] = float("nan")
    entries[3]["loss"] = float("inf")
    assert len(curves_figure(entries).axes[0].lines[0].get_xdata()) == 14


def test_a_long_line_is_thinned_and_keeps_its_spikes(tmp_path):
    x = np.arange(100_000.0)
    y = np.sin(x / 9000)
    y[[777, 43_210]] = 5, -5
    few_x, few_y = downsample_line(x, y)
    assert len(few_x) <= 2000
    assert np.array_equal(y[few_x.astype(int)], few_y)
    assert (np.diff(few_x) > 0).all()
    assert {777.0, 43_210.0} <= set(few_x)
    entries = entries_of(100, steps=1000, every=1)
    assert len(entries) == 100_100
    draw_curves(tmp_path, entries)
    assert (tmp_path / "curves.png").stat().st_size < 500_000
    labels = curves_figure(entries).axes[0].child_axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == [str(epoch) for epoch in range(10, 101, 10)]


def test_the_report_holds_every_figure(tmp_path):
    scores, truth = single_label(30)
    truth[truth == 29] = 0  # absent
    labels = [f"class {index}" for index in range(29)] + ["<b>absent</b> & more"]
    metrics = evaluate_scores(scores, truth, labels)
    page = page_of(tmp_path, metrics)
    text = page.text
    for value in (metrics.mAP, metrics.mAUC, metrics.mEER, metrics.d_prime, metrics.lwlrap, metrics.top1):
        assert any(row[1] == f"{value:.4f}" for row in page.rows if len(row) == 3)
    assert "400 clips; 29 classes scored, 1 without clips, not counted." in text
    prevalence = metrics.per_class.n_positive[:29] / 400
    assert f"Random scores have a mAP of {prevalence.mean():.4f}" in text
    assert "On eval.tsv:" in text
    assert "The best of 4 validations was taken." in text
    for name, value in (FACTS | collect_versions()).items():
        assert f"{name} {value}" in text
    assert "model: ced_tiny optimizer_args: lr: 0.001 train_data: a & b.tsv" in text
    assert shlex.join(sys.argv) in text
    assert "A <run>" in text
    assert not {"b", "run", "cpu"} & set(page.tags)  # escaped
    table = metrics.per_class.sort_values("AP", ascending=False)
    ranked = [row for row in page.rows if len(row) == 4 and row[0] != "class" and "." in row[2]][:20]
    expected = [*table.head(10).itertuples(), *table[:29].tail(10)[::-1].itertuples()]
    assert [row[:3] for row in ranked] == [[row.label, str(row.n_positive), f"{row.AP:.4f}"] for row in expected]
    whole = [row for row in page.rows if len(row) == 7 and row[0] != "index"]
    assert [row[1] for row in whole] == labels
    assert whole[3][2:-1] == [str(table.n_positive[3]), *(f"{table[name][3]:.4f}" for name in MEASURES)]
    assert 0.998 * table.EER_threshold[3] <= float(whole[3][-1]) <= table.EER_threshold[3]
    assert whole[29][2:] == ["0", "-", "-", "-", "-"]
    assert "details" in page.tags
    assert page.picture(0).shape[1] > 900


def test_confusions_are_those_of_scikit_learn(tmp_path):
    scores, truth = single_label(7)
    metrics = evaluate_scores(scores, truth, list("abcdefg"))
    expected = confusion_matrix(truth, scores.argmax(axis=1))
    wrong = expected - np.diag(np.diag(expected))
    page = page_of(tmp_path, metrics)
    assert len(page.pictures) == 3
    start = next(index for index, row in enumerate(page.rows) if row[:2] == ["true class", "predicted class"])
    pairs = page.rows[start + 1 :]
    assert len(pairs) == 10
    counts = []
    for true, predicted, count, share in pairs:
        row, column = "abcdefg".index(true), "abcdefg".index(predicted)
        assert int(count) == wrong[row, column]
        assert share == f"{wrong[row, column] / expected[row].sum():.1%}"
        counts.append(int(count))
    assert counts == sorted(wrong.ravel(), reverse=True)[:10]
    assert f"{wrong.sum()} clips are misclassified" in page.text
    numbers = [text.get_text() for text in confusion_figure(metrics.confusion, list("abcdefg")).axes[0].texts]
    assert numbers == [str(count) for count in expected.ravel() if count]


def test_more_classes_than_a_picture_can_show_are_listed_as_pairs(tmp_path):
    page = page_of(tmp_path, evaluate_scores(*single_label(51)))
    assert len(page.pictures) == 2  # of training, and ROC and DET
    assert "not drawn for more than 50 classes" in page.text
    assert len([row for row in page.rows if row[-1].endswith("%")]) == 30


@pytest.mark.parametrize("n_classes", [2, 7, 50])
def test_the_confusion_picture_grows_with_the_classes_and_takes_any_name(n_classes):
    names = ["$x$ or $\\frac", "音楽", "a name that is longer than any picture has room for", *map(str, range(50))]
    figure = confusion_figure(np.eye(n_classes, dtype=np.int64) * 1234, names[:n_classes])
    height, width = matplotlib.image.imread(io.BytesIO(report.render_png(figure))).shape[:2]
    assert 300 < height < 2200
    assert 300 < width < 2200
    drawn = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert drawn[:3] == ["$x$ or $\\frac", "class 1", "a name that is longer t..."][:n_classes]  # no such letters


def test_a_multi_label_set_has_no_confusions(tmp_path):
    scores, targets = np.random.default_rng(0).random((50, 4)), np.ones((50, 4), int)
    targets[:25, :2] = 0
    page = page_of(tmp_path, evaluate_scores(scores, targets))
    assert "Not every clip has exactly one label" in page.text
    assert not any(row[0] == "top-1" for row in page.rows)


def test_a_report_without_evaluation_data_or_steps_reports_it(tmp_path):
    page = page_of(tmp_path, None, entries=[])
    assert "there is no evaluation data" in page.text
    assert "No steps were recorded" in page.text
    assert page.pictures == []
    assert "Confusions" not in page.text


def test_perfect_scores_have_no_confused_pair(tmp_path):
    page = page_of(tmp_path, evaluate_scores(np.eye(3), np.eye(3)))
    assert "No clip is misclassified" in page.text
    assert find_most_confused(np.array([[5, 2], [7, 1]]), 10) == [(1, 0, 7), (0, 1, 2)]


def test_versions_name_the_commit_where_there_is_one(monkeypatch, tmp_path):
    found = collect_versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert "git commit" not in collect_versions()
    subprocess.run([*git, "init", "-q"], check=True)
    assert "git commit" not in collect_versions()  # nothing is committed yet
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert collect_versions()["git commit"] == head
    (tmp_path / "file").write_text("2")
    assert collect_versions()["git commit"] == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert "git commit" not in collect_versions()


def test_drawing_leaves_the_global_state_of_matplotlib_alone(tmp_path):
    code = (
        "import sys; from pathlib import Path; import training.report, training.journal\n"
        "assert not {'matplotlib', 'jinja2', 'tensorboard'} & sys.modules.keys(), 'imported before they are needed'\n"
        "training.report.draw_curves(Path(sys.argv[1]), [])\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=report.ROOT)
