import pytest
import torch

from common.errors import UserError
from models import Ensemble, create_model
from tests.models.sounds import noise


def members(**second):
    torch.manual_seed(0)
    one = create_model("audiotransformer_pico", num_classes=3, pooling="logit").eval()
    two = create_model("mn01_as", **{"num_classes": 3, **second}).eval()
    return one, two


@torch.inference_mode()
def test_probabilities_of_members_with_other_rates_are_averaged():
    one, two = members()
    ensemble = Ensemble([one, two])
    assert ensemble.sample_rates == [16000, 32000]
    waves = {16000: noise(32000).reshape(2, -1), 32000: noise(64000).reshape(2, -1)}
    lengths = {16000: torch.tensor([16000, 8000]), 32000: torch.tensor([32000, 16000])}
    wanted = (one(waves[16000]).sigmoid() + two(waves[32000]).sigmoid()) / 2
    torch.testing.assert_close(ensemble.predict(waves), wanted)
    alone = ensemble.predict({16000: waves[16000][1:, :8000], 32000: waves[32000][1:, :16000]})
    torch.testing.assert_close(ensemble.predict(waves, lengths)[1], alone[0], atol=1e-6, rtol=1e-5)


def test_members_with_other_labels_are_refused():
    with pytest.raises(
        UserError, match="'audiotransformer_pico' has 3, 'mn01_as' has 3, and they differ from class 1 on"
    ):
        Ensemble(members(labels=["0", "b", "2"]))
    with pytest.raises(UserError, match="'mn01_as' has 2, and they differ from class 2 on"):
        Ensemble(members(num_classes=2))
    with pytest.raises(UserError, match="at least one member"):
        Ensemble([])


def test_a_missing_rate_is_reported():
    ensemble = Ensemble(members())
    with pytest.raises(UserError, match=r"waveforms at \[16000, 32000\] Hz; \[32000\] are missing"):
        ensemble.predict({16000: torch.zeros(1, 100)})
    with pytest.raises(UserError, match=r"lengths at .* \[16000, 32000\] are missing"):
        ensemble.predict({16000: torch.zeros(1, 100), 32000: torch.zeros(1, 200)}, {})


@torch.inference_mode()
def test_layers_of_a_network_that_does_not_mask_padding_are_of_clips_of_one_length():
    """Padding would be in its layers; a network that masks it gives each clip what it has alone."""
    masking, other = members()
    spectrogram = lambda front_end, batch: front_end.spectrogram(*batch)  # noqa: E731
    waves, lengths = noise(64000).reshape(2, -1), torch.tensor([32000, 16000])
    teacher = Ensemble([other])
    with pytest.raises(UserError, match="mn01_as does not mask padding, so it cannot encode clips of several lengths"):
        teacher.encode((waves, lengths), spectrogram, layers=(1,))
    with pytest.raises(UserError, match="does not mask padding"):
        other.encode(*other.front_end.spectrogram(waves, lengths))
    whole = teacher.encode((waves, None), spectrogram, layers=(1,)).layers[1]
    alone = teacher.encode((waves[1:], None), spectrogram, layers=(1,)).layers[1]
    torch.testing.assert_close(whole[1:], alone, atol=1e-5, rtol=1e-4)
    # each length is computed alone
    pooled = teacher.single.embed_layers(*spectrogram(other.front_end, (waves, lengths)), layers=(1, -1))
    torch.testing.assert_close(pooled[0][0], whole[0].mean((1, 2)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pooled[1], teacher.embeddings((waves, lengths), spectrogram))
    assert len(Ensemble([masking]).encode((waves, lengths), spectrogram).valid) == 2
