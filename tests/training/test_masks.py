"""Masks are looked at before a run, a smoke run on sounds that exist included."""

import pytest
import yaml

from audio.dataset import Pack
from common.errors import UserError
from models import Ensemble, create_model
from training.config import SoftTargetConfig
from training.prepare import prepare_run
from training.store_writer import SoftTargetContent, StoreWriter

SETTINGS = {
    "model": "audiotransformer_pico",
    "model_args": {"pooling": "logit", "depth": 1},
    "pretrained": False,
    "loss": "BCEWithLogitsLoss",
    "epochs": 1,
    "num_workers": 0,
    "device": "cpu",
}


@pytest.fixture
def prepare(tone_pack, tmp_path):
    """Prepare a run on the tones, of one second each, under masks."""

    def prepared(masks, **changes):
        data = {"train_data": str(tone_pack), "outputpath": str(tmp_path / "runs"), "spectransforms": masks}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(SETTINGS | data | changes))
        return prepare_run(str(path), {}, 1)

    return prepared


@pytest.mark.parametrize("smoke", [False, True])
def test_a_run_under_masks_that_leave_too_little_is_refused_beside_all_other_faults(prepare, tmp_path, smoke):
    with pytest.raises(UserError, match="has 1 fault") as error:
        prepare([{"TimeMasking": {"time_mask_param": 192}}], smoke=smoke)
    assert "1.92 s of 28 clips" in str(error.value)
    assert "max_share: 0.2" in str(error.value)
    assert not list(tmp_path.glob("runs/*/*/*"))
    if not smoke:
        with pytest.raises(UserError, match=r"2 faults(?s:.*)max_share: 0.2(?s:.*)loss BCELoss expects"):
            prepare([{"TimeMasking": {"time_mask_param": 192}}], loss="BCELoss")


def test_a_smoke_run_on_sounds_that_stand_in_is_not_refused_for_their_length(prepare, tmp_path):
    prepare([{"TimeMasking": {"time_mask_param": 192}}], smoke=True, train_data=str(tmp_path / "absent.tsv"))


@pytest.mark.parametrize(
    ("masks", "warned"),
    [({"time_mask_param": 60}, True), ({"time_mask_param": 60, "max_share": 0.2}, False)],
)
def test_what_single_clips_can_lose_is_in_the_log(prepare, masks, warned):
    folder = prepare([{"TimeMasking": masks}]).folder.path
    assert ("more than a third of 28 clips" in (folder / "train.log").read_text()) is warned


def test_masks_of_stored_targets_are_warned_of_since_the_run_cannot_change_them(prepare, tone_pack, tmp_path):
    settings = {"epochs": 1, "topk": 3, "num_workers": 0, "device": "cpu"}  # masks of up to 1.92 s by default
    config = SoftTargetConfig(train_data=str(tone_pack), model="audiotransformer_pico", **settings)
    teacher = Ensemble([create_model("audiotransformer_pico", num_classes=7, depth=1)])
    store = StoreWriter(config, Pack.open(tone_pack), SoftTargetContent(teacher, 3), tmp_path / "store").save()
    log = (prepare([], logitspath=str(store)).folder.path / "train.log").read_text()
    assert f"the targets of {store} were stored with masks" in log
    assert "store them again, by save_logits.py with `TimeMasking: {time_mask_param: 192, max_share: 0.2}`" in log
