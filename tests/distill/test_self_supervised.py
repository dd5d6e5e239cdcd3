"""MAE, MATPAC, MATPAC++ and EAT against slow references; what the student sees, and what it must not see."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from distill.objectives import TrainingFacts, list_objectives, plan_objective
from distill.objectives.collapse import RunningMean, describe_collapse
from distill.objectives.masking import cut_patches, draw_mask, mask_clips
from distill.random_streams import derive_seed
from models import create_model
from tests.batches import make_batch

NAMES = ("mae", "matpac", "matpac++", "eat")


def make_student(**arguments):
    torch.manual_seed(0)
    student = create_model("audiotransformer_pico", num_classes=0, depth=2, **arguments)
    norm = student.init_bn[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.num_batches_tracked += 1
    return student


def build(name, student, **settings):
    torch.manual_seed(1)
    objective = plan_objective(name, **settings).build(student, TrainingFacts(seed=5))
    objective.start(student)
    objective.train()
    student.train()
    return objective


def clips(n_frames=(96, 48, 70)):
    """Spectrograms of several lengths, padded with noise that must not count."""
    torch.manual_seed(2)
    n = torch.tensor(n_frames)
    batch = make_batch(item=torch.arange(len(n)) + 3, mel=torch.randn(len(n), 64, int(n.max())), n_frames=n)
    return batch if len(set(n_frames)) > 1 else replace(batch, n_frames=None)


def take(batch, row):
    """One clip as a batch, without padding."""
    frames = int(batch.n_frames[row])
    return make_batch(item=batch.item[row : row + 1], mel=batch.mel[row : row + 1, :, :frames])


def mask_of(objective, batch):
    columns = batch.mel.shape[2] // 16
    return draw_mask(5, batch, objective.settings.mask_ratio, (4, columns), None)


def test_the_loss_of_mae_is_the_error_of_each_hidden_patch_that_is_normalised():
    student = make_student()
    objective = build("mae", student)
    batch = clips()
    found = objective(student, batch)["loss"]
    losses = []
    for row in range(3):
        one = take(batch, row)
        mask = mask_of(objective, one)
        encoded = student.encode(one.mel, keep=lambda f, t, v, mask=mask: mask.visible)
        output = objective.output(objective.decoder(encoded, mask))[0].detach().numpy()
        errors = []
        for place, token in enumerate(mask.masked[0].tolist()):
            f, t = divmod(token, one.mel.shape[2] // 16)
            patch = one.mel[0, 16 * f : 16 * f + 16, 16 * t : 16 * t + 16].numpy().astype(np.float64).ravel()
            patch = (patch - patch.mean()) / math.sqrt(patch.var(ddof=1) + 1e-6)
            errors.append(np.mean((output[place] - patch) ** 2))
        losses.append(np.mean(errors))
    assert float(found.detach()) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("name", ["matpac", "matpac++"])
@pytest.mark.parametrize("progress", [0.0, 0.4, 0.9])
def test_the_losses_of_matpac_are_those_of_a_slow_reference(name, progress):
    student = make_student()
    objective = build(name, student, classes=16)
    with torch.no_grad():
        for parameter in objective.teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    objective.progress.fill_(progress)
    objective.centre.mean.normal_(std=0.1)
    batch = clips()
    found = objective(student, batch)
    temperature = 0.04 + 0.03 * min(1, progress * 294816 / 9827)
    spread = 0.1 * 0.99997 ** (progress * 294816)
    predictions, classes = [], []
    for row in range(3):
        one = take(batch, row)
        mask = mask_of(objective, one)
        encoded = student.encode(one.mel, keep=lambda f, t, v, mask=mask: mask.visible)
        outputs = objective.output(objective.predictor(encoded, mask))[0]
        targets = objective.teacher.encode(one.mel, keep=lambda f, t, v, mask=mask: mask.masked).tokens[0]
        for token in range(len(targets)):
            target = targets[token]
            choices = outputs[token].split(64)
            cosines = [(choice @ target / (choice.norm() * target.norm())).item() for choice in choices]
            errors = [2 - 2 * cosine for cosine in cosines]
            best = int(np.argmin(errors))
            if spread < 1e-4:
                weights = np.eye(len(errors))[best]
            else:
                weights = np.exp([-(error - min(errors)) / spread for error in errors])
                weights /= weights.sum()
            predictions.append((row, float(np.dot(weights, errors))))
            taught = ((objective.teacher_head(target) - objective.centre.mean[0]) / temperature).softmax(0)
            output = (objective.head(choices[best]) / 0.1).log_softmax(0)
            classes.append((row, -(taught @ output).item()))
    prediction, classification = (
        np.mean([np.mean([value for row, value in part if row == wanted]) for wanted in range(3)])
        for part in (predictions, classes)
    )
    assert float(found["loss_prediction"]) == pytest.approx(prediction, rel=1e-4)
    assert float(found["loss_classes"]) == pytest.approx(classification, rel=1e-4)
    assert float(found["loss"]) == pytest.approx((prediction + classification) / 2, rel=1e-4)


def test_the_losses_of_eat_are_those_of_a_slow_reference():
    student = make_student()
    objective = build("eat", student, masks=3, clip_weight=0.5)
    with torch.no_grad():
        for parameter in objective.teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = clips()
    found = objective(student, batch)
    errors, clip_errors = [], []
    for row in range(3):
        one = take(batch, row)
        teacher = objective.teacher
        x = teacher._add_positions(teacher.patch_embed(teacher._normalise(one.mel, None))).flatten(1, 2)
        outputs = []
        for block in teacher.blocks:
            x = block(x)
            outputs.append(x)
        target = F.layer_norm(sum(F.layer_norm(output[0], (64,)) for output in outputs) / len(outputs), (64,))
        for number in range(3):
            seed = 5 if number == 0 else derive_seed(5, number)
            mask = draw_mask(seed, one, 0.8, (4, one.mel.shape[2] // 16), None)
            encoded = student.encode(one.mel, keep=lambda f, t, v, mask=mask: mask.visible)
            predicted = objective.output(objective.predictor(encoded, mask))[0]
            errors.append((predicted - target[mask.masked[0]]).square().mean().item())
            clip = objective.clip_output(encoded.tokens[0].mean(0)) - target.mean(0)
            clip_errors.append(clip.square().mean().item())
    assert found["loss_tokens"].item() == pytest.approx(np.mean(errors), rel=1e-4)
    assert found["loss_clip"].item() == pytest.approx(np.mean(clip_errors), rel=1e-4)
    assert found["loss"].item() == pytest.approx(np.mean(errors) + 0.5 * np.mean(clip_errors), rel=1e-4)


def test_at_the_end_only_the_best_output_of_a_token_is_trained_and_at_first_all_are():
    student = make_student()
    objective = build("matpac++", student, alpha=0.0)
    batch = clips((32, 32))
    for progress, trained in ((0.0, 5), (0.9, None)):
        objective.progress.fill_(progress)
        objective.zero_grad()
        objective(student, batch)["loss"].backward()
        norms = objective.output.weight.grad.view(5, 64, -1).norm(dim=(1, 2))
        n_trained = int((norms > 0).sum())
        assert n_trained == trained if trained else n_trained >= 1
    with torch.no_grad():
        objective.output.bias.zero_()
        objective.output.weight.view(5, 64, -1)[1:] = -objective.output.weight.view(5, 64, -1)[:1] * 0 + 1e-3
        target = objective.teacher.encode(batch.mel, keep=lambda f, t, v: torch.arange(8).expand(2, -1)).tokens
        objective.output.bias[:64] = target.mean((0, 1))
    objective.zero_grad()
    objective(student, batch)["loss"].backward()
    assert (objective.output.weight.grad.view(5, 64, -1).norm(dim=(1, 2)) > 0).tolist() == [True] + 4 * [False]


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_goes_to_the_teacher_or_the_classes_and_every_other_weight_has_one(name):
    student = make_student()
    objective = build(name, student)
    objective(student, clips())["loss"].backward()
    for part, parameter in objective.named_parameters():
        is_teacher = part.startswith("teacher")
        assert (parameter.grad is None) == is_teacher, part
        assert parameter.requires_grad != is_teacher
    unused = {part for part, parameter in student.named_parameters() if parameter.grad is None}
    assert unused == {part for part, _ in student.named_parameters() if part.startswith("outputlayer")}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_the_student_computes_depends_on_masked_patches_but_the_target_does(name):
    """Batch norms in particular keep their statistics."""
    student = make_student()
    objective = build(name, student, **({"masks": 1} if name == "eat" else {}))
    batch = clips((64, 64))
    mask = mask_of(objective, batch)
    predictor = objective.decoder if name == "mae" else objective.predictor
    seen = []
    predictor.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].tokens, output)))
    losses = [objective(student, batch)["loss"]]
    patches = cut_patches(student, batch.mel, (4, 4)).unflatten(2, (16, 16))
    is_masked = torch.zeros(2, 16, dtype=torch.bool).scatter(1, mask.masked, True)
    patches[is_masked] += torch.randn(int(is_masked.sum()), 16, 16) * 3
    changed = patches.unflatten(1, (4, 4)).transpose(2, 3).reshape(2, 64, 64)
    losses.append(objective(student, replace(batch, mel=changed))["loss"])
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
    assert float(losses[0]) != float(losses[1])
    for frozen in (n for n in [*student.modules(), *objective.modules()] if isinstance(n, torch.nn.BatchNorm2d)):
        assert not frozen.training


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_the_other_clips_of_a_batch_do_not_change_a_clips_loss(name):
    student = make_student()
    objective = build(name, student)
    batch = clips()
    together = objective(student, batch)["loss"]
    alone = [objective(student, take(batch, row))["loss"] for row in range(3)]
    assert float(together) == pytest.approx(float(sum(alone)) / 3, rel=1e-5)


@pytest.mark.parametrize("name", ["matpac", "matpac++"])
def test_the_teacher_is_the_moving_average_of_the_student_with_the_published_schedule(name):
    student = make_student()
    objective = build(name, student)
    n_steps = 294816
    start, teacher = student.patch_embed.proj.weight.detach().clone(), objective.teacher.patch_embed.proj.weight
    head = objective.head.layers[0].weight.detach().clone()
    assert torch.equal(teacher, start)
    with torch.no_grad():
        student.patch_embed.proj.weight.add_(1)
        objective.head.layers[0].weight.add_(1)
    objective.after_step(student, n_steps // 2, n_steps)
    torch.testing.assert_close(teacher, start + (1 - 0.99997), rtol=0, atol=1e-7)
    torch.testing.assert_close(objective.teacher_head.layers[0].weight, head + (1 - 0.999), rtol=0, atol=1e-7)
    assert float(objective.progress) == 0.5
    with torch.no_grad():
        student.init_bn[1].running_mean.fill_(7)
    objective.after_step(student, n_steps, n_steps)
    torch.testing.assert_close(teacher, start + 1 - 0.99997 * 0.99999, rtol=0, atol=1e-7)
    assert (objective.teacher.init_bn[1].running_mean == 7).all()


def test_a_short_run_has_the_published_horizon_and_given_decays_are_used():
    student = make_student()
    objective = build("matpac", student)
    assert objective._compute_decay(0.0, 2948) == pytest.approx(1 - 0.00005 * 294816 / 2948)
    assert objective._compute_decay(1.0, 2948) == pytest.approx(1 - 0.00001 * 294816 / 2948)
    given = build("matpac", student, decay=[0.9, 0.98])
    assert [given._compute_decay(share, 10) for share in (0, 0.5, 1)] == pytest.approx([0.9, 0.94, 0.98])
    assert build("matpac", student, decay="0.5")._compute_decay(0.7, 10) == 0.5


def test_the_centre_is_the_mean_output_of_the_teachers_head_over_the_tokens_of_the_clips():
    student = make_student()
    objective = build("matpac", student, classes=8)
    seen = []
    objective.teacher_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    batch = clips()
    for step in (1, 2):
        objective(student, batch)
        objective.after_step(student, step, 10)
    expected = torch.zeros(8)
    for output in seen:
        tokens = [output[row, : round(0.7 * 4 * (n // 16))] for row, n in enumerate((96, 48, 70))]
        # padding is among the masked places of shorter clips: the mean over their own tokens alone
        columns = torch.tensor([6, 3, 4])
        mask = draw_mask(5, batch, 0.7, (4, 6), columns)
        tokens = [output[row][mask.is_target[row]] for row in range(3)]
        expected = 0.9 * expected + 0.1 * torch.cat(tokens).mean(0)
    torch.testing.assert_close(objective.centre.mean[0], expected, rtol=1e-5, atol=1e-6)


def test_the_encoder_computes_visible_tokens_only():
    student = make_student()
    mel = torch.randn(1, 64, 512)

    def count(ratio):
        mask = draw_mask(0, make_batch(item=torch.arange(1)), ratio, (4, 32), None) if ratio else None
        with FlopCounterMode(display=False) as counter:
            student.encode(mel, keep=None if mask is None else lambda f, t, v: mask.visible)
        by_module = counter.get_flop_counts()["Global"]
        return sum(flops for operator, flops in by_module.items() if "attention" not in str(operator))

    patches = 2 * 128 * 256 * 64
    whole = count(0) - patches
    for ratio in (0.5, 0.75, 0.875):
        assert count(ratio) - patches == pytest.approx((1 - ratio) * whole, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_frames", [(16,), (16, 40), (2000,), (2000, 16)])
def test_clips_of_any_length_silence_and_single_clips_have_a_finite_loss(name, n_frames):
    student = make_student()
    objective = build(name, student)
    batch = clips(n_frames)
    for mel in (batch.mel, torch.full_like(batch.mel, -100.0)):
        losses = objective(student, replace(batch, mel=mel))
        losses["loss"].backward()
        assert all(bool(value.isfinite()) for value in losses.values())
        assert all(bool(p.grad.isfinite().all()) for p in student.parameters() if p.grad is not None)


def test_running_means_are_exact_for_each_group_and_ignore_what_is_not_finite():
    running = RunningMean(2, 0.5, 2)
    running.add(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    running.add(torch.tensor([[9.0, 9.0], [8.0, 1.0]]), torch.tensor([False, True]), torch.tensor([0, 1]))
    running.update()
    assert running.mean.tolist() == [[1.0, 2.0], [4.0, 0.5]]  # half of the means
    assert running.value().tolist() == [[2.0, 4.0], [8.0, 1.0]]
    running.add(torch.tensor([[torch.inf, 1.0]]))
    running.add(torch.tensor([[4.0, 1.0]]), None, torch.tensor([1]))
    running.update()
    running.update()
    assert running.value().tolist() == [[2.0, 4.0], [pytest.approx((4 / 2 + 4 / 2) / 0.75), (0.5 / 2 + 1 / 2) / 0.75]]


def test_the_variance_is_that_among_clips_at_each_position():
    student = make_student()
    objective = build("mae", student)
    batch = clips()
    seen = {}
    for step in (1, 2):
        found = objective(student, batch)["token_variance"]
        objective.after_step(student, step, 10)
        for row in range(3) if step == 1 else ():
            one = take(batch, row)
            mask = mask_of(objective, one)
            tokens = student.encode(one.mel, keep=lambda f, t, v, mask=mask: mask.visible).tokens[0]
            for place, token in zip(mask.visible[0].tolist(), tokens, strict=True):
                seen.setdefault(divmod(place, one.mel.shape[2] // 16), []).append(token / token.norm())
    common = [float(torch.stack(tokens).mean(0).square().sum()) for tokens in seen.values()]
    assert float(found) == pytest.approx(1 - np.mean(common), abs=1e-5)


def test_collapses_are_described_and_healthy_runs_are_not():
    healthy = {"token_variance": 0.3, "class_entropy": 0.8, "class_uncertainty": 0.4}
    assert describe_collapse(healthy) is None
    assert describe_collapse({"loss": 1.0}) is None
    assert "tokens of all clips are nearly the same" in describe_collapse(healthy | {"token_variance": 1e-5})
    assert "in one class" in describe_collapse(healthy | {"class_entropy": 0.01})
    assert "the same probability for every class" in describe_collapse(healthy | {"class_uncertainty": 0.9999})


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_known_of_a_collapse_at_the_first_step(name):
    student = make_student()
    losses = build(name, student)(student, clips())
    assert float(losses["token_variance"]) == 1
    assert float(losses.get("class_entropy", 1)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_of_a_collapsed_student_have_no_variance(name):
    student = make_student()
    objective = build(name, student)
    with torch.no_grad():
        for network in (student, getattr(objective, "teacher", student)):
            network.norm.weight.zero_()
            network.norm.bias.fill_(0.5)
    for step in range(1, 4):
        losses = objective(student, clips())
        objective.after_step(student, step, 10)
    assert float(losses["token_variance"]) < 1e-5
    assert "tokens of all clips are nearly the same" in objective.describe_collapse(
        {key: float(value) for key, value in losses.items()}
    )


def test_a_student_without_statistics_is_refused():
    student = create_model("audiotransformer_pico", num_classes=0)
    with pytest.raises(UserError, match=r"init_bn\.1 has no statistics.*set init_from_data: true"):
        plan_objective("mae").build(student).start(student)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mae", {"mask_ratio": 1}, "mask_ratio is 1; expected a share between 0 and 1, both excluded"),
        ("mae", {"mask_ratio": "much"}, "mask_ratio is 'much', not a number"),
        ("mae", {"decoder_width": 50}, "decoder_width is 50; expected a multiple of 32"),
        ("mae", {"decoder_depth": 0}, "decoder_depth is 0; expected a whole number above 0"),
        ("mae", {"decoder_width": 3_200_000}, "this machine has .* GB: choose smaller ones"),
        ("matpac", {"predictor_width": 3_200_000}, "this machine has .* GB: choose smaller ones"),
        ("matpac", {"classes": 10**9}, r"head_width 256 and classes 1000000000 need .* GB: choose smaller ones"),
        ("matpac", {"alpha": 2}, "alpha is 2; expected the share of the classification, 0 to 1"),
        ("matpac", {"classes": 1}, "classes is 1; expected at least 2"),
        ("matpac", {"decay": [0.9, 0.95, 0.99]}, "expected one number, or two: at the start and at the end"),
        ("matpac", {"outputs": 3}, "no argument 'outputs'"),
        ("eat", {"masks": 0}, "masks is 0; expected a whole number above 0"),
        ("eat", {"masks": None}, "masks is None, not a number"),
        ("matpac++", {"outputs": None}, "outputs is None, not a number"),
        ("eat", {"clip_weight": -1}, "clip_weight is -1; expected a number, 0 or more"),
        ("matpac++", {"outputs": 0}, "outputs is 0; expected a whole number above 0"),
    ],
)
def test_wrong_settings_are_one_sentence(name, settings, message):
    with pytest.raises(UserError, match=message):
        plan_objective(name, **settings).build(make_student())


def test_they_need_no_labels_and_no_teacher():
    assert set(NAMES) <= set(list_objectives("none"))


@pytest.mark.parametrize(
    ("model", "arguments", "n_mels"),
    [
        ("ast_pico", {"patch_stride": 16}, 128),
        ("passt_pico", {"patch_stride": 16}, 128),
        ("matpac_pico", {}, 80),
        ("dasheng_pico", {}, 64),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_other_transformers_with_patches_that_do_not_overlap_learn_as_well(model, arguments, n_mels, name):
    torch.manual_seed(0)
    student = create_model(model, num_classes=0, depth=1, **arguments)
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.num_batches_tracked += 1
    objective = build(name, student)
    mel = torch.randn(2, n_mels, 208)
    losses = objective(student, make_batch(item=torch.arange(2), mel=mel, n_frames=torch.tensor([208, 96])))
    losses["loss"].backward()
    assert all(p.grad is not None for p in student.blocks.parameters())
    if model not in ("ast_pico", "passt_pico"):  # as published, no masks of padding; random positions
        alone = [
            objective(student, make_batch(item=torch.tensor([row]), mel=mel[row : row + 1, :, :n]))["loss"]
            for row, n in enumerate((208, 96))
        ]
        assert float(losses["loss"]) == pytest.approx(float(sum(alone)) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("model", "arguments", "n_mels"), [("matpac_pico", {}, 80), ("ast_pico", {"patch_stride": 16}, 128)]
)
def test_a_clip_that_ends_within_a_patch_has_the_same_mask_alone_and_in_a_batch(model, arguments, n_mels):
    """MATPAC fills up the last patch, AST the whole window: what they fill up is neither visible nor predicted."""
    student = create_model(model, num_classes=0, depth=1, **arguments)
    mel = torch.randn(2, n_mels, 150)
    n_frames = torch.tensor([70, 150])
    together, mask = mask_clips(5, student, make_batch(item=torch.arange(2), mel=mel, n_frames=n_frames), 0.5)

    def find_places(mask, row, n_columns):
        visible = mask.visible[row] if mask.is_visible is None else mask.visible[row][mask.is_visible[row]]
        masked = mask.masked[row][mask.is_target[row]]
        return [[divmod(place, n_columns) for place in places.tolist()] for places in (visible, masked)]

    for row, n in enumerate((70, 150)):
        one, alone = mask_clips(5, student, make_batch(item=torch.tensor([row]), mel=mel[row : row + 1, :, :n]), 0.5)
        found = find_places(alone, 0, student.grid(one.mel.shape[2])[1])
        assert found == find_places(mask, row, student.grid(together.mel.shape[2])[1])
        assert sum(map(len, found)) == n_mels // 16 * (n // 16)
