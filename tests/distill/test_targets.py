import json
import shutil

import numpy as np
import pandas as pd
import pytest

from audio.dataset import Pack
from audio.shard_writer import ShardWriter
from common.errors import UserError
from distill.targets import SoftTargetStore, StoredTargets, rebuild_target
from tests.distill.stores import write_epoch

V = np.array([0.8, 0.4, 0.2], np.float16)
I = np.array([2, 0, 5], np.int16)  # noqa: E741


def pack_of(folder, names, seconds=2.0, sample_rate=16000):
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder / "p_0.h5", sample_rate) as writer:
        for k, name in enumerate(names):
            writer.append(name, np.full(round(seconds * sample_rate), k + 1, np.int16))
    lines = [f"{name}\t{folder / 'p_0.h5'}" for name in names]
    (folder / "p.tsv").write_text("filename\thdf5path\n" + "\n".join(lines) + "\n")
    return Pack.open(folder / "p.tsv")


def store_of(folder, epochs, meta=None, seconds=2.0):
    """`epochs`: for each stored epoch, for each rank, the list of names; value = epoch + name's number / 100."""
    for e, ranks in enumerate(epochs, 1):
        for r, names in enumerate(ranks):
            n = len(names)
            numbers = np.array([int(name.split("_")[1].split(".")[0]) for name in names])
            rows = pd.DataFrame({"filename": names, "start": np.zeros(n, np.float32), "end": np.float32(seconds)})
            values = np.stack([0.1 * e + numbers / 100, np.full(n, 0.01)], axis=1)
            write_epoch(folder, e, r, rows, values, np.tile([3, 1], (n, 1)), 1000 * e + numbers)
    meta = {"wavtransforms": {}, "spectransforms": []} | (meta or {})
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize(
    ("label_type", "rest"),
    [("last_mean", 0.2 / 5), ("last_half", 0.1), ("527", 1 / 8), ("zero", 0.0)],
)
def test_every_fill_rule_gives_its_value(label_type, rest):
    target = rebuild_target(V, I, 8, label_type)
    expected = np.full(8, rest)
    expected[[2, 0, 5]] = V
    assert np.allclose(target, expected, atol=1e-4)
    assert target.dtype == np.float32


def test_last_random_fills_below_the_smallest_value_as_its_seed_says():
    one, again, other = (rebuild_target(V, I, 1000, "last_random", seed) for seed in (1, 1, 2))
    rest = np.delete(one, [2, 0, 5])
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert rest.max() < 0.2
    assert abs(rest.mean() - 0.1) < 0.01


def test_published_folder_with_its_pickle_replays_every_reference_row(shared, tmp_path):
    """The published store, matched by stem to a pack of .ogg names, gives the published targets and seeds."""
    folder = shared / "fixtures/published_logits_layout"
    reference = json.loads((folder / "replay.json").read_text())["rows"]
    names = [f"audio/{row['filename'].replace('.wav', '.ogg')}" for row in reference]
    names = list(dict.fromkeys(names))
    with ShardWriter(tmp_path / "p_0.h5", 16000) as writer:
        for name in names:
            writer.append(name, np.zeros(80016, np.int16))
    (tmp_path / "p.tsv").write_text("filename\thdf5path\n" + "".join(f"{n}\t{tmp_path / 'p_0.h5'}\n" for n in names))
    pack = Pack.open(tmp_path / "p.tsv")
    store = SoftTargetStore(folder / "chunk_10")
    assert store.epochs == [1, 2]
    targets = StoredTargets(store, pack, 527, "zero")
    item_of = {pack.names[clip]: item for item, clip in enumerate(targets.chunks.clip)}
    for row in reference:
        item = item_of[f"audio/{row['filename'].replace('.wav', '.ogg')}"]
        assert targets.seed(row["epoch"], item) == row["seed"]
        assert targets.n_reference[item] == row["n_samples"]
        target = targets.target(row["epoch"], item)
        assert np.flatnonzero(target).tolist() == row["topk_indexes"]
        assert target.sum() == pytest.approx(row["target_sum"], rel=1e-6)
        assert target.max() == np.float32(row["target_max"])
        assert target.argmax() == row["target_argmax"]


