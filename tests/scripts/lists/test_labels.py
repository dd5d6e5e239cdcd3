import numpy as np
import pandas as pd
import pytest

from common.errors import UserError
from scripts.lists import list_files
from scripts.lists.labels import clean_labels, label_sounds
from scripts.lists.list_files import write_lists
from scripts.lists.options import ListOptions
from scripts.lists.sound_folders import SoundFolder


def make_options(**given):
    return ListOptions(folder="sounds", **{name: str(value) for name, value in given.items()})


def sounds_of(*names):
    return SoundFolder("my_sounds", sorted(names), np.ones(len(names), np.int64))


def labels_of(clips):
    return dict(zip(clips.table["filename"], clips.table["labels"], strict=True))


def table_file(tmp_path, text, name="meta.csv"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def join_notes(clips):
    return "\n".join(clips.notes)


def test_the_first_folder_is_the_label_and_another_level_on_demand():
    sounds = sounds_of("dog/rec1/a.wav", "dog/rec2/b.wav", "cat/rec1/c.wav", "cat/d.wav", "lost.wav")
    clips = label_sounds(sounds, make_options())
    assert labels_of(clips) == {
        "cat/d.wav": "cat",
        "cat/rec1/c.wav": "cat",
        "dog/rec1/a.wav": "dog",
        "dog/rec2/b.wav": "dog",
    }
    assert "without a label: 1 (lost.wav)" in join_notes(clips)
    assert "--label_level last would give 3" in join_notes(clips)
    last = labels_of(label_sounds(sounds, make_options(label_level="last")))
    assert last == {"cat/d.wav": "cat", "cat/rec1/c.wav": "rec1", "dog/rec1/a.wav": "rec1", "dog/rec2/b.wav": "rec2"}
    second = labels_of(label_sounds(sounds, make_options(label_level="2")))
    assert second == {"cat/rec1/c.wav": "rec1", "dog/rec1/a.wav": "rec1", "dog/rec2/b.wav": "rec2"}


def test_a_semicolon_joins_labels_and_spaces_around_them_do_not_count():
    sounds = sounds_of("a;b/1.wav", "a ;c/2.wav", " b/3.wav", "b/4.wav", "x+y/5.wav")
    clips = label_sounds(sounds, make_options())
    assert labels_of(clips) == {
        "a;b/1.wav": "a;b", "a ;c/2.wav": "a;c", " b/3.wav": "b", "b/4.wav": "b", "x+y/5.wav": "x+y",
    }  # fmt: skip
    assert "are the same: ' b' and 'b'" in join_notes(clips)
    assert clean_labels("a; b,c ;;a", ",") == "a;b;c"


def test_no_labels_on_demand():
    clips = label_sounds(sounds_of("x.wav", "y.wav"), make_options(label_level="none"))
    assert list(clips.table) == ["filename"]
    assert not clips.has_labels


def test_folders_that_look_like_lists_are_no_labels_in_silence():
    sounds = sounds_of("train/dog/a.wav", "test/dog/b.wav", "Val/cat/c.wav")
    with pytest.raises(UserError, match=r"look like lists.*'\{split\}/\{label\}/\{\}'"):
        label_sounds(sounds, make_options())
    assert set(labels_of(label_sounds(sounds, make_options(label_level="first"))).values()) == {"train", "test", "Val"}
    clips = label_sounds(sounds, make_options(pattern="{split}/{label}/{}"))
    assert labels_of(clips)["Val/cat/c.wav"] == "cat"
    assert clips.table["split"].tolist() == ["Val", "test", "train"]


def test_the_only_candidate_of_a_pattern_is_used_without_folders():
    names = [f"{label}_{number}.wav" for label in ("dog", "cat") for number in range(9)]
    clips = label_sounds(sounds_of(*names), make_options())
    assert labels_of(clips)["dog_3.wav"] == "dog"
    assert "'{label}_{}'" in clips.source
    inside = label_sounds(sounds_of(*(f"audio/{name}" for name in names)), make_options())
    assert labels_of(inside)["audio/cat_0.wav"] == "cat"
    assert "one folder" in inside.source


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([f"x{number}.wav" for number in range(9)], "no part of their names has few values"),
        (
            [f"{a}_{b}_{c}.wav" for a in "01" for b in range(3) for c in range(3)],
            r"'\{label\}_\{\}' \(2 values: 0, 1\) or",
        ),
        (["audio/dog/1.wav", "audio/cat/2.wav"], "--label_level 2 would use the 2 folders"),
    ],
)
def test_the_error_without_labels_suggests_options(names, message):
    with pytest.raises(UserError, match=message) as error:
        label_sounds(sounds_of(*names), make_options())
    for option in ("--pattern", "--table", "--label_level"):
        assert option in str(error.value)


