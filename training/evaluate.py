"""Judging a model on a labelled pack."""

import re
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from audio.dataset import ClipDataset, Pack, loader_workers, pad_batch
from common.errors import Faults, UserError, did_you_mean
from common.files import whole_file, write_json
from models import AudioTagger, load_model
from models.devices import choose_device
from models.token_merging import Schedule
from training.config import Mode
from training.data import LabelledPack, open_labelled, open_pack
from training.metrics import Metrics, evaluate_scores
from training.parallel import Ranks
from training.precision import Precision

OPTIONS = ["test_data", "weights", "mode", "batch_size", "num_workers", "token_merging", "device", "output"]


def _collate(items: list[dict[str, Any]], sample_rate: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    waveform, lengths = pad_batch([item["waveforms"][sample_rate] for item in items])
    return torch.tensor([item["index"] for item in items]), waveform, lengths


@torch.inference_mode()
def predict_pack(
    model: AudioTagger,
    pack: Pack,
    *,
    batch_size: int,
    num_workers: int,
    precision: Precision,
    description: str = "evaluate",
    ranks: Ranks | None = None,
) -> np.ndarray:
    """Return the probabilities (N, C) of every clip of `pack`, whole clips, in its order.

    Each of several ranks computes its part of the batches, none of them twice, and all get all of the scores.
    """
    ranks = ranks or Ranks()
    # Clips of like length share a batch, so that little is padded.
    order = np.argsort(pack.n_samples, kind="stable")
    batches = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    batches = batches[ranks.rank :: ranks.world_size]
    loader = DataLoader(
        ClipDataset(pack, [model.sample_rate]),
        batch_sampler=batches,
        num_workers=loader_workers(num_workers),
        collate_fn=partial(_collate, sample_rate=model.sample_rate),
    )
    model.eval()
    scores = np.zeros((len(pack), model.num_classes), np.float32)
    with tqdm(
        total=sum(map(len, batches)),
        desc=description,
        unit="clip",
        leave=False,
        disable=not ranks.is_main,
        mininterval=0.1 if sys.stderr.isatty() else 30,
    ) as progress:
        for index, waveform, lengths in loader:
            with precision.context():
                probabilities = model.predict(waveform.to(precision.device), lengths.to(precision.device))
            scores[index.numpy()] = probabilities.float().cpu().numpy()
            progress.update(len(index))
    if ranks.world_size > 1:  # every clip has one rank's scores and the others' zeros
        scores = ranks.sum(torch.from_numpy(scores).to(precision.device)).cpu().numpy()
    return scores


def evaluate(
    model: AudioTagger,
    data: LabelledPack,
    *,
    batch_size: int,
    num_workers: int,
    precision: Precision,
    ranks: Ranks | None = None,
) -> Metrics:
    """Return the metrics of `model` on every clip of `data`, shared out among `ranks`; the same on all of them."""
    scores = predict_pack(
        model, data.pack, batch_size=batch_size, num_workers=num_workers, precision=precision, ranks=ranks
    )
    return evaluate_scores(scores, data.multi_hot(), model.labels)


def open_evaluation(
    source: str, weights: str | None, test_data: str, device: torch.device, token_merging: Schedule = None
) -> tuple[AudioTagger, LabelledPack]:
    """Load a model and open the labelled pack to judge it on.

    Args:
        source: a run's folder, a checkpoint, or the name of a model.
        weights: for a model given by name.
        test_data: TSV of the pack.
        device: for the model.
        token_merging: see `models.token_merging.merging_schedule`; by default what the model says itself.

    Raises:
        UserError: all that is wrong with either.
    """
    faults = Faults("the evaluation")
    model = data = None
    try:
        model = load_model(source, weights=weights, device=device)
        if not model.num_classes:
            raise UserError(
                f"{source}: {model.name} embeds sounds and has no classes to be judged by; `python run.py probe "
                f"{source} --data PACK.tsv --name NAME` trains a head on its embeddings and judges that"
            )
        if token_merging is not None:
            model.merge_tokens(token_merging)
        data = open_labelled(test_data, model.labels, faults)
    except UserError as error:
        faults.add(str(error))
        open_pack(test_data, faults, labelled=True)
    faults.raise_if_any()
    assert model is not None
    assert data is not None
    return model, data


def write_results(folder: Path, name: str, metrics: Metrics, data: LabelledPack) -> Path:
    """Write NAME.json (figures, clips used and missing) and NAME_per_class.csv into `folder`; return the former."""
    prevalence = data.multi_hot().mean(axis=0)
    counts = {
        "data": str(data.pack.manifest),
        "clips": len(data.pack),
        "clips_missing": data.pack.n_missing,
        "chance_mAP": float(prevalence[prevalence > 0].mean()),  # what random scores reach
    }
    target = folder / f"{name}.json"
    with whole_file(folder / f"{name}_per_class.csv") as partial:
        metrics.per_class.to_csv(partial, index=False)
    write_json(target, counts | metrics.as_dict())
    return target


def judge(
    source: str | None,
    test_data: str | None,
    *,
    weights: str | None,
    mode: str,
    batch_size: int,
    num_workers: int,
    token_merging: Any,
    device: str,
    output: str | None,
    unknown: Collection[str] = (),
) -> str:
    """Do what `run.py evaluate` is told: judge a model, write its results, and return what there is to tell.

    Args:
        source: a run's folder, a checkpoint, or the name of a model.
        test_data: TSV of the pack.
        weights: for a model given by name.
        mode: see `training.config.Mode`.
        batch_size: clips at once.
        num_workers: loader processes.
        token_merging: see `open_evaluation`.
        device: auto, cpu or cuda.
        output: folder for the results; beside the checkpoint by default.
        unknown: options that there are none of.

    Raises:
        UserError: options, model or data that will not do.
    """
    if unknown:
        raise UserError("; ".join(f"unknown option --{key}{did_you_mean(key, OPTIONS)}" for key in unknown))
    if source is None or test_data is None:
        raise UserError("give a run's folder, a checkpoint or a model's name, and --test_data PACK.tsv")
    if mode not in get_args(Mode):
        raise UserError(f"mode is {mode!r}; use {', '.join(get_args(Mode))}")
    if batch_size < 1 or num_workers < 0:
        raise UserError(f"batch_size is {batch_size} and num_workers {num_workers}; wanted at least 1 and 0")
    source, test_data, precision = str(source), str(test_data), Precision(mode, choose_device(device))
    model, data = open_evaluation(source, weights, test_data, precision.device, token_merging)
    metrics = evaluate(model, data, batch_size=batch_size, num_workers=num_workers, precision=precision)
    merging = "" if token_merging is None else "_merging_" + re.sub("[^0-9.-]+", "_", str(token_merging)).strip("_")
    folder = Path(output) if output else _beside(source)
    written = write_results(folder, f"evaluation_{Path(test_data).stem}{merging}", metrics, data)
    used = f"clips used: {len(data.pack)}, missing from the pack: {data.pack.n_missing}"
    return f"{metrics.summary()}\n{used}\nresults: {written}"


def _beside(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    return path.parent if path.is_file() else Path("experiments") / "evaluations" / path.name
