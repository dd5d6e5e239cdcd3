"""Traps of S-SONDO's published inference: short clips, tails, layers that a freeze forgot, pickles."""

import pytest
import torch

from common.errors import UserError
from models import create_model, get_ssondo, load_model
from tests.models.sounds import noise

RATE = 32000
TINY = {"mobilenetv3": {"width": 0.1}, "dymn": {"width": 0.1}, "eres2net": {"m_channels": 4, "num_blocks": [1] * 5}}


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.parametrize("n_samples", [1, 1023, 5 * RATE, 10 * RATE + 1, 25 * RATE])
@torch.inference_mode()
def test_no_length_gives_nan(name, n_samples):
    """Below 10 s there was no segment at all, and the mean of none is NaN; a head says it at once."""
    torch.manual_seed(0)
    model = get_ssondo(create_model(name, num_classes=0, **TINY[name]), head="linear", n_classes=2)
    for sound in (noise(n_samples), torch.zeros(n_samples)):
        assert model(sound).isfinite().all()
        assert model.preprocess(sound).shape[:2] == (1, -(-n_samples // (10 * RATE)))


@torch.inference_mode()
def test_what_lies_behind_the_last_whole_segment_is_given():
    """The tail of a clip was dropped."""
    torch.manual_seed(0)
    model = get_ssondo(create_model("eres2net", num_classes=0, **TINY["eres2net"]))
    sound = noise(14 * RATE)
    changed = torch.cat([sound[: 11 * RATE], 3 * sound[11 * RATE :]])
    before, after = model(sound)[0], model(changed)[0]
    torch.testing.assert_close(before[0], after[0])
    assert (before[1] - after[1]).norm() > 1e-3 * before[1].norm()


def test_a_frozen_backbone_rests_but_for_the_head():
    """The projection kept learning, and batch norms kept counting in training mode."""
    torch.manual_seed(0)
    model = get_ssondo(create_model("mobilenetv3", num_classes=24, width=0.1), head="linear", n_classes=2)
    model.freeze_backbone()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learns = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(learns, lr=0.1)
    model(noise(2 * 2000).reshape(2, -1)).square().sum().backward()
    optimiser.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.layers.0.bias", "head.layers.0.weight"}
    assert all(p.grad is None for p in model.model.parameters())
    assert model.head.training
    model.unfreeze_backbone()
    assert all(p.requires_grad for p in model.parameters())
    model(noise(2 * 2000).reshape(2, -1))
    assert not torch.equal(
        model.state_dict()["model.model.features.0.1.running_mean"], before["model.model.features.0.1.running_mean"]
    )


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_is_read_without_running_what_it_holds(tmp_path):
    """Published code unpickled whatever a file held."""
    model = create_model("mobilenetv3", num_classes=6, width=0.1)
    state = {f"student_model.{key}": value for key, value in model.state_dict().items()}
    config = {"student_model": {"model_name": "mn10_im"}, "loss": Bomb(tmp_path / "it_ran")}
    torch.save({"state_dict": state, "training_config": config}, tmp_path / "student.ckpt")
    with pytest.raises(UserError, match="contains more than tensors and plain values"):
        load_model(tmp_path / "student.ckpt")
    with pytest.raises(UserError, match="contains more than tensors and plain values"):
        get_ssondo(tmp_path / "student.ckpt")
    assert not (tmp_path / "it_ran").exists()