def test_a_pattern_gives_labels_and_columns_and_drops_other_names():
    sounds = sounds_of("s/dog_anna_1.wav", "s/cat_bob_2.wav", "s/other.wav")
    clips = label_sounds(sounds, make_options(pattern="{label}_{speaker}_{}"))
    assert clips.table.to_dict("list") == {
        "filename": ["s/cat_bob_2.wav", "s/dog_anna_1.wav"], "labels": ["cat", "dog"], "speaker": ["bob", "anna"],
    }  # fmt: skip
    assert "do not match the pattern: 1 (s/other.wav)" in join_notes(clips)
    assert "matches s/cat_bob_2.wav with label 'cat', speaker 'bob'" in join_notes(clips)


def test_folders_give_labels_beside_the_columns_of_a_pattern():
    sounds = sounds_of("dog/anna_1.wav", "cat/bob_2.wav", "cat/3.wav")
    clips = label_sounds(sounds, make_options(pattern="{speaker}_{}", label_level="first"))
    assert clips.table["labels"].tolist() == ["cat", "cat", "dog"]
    assert clips.table["speaker"].tolist() == ["", "bob", "anna"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "{label}-{}"}, "matches none of the 2 names, such as a/dog_1.wav, a/dog_2.wav"),
        ({"pattern": "{speaker}_{}"}, r"has no \{label\}"),
        ({"pattern": "{label}_{}", "label_level": "first"}, "omit one of them"),
        ({"pattern": "{label}_{}", "table": "x.csv"}, "omit one of them"),
        ({"table": "x.csv", "label_level": "last"}, "omit one of them"),
        ({"table": "x.csv"}, "x.csv: there is no such file"),
        ({"label_level": "3rd"}, "expected first, last, a number"),
        ({"label_level": "5"}, "none of its 2 sounds has a label"),
    ],
)
def test_options_that_match_nothing_are_errors(options, message):
    with pytest.raises(UserError, match=message):
        label_sounds(sounds_of("a/dog_1.wav", "a/dog_2.wav"), make_options(**options))


def test_esc50s_table_is_read(tmp_path):
    path = table_file(
        tmp_path,
        "filename,fold,target,category,esc10,src_file,take\n"
        "1-100032-A-0.wav,1,0,dog,True,100032,A\n1-100038-A-14.wav,2,14,chirping_birds,False,100038,A\n",
    )
    clips = label_sounds(
        sounds_of("audio/1-100032-A-0.wav", "audio/1-100038-A-14.wav", "demo.wav"), make_options(table=path)
    )
    assert labels_of(clips) == {"audio/1-100032-A-0.wav": "dog", "audio/1-100038-A-14.wav": "chirping_birds"}
    assert clips.table["fold"].tolist() == ["1", "2"]
    assert clips.table["src_file"].tolist() == ["100032", "100038"]
    assert "meta.csv: 1 (demo.wav)" in join_notes(clips)


def test_urbansound8ks_table_is_read(tmp_path):
    path = table_file(
        tmp_path,
        "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
        "100032-3-0-0.wav,100032,0.0,0.317551,1,5,3,dog_bark\n9-9-9-9.wav,9,0,1,1,1,0,drilling\n",
    )
    clips = label_sounds(sounds_of("audio/fold5/100032-3-0-0.wav"), make_options(table=path))
    assert labels_of(clips) == {"audio/fold5/100032-3-0-0.wav": "dog_bark"}
    assert "or several: 1 (9-9-9-9.wav)" in join_notes(clips)


def test_fsd50ks_table_is_read_and_commas_are_noticed(tmp_path):
    path = table_file(
        tmp_path,
        "fname,labels,mids,split\n"
        '64760,"Electric_guitar,Guitar,Music","/m/02sgy,/m/0342h,/m/04rlf",train\n16399,"Guitar,Music","/m/a",val\n'
        '1,"Music","/m/a",val\n2,"Electric_guitar,Music","/m/a",val\n',
    )
    sounds = sounds_of(*(f"FSD50K.dev_audio/{name}.wav" for name in (64760, 16399, 1, 2)))
    whole = label_sounds(sounds, make_options(table=path))
    assert "with --label_separator , there would be 3" in join_notes(whole)
    clips = label_sounds(sounds, make_options(table=path, label_separator=","))
    assert labels_of(clips)["FSD50K.dev_audio/64760.wav"] == "Electric_guitar;Guitar;Music"
    assert "label_separator" not in join_notes(clips)


def test_a_row_an_event_becomes_a_row_a_file(tmp_path):
    path = table_file(
        tmp_path, "file\tonset\tevent_label\nb.wav\t1\tdog\na.wav\t2\tcat\nb.wav\t3\tcat\nb.wav\t4\tdog\n", "t.tsv"
    )
    clips = label_sounds(sounds_of("a.wav", "b.wav"), make_options(table=path))
    assert clips.table.to_dict("list") == {
        "filename": ["a.wav", "b.wav"],
        "labels": ["cat", "dog;cat"],
        "onset": ["2", "1"],
    }
    assert "for the same sound: 2" in join_notes(clips)