def test_files_of_several_ranks_and_another_order_in_each_epoch_align(tmp_path):
    names = [f"clip_{k}.wav" for k in range(6)]
    pack = pack_of(tmp_path / "pack", names)
    folder = store_of(tmp_path / "store", [[names[:3], names[3:]], [names[::-1][:2], names[::-1][2:]]])
    targets = StoredTargets(SoftTargetStore(folder), pack, 4, "zero")
    for item, clip in enumerate(targets.chunks.clip):
        for epoch in (1, 2):
            assert targets.seed(epoch, item) == 1000 * epoch + clip
            assert targets.target(epoch, item)[3] == pytest.approx(0.1 * epoch + clip / 100, abs=1e-3)


def test_max_epochs_uses_the_first_stored_ones(tmp_path):
    names = ["clip_0.wav"]
    folder = store_of(tmp_path / "store", [[names]] * 3)
    targets = StoredTargets(SoftTargetStore(folder), pack_of(tmp_path / "pack", names), 4, "zero", max_epochs=2)
    assert [targets.seed(epoch, 0) for epoch in range(1, 5)] == [1000, 2000, 1000, 2000]


def test_chunks_of_a_long_clip_find_their_samples(tmp_path):
    pack = pack_of(tmp_path / "pack", ["clip_0.wav"], seconds=25.0)
    rows = pd.DataFrame({"filename": ["clip_0.wav"] * 3, "start": [0.0, 10.0, 20.0], "end": [10.0, 20.0, 25.0]})
    write_epoch(tmp_path / "s", 1, 0, rows, np.full((3, 2), 0.5), np.tile([0, 1], (3, 1)), np.array([5, 6, 7]))
    (tmp_path / "s" / "meta.json").write_text("{}")
    targets = StoredTargets(SoftTargetStore(tmp_path / "s"), pack, 4, "zero")
    assert list(targets.chunks) == [(0, 0, 160000), (0, 160000, 320000), (0, 320000, 400000)]
    assert targets.n_reference.tolist() == [160000, 160000, 80000]


def test_a_pack_at_another_rate_takes_the_stored_length_at_the_reference_rate(tmp_path):
    pack = pack_of(tmp_path / "pack", ["clip_0.wav"], sample_rate=32000)
    rows = pd.DataFrame({"filename": ["clip_0.wav"], "start": [0.0], "end": [2.0], "n_reference": [31999]})
    write_epoch(tmp_path / "s", 1, 0, rows, np.full((1, 2), 0.5), np.array([[0, 1]]), np.array([5]))
    (tmp_path / "s" / "meta.json").write_text("{}")
    targets = StoredTargets(SoftTargetStore(tmp_path / "s"), pack, 4, "zero")
    assert targets.n_reference.tolist() == [31999]
    assert list(targets.chunks) == [(0, 0, 64000)]


def test_clips_beyond_the_pack_and_clips_of_another_length_are_left_out_and_counted(tmp_path):
    names = [f"clip_{k}.wav" for k in range(4)]
    folder = store_of(tmp_path / "store", [[names]])
    rows = pd.read_parquet(folder / "logits_ep1_0.parquet")
    rows.loc[1, "end"] = 9.0  # the store heard nine seconds, the pack has two
    rows.to_parquet(folder / "logits_ep1_0.parquet", index=False)
    targets = StoredTargets(SoftTargetStore(folder), pack_of(tmp_path / "pack", names[:3]), 4, "zero")
    assert (targets.n_unmatched, targets.n_misfits) == (1, 1)
    assert targets.chunks.clip.tolist() == [0, 2]


def test_a_store_of_other_clips_says_both_spellings(tmp_path):
    folder = store_of(tmp_path / "store", [[["clip_7.wav"]]])
    pack = pack_of(tmp_path / "pack", ["dog_1.wav"])
    with pytest.raises(UserError, match=r"none of its 1 chunks(?s:.*)clip_7\.wav(?s:.*)dog_1\.wav"):
        StoredTargets(SoftTargetStore(folder), pack, 4, "zero")


def test_epochs_with_different_chunks_are_refused(tmp_path):
    names = [f"clip_{k}.wav" for k in range(3)]
    folder = store_of(tmp_path / "store", [[names], [names[:2]]])
    with pytest.raises(UserError, match="epoch 2 lacks 1 of the chunks"):
        StoredTargets(SoftTargetStore(folder), pack_of(tmp_path / "pack", names), 4, "zero")


