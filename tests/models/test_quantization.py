"""Quantized weights: what a grid is, how it is fitted, what gradients pass it, and which weights have one."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from common.errors import UserError
from models import create_model, load_model, load_weights, save_checkpoint
from models.parametrizations import bake_parametrizations
from models.quantization import QuantizationSchedule, quantize_model, quantized_weights
from models.quantization_recipe import Quantization
from models.quantizers import FakeQuantize, InputQuantizer
from models.weight_sources import read_weights
from tests.models.sounds import noise

SOUND = torch.stack([noise(16000, 1), noise(16000, 2)])
GRIDS = [
    *itertools.product(("symmetric", "minmax"), ("absmax", "mse", "learned")),
    ("levels", None),
]
SCOPES = ("tensor", "channel", "bucket")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fake(weight, **settings):
    return FakeQuantize(weight, Quantization(**{"bucket_size": 50} | settings))


def split(tensor, scope):
    """The groups of a weight that share a grid, one by one."""
    flat = tensor.flatten()
    size = {"tensor": len(flat), "channel": tensor[0].numel(), "bucket": 50}[scope]
    return [flat[start : start + size] for start in range(0, len(flat), size)]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("scheme", "clip"), GRIDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_group_has_at_most_2_to_the_k_values_and_each_weight_the_nearest_of_them(bits, scheme, clip, scope):
    weight = normal(6, 7, 9)
    quantizer = fake(weight, weights=bits, scheme=scheme, clip=clip, scope=scope).eval()
    quantized, codes = quantizer(weight), quantizer.encode(weight)
    assert codes.codes.dtype == torch.uint8
    assert int(codes.codes.max()) < 2**bits
    for row, (found, original) in enumerate(zip(split(quantized, scope), split(weight, scope), strict=True)):
        assert len(found.unique()) <= 2**bits
        if codes.levels is not None:
            grid = codes.levels[row]
        else:
            grid = codes.scale[row] * (torch.arange(2**bits) - int(codes.zero_point[row]))
        nearest = (original[:, None] - grid).abs().min(1).values
        torch.testing.assert_close((original - found).abs(), nearest, rtol=0, atol=1e-6)
    assert torch.equal(codes.decode(), quantized)
    assert torch.equal(quantizer(quantized), quantized)  # what is on the grid stays there
    assert torch.equal(quantizer.encode(quantized).decode(), quantized)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("scheme", "clip"), GRIDS)
def test_the_grid_of_codes_can_be_set_again(scheme, clip, scope):
    weight = normal(5, 30)
    quantizer = fake(weight, scheme=scheme, clip=clip, scope=scope).eval()
    other = fake(normal(5, 30, seed=1), scheme=scheme, clip=clip, scope=scope).eval()
    codes = quantizer.encode(weight)
    other.restore(codes)
    assert torch.equal(other(codes.decode()), quantizer(weight))
    assert torch.equal(other.encode(codes.decode()).codes, codes.codes)


@pytest.mark.parametrize("clip", ["absmax", "mse"])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scales_are_bfloat16_of_any_size(scale, clip):
    quantizer = fake(normal(8, 40) * scale, clip=clip).eval()
    codes = quantizer.encode(normal(8, 40) * scale)
    assert torch.equal(codes.scale.bfloat16().float(), codes.scale)
    assert F.mse_loss(codes.decode() / scale, normal(8, 40)) < 0.02


def test_absmax_clips_nothing():
    weight = normal(50, 40)
    for scheme in ("symmetric", "minmax"):
        quantizer = fake(weight, weights=8, clip="absmax", scheme=scheme)
        half = quantizer.grid_scale()[:, None] * (
            0.5 if scheme == "symmetric" else 1.0
        )  # the zero point is rounded too
        assert bool(((quantizer(weight) - weight).abs() <= half * 1.0001).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_least_squared_error_is_found_as_by_trying_a_thousand_scales(bits):
    """Absmax loses more than half of the energy of normal weights at 2 bits, the best range 0.15."""
    weight = normal(20, 400)
    errors = []
    for scale in torch.linspace(0.01, 4, 1000):
        multiples = (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        errors.append((multiples * scale - weight).square().sum(1))
    best = torch.stack(errors).min(0).values
    found = (fake(weight, weights=bits, clip="mse")(weight) - weight).square().sum(1)
    assert bool((found < 1.1 * best).all())
    assert found.sum() < 1.02 * best.sum()
    lost = {
        clip: (fake(weight, weights=bits, clip=clip)(weight) - weight).square().mean() for clip in ("absmax", "mse")
    }
    assert lost["mse"] < 0.8 * lost["absmax"]
    if bits == 2:
        assert lost["absmax"] > 0.5
        assert lost["mse"] < 0.17


def test_the_range_is_by_squared_error_below_five_bits():
    assert [Quantization(weights=bits).range for bits in (2, 4, 5, 8)] == ["mse", "mse", "absmax", "absmax"]


@pytest.mark.parametrize("scheme", ["symmetric", "minmax", "levels"])
@pytest.mark.parametrize("weight", [torch.zeros(4, 8), torch.full((4, 8), 0.7), torch.full((1, 1), -0.3)])
def test_constant_weights_and_single_ones_are_kept_to_the_precision_of_a_scale(weight, scheme):
    found = fake(weight, scheme=scheme).eval()(weight)
    torch.testing.assert_close(found, weight, rtol=0.13 if scheme == "symmetric" else 0.005, atol=0)


@pytest.mark.parametrize("clip", ["absmax", "mse"])
def test_gradients_pass_the_rounding_unchanged(clip):
    weight = normal(4, 9).requires_grad_()
    other = normal(4, 9, seed=1)
    (fake(weight, clip=clip, weights=2)(weight) * other).sum().backward()
    assert torch.equal(weight.grad, other)


@pytest.mark.parametrize(("scope", "bits"), [("tensor", 2), ("channel", 3), ("bucket", 4)])
def test_gradients_of_a_learned_scale_are_those_of_lsq(scope, bits):
    weight, other = normal(7, 21).requires_grad_(), normal(7, 21, seed=1)
    quantizer = fake(weight, clip="learned", weights=bits, scope=scope)
    with torch.no_grad():
        quantizer.log_scale -= 0.6  # so that some weights are clipped
    (quantizer(weight) * other).sum().backward()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    of_weight, of_scale = [], []
    for group, gradient, scale in zip(
        split(weight.detach(), scope), split(other, scope), quantizer.grid_scale().tolist(), strict=True
    ):
        total = 0.0
        for value, g in zip(group.tolist(), gradient.tolist(), strict=True):
            ratio = value / scale
            inside = low <= ratio <= high
            of_weight.append(g if inside else 0.0)
            total += g * (round(ratio) - ratio if inside else (low if ratio < low else high))
        size = {"tensor": 147, "channel": 21, "bucket": 50}[scope]
        of_scale.append(total * scale * 0.6931471805599453 / (size * max(high, 1)) ** 0.5)
    assert 0.0 in of_weight
    torch.testing.assert_close(weight.grad.flatten(), torch.tensor(of_weight))
    torch.testing.assert_close(quantizer.log_scale.grad, torch.tensor(of_scale), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_level_is_the_sum_over_its_weights():
    weight, other = normal(3, 40).requires_grad_(), normal(3, 40, seed=1)
    quantizer = fake(weight, scheme="levels", weights=2)
    quantized = quantizer(weight)
    (quantized * other).sum().backward()
    codes = quantizer.encode(weight.detach()).codes
    sums = torch.tensor([[float(other[row][codes[row] == level].sum()) for level in range(4)] for row in range(3)])
    assert torch.equal(weight.grad, other)
    torch.testing.assert_close(quantizer.levels.grad.view(3, 4), sums * quantizer.scale[:, None])


def test_levels_are_those_of_k_means():
    centres = torch.tensor([-3.0, -0.5, 1.0, 4.0])
    weight = (centres.repeat_interleave(25) + 0.01 * normal(100)).view(1, 100)
    found = fake(weight, scheme="levels", weights=2).encode(weight).levels
    torch.testing.assert_close(found, weight.view(4, 25).mean(1)[None], rtol=0.005, atol=0.005)


def test_levels_that_cross_while_trained_stay_a_grid():
    weight = normal(2, 30)
    quantizer = fake(weight, scheme="levels", weights=2).eval()
    with torch.no_grad():
        quantizer.levels.copy_(quantizer.levels.flip(0))
    found = quantizer(weight)
    distances = (weight[:, :, None] - quantizer.grid_levels()[:, None]).abs()
    torch.testing.assert_close((found - weight).abs(), distances.min(2).values)


@pytest.mark.parametrize("clip", ["absmax", "mse"])
def test_a_grid_follows_the_weights_while_they_are_trained(clip):
    weight = normal(5, 60)
    quantizer = fake(weight, clip=clip, weights=3)
    for step in range(201):
        weight = weight + (3 * normal(5, 60, seed=7) - weight) * 0.02
        quantizer.advance(weight, step, 201)
    lost = [(each(weight) - weight).square().sum() for each in (quantizer, fake(weight, clip=clip, weights=3))]
    assert lost[0] < 1.05 * lost[1]


def test_weights_are_float_until_the_start_and_quantized_in_evaluation_throughout():
    model = create_model(
        "audiotransformer_pico", num_classes=3, quantize={"weights": 2, "start": 0.5, "activations": 8}
    )
    layer = model.blocks[0].mlp.fc1
    original = layer.parametrizations.weight.original
    schedule = QuantizationSchedule(model)
    for step, is_float in ((0, True), (49, True), (50, False), (90, False)):
        schedule.advance(step, 100)
        assert torch.equal(layer.weight, original) == is_float
        assert layer.input_quantizer.active != is_float
        model.eval()
        assert len(layer.weight[0].unique()) <= 4
        model.train()


def test_rounded_inputs_have_255_values_and_depend_on_no_other_clip_nor_on_padding():
    x = normal(3, 5, 40).requires_grad_()
    for time_last in (False, True):
        rounded = InputQuantizer(0.0, time_last)(x)
        scale = x.abs().amax((1,) if time_last else (2,), keepdim=True) / 127
        torch.testing.assert_close(rounded, (x / scale).round() * scale)
        torch.testing.assert_close(InputQuantizer(0.0, time_last)(x[1:2]), rounded[1:2])
    padded = torch.cat([x, torch.full((3, 5, 6), 50.0)], dim=2)
    assert torch.equal(InputQuantizer(0.0, True)(padded)[..., :40], InputQuantizer(0.0, True)(x))
    rounded.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(InputQuantizer(0.0, False)(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("activations", [None, 8])
@pytest.mark.parametrize(("scheme", "clip"), GRIDS)
def test_a_checkpoint_has_plain_names_and_loads_as_quantized_values(scheme, clip, activations, tmp_path):
    torch.manual_seed(0)
    recipe = {"weights": 3, "scheme": scheme, "clip": clip, "activations": activations, "start": 0.5}
    model = create_model("audiotransformer_pico", num_classes=3, depth=1, pooling="logit", quantize=recipe).eval()
    save_checkpoint(tmp_path / "a.pt", model)
    state, config = read_weights(tmp_path / "a.pt")
    assert not [name for name in state if "parametrizations" in name]
    assert torch.equal(state["blocks.0.mlp.fc1.weight"], model.blocks[0].mlp.fc1.parametrizations.weight.original)
    assert config["model_args"]["quantize"]["weights"] == 3
    loaded = load_model(tmp_path / "a.pt")
    assert not any(parametrize.is_parametrized(module) for module in loaded.modules())
    assert torch.equal(loaded.predict(SOUND), model.predict(SOUND))
    assert torch.equal(copy.deepcopy(loaded).predict(SOUND), model.predict(SOUND))
    for (name, module, key, quantizer), (other, *_) in zip(
        quantized_weights(loaded), quantized_weights(model), strict=True
    ):
        assert name == other
        weight = getattr(module, key)
        assert torch.equal(quantizer.encode(weight).decode(), weight)
    save_checkpoint(tmp_path / "b.pt", loaded)  # of a network whose weights are on the grid already
    assert torch.equal(load_model(tmp_path / "b.pt").predict(SOUND), model.predict(SOUND))
    trained = create_model("audiotransformer_pico", num_classes=3, depth=1, pooling="logit", quantize=recipe).eval()
    load_weights(trained, tmp_path / "a.pt")  # training goes on from the latent weights
    for name, value in model.state_dict().items():
        assert torch.equal(trained.state_dict()[name], value), name


@pytest.mark.parametrize("recipe", [None, {"weights": 2}, {"weights": 4, "clip": "learned"}])
def test_training_takes_latent_weights_alone_where_the_grid_is_another(recipe, tmp_path):
    torch.manual_seed(0)
    model = create_model("audiotransformer_pico", num_classes=3, depth=1, quantize={"weights": 4})
    save_checkpoint(tmp_path / "a.pt", model)
    other = create_model("audiotransformer_pico", num_classes=3, depth=1, quantize=recipe)
    load_weights(other, tmp_path / "a.pt")
    weight = model.blocks[0].mlp.fc1.parametrizations.weight.original
    expected = weight if recipe is None else FakeQuantize(weight, Quantization(**recipe)).eval()(weight)
    assert torch.equal(other.eval().blocks[0].mlp.fc1.weight, expected)


def test_the_last_layer_may_have_another_number_of_classes(tmp_path):
    recipe = {"weights": 4}
    save_checkpoint(tmp_path / "a.pt", create_model("audiotransformer_pico", num_classes=3, depth=1, quantize=recipe))
    for n_classes in (0, 5):
        loaded = load_model(tmp_path / "a.pt", num_classes=n_classes)
        assert loaded.num_classes == n_classes
        assert loaded.embed(SOUND)[0].isfinite().all()
    other = create_model("audiotransformer_pico", num_classes=5, depth=1, quantize=recipe)
    load_weights(other, tmp_path / "a.pt")
    assert torch.equal(other.blocks[0].mlp.fc1.weight, load_model(tmp_path / "a.pt").blocks[0].mlp.fc1.weight)


def test_a_checkpoint_of_float_weights_is_quantized_when_loaded(tmp_path):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "a.pt", create_model("audiotransformer_pico", num_classes=3, depth=1))
    plain, loaded = load_model(tmp_path / "a.pt"), load_model(tmp_path / "a.pt", quantize={"weights": 2})
    weight = plain.blocks[0].mlp.fc1.weight.detach()
    expected = FakeQuantize(weight, Quantization(weights=2)).eval()(weight)
    assert torch.equal(loaded.blocks[0].mlp.fc1.weight, expected)
    assert torch.equal(loaded.blocks[0].norm1.weight, plain.blocks[0].norm1.weight)


class Layers(nn.Module):
    """One layer of each kind that is quantized, and some that are not."""

    def __init__(self):
        super().__init__()
        self.front_end = nn.Linear(8, 8)
        self.conv, self.depthwise = nn.Conv2d(1, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.lstm, self.gru = nn.LSTM(8, 8, 2, batch_first=True), nn.GRU(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.position = nn.BatchNorm1d(8), nn.Parameter(torch.ones(8, 8))
        self.linear = nn.Linear(8, 2)

    def forward(self, x):
        x = self.front_end(x)  # (B,T,8)
        x = self.depthwise(self.conv(x.transpose(1, 2)[:, None]).mean(1)).transpose(1, 2) + self.position[:1]
        x = self.gru(self.lstm(x)[0])[0]
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.linear(self.norm(x.transpose(1, 2)).mean(2))


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return Layers()


QUANTIZED = [
    "conv.weight", "depthwise.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.weight_ih_l1",
    "lstm.weight_hh_l1", "gru.weight_ih_l0", "gru.weight_hh_l0", "attention.in_proj_weight",
    "attention.out_proj.weight", "linear.weight",
]  # fmt: skip


def test_weights_of_all_kinds_of_layers_are_quantized_and_trained(layers):
    quantize_model(layers, Quantization(weights=4, activations=8))
    assert [name for name, *_ in quantized_weights(layers)] == QUANTIZED
    x = normal(3, 8, 8)
    optimizer = torch.optim.SGD(layers.parameters(), 0.1)
    before = {name: value.clone() for name, value in layers.state_dict().items() if name.endswith("original")}
    layers(x).square().sum().backward()
    optimizer.step()
    after = layers.state_dict()
    assert all(not torch.equal(value, after[name]) for name, value in before.items())
    copied = copy.deepcopy(layers).eval()  # also after a forward pass, whose weights a recurrent layer would keep
    expected = layers.eval()(x)
    assert torch.equal(copied(x), expected)
    bake_parametrizations(copied)
    assert torch.equal(copied(x), expected)
    assert torch.equal(copy.deepcopy(copied)(x), expected)
    plain = Layers().eval()
    plain.load_state_dict({name: value for name, value in copied.state_dict().items() if "quantizer" not in name})
    assert not torch.equal(plain(x), expected)  # whose inputs are not rounded
    torch.testing.assert_close(plain(x), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("skip", "left_out"),
    [
        (("depthwise",), {"depthwise.weight"}),
        (("lstm.*", "linear"), {name for name in QUANTIZED if name.startswith("lstm")} | {"linear.weight"}),
        (("attention*",), {"attention.in_proj_weight", "attention.out_proj.weight"}),
    ],
)
def test_patterns_leave_weights_out(layers, skip, left_out):
    quantize_model(layers, Quantization(skip=skip))
    assert [name for name, *_ in quantized_weights(layers)] == [name for name in QUANTIZED if name not in left_out]


def test_a_recurrent_model_is_copied_before_after_and_between_its_passes():
    model = create_model("lstm_small", num_classes=2, hidden_size=4, quantize={"weights": 4})
    copies = [copy.deepcopy(model), copy.deepcopy(model.to("cpu"))]
    output = model(SOUND).sum()
    copies.append(copy.deepcopy(model))
    output.backward()
    for each in (model, *copies):
        assert torch.equal(each.eval()(SOUND), copy.deepcopy(each)(SOUND))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"weights": 1}, "weights is 1; expected a number of bits, 2 to 8"),
        ({"weights": 4.0}, "weights is 4.0; expected a number of bits"),
        ({"weights": True}, "weights is True"),
        ({"activations": 4}, "activations is 4; expected null or 8"),
        ({"scope": "row"}, "scope is 'row'; expected tensor, channel, bucket"),
        ({"scheme": "uniform"}, "scheme is 'uniform'"),
        ({"clip": "max"}, "clip is 'max'"),
        ({"scheme": "levels", "clip": "mse"}, "the scheme levels trains its levels; leave clip out"),
        ({"start": 1.0}, "start is 1.0; expected a share of the run"),
        ({"start": float("nan")}, "start is nan"),
        ({"bucket_size": 1}, "bucket_size is 1"),
        ({"skip": "linear"}, "skip is 'linear'; expected a list"),
        ({"skip": ["liner*"]}, "'liner\\*' in skip fits no weight"),
        ({"skip": ["*"]}, "no weights are left"),
        ({"bits": 4}, "unknown setting 'bits'"),
        ({"weihgts": 4}, "did you mean 'weights'"),
        ({3: 4}, "unknown setting 3"),
        ("int4", "quantize is 'int4'; expected settings"),
    ],
)
def test_settings_that_fit_nothing_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("audiotransformer_pico", num_classes=2, quantize=settings)


def test_weights_that_are_not_finite_and_models_that_are_quantized_are_refused(layers, tmp_path):
    with torch.no_grad():
        layers.linear.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="a weight is NaN or infinite"):
        quantize_model(layers, Quantization())
    model = create_model("audiotransformer_pico", num_classes=2, depth=1, quantize={"weights": 4})
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(UserError, match="quantized already"):
            quantize_model(each, Quantization())
        bake_parametrizations(each)
        with pytest.raises(UserError, match="quantized already"):
            quantize_model(each, Quantization())


@pytest.mark.parametrize("name", ["mn01_as", "resnet10_small", "efficientnet_b0"])
def test_batch_norms_are_folded_without_a_change_of_the_output(name):
    torch.manual_seed(0)
    options = {"width": 0.1} if name == "mn01_as" else {}
    plain = create_model(name, num_classes=4, **options)
    sound = SOUND.repeat(1, 2)[:, : plain.sample_rate]
    with torch.no_grad():
        for _ in range(3):
            plain(sound + 0.1 * torch.randn_like(sound))  # statistics that are not those of initialisation
    plain.eval()
    folded = copy.deepcopy(plain)
    fold = Quantization(weights=8, fold_batch_norm=True, skip=("*[a-z]",))
    with pytest.raises(UserError, match="no weights are left"):
        quantize_model(folded, fold)
    norms = [
        sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        for model in (plain, folded)
    ]
    assert norms[0] > 10
    assert norms[1] <= 1  # of the input
    torch.testing.assert_close(folded.predict(sound), plain.predict(sound), rtol=1e-4, atol=1e-5)


def test_a_folded_network_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    plain = create_model("resnet10_small", num_classes=3)
    save_checkpoint(tmp_path / "a.pt", plain)
    folded = load_model(tmp_path / "a.pt", quantize={"weights": 8, "fold_batch_norm": True})
    save_checkpoint(tmp_path / "b.pt", folded)
    assert torch.equal(load_model(tmp_path / "b.pt").predict(SOUND), folded.predict(SOUND))
    torch.testing.assert_close(folded.predict(SOUND), plain.eval().predict(SOUND), atol=0.05, rtol=0)
