"""Judging a model on a labelled pack."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from audio.dataset import ClipDataset, Pack, loader_workers, pad_batch
from common.files import whole_file, write_json
from models import AudioTagger
from training.data import LabelledPack
from training.metrics import Metrics, evaluate_scores
from training.precision import Precision


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
) -> np.ndarray:
    """Return the probabilities (N, C) of every clip of `pack`, whole clips, in its order."""
    # Clips of like length share a batch, so that little is padded.
    order = np.argsort(pack.n_samples, kind="stable")
    batches = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    loader = DataLoader(
        ClipDataset(pack, [model.sample_rate]),
        batch_sampler=batches,
        num_workers=loader_workers(num_workers),
        collate_fn=partial(_collate, sample_rate=model.sample_rate),
    )
    model.eval()
    scores = np.empty((len(pack), model.num_classes), np.float32)
    with tqdm(total=len(pack), desc=description, unit="clip", leave=False) as progress:
        for index, waveform, lengths in loader:
            with precision.context():
                probabilities = model.predict(waveform.to(precision.device), lengths.to(precision.device))
            scores[index.numpy()] = probabilities.float().cpu().numpy()
            progress.update(len(index))
    return scores


def evaluate(
    model: AudioTagger, data: LabelledPack, *, batch_size: int, num_workers: int, precision: Precision
) -> Metrics:
    """Return the metrics of `model` on every clip of `data`."""
    scores = predict_pack(model, data.pack, batch_size=batch_size, num_workers=num_workers, precision=precision)
    return evaluate_scores(scores, data.multi_hot(), model.labels)


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
