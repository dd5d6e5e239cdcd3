import csv
import hashlib
import itertools

import numpy as np
import pytest
import soundfile

from scripts.make_demo_sounds import CLASSES, FOLDER_TO_TAG, main, make_clip, make_event

SMALL = ["--n_train", "17", "--n_valid", "3", "--n_eval", "2", "--seconds", "1"]
RATE = 16000


def digests(folder):
    """SHA-256 of every file but the .ogg ones, whose container numbers each stream at random."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".ogg")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "small"
    main([str(folder), *SMALL])
    return folder


def read_table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_tables_name_every_clip_and_its_labels(demo):
    for split, count in (("train", 17), ("valid", 3), ("eval", 2)):
        rows = read_table(demo / f"{split}.tsv")
        assert [row["filename"] for row in rows] == [f"audio/{split}/{index:04d}.wav" for index in range(count)]
        for index, row in enumerate(rows):
            info = soundfile.info(demo / row["filename"])
            assert (info.samplerate, info.channels, info.frames, info.subtype) == (RATE, 1, RATE, "PCM_16")
            samples, labels = make_clip(0, split, index, 1.0, RATE)
            assert row["labels"] == ";".join(map(str, labels))
            np.testing.assert_array_equal(soundfile.read(demo / row["filename"], dtype="int16")[0], samples)
    train = read_table(demo / "train.tsv")
    assert {int(label) for row in train for label in row["labels"].split(";")} == set(range(16))  # 16 clips suffice


def test_class_list_has_the_names_and_identifiers_of_audioset(demo, shared):
    with open(demo / "class_labels_indices.csv", newline="", encoding="utf-8") as file:
        ours = list(csv.DictReader(file))
    with open(shared / "data/audioset/class_labels_indices.csv", newline="", encoding="utf-8") as file:
        audioset = {row["mid"]: row for row in csv.DictReader(file)}
    assert [int(row["index"]) for row in ours] == list(range(16))
    assert [row["display_name"] for row in ours] == [audioset[row["mid"]]["display_name"] for row in ours]
    places = [int(audioset[row["mid"]]["index"]) for row in ours]
    assert len(set(places)) == 16
    assert '2,/m/07pggtn,"Chirp, tweet"\n' in (demo / "class_labels_indices.csv").read_text(encoding="utf-8")


def test_the_same_settings_give_the_same_bytes(demo, tmp_path):
    main([str(tmp_path / "again"), *SMALL])
    assert digests(tmp_path / "again") == digests(demo)


def test_a_clip_depends_on_seed_split_and_number_only(demo, tmp_path):
    main([str(tmp_path), "--n_train", "2", "--n_valid", "1", "--n_eval", "0", "--seconds", "1"])
    for name in ("train/0000", "train/0001", "valid/0000"):
        assert (tmp_path / f"audio/{name}.wav").read_bytes() == (demo / f"audio/{name}.wav").read_bytes()
    clips = [
        make_clip(0, "train", 0, 1.0, RATE)[0],
        make_clip(16, "train", 0, 1.0, RATE)[0],  # the same first class
        make_clip(0, "valid", 0, 1.0, RATE)[0],
        make_clip(0, "train", 16, 1.0, RATE)[0],
    ]
    for one, other in itertools.combinations(clips, 2):
        assert not np.array_equal(one, other)


def test_a_complete_folder_is_left_alone_and_an_incomplete_or_other_one_is_made(tmp_path, capsys):
    arguments = [str(tmp_path), "--n_train", "4", "--n_valid", "1", "--n_eval", "1", "--seconds", "1"]
    main(arguments)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    main(arguments)
    assert "already has" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in written} == written

    before = digests(tmp_path)
    (tmp_path / "settings.json").unlink()  # what an interruption leaves
    (tmp_path / "audio/train/0001.wav").write_bytes(b"half")
    main(arguments)
    assert digests(tmp_path) == before

    (tmp_path / "audio/valid/0000.wav").unlink()  # a folder that lost a clip
    main(arguments)
    assert digests(tmp_path) == before

    main([*arguments[:2], "2", *arguments[3:]])  # fewer clips: those of the larger set go
    assert sorted(path.name for path in (tmp_path / "audio/train").iterdir()) == ["0000.wav", "0001.wav"]


def test_clips_are_loud_enough_and_never_clipped():
    for index in range(32):
        peak = np.abs(make_clip(3, "train", index, 1.0, RATE)[0].astype(np.int32)).max()
        assert 10 ** (-18.1 / 20) * 32767 <= peak <= 10 ** (-0.9 / 20) * 32767


def test_label_counts_are_one_to_three_and_classes_even():
    counts, sizes = np.zeros(16), np.zeros(4)
    for index in range(160):
        labels = make_clip(0, "eval", index, 1.0, 8000)[1]
        assert labels == sorted(set(labels))
        counts[labels] += 1
        sizes[len(labels)] += 1
    assert sizes[0] == 0
    assert sizes[1:] / 160 == pytest.approx([0.4, 0.4, 0.2], abs=0.12)
    assert counts.min() >= 10


def coarse_spectrum(samples):
    """Mean and spread over time of the level in 12 bands: what tells the classes apart, roughly."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, 512)[::256] * np.hanning(512)
    power = np.square(np.abs(np.fft.rfft(frames)))
    edges = np.unique(np.geomspace(2, 256, 13).astype(int))
    bands = np.log10(np.stack([power[:, a:b].sum(1) for a, b in itertools.pairwise(edges)], axis=1) + 1e-6)
    return np.concatenate([bands.mean(0), bands.std(0), np.abs(np.diff(bands, axis=0)).mean(0)])


def test_classes_differ_and_vary_within():
    train: list[tuple[np.ndarray, int]] = []
    test: list[tuple[np.ndarray, int]] = []
    for label in range(16):
        for number in range(12):
            rng = np.random.default_rng([5, label, number])
            (train if number < 8 else test).append((coarse_spectrum(make_event(rng, label, RATE * 2, RATE)), label))
    features = np.array([feature for feature, _ in train])
    mean, spread = features.mean(0), features.std(0)
    right = 0
    for feature, label in test:
        distances = np.square((features - feature) / spread).sum(1)
        right += train[int(distances.argmin())][1] == label
    assert 0.7 < right / len(test) <= 1  # nearest neighbour on 36 numbers; chance is 0.06
    for label in range(16):
        own = features[[index for index, row in enumerate(train) if row[1] == label]]
        assert ((own - mean) / spread).std(0).max() > 0.1, CLASSES[label].display_name


def test_folder_to_tag_holds_several_formats_and_rates(demo):
    for name, (_, seconds, rate, _) in FOLDER_TO_TAG.items():
        samples, found_rate = soundfile.read(demo / "folder_to_tag" / name)
        assert (found_rate, len(samples)) == (rate, round(seconds * rate))
        assert 0.05 < np.abs(samples).max() <= 1.05
    assert len({rate for _, _, rate, _ in FOLDER_TO_TAG.values()}) >= 5
    assert {name.rsplit(".", 1)[1] for name in FOLDER_TO_TAG} == {"wav", "flac", "ogg"}


@pytest.mark.parametrize("wrong", [["--seconds", "0.1"], ["--sample_rate", "4000"], ["--n_train", "-1"]])
def test_settings_that_make_no_sound_are_refused(tmp_path, capsys, wrong):
    with pytest.raises(SystemExit) as exit_status:
        main([str(tmp_path), *wrong])
    assert exit_status.value.code == 2
    assert "error:" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