def test_a_tables_own_columns_of_those_names_are_kept_beside_the_labels(tmp_path):
    path = table_file(tmp_path, "filename;labels;word\na;3;no way\n", "t.csv")
    clips = label_sounds(sounds_of("a.wav", "b.wav"), make_options(table=path, label_column="word"))
    assert clips.table.to_dict("list") == {"filename": ["a.wav"], "labels": ["no way"], "labels_in_table": ["3"]}
    none = label_sounds(sounds_of("a.wav"), make_options(table=path, label_column="none"))
    assert "labels" not in none.table


def test_a_table_and_a_pattern_go_together(tmp_path):
    path = table_file(tmp_path, "filename,label\nanna_1,x\nbob_2,y\n")
    clips = label_sounds(sounds_of("anna_1.wav", "bob_2.wav"), make_options(table=path, pattern="{speaker}_{}"))
    assert clips.table["speaker"].tolist() == ["anna", "bob"]
    path = table_file(tmp_path, "filename,label,speaker\nanna_1,x,a\n")
    with pytest.raises(UserError, match="'speaker' already"):
        label_sounds(sounds_of("anna_1.wav"), make_options(table=path, pattern="{speaker}_{}"))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,2\n", {}, "found the columns 'a', 'b', none of which is usual for file names"),
        ("file,lable\nx,2\n", {}, r"--label_column.*did you mean 'lable'"),
        ("file,sort\nx,2\n", {"label_column": "sorts"}, "did you mean 'sort'"),
        ("file,sort\nx,2\n", {"filename_column": "files", "label_column": "sort"}, "did you mean 'file'"),
        ("file,label\ny.wav,2\nz.wav,3\n", {}, "none of the 2 names.*found there x.wav, expected y.wav, z.wav"),
        ("file,label\n", {}, "no rows"),
        ("file,label\nx.wav,\n", {}, "none of its 1 sounds has a label"),
    ],
)
def test_a_table_that_does_not_match_is_an_error(tmp_path, text, options, message):
    with pytest.raises(UserError, match=message):
        label_sounds(sounds_of("x.wav"), make_options(table=table_file(tmp_path, text), **options))


def test_lists_are_replaced_only_if_the_command_made_them(tmp_path):
    one, other = pd.DataFrame({"filename": ["a.wav"]}), pd.DataFrame({"filename": ["b.wav"]})
    assert write_lists(tmp_path / "d", {"train.tsv": one, "test.tsv": one}, {}, False) == []
    assert write_lists(tmp_path / "d", {"train.tsv": other}, {}, False) == [tmp_path / "d" / "test.tsv"]
    assert (tmp_path / "d" / "train.tsv").read_text() == "filename\nb.wav\n"
    assert not (tmp_path / "d" / "test.tsv").exists()
    (tmp_path / "d" / "train.tsv").write_text("filename\nedited.wav\n")
    (tmp_path / "d" / "valid.tsv").write_text("filename\nmine.wav\n")
    with pytest.raises(UserError, match=r"train\.tsv, .*valid\.tsv: exists.*--overwrite"):
        write_lists(tmp_path / "d", {"train.tsv": one, "valid.tsv": one}, {}, False)
    assert (tmp_path / "d" / "train.tsv").read_text() == "filename\nedited.wav\n"
    write_lists(tmp_path / "d", {"train.tsv": one}, {}, True)
    assert (tmp_path / "d" / "valid.tsv").read_text() == "filename\nmine.wav\n"  # it is no list of the command's


def test_equal_lists_are_no_obstacle_and_foreign_records_are(tmp_path):
    table = pd.DataFrame({"filename": ["a.wav"]})
    (tmp_path / "train.tsv").write_text("filename\na.wav\n")
    write_lists(tmp_path, {"train.tsv": table}, {}, False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lists.json").write_text("[]")
    with pytest.raises(UserError, match=r"lists\.json"):
        write_lists(tmp_path / "other", {"train.tsv": table}, {}, False)
    with pytest.raises(UserError, match="is a file"):
        write_lists(tmp_path / "train.tsv", {"train.tsv": table}, {}, False)


def test_lists_of_an_interrupted_call_are_replaced_by_the_next(tmp_path, monkeypatch):
    one, other = pd.DataFrame({"filename": ["a.wav"]}), pd.DataFrame({"filename": ["b.wav"]})
    write_lists(tmp_path, {"train.tsv": one, "test.tsv": one}, {}, False)
    write_text = list_files.write_text

    def stop_at_test(path, text):
        if path.name == "test.tsv":
            raise KeyboardInterrupt
        write_text(path, text)

    monkeypatch.setattr(list_files, "write_text", stop_at_test)
    with pytest.raises(KeyboardInterrupt):
        write_lists(tmp_path, {"train.tsv": other, "test.tsv": other}, {}, False)
    monkeypatch.undo()
    assert (tmp_path / "train.tsv").read_text() != (tmp_path / "test.tsv").read_text()
    write_lists(tmp_path, {"train.tsv": one, "test.tsv": other}, {}, False)
    assert (tmp_path / "test.tsv").read_text() == "filename\nb.wav\n"
