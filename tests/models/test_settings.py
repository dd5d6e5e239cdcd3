"""Arguments that networks share: documented once, taken flat, found with their defaults."""

import re
from dataclasses import fields
from functools import partial

import pytest

from common.errors import UserError
from models import create_model
from models.audio_spectrogram_transformer import AST
from models.audiotransformer import ARGUMENTS, AudioTransformer
from models.passt import PaSST
from models.registry import model_entry
from models.settings import MelSettings, TransformerSettings, find_arguments, take_settings

TRANSFORMER = {
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "target_length": 1012,
    "patch_size": 16,
    "patch_stride": 16,
    "eval_avg": "mean",
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "init_values": None,
    "time_patch_out": None,
    "freq_patch_out": None,
    "token_merging": None,
    "token_merging_in_training": True,
}
NORM = {"norm_eps": 1e-6}
KALDI = {"sample_rate": 16000, "n_mels": 128, "mean": -4.2677393, "std": 4.5689974}
# name of a network -> what it takes, in any order
WANTED = {
    "ced_base": {
        **TRANSFORMER,
        **{"pooling": "mean", "init_bn": True, "center": True},
        **{"sample_rate": 16000, "n_mels": 64, "n_fft": 512, "win_size": 512, "hop_size": 160},
        **{"f_min": 0.0, "f_max": 8000.0},
    },
    "ast_audioset_10_10_0.4593": {**TRANSFORMER, **NORM, **KALDI, "target_length": 1024, "patch_stride": 10},
    "ast_audioset_16_16_0.4422": {**TRANSFORMER, **NORM, **KALDI, "target_length": 1024, "patch_stride": 16},
    "passt_s": {
        **TRANSFORMER,
        **NORM,
        **{"target_length": 1000, "patch_stride": 10, "fmin_aug_range": 1, "fmax_aug_range": 1},
        **{"sample_rate": 32000, "n_mels": 128, "n_fft": 1024, "win_size": 800, "hop_size": 320},
        **{"f_min": 0.0, "f_max": 15000.0},
    },
}


@pytest.mark.parametrize("name", WANTED)
def test_a_network_takes_these_arguments_with_these_defaults(name):
    assert model_entry(name).defaults == WANTED[name] | {"band_limit": None, "parametrize": None}
    assert set(model_entry(name).arguments) == set(model_entry(name).defaults)


def test_arguments_of_a_partial_are_its_defaults():
    assert model_entry("audiotransformer_pico").defaults["embed_dim"] == 64
    assert find_arguments(partial(AST, mean=1.0, depth=3))["mean"] == 1.0
    assert find_arguments(partial(AST, mean=1.0, depth=3))["depth"] == 3
    assert find_arguments(lambda *, num_classes, width=3: None) == {"width": 3}


def test_published_configurations_have_these_arguments_in_this_order():
    order = (
        "embed_dim depth num_heads mlp_ratio qkv_bias pooling target_length patch_size patch_stride init_bn eval_avg "
        "drop_rate attn_drop_rate drop_path_rate init_values time_patch_out freq_patch_out token_merging "
        "token_merging_in_training sample_rate n_mels f_min f_max n_fft win_size hop_size center"
    )
    assert list(ARGUMENTS) == order.split()
    assert WANTED["ced_base"] == ARGUMENTS


@pytest.mark.parametrize("settings", [MelSettings, TransformerSettings])
def test_every_setting_is_documented(settings):
    assert re.findall(r"^        (\w+): ", settings.__doc__, re.MULTILINE) == [each.name for each in fields(settings)]


@pytest.mark.parametrize("network", [AudioTransformer, AST, PaSST])
def test_names_of_shared_settings_do_not_overlap(network):
    names = [each.name for settings in network.shared_settings for each in fields(settings)]
    assert len(names) == len(set(names))
    assert len(find_arguments(network)) == len(find_arguments(partial(network))) > len(names)


def test_given_values_are_laid_over_the_defaults_and_other_names_refused():
    defaults = (TransformerSettings(depth=3), MelSettings(16000, 64, 512, 512, 160, 0.0, None))
    transformer, mel = take_settings(defaults, {"n_mels": 80, "embed_dim": 64})
    assert (transformer.depth, transformer.embed_dim, mel.n_mels, mel.hop_size) == (3, 64, 80, 160)
    assert defaults[0].embed_dim == 768
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_mel'"):
        take_settings(defaults, {"n_mel": 80})


def test_arguments_reach_the_network_and_a_wrong_name_is_told():
    model = AudioTransformer(num_classes=2, embed_dim=64, num_heads=1, depth=2, n_mels=32, f_max=None, center=False)
    assert (model.embed_dim, len(model.blocks), model.front_end.n_mels) == (64, 2, 32)
    with pytest.raises(TypeError, match="unexpected keyword argument 'embed_dims'"):
        AudioTransformer(embed_dims=64)
    scaled = create_model("ast_pico", num_classes=2, init_values=0.5, depth=2)
    assert scaled.blocks[1].ls1.gamma.tolist() == [0.5] * 64
    with pytest.raises(UserError, match=r"'init_value' \(did you mean 'init_values'"):
        create_model("passt_pico", num_classes=2, init_value=0.5)
