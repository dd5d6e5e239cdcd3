"""Judging a model on a labelled pack."""

import logging
import re
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from audio.cutting import Chunks
from audio.dataset import ClipDataset, Pack, loader_workers, pad_batch
from common.errors import Faults, UserError, did_you_mean
from common.files import whole_file, write_json
from models import AudioTagger, load_tagger
from models.devices import choose_device
from models.headed import HeadedTagger
from models.heads import check_classes
from models.source_errors import ONNX
from models.token_merging import MergingSetting, split_setting
from training.config import Mode
from training.exported import ExportedTagger, predict_exported
from training.label_numbers import check_label_numbers
from training.labelled import LabelledPack, open_labelled, open_pack
from training.metrics import Metrics, evaluate_scores
from training.parallel import Ranks
from training.precision import Precision

logger = logging.getLogger(__name__)

OPTIONS = ["test_data", "weights", "head", "mode", "batch_size", "num_workers", "token_merging", "device", "output"]


LONG_SECONDS = 30.0  # batches hold fewer clips where these are longer


def _collate(items: list[dict[str, Any]], sample_rate: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    waveform, lengths = pad_batch([item["waveforms"][sample_rate] for item in items])
    return torch.tensor([item["index"] for item in items]), waveform, lengths


def _embed_as_stored(model: HeadedTagger, waveform: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Embed clips for a head: (B,S), own samples (B,) -> (B,E), rounded as `distill.embeddings.EmbeddingStore` does."""
    largest = torch.finfo(torch.float16).max
    return model.embed_for_head(waveform, lengths).clamp(-largest, largest).half()


def group_by_length(order: np.ndarray, n_samples: np.ndarray, batch_size: int, long: int) -> list[list[int]]:
    """Cut an order of clips into batches, smaller ones where clips are long, so that memory does not grow with these.

    Args:
        order: clips by ascending length.
        n_samples: of each clip.
        batch_size: clips of a batch at most.
        long: a batch of several clips holds no more samples than `batch_size` clips of so many.
    """
    batches: list[list[int]] = []
    for clip in order.tolist():
        last = batches[-1] if batches else []
        fits = len(last) < batch_size and (len(last) + 1) * n_samples[clip] <= batch_size * long
        if last and fits:
            last.append(clip)
        else:
            batches.append([clip])
    return batches


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

    A model with a head on it is given the chunks that its head was trained on, and the head the mean embedding of a
    clip's chunks, weighted by their lengths and in the precision of stored ones: what `run.py probe` gives it.

    Each of several ranks computes its part of the batches, none of them twice, and all get all of the results.
    """
    ranks = ranks or Ranks()
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    if isinstance(model, HeadedTagger):
        chunks = Chunks.cut(pack.n_samples, pack.sample_rate, model.head.chunk_seconds, drop_short_tail=False)
        compute, width = partial(_embed_as_stored, model), model.embed_dim
    else:
        chunks = Chunks.whole(pack.n_samples, pack.sample_rate)
        compute, width = model.predict, model.num_classes
    lengths = chunks.n_samples
    # Clips of like length share a batch, so that little is padded.
    order = np.argsort(lengths, kind="stable")
    batches = group_by_length(order, lengths, batch_size, round(LONG_SECONDS * pack.sample_rate))
    batches = batches[ranks.rank :: ranks.world_size]
    loader = DataLoader(
        ClipDataset(pack, [model.sample_rate], chunks),
        batch_sampler=batches,
        num_workers=loader_workers(num_workers),
        collate_fn=partial(_collate, sample_rate=model.sample_rate),
    )
    model.eval()
    share = lengths / np.bincount(chunks.clip, lengths, len(pack)).clip(min=1)[chunks.clip]  # of its clip
    means = np.zeros((len(pack), width))
    with tqdm(
        total=sum(map(len, batches)),
        desc=description,
        unit="clip" if len(chunks) == len(pack) else "chunk",
        leave=False,
        disable=not ranks.is_main,
        mininterval=0.1 if sys.stderr.isatty() else 30,
    ) as progress:
        for index, waveform, n_samples in loader:
            rows = index.numpy()
            with precision.context():
                found = compute(waveform.to(precision.device), n_samples.to(precision.device))
            np.add.at(means, chunks.clip[rows], found.float().cpu().numpy() * share[rows, None])
            progress.update(len(rows))
    results = torch.from_numpy(means.astype(np.float32))
    if ranks.world_size > 1:  # a chunk is in one rank's sums, and zero in the others'
        results = ranks.sum(results.to(precision.device)).cpu()
    if isinstance(model, HeadedTagger):
        results = model.tag_embedding(results.to(precision.device)).cpu()
    return results.numpy()


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
    source: str,
    weights: str | None,
    test_data: str,
    device: torch.device,
    token_merging: MergingSetting = None,
    head: str | None = None,
) -> tuple[AudioTagger, LabelledPack]:
    """Load a model and open the labelled pack to judge it on.

    Args:
        source: a run's folder, a checkpoint, or the name of a model.
        weights: for a model given by name.
        test_data: TSV of the pack.
        device: for the model.
        token_merging: see `models.token_merging.merging_schedule`; by default what the model says itself.
        head: see `models.heads.load_tagger`.

    Raises:
        UserError: all that is wrong with either.
    """
    faults = Faults("the evaluation")
    model = data = None
    try:
        model = load_tagger(source, head=head, weights=weights, device=device, token_merging=token_merging)
        check_classes(model, source)
        data = _open_data(test_data, model.labels, faults)
    except UserError as error:
        faults.add(str(error))
        open_pack(test_data, faults, labelled=True)
    faults.raise_if_any()
    assert model is not None
    assert data is not None
    return model, data


def _open_data(test_data: str, labels: list[str], faults: Faults) -> LabelledPack | None:
    """Open the labelled pack to judge a model with these classes on; what is wrong is noted in `faults`."""
    data = open_labelled(test_data, labels, faults)
    if data is not None:
        check_label_numbers(data.pack, labels, faults)
    return data


def evaluate_exported(tagger: ExportedTagger, test_data: str) -> tuple[Metrics, LabelledPack]:
    """Return the metrics of an exported model on a labelled pack, and the pack.

    Raises:
        UserError: all that is wrong with the pack.
    """
    faults = Faults("the evaluation")
    data = _open_data(test_data, tagger.labels, faults)
    faults.raise_if_any()
    assert data is not None
    return evaluate_scores(predict_exported(tagger, data.pack), data.multi_hot(), tagger.labels), data


def _warn_of_missing_band(model: AudioTagger, pack: Pack) -> None:
    """Say that files get other tags than the clips of a pack where its rate left out what a model makes use of."""
    highest, nyquist = model.front_end.highest_hz, pack.sample_rate / 2
    if highest > nyquist:
        logger.warning(
            "%s is at %d Hz, but %s takes mel bands up to %g Hz: its figures are those of sounds that hold nothing "
            "above %g Hz. `inference.py` tags files with all that they hold; to judge that, pack with --sample_rate %d",
            pack.manifest,
            pack.sample_rate,
            model.full_name,
            highest,
            nyquist,
            model.sample_rate,
        )


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
    head: str | None = None,
    mode: str,
    batch_size: int,
    num_workers: int,
    token_merging: Any,
    device: str,
    output: str | None,
    unknown: Collection[str] = (),
    open_exported: Callable[..., ExportedTagger] | None = None,
) -> str:
    """Do what `run.py evaluate` is told: judge a model, write its results, and return what there is to tell.

    Args:
        source: a run's folder, a checkpoint, or the name of a model.
        test_data: TSV of the pack.
        weights: for a model given by name.
        head: see `models.heads.load_tagger`.
        mode: see `training.config.Mode`.
        batch_size: clips at once.
        num_workers: loader processes.
        token_merging: see `open_evaluation`.
        device: auto, cpu or cuda.
        output: folder for the results; beside the checkpoint by default.
        unknown: options that there are none of.
        open_exported: opens a `source` that is an .onnx file, as `tagging.engines.open_engine` does.

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
    head = None if head is None else str(head)  # a command line reads 50 as a number
    if open_exported is not None and source.lower().endswith(ONNX):
        given = {"weights": weights, "head": head, "token_merging": token_merging, "device": device}
        metrics, data = evaluate_exported(open_exported(source, **given), test_data)
    else:
        model, data = open_evaluation(source, weights, test_data, precision.device, token_merging, head)
        _warn_of_missing_band(model, data.pack)
        metrics = evaluate(model, data, batch_size=batch_size, num_workers=num_workers, precision=precision)
    r, proportional = split_setting(token_merging)
    merging = "" if r is None else "_merging_" + re.sub("[^0-9.-]+", "_", str(r)).strip("_")
    merging += "" if proportional else "_plain"
    with_head = "" if head is None else f"_head_{Path(head).stem}"
    folder = Path(output) if output else _beside(source)
    of_file = f"_{Path(source).stem}" if source.lower().endswith(ONNX) else ""  # several lie in one folder
    name = f"evaluation_{Path(test_data).stem}{of_file}{with_head}{merging}"
    written = write_results(folder, name, metrics, data)
    used = f"clips used: {len(data.pack)}, missing from the pack: {data.pack.n_missing}"
    return f"{metrics.summary()}\n{used}\nresults: {written}"


def _beside(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    return path.parent if path.is_file() else Path("experiments") / "evaluations" / path.name
