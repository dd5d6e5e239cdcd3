import csv
import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tagging.parts
import tagging.rows
from common.errors import UserError
from tagging.files import TaggedFile, TaggedWindow
from tagging.outputs import name_targets, open_output
from tagging.parts import SINGLE_PROCESS, Share
from tagging.rows import COLUMNS, escape_name, make_printable, unescape_name
from tagging.session import open_outputs

SETTINGS = {"model": "pico.pt", "chunk_length": 10.0, "threshold": None}
NAMES = [
    "plain.wav",
    "a, b.wav",
    'the "best" one.wav',
    "two\nlines.wav",
    "carriage\rreturn.wav",
    "tab\tand 'quote'.wav",
    "Käuzchen 梟.wav",
    "separators\u2028and\u2029.wav",
    "emoji \U0001f989.wav",
    os.fsdecode(b"latin-1 \xe4\xff.wav"),
    "[a]*?.wav",
    " leading and trailing .wav",
    "\\xe4 written.wav",
]
FORMS = ("csv", "jsonl", "parquet")


def tagged(name, shift=0.0):
    windows = [
        TaggedWindow(0.0, 10.0, [("Chirp, tweet", 0.75 - shift), ("Bell", 0.125)]),
        TaggedWindow(10.0, 20.0),
        TaggedWindow(20.0, 22.00006, [("Bell", 0.5000004)]),
    ]
    return TaggedFile(Path(name), windows)


FILES = [tagged(name, 0.01 * i) for i, name in enumerate(NAMES)]
FILES.insert(3, TaggedFile(Path("broken, really.wav"), fault='cannot be decoded ("no, it can\'t")'))
FILES.insert(5, TaggedFile(Path("silent.wav"), [TaggedWindow(0.0, 10.0)]))
FILES.insert(6, TaggedFile(Path("no events.wav")))
ODD = {"truncated": 'ends early, "really"', "joined": "is joined"}
FILES.insert(7, replace(tagged("odd.wav", 0.02), warnings=ODD))
PATHS = [file.path for file in FILES]
WINDOWS = {"silent.wav": 1, "no events.wav": 0}


def read_table(path):
    """The rows of a csv or parquet file: names as they are on the disk, numbers or None."""
    if path.suffix == ".parquet":
        frame = pd.read_parquet(path)
        assert tuple(frame.columns) == COLUMNS
        assert [str(kind) for kind in frame.dtypes[["start", "end", "probability"]]] == ["float64"] * 3
        rows = frame.astype(object).where(frame.notna(), None).values.tolist()
        return [[unescape_name(row[0]), *row[1:]] for row in rows]
    with open(path, newline="", encoding="utf-8") as stream:
        head, *rows = csv.reader(stream)
    assert tuple(head) == COLUMNS
    numbers = [lambda text: float(text) if text else None] * 2
    kinds = [unescape_name, *numbers, lambda text: text or None, numbers[0], *[lambda text: text or None] * 2]
    return [[convert(text) for convert, text in zip(kinds, row, strict=True)] for row in rows]


def read_lines(path):
    rows = [json.loads(line) for line in path.read_bytes().decode("utf-8").split("\n")[:-1]]
    return [row | {"filename": unescape_name(row["filename"])} for row in rows]


