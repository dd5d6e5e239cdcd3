"""Traps of MATPAC's published inference: columns of a batch mixed up, names that decide, imports, order of classes."""

import subprocess
import sys

import pytest
import torch

from models import create_model, load_model
from models.labels import audioset_labels
from models.matpac_checkpoints import list_sorted_labels
from tests.conftest import ROOT
from tests.models.sounds import noise
from tests.models.test_matpac import SMALL, publish


@torch.inference_mode()
def test_columns_of_long_clips_in_a_batch_stay_in_the_order_of_time():
    """The mode 'fast' joined the chunks of clips column by column, so that time jumped between them."""
    torch.manual_seed(0)
    model = create_model("matpac_pico", num_classes=0, **SMALL).eval()
    clips = torch.stack([noise(40_000, seed) for seed in range(3)])  # three chunks
    _, together = model.embed(clips)
    for clip, columns in zip(clips, together, strict=True):
        alone = [model.embed(clip[None, start : start + 95 * 160 + 400])[1][0] for start in (0, 96 * 160)]
        torch.testing.assert_close(columns[:12], torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.long
def test_it_is_imported_without_packages_of_the_published_code():
    """The published package needs timm 0.4.12 and einops; a mutable default in a dataclass fails on Python 3.11."""
    code = "import sys, models.matpac; print(*sorted({'timm', 'einops', 'torchaudio', 'pandas'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


@pytest.mark.parametrize("folder", ["bass", "plain"])
def test_a_path_with_the_letters_as_does_not_make_another_network_of_it(folder, tmp_path):
    """A checkpoint in a folder such as `bass/` was taken for one that was fine-tuned on AudioSet, with 992 frames."""
    (tmp_path / folder).mkdir()
    publish(create_model("matpac_pico", num_classes=0), tmp_path / folder / "matpac.pt")
    assert load_model("matpac_pico", weights=tmp_path / folder / "matpac.pt").target_length == 608


def test_classes_of_its_classifier_are_in_the_order_of_identifiers():
    """Not in the order of AudioSet's own table."""
    labels = list_sorted_labels()
    assert sorted(labels) == sorted(audioset_labels())
    assert labels != audioset_labels()
    assert labels[:2] == ["Firecracker", "Timpani"]  # /g/122z_qxw, /m/011k_j
