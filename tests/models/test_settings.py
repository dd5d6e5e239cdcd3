"""Arguments that networks share: documented once, taken flat, found with their defaults."""

import re
from dataclasses import fields
from functools import partial

import numpy as np
import pytest

from common.errors import UserError
from models import create_model, resnet
from models.audio_spectrogram_transformer import AST
from models.audiotransformer import ARGUMENTS, AudioTransformer
from models.dymn import DyMN
from models.efficientnet import EfficientNet
from models.matpac import MATPAC
from models.mobilenetv3 import MobileNetV3
from models.passt import PaSST
from models.registry import get_model_entry
from models.resnet import ResNet10
from models.settings import MelSettings, TransformerSettings, find_arguments, take_settings
from models.ssondo_students import DyMNStudent, ERes2NetStudent, MobileNetV3Student, StudentSettings

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
WIDE_MEL = {"sample_rate": 32000, "n_mels": 128, "n_fft": 1024}
EFFICIENTAT = {**WIDE_MEL, "win_size": 800, "hop_size": 320, "f_min": 0.0, "f_max": 15000.0}
EFFICIENTAT |= {"dropout": 0.2, "fmin_aug_range": 1, "fmax_aug_range": 1}
STUDENT = {**WIDE_MEL, "win_size": 1024, "hop_size": 512, "f_min": 50.0, "f_max": 16000.0}
STUDENT |= {"dropout": 0.2, "segment_seconds": 10.0}
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
    "dasheng_base": {
        **{**TRANSFORMER, "target_length": 1008, "patch_size": (64, 4), "patch_stride": (64, 4)},
        **{"pooling": "logit", "init_bn": True, "center": True},
        **{"sample_rate": 16000, "n_mels": 64, "n_fft": 512, "win_size": 512, "hop_size": 160},
        **{"f_min": 0.0, "f_max": 8000.0},
    },
    "matpac": {
        **{**TRANSFORMER, **NORM, "target_length": 608, "pooling": "rows", "center": False},
        **{"mean": -7.056, "std": 4.193, "sample_rate": 16000, "n_mels": 80, "n_fft": 400, "win_size": 400},
        **{"hop_size": 160, "f_min": 50.0, "f_max": 8000.0},
    },
    "mn10_as": {**EFFICIENTAT, "width": 1.0},
    "mn10_as_hop_15": {**EFFICIENTAT, "width": 1.0, "hop_size": 480},
    "dymn04_as": {**EFFICIENTAT, "width": 0.4},
    "efficientnet_b2": {
        **{"pooling": "mean", "dropout": 0.0, "drop_path_rate": 0.2, "mean": -4.6476, "std": 4.5699},
        **{"sample_rate": 16000, "n_mels": 128, "n_fft": 512, "win_size": 400, "hop_size": 160},
        **{"f_min": 20.0, "f_max": None},
    },
    "resnet10_small": {
        **{"width": 8, "dropout": 0.2, "sample_rate": 16000, "n_mels": 64, "n_fft": 512, "win_size": 400},
        **{"hop_size": 160, "f_min": 0.0, "f_max": None},
    },
    "mobilenetv3": {**STUDENT, "width": 1.0},
    "m2d-dymn": {**STUDENT, "width": 1.0, "temperature": 30.0},
    "eres2net": {**STUDENT, "m_channels": 16, "num_blocks": (3, 4, 6, 3, 3)},
    "eres2net_base": {**STUDENT, "m_channels": 32, "num_blocks": (3, 4, 6, 3), "n_mels": 80},
}
WANTED_WINDOWS = {"mn01_as": 800, "dymn04_as": 800, "efficientnet_b0": 400, "resnet10_small": 400}
WANTED_WINDOWS |= {"mobilenetv3": 1024, "eres2net": 1024}


@pytest.mark.parametrize("name", WANTED)
def test_a_network_takes_these_arguments_with_these_defaults(name):
    assert get_model_entry(name).defaults == WANTED[name] | {"band_limit": None, "parametrize": None, "quantize": None}
    assert set(get_model_entry(name).arguments) == set(get_model_entry(name).defaults)


def test_arguments_of_a_partial_are_its_defaults():
    assert get_model_entry("audiotransformer_pico").defaults["embed_dim"] == 64
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
    order = "width dropout sample_rate n_mels f_min f_max n_fft win_size hop_size"
    assert list(resnet.ARGUMENTS) == order.split()
    assert WANTED["resnet10_small"] | {"width": 16} == resnet.ARGUMENTS


@pytest.mark.parametrize("settings", [MelSettings, TransformerSettings, StudentSettings])
def test_every_setting_is_documented(settings):
    assert re.findall(r"^        (\w+): ", settings.__doc__, re.MULTILINE) == [each.name for each in fields(settings)]


@pytest.mark.parametrize(
    "network",
    [
        *(AudioTransformer, AST, MATPAC, PaSST, MobileNetV3, DyMN, EfficientNet, ResNet10),
        *(MobileNetV3Student, DyMNStudent, ERes2NetStudent),
    ],
)
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


def test_arguments_reach_the_network_and_a_wrong_name_is_reported():
    model = AudioTransformer(num_classes=2, embed_dim=64, num_heads=1, depth=2, n_mels=32, f_max=None, center=False)
    assert (model.embed_dim, len(model.blocks), model.front_end.n_mels) == (64, 2, 32)
    with pytest.raises(TypeError, match="unexpected keyword argument 'embed_dims'"):
        AudioTransformer(embed_dims=64)
    scaled = create_model("ast_pico", num_classes=2, init_values=0.5, depth=2)
    assert scaled.blocks[1].ls1.gamma.tolist() == [0.5] * 64
    with pytest.raises(UserError, match=r"'init_value' \(did you mean 'init_values'"):
        create_model("passt_pico", num_classes=2, init_value=0.5)


def test_front_end_settings_reach_every_network_of_convolutions():
    for name in ("mn01_as", "dymn04_as", "efficientnet_b0", "resnet10_small", "mobilenetv3", "eres2net"):
        front_end = create_model(name, num_classes=2, n_mels=40, hop_size=200, f_min=30.0, f_max=7000.0).front_end
        assert (front_end.n_mels, front_end.hop_size, front_end.f_min, front_end.f_max) == (40, 200, 30.0, 7000.0)
        assert front_end.win_size == WANTED_WINDOWS[name]
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_mel'"):
        MobileNetV3Student(n_mel=40)
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_mel'"):
        MobileNetV3(n_mel=40)


def test_numbers_of_numpy_are_numbers():
    model = create_model("audiotransformer_pico", depth=np.int64(1), drop_rate=np.float32(0.0))
    assert len(model.blocks) == 1