def write(path, files=FILES, settings=SETTINGS, share=SINGLE_PROCESS, paths=PATHS):
    output = open_output(path, None, paths, settings, share)
    for file in files:
        output.write(file)
    assert output.close(paths)
    return output


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_tables_have_a_row_a_label_and_one_of_every_file(tmp_path, form):
    write(tmp_path / f"tags.{form}")
    expected = []
    for file in FILES:
        name = str(file.path)
        odd = 'truncated: ends early, "really"; joined: is joined' if file.warnings else None
        if file.fault or name in WINDOWS:
            expected.append([name, None, None, None, None, file.fault, odd])
        else:
            value = file.windows[0].tags[0][1]
            expected.append([name, 0.0, 10.0, "Chirp, tweet", pytest.approx(value, abs=1e-6), None, odd])
            expected.append([name, 0.0, 10.0, "Bell", 0.125, None, odd])
            expected.append([name, 20.0, 22.0001, "Bell", 0.5, None, odd])
    assert read_table(tmp_path / f"tags.{form}") == expected


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("shares", [[SINGLE_PROCESS], [Share(0, 2), Share(1, 2)]])
def test_what_is_odd_is_known_to_the_last_process_and_when_the_command_is_given_again(tmp_path, form, shares):
    path = tmp_path / f"tags.{form}"
    outputs = [open_output(path, None, PATHS, SETTINGS, share) for share in shares]
    for number, file in enumerate(FILES):
        outputs[number % len(outputs)].write(file)
    message = {"odd.wav": 'truncated: ends early, "really"; joined: is joined'}
    assert [output.close(PATHS) for output in outputs][-1]
    assert outputs[-1].warnings == message
    again = open_output(path, None, PATHS, SETTINGS, SINGLE_PROCESS)
    assert again.warnings == message
    again.close(PATHS)


def test_rows_with_other_columns_are_not_added_to(tmp_path):
    write(tmp_path / "tags.csv")
    data = (tmp_path / "tags.csv").read_bytes()
    (tmp_path / "tags.csv").write_bytes(data.replace(b",warning\n", b",warnings\n", 1))
    with pytest.raises(UserError, match="has other columns than expected"):
        open_output(tmp_path / "tags.csv", None, PATHS, SETTINGS, SINGLE_PROCESS)


def test_jsonl_has_a_line_a_window_and_one_of_every_file(tmp_path):
    write(tmp_path / "tags.jsonl")
    lines = read_lines(tmp_path / "tags.jsonl")
    for file in FILES:
        own = [line for line in lines if line["filename"] == str(file.path)]
        if file.fault:
            assert own == [{"filename": str(file.path), "error": file.fault}]
        elif not file.windows:
            assert own == [{"filename": str(file.path), "tags": []}]
        else:
            assert [line.get("warnings", {}) for line in own] == [file.warnings] + [{}] * (len(own) - 1)
            times = [(line["start"], line["end"]) for line in own]
            assert times == [(round(w.start, 4), round(w.end, 4)) for w in file.windows]
            for line, window in zip(own, file.windows, strict=True):
                values = [(tag["label"], tag["probability"]) for tag in line["tags"]]
                assert values == [(label, round(value, 6)) for label, value in window.tags]
    assert list(dict.fromkeys(line["filename"] for line in lines)) == [str(path) for path in PATHS]


def test_audacity_finds_a_label_track_for_each_sound_laid_out_as_the_sounds_are(tmp_path):
    paths = [tmp_path / "sounds" / name for name in ("a.wav", "a.flac", "deep/er/b.wav", "deep/bad.wav")]
    output = open_output(tmp_path / "tracks", "audacity", paths, SETTINGS, SINGLE_PROCESS)
    for path in paths[:3]:
        output.write(tagged(path))
    output.write(TaggedFile(paths[3], fault="no samples"))
    assert output.close(paths)
    assert output.faults == {str(paths[3]): "no samples"}
    made = {str(p.relative_to(tmp_path / "tracks")) for p in (tmp_path / "tracks").rglob("*") if p.is_file()}
    assert made == {"a.wav.txt", "a.flac.txt", "deep/er/b.wav.txt", "made_with.json"}
    lines = (tmp_path / "tracks/deep/er/b.wav.txt").read_text().splitlines()
    assert [line.split("\t") for line in lines] == [
        ["0.000000", "10.000000", "Chirp, tweet 0.75"],
        ["0.000000", "10.000000", "Bell 0.12"],
        ["20.000000", "22.000060", "Bell 0.50"],
    ]
    again = open_output(tmp_path / "tracks", "audacity", paths, SETTINGS, SINGLE_PROCESS)
    assert again.done == {str(path) for path in paths[:3]}
    with pytest.raises(UserError, match=r"threshold None; now it is threshold 0\.5"):
        open_output(tmp_path / "tracks", "audacity", paths, {**SETTINGS, "threshold": 0.5}, SINGLE_PROCESS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="holds files of another program"):
        open_output(tmp_path / "mine", "audacity", paths, SETTINGS, SINGLE_PROCESS)