def test_a_missing_rank_a_missing_table_and_a_missing_meta_are_told_at_once(tmp_path):
    names = [f"clip_{k}.wav" for k in range(4)]
    folder = store_of(tmp_path / "store", [[names[:2], names[2:]], [names[:2], names[2:]]])
    (folder / "logits_ep1_1.h5").unlink()
    (folder / "logits_ep2_0.parquet").unlink()
    (folder / "meta.json").unlink()
    with pytest.raises(UserError, match=r"3 faults(?s:.*)neither meta(?s:.*)epoch 1 lacks(?s:.*)epoch 2 lacks"):
        SoftTargetStore(folder)


def test_an_epoch_missing_between_others_is_a_fault(tmp_path):
    folder = store_of(tmp_path / "store", [[["clip_0.wav"]]] * 3)
    (folder / "logits_ep2_0.h5").unlink()
    with pytest.raises(UserError, match="lacks epoch 2 between others"):
        SoftTargetStore(folder)


def test_an_empty_or_absent_folder_says_how_to_fill_it(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"save_logits\.py"):
            SoftTargetStore(folder)


def test_a_truncated_file_is_named(tmp_path):
    folder = store_of(tmp_path / "store", [[["clip_0.wav"]]])
    path = folder / "logits_ep1_0.h5"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"logits_ep1_0\.h5 cannot be read"):
        SoftTargetStore(folder)


def test_values_and_names_of_different_length_are_refused_before_they_are_misaligned(tmp_path):
    folder = store_of(tmp_path / "store", [[[f"clip_{k}.wav" for k in range(4)]]] * 2)
    rows = pd.read_parquet(folder / "logits_ep2_0.parquet")
    pd.concat([rows, rows[:1]]).to_parquet(folder / "logits_ep2_0.parquet", index=False)
    with pytest.raises(UserError, match=r"logits_ep2_0\.h5 and the \.parquet beside it differ in length"):
        SoftTargetStore(folder)


def test_the_draws_are_for_the_length_the_teacher_heard_when_the_pack_decodes_another(tmp_path):
    """The published fixture says 5.001 s; the same clip as a 5.000 s file must replay the draws of 80016 samples."""
    names = ["clip_0.wav"]
    folder = store_of(tmp_path / "store", [[names]], seconds=5.001)
    targets = StoredTargets(SoftTargetStore(folder), pack_of(tmp_path / "pack", names, seconds=5.0), 4, "zero")
    assert targets.n_reference.tolist() == [80016]


def test_a_store_of_more_classes_than_the_model_has_is_refused(tmp_path):
    names = ["clip_0.wav"]
    folder = store_of(tmp_path / "store", [[names]])
    with pytest.raises(UserError, match="targets of class 3, but there are 2 classes"):
        StoredTargets(SoftTargetStore(folder), pack_of(tmp_path / "pack", names), 2, "zero")


def test_a_clip_that_ends_before_its_chunk_starts_is_left_out(tmp_path):
    pack = pack_of(tmp_path / "pack", ["clip_0.wav"], seconds=0.5)
    rows = pd.DataFrame({"filename": ["clip_0.wav"] * 2, "start": [0.0, 0.6], "end": [0.5, 0.62]})
    write_epoch(tmp_path / "s", 1, 0, rows, np.full((2, 2), 0.5), np.tile([0, 1], (2, 1)), np.array([5, 6]))
    (tmp_path / "s" / "meta.json").write_text('{"config": {"chunk_length": 0.6}}')
    assert list(StoredTargets(SoftTargetStore(tmp_path / "s"), pack, 4, "zero").chunks) == [(0, 0, 8000)]


def test_meta_pt_beside_meta_json_is_not_read(shared, tmp_path):
    published = shared / "fixtures/published_logits_layout/chunk_10"
    for file in published.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"wavtransforms": {}, "spectransforms": []}))
    assert SoftTargetStore(tmp_path).replay.wavtransforms == {}
    (tmp_path / "meta.json").unlink()
    assert SoftTargetStore(tmp_path).replay.settings()["spectransforms"] == [
        {"TimeMasking": {"time_mask_param": 192}},
        {"FrequencyMasking": {"freq_mask_param": 24}},
    ]