def test_names_in_any_bytes_become_file_names_beside_each_other(tmp_path):
    paths = [tmp_path / name for name in NAMES]
    targets = name_targets(tmp_path / "out", paths, ".txt")
    assert targets == {str(path): tmp_path / "out" / f"{path.name}.txt" for path in paths}
    assert name_targets(tmp_path / "out", [], ".txt") == {}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*"\\\\x5cfé/", *map(os.fsdecode, (b"\xfc", b"\xc3", b"\x80"))]), max_size=12))
def test_names_survive_being_text(letters):
    name = os.fsdecode(os.fsencode("".join(letters)))  # as the operating system would give it
    escape_name(name).encode("utf-8")
    assert unescape_name(escape_name(name)) == name


def test_names_are_escaped_only_where_they_have_to_be():
    for name in NAMES[:-4]:
        assert escape_name(name) == name
    assert escape_name(os.fsdecode(b"gr\xfcn.wav")) == r"gr\xfcn.wav"
    assert escape_name(r"gr\xfcn \x41 \n.wav") == r"gr\x5cxfcn \x41 \n.wav"


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_reader_sees_each_file_as_soon_as_it_is_through(tmp_path, form):
    path = tmp_path / f"tags.{form}"
    output = open_output(path, None, PATHS, SETTINGS, SINGLE_PROCESS)
    for n, file in enumerate(FILES, 1):
        output.write(file)
        names = [line["filename"] for line in read_lines(path)] if form == "jsonl" else [r[0] for r in read_table(path)]
        assert list(dict.fromkeys(names)) == [str(path) for path in PATHS[:n]]
    output.close(PATHS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_first", [0, 1, 7, len(FILES)])
def test_what_is_there_is_not_done_again_and_the_rest_is_added(tmp_path, form, n_first):
    write(tmp_path / f"whole.{form}")
    path = tmp_path / f"tags.{form}"
    write(path, FILES[:n_first])
    output = open_output(path, None, PATHS, SETTINGS, SINGLE_PROCESS)
    done = {str(path) for path in PATHS[:n_first]}
    assert {str(path) for path in PATHS if str(path) in output.done} == done
    assert set(output.faults) == ({"broken, really.wav"} & done)
    for file in FILES:
        output.write(file)
    assert output.close(PATHS)
    assert set(output.faults) == {"broken, really.wav"}
    reader = read_lines if form == "jsonl" else read_table
    assert reader(path) == reader(tmp_path / f"whole.{form}")


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_row_written_in_part_is_cut_off(tmp_path, form):
    path = tmp_path / f"tags.{form}"
    write(tmp_path / f"whole.{form}")
    whole = (tmp_path / f"whole.{form}").read_bytes()
    write(path, FILES[:4])
    meta = path.with_name(f"{path.name}.meta.json").read_bytes()
    there = path.read_bytes()
    assert whole.startswith(there)
    for n_more in (1, 20, 300):  # in a name, in a number, behind a whole row of a file that has more
        path.write_bytes(whole[: len(there) + n_more])
        path.with_name(f"{path.name}.meta.json").write_bytes(meta)
        output = write(path)
        assert len(output.done) == len(FILES)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("n_bytes", [0, 9, 1000])
def test_a_run_that_was_stopped_before_its_first_note_can_begin_again(tmp_path, form, n_bytes):
    path = tmp_path / f"tags.{form}"
    write(path, [])
    header = path.read_bytes()
    path.write_bytes(header[:n_bytes])
    path.with_name(f"{path.name}.meta.json").unlink()
    write(path, FILES[:1])
    assert path.read_bytes().startswith(header)
    assert len(path.read_bytes()) > len(header)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_another_kind_is_left_alone(tmp_path, form):
    path = tmp_path / f"tags.{form}"
    path.write_text("my notes")
    with pytest.raises(UserError, match=r"tags\.\w+ exists.*write elsewhere, or remove it"):
        open_output(path, None, PATHS, SETTINGS, SINGLE_PROCESS)
    assert path.read_text() == "my notes"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model": "other.pt"}, "made with model pico.pt; now it is model other.pt"),
        ({"threshold": 0.3}, r"made with threshold None; now it is threshold 0\.3"),
        ({"chunk_length": 2.0, "hop": 1}, r"chunk_length 10\.0, hop None|hop None, chunk_length 10\.0"),
    ],
)
def test_settings_of_another_run_are_a_sentence(tmp_path, form, changed, sentence):
    path = tmp_path / f"tags.{form}"
    write(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=sentence) as error:
        open_output(path, None, PATHS, {**SETTINGS, **changed}, SINGLE_PROCESS)
    assert "--overwrite" in str(error.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_note_that_is_damaged_is_a_sentence(tmp_path, form):
    path = tmp_path / f"tags.{form}"
    write(path)
    path.with_name(f"{path.name}.meta.json").write_text("{")
    with pytest.raises(UserError, match="missing or damaged"):
        open_output(path, None, PATHS, SETTINGS, SINGLE_PROCESS)


def overwrite(share=SINGLE_PROCESS, **outputs):
    opened = open_outputs(PATHS, {**SETTINGS, "model": "new"}, share, overwrite=True, **outputs)
    assert not any(output.done for output in opened)
    return opened


def test_overwriting_begins_anew_with_all_that_lies_beside(tmp_path):
    for form in FORMS:
        path = tmp_path / f"[tags].{form}"
        write(path)
        stopped = open_output(path, None, PATHS, SETTINGS, Share(1, 2))  # one of two processes, killed
        stopped.write(tagged("more.wav"))
        (tmp_path / f"[tags].{form}.department.txt").write_text("mine")
        (output,) = overwrite(output=path)
        output.write(FILES[0])
        output.close(PATHS)
        assert {p.name for p in tmp_path.iterdir()} == {
            path.name,
            f"{path.name}.meta.json",
            f"{path.name}.department.txt",
        }
        assert len(read_lines(path) if form == "jsonl" else read_table(path)) == 3
        for left in tmp_path.iterdir():
            left.unlink()


def test_overwriting_removes_embeddings_whose_run_was_killed(tmp_path):
    target = tmp_path / "out.h5"
    parts = tmp_path / "out.h5.parts"
    parts.mkdir()
    (parts / "0-of-1.000000.h5").write_bytes(b"cut off")
    overwrite(embeddings=target)
    assert list(parts.iterdir()) == []


def test_overwriting_spares_folders_of_something_else(tmp_path):
    folder = tmp_path / "sounds"
    folder.mkdir()
    (folder / "a.wav").write_text("a sound")
    for what in ("output", "plot"):
        with pytest.raises(UserError, match="does not touch"):
            open_outputs(PATHS, SETTINGS, SINGLE_PROCESS, output_format="audacity", overwrite=True, **{what: folder})
    assert (folder / "a.wav").exists()
    open_outputs(PATHS, SETTINGS, SINGLE_PROCESS, output_format="audacity", output=tmp_path / "tracks")
    (tmp_path / "tracks" / "a.txt").write_text("")
    overwrite(output_format="audacity", output=tmp_path / "tracks")
    assert [p.name for p in (tmp_path / "tracks").iterdir()] == ["made_with.json"]


def test_several_processes_need_an_output_and_may_not_overwrite(tmp_path):
    with pytest.raises(UserError, match="remove it beforehand"):
        overwrite(Share(0, 2), output=tmp_path / "tags.csv")
    with pytest.raises(UserError, match="give --output"):
        open_outputs(PATHS, SETTINGS, Share(0, 2))


@pytest.mark.parametrize(
    ("name", "kind"), [("tags.txt", None), ("tags", None), ("tags.csv", "jsonl"), ("tags.txt", "csv")]
)
def test_a_form_that_is_not_known_or_not_the_names_is_a_sentence(tmp_path, name, kind):
    with pytest.raises(UserError, match=r"\.csv, \.jsonl, \.parquet, or a folder with --format audacity"):
        open_output(tmp_path / name, kind, PATHS, SETTINGS, SINGLE_PROCESS)
    assert list(tmp_path.iterdir()) == []


def test_the_ending_may_be_in_capitals_and_the_folder_new(tmp_path):
    write(tmp_path / "new" / "TAGS.CSV")
    assert len(read_table(tmp_path / "new" / "TAGS.CSV")) == 3 * (len(NAMES) + 1) + 3


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_several_processes_become_one_file_in_the_order_of_the_sounds(tmp_path, form):
    write(tmp_path / f"whole.{form}")
    path = tmp_path / f"[tags].{form}"  # brackets mean something to glob
    ranks = [open_output(path, None, PATHS, SETTINGS, Share(rank, 3)) for rank in range(3)]
    for number, file in enumerate(FILES):
        ranks[number % 3].write(file)
    assert [rank.close(PATHS) for rank in ranks] == [False, False, True]
    reader = read_lines if form == "jsonl" else read_table
    assert reader(path) == reader(tmp_path / f"whole.{form}")
    left = {p.name for p in tmp_path.iterdir() if not p.name.startswith("whole")}
    assert left == {path.name, f"{path.name}.meta.json"}
    assert ranks[2].faults == {"broken, really.wav": FILES[3].fault}
    assert len(open_output(path, None, PATHS, SETTINGS, SINGLE_PROCESS).done & {str(p) for p in PATHS}) == len(FILES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_next", [1, 2, 3])
def test_what_killed_processes_have_done_is_kept_however_many_go_on(tmp_path, form, n_next):
    path = tmp_path / f"tags.{form}"
    for rank in range(2):
        output = open_output(path, None, PATHS, SETTINGS, Share(rank, 2))
        for file in FILES[rank::2][:3]:
            output.write(file)  # and is killed, while it notes what is whole
        (tmp_path / f".{path.name}.part-{rank}-of-2.jsonl.meta.json.partial").write_text("{")
    ranks = [open_output(path, None, PATHS, SETTINGS, Share(rank, n_next)) for rank in range(n_next)]
    for rank, output in enumerate(ranks):
        assert {str(path) for path in PATHS if str(path) in output.done} == {str(path) for path in PATHS[:6]}
        for file in FILES[rank::n_next]:
            output.write(file)
    assert [output.close(PATHS) for output in ranks] == [False] * (n_next - 1) + [True]
    write(tmp_path / f"whole.{form}")
    reader = read_lines if form == "jsonl" else read_table
    assert reader(path) == reader(tmp_path / f"whole.{form}")
    assert not [p.name for p in tmp_path.iterdir() if "part" in p.name or ".end-" in p.name]


@pytest.mark.parametrize("form", FORMS)
def test_a_part_that_was_hardly_begun_is_removed_when_parts_are_joined(tmp_path, form):
    path = tmp_path / f"tags.{form}"
    (tmp_path / f"{path.name}.part-1-of-2.jsonl").touch()  # and its process was killed before the first note
    (tmp_path / f".{path.name}.part-1-of-2.jsonl.meta.json.partial").write_text("{")
    output = open_output(path, None, PATHS, SETTINGS, SINGLE_PROCESS)
    output.write(FILES[0])
    assert output.close(PATHS)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, f"{path.name}.meta.json"}


def test_a_process_of_an_earlier_start_does_not_count_as_finished(tmp_path):
    path = tmp_path / "tags.csv"
    first = open_output(path, None, PATHS, SETTINGS, Share(1, 2, "monday"))
    assert not first.close(PATHS)  # and the other one was killed
    ranks = [open_output(path, None, PATHS, SETTINGS, Share(rank, 2, "tuesday")) for rank in range(1)]
    assert not ranks[0].close(PATHS)  # before the second one has so much as begun
    second = open_output(path, None, PATHS, SETTINGS, Share(1, 2, "tuesday"))
    second.write(FILES[1])
    assert second.close(PATHS)
    assert len(read_table(path)) == 3


def test_who_is_last_has_the_faults_of_all_also_where_nothing_is_joined(tmp_path):
    shares = Share(0, 2), Share(1, 2)
    for outputs in ({"output": tmp_path / "tracks", "output_format": "audacity"}, {"plot": tmp_path / "pictures"}):
        (first,), (second,) = (open_outputs(PATHS, SETTINGS, share, **outputs) for share in shares)
        first.write(TaggedFile(Path("broken, really.wav"), fault="no samples"))
        assert not first.close(PATHS)
        assert second.close(PATHS)
        assert second.faults == {"broken, really.wav": "no samples"}
    (first,), (second,) = (open_outputs(PATHS, SETTINGS, share, embeddings=tmp_path / "e.h5") for share in shares)
    first.write(TaggedFile(Path("broken, really.wav"), fault="no samples"))
    assert not first.close(PATHS)
    assert second.close(PATHS)
    assert second.faults == {"broken, really.wav": "no samples"}


def test_processes_that_start_together_may_claim_a_folder_together(tmp_path):
    (tmp_path / "tracks").mkdir()
    (tmp_path / "tracks" / ".made_with.json.123.partial").write_text("{")  # just being written
    open_output(tmp_path / "tracks", "audacity", PATHS, SETTINGS, Share(1, 2))
    assert json.loads((tmp_path / "tracks" / "made_with.json").read_text()) == SETTINGS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("function", ["write_json", "whole_file"])
def test_a_run_stopped_while_it_joins_parts_joins_them_the_next_time(tmp_path, form, function):
    path = tmp_path / f"tags.{form}"
    output = open_output(path, None, PATHS, SETTINGS, Share(1, 2))
    for file in FILES:
        output.write(file)
    last = open_output(path, None, PATHS, SETTINGS, Share(0, 2))
    output.close(PATHS)
    with pytest.MonkeyPatch.context() as patch:

        def stop(*unused, **also_unused):
            raise KeyboardInterrupt

        unlink = Path.unlink
        patch.setattr(tagging.rows, function, stop)
        patch.setattr(Path, "unlink", lambda p, **how: stop() if ".part-" in p.name else unlink(p, **how))
        with pytest.raises(KeyboardInterrupt):
            last.close(PATHS)
    again = open_output(path, None, PATHS, SETTINGS, SINGLE_PROCESS)
    assert {str(path) for path in PATHS} <= again.done
    assert again.close(PATHS)
    write(tmp_path / f"whole.{form}")
    reader = read_lines if form == "jsonl" else read_table
    assert reader(path) == reader(tmp_path / f"whole.{form}")
    assert not [p.name for p in tmp_path.iterdir() if "part" in p.name]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_lost_in_a_power_cut_are_made_again_from_the_last_whole_sound_on(tmp_path, form, world_size):
    write(tmp_path / f"whole.{form}")
    whole = (tmp_path / f"whole.{form}").read_bytes()
    path = tmp_path / f"tags.{form}"
    for n_bytes in (0, 9, 60, *range(100, len(whole), len(whole) // 7), len(whole) - 1):
        write(path)
        path.write_bytes(whole[:n_bytes])
        ranks = [open_output(path, None, PATHS, SETTINGS, Share(rank, world_size)) for rank in range(world_size)]
        if n_bytes > len(whole) // 2:
            assert len(ranks[0].done) > len(FILES) // 3
        for number, file in enumerate(FILES):
            ranks[number % world_size].write(file)
        assert [rank.close(PATHS) for rank in ranks][-1]
        assert path.read_bytes() == whole


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_run_killed_right_after_lost_rows_were_cut_off_is_gone_on_with(tmp_path, form):
    path = tmp_path / f"tags.{form}"
    write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    output = open_output(path, None, PATHS, SETTINGS, SINGLE_PROCESS)
    output.rows.file.write(b'"half' * 1000)  # and is killed before the next note
    output.rows.file.flush()
    write(path)
    assert path.read_bytes() == whole


def test_rows_with_a_note_that_are_no_rows_are_a_sentence(tmp_path):
    path = tmp_path / "tags.csv"
    write(path)
    path.write_bytes(path.read_bytes().replace(b"1", b'"', 1))
    with pytest.raises(UserError, match="was changed by another program"):
        open_output(path, None, PATHS, SETTINGS, SINGLE_PROCESS)


def test_a_parquet_table_grows_by_groups_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(tagging.rows, "GROUP", 5)
    path = tmp_path / "tags.parquet"
    write(path, FILES[:4])
    n_first = pyarrow.parquet.ParquetFile(path).num_row_groups
    write(path)
    write(tmp_path / "whole.parquet")
    assert pyarrow.parquet.ParquetFile(path).num_row_groups > n_first > 1
    assert read_table(path) == read_table(tmp_path / "whole.parquet")


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_going_on_does_not_hold_the_rows(tmp_path, form):
    path = tmp_path / f"tags.{form}"
    tags = [(f"label {i}", 0.5) for i in range(100)]
    files = [TaggedFile(Path(f"{i}.wav"), [TaggedWindow(j, j + 1.0, tags) for j in range(9)]) for i in range(50)]
    write(path, files)
    size = path.stat().st_size
    tracemalloc.start()
    for share in (SINGLE_PROCESS, Share(0, 2)):
        assert len(open_output(path, None, PATHS, SETTINGS, share).done) == 50
    assert tracemalloc.get_traced_memory()[1] < size / 10
    tracemalloc.stop()


def test_overwriting_checks_everything_before_it_removes_anything(tmp_path):
    path = tmp_path / "tags.csv"
    write(path)
    mine = tmp_path / "precious.h5"
    mine.write_bytes(b"precious")
    strange = (
        {"output": tmp_path / "precious.wav"},
        {"output": path, "embeddings": mine},
        {"output": tmp_path / "m.csv"},
    )
    (tmp_path / "precious.wav").write_bytes(b"precious")
    (tmp_path / "m.csv").write_bytes(b"precious")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for outputs in (*strange, {"output": path, "plot": mine}):
        with pytest.raises(UserError, match=r"does not touch: write elsewhere|expected a name that ends in"):
            overwrite(**outputs)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    (tmp_path / "e.h5.parts").mkdir()
    (tmp_path / "e.h5.parts" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="does not touch"):
        overwrite(embeddings=tmp_path / "e.h5")
    assert (tmp_path / "e.h5.parts" / "letter.txt").exists()


def test_a_name_too_long_for_a_file_beside_others_is_that_files_fault(tmp_path):
    paths = [tmp_path / f"{'n' * 250}.wav", tmp_path / "short.wav"]
    output = open_output(tmp_path / "tracks", "audacity", paths, SETTINGS, SINGLE_PROCESS)
    for path in paths:
        output.write(tagged(path))
    assert output.close(paths)
    assert list(output.faults) == [str(paths[0])]
    assert "too long" in output.faults[str(paths[0])]
    assert (tmp_path / "tracks" / "short.wav.txt").exists()


def test_names_and_labels_do_not_control_the_terminal():
    assert make_printable("a\x1b[31m\n\udce4 ä.wav") == r"a\x1b[31m\n\xe4 ä.wav"
