"""Evaluating a model on a labelled pack."""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from pydantic import Field

from audio.cutting import Chunks
from audio.dataset import ClipDataset, ClipLoader, Pack, pad_batch
from common.errors import Faults
from common.files import whole_file, write_bytes, write_json
from common.interrupts import StopSignal
from common.options import MergingOption, Options, read_options
from common.progress import create_progress
from models import AudioTagger, load_tagger
from models.devices import choose_device
from models.headed import HeadedTagger
from models.heads import check_classes
from models.source_errors import ONNX
from models.token_merging import split_setting
from models.weight_sources import needs_download
from training.config import Mode
from training.detection_figure import detection_figure
from training.exported import ExportedTagger, predict_exported
from training.figures import render_png
from training.label_numbers import check_label_numbers
from training.labelled import LabelledPack, open_labelled, open_pack
from training.metrics import Metrics, evaluate_scores
from training.parallel import Ranks
from training.precision import Precision
from training.stopping import StopRequest

logger = logging.getLogger(__name__)

Tagger = TypeVar("Tagger", AudioTagger, ExportedTagger)

LONG_SECONDS = 30.0  # batches of longer clips are smaller


def _collate(items: list[dict[str, Any]], sample_rate: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    waveform, lengths = pad_batch([item["waveforms"][sample_rate] for item in items])
    return torch.tensor([item["index"] for item in items]), waveform, lengths


def _embed_as_stored(model: HeadedTagger, waveform: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Embed clips for a head: (B,S), lengths (B,) -> (B,I), rounded as in `distill.embeddings.EmbeddingStore`."""
    return model.embed_for_head(waveform, lengths, as_stored=True)


def group_by_length(order: np.ndarray, n_samples: np.ndarray, batch_size: int, long: int) -> list[list[int]]:
    """Cut an order of clips into batches, smaller ones for long clips, which bounds the memory.

    Args:
        order: clips by ascending length.
        n_samples: length of each clip.
        batch_size: largest number of clips in a batch.
        long: length in samples; a batch of several clips has at most `batch_size * long` samples.
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
    stop: StopRequest | None = None,
) -> np.ndarray:
    """Return the probabilities (N, C) of every clip of `pack`, whole clips, in its order.

    The input of a head is the same as in `run.py probe`: the mean embedding of the chunks of a clip, cut as for the
    training of the head, weighted by their lengths, in the precision of stored embeddings.

    Each rank computes a part of the batches, and all get all results. A run that is to stop (`stop`) does not
    compute the rest: all ranks raise `StopSignal`.
    """
    ranks = ranks or Ranks()
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    if isinstance(model, HeadedTagger):
        chunks = Chunks.cut(pack.n_samples, pack.sample_rate, model.head.chunk_seconds, drop_short_tail=False)
        compute, width = partial(_embed_as_stored, model), model.head.width
    else:
        chunks = Chunks.whole(pack.n_samples, pack.sample_rate)
        compute, width = model.predict, model.num_classes
    lengths = chunks.n_samples
    # Clips of similar length share a batch, which reduces padding.
    order = np.argsort(lengths, kind="stable")
    batches = group_by_length(order, lengths, batch_size, round(LONG_SECONDS * pack.sample_rate))
    batches = batches[ranks.rank :: ranks.world_size]
    loader = ClipLoader(
        ClipDataset(pack, [model.sample_rate], chunks),
        num_workers,
        batch_sampler=batches,
        collate_fn=partial(_collate, sample_rate=model.sample_rate),
    )
    model.eval()
    share = lengths / np.bincount(chunks.clip, lengths, len(pack)).clip(min=1)[chunks.clip]  # of its clip
    means = np.zeros((len(pack), width))
    unit = "clip" if len(chunks) == len(pack) else "chunk"
    n_items = sum(map(len, batches))
    with create_progress(total=n_items, desc=description, unit=unit, disable=not ranks.is_main) as progress:
        for index, waveform, n_samples in loader:
            rows = index.numpy()
            with precision.context():
                outputs = compute(waveform.to(precision.device), n_samples.to(precision.device))
            np.add.at(means, chunks.clip[rows], outputs.float().cpu().numpy() * share[rows, None])
            progress.update(len(rows))
            if stop is not None and stop.number:
                break
    if stop is not None and (number := stop.find_now()):
        raise StopSignal(number)
    results = torch.from_numpy(means.astype(np.float32))
    if ranks.world_size > 1:  # each chunk was computed by one rank, and is zero on the others
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
    """Return the metrics of `model` on `data`, the same on all ranks, among which the clips are divided."""
    scores = predict_pack(
        model, data.pack, batch_size=batch_size, num_workers=num_workers, precision=precision, ranks=ranks
    )
    return evaluate_scores(scores, data.multi_hot(), model.labels)


def _open_evaluation(
    load: Callable[[], Tagger], test_data: str, origin: str, verify: bool
) -> tuple[Tagger, LabelledPack]:
    """Load a model and open the labelled pack for its evaluation; raises all errors of both at once.

    Where the weights are to be downloaded from `origin`, errors of the pack are raised before.
    """
    faults = Faults("the evaluation")
    tagger = data = None
    if needs_download(origin):
        open_pack(test_data, faults, labelled=True)
        faults.raise_if_any()
    with faults.noted():
        tagger = load()
        data = open_labelled(test_data, tagger.labels, faults, verify=verify)
        if data is not None:
            check_label_numbers(data.pack, tagger.labels, faults)
    if tagger is None:
        open_pack(test_data, faults, labelled=True)
    faults.raise_if_any()
    assert tagger is not None
    assert data is not None
    return tagger, data


def _warn_of_missing_band(model: AudioTagger, pack: Pack) -> None:
    """Log a warning if the rate of a pack is too low for the highest mel bands of a model."""
    highest, nyquist = model.front_end.highest_hz, pack.sample_rate / 2
    if highest > nyquist:
        logger.warning(
            "%s is at %d Hz, but %s has mel bands up to %g Hz: its metrics are those of sounds without content above "
            "%g Hz. `inference.py` reads files with all their content; to evaluate that, pack with --sample_rate %d",
            pack.manifest,
            pack.sample_rate,
            model.full_name,
            highest,
            nyquist,
            model.sample_rate,
        )


def write_results(folder: Path, name: str, metrics: Metrics, data: LabelledPack) -> Path:
    """Write the results of an evaluation to `folder`.

    NAME.json has all metrics and the clips used and missing, NAME_per_class.csv the metrics of each class as a table,
    NAME_roc_det.png the curves of up to a dozen classes.

    Returns:
        The path of NAME.json.
    """
    prevalence = data.multi_hot().mean(axis=0)
    counts = {
        "data": str(data.pack.manifest),
        "clips": len(data.pack),
        "clips_missing": data.pack.n_missing,
        "chance_mAP": float(prevalence[prevalence > 0].mean()),  # of random scores
    }
    target = folder / f"{name}.json"
    with whole_file(folder / f"{name}_per_class.csv") as file:
        metrics.per_class.to_csv(file, index=False)
    if metrics.curves:
        write_bytes(folder / f"{name}_roc_det.png", render_png(detection_figure(metrics.curves)))
    per_class = json.loads(metrics.per_class.to_json(orient="records", double_precision=15))  # null where undefined
    write_json(target, counts | metrics.as_dict() | {"per_class": per_class})
    return target


class EvaluateOptions(Options):
    """The options of `run.py evaluate`."""

    SHORT: ClassVar[Mapping[str, str]] = {"model": "m"}

    model: str = ""  # a run's folder, a checkpoint, the name of a model, or an .onnx file
    test_data: str = ""  # TSV of a pack with a `labels` column
    weights: str | None = None  # file or URL of the weights of a model given by name
    head: str | None = None  # a head on the model's embeddings: a name in heads/ or a file; `run.py probe` trains them
    mode: Mode = "fp32"  # precision; noamp = fp32, amp = fp16, amp_bf16 = bf16
    batch_size: int = Field(32, ge=1)  # clips at once
    num_workers: int = Field(4, ge=0)  # processes that read clips
    verify: bool = False  # compare every clip with its checksum
    # tokens merged in each block, in place of the model's own setting: a number, [r, inflect], or a number a block
    token_merging: MergingOption = None
    device: str = "auto"  # auto, cpu or cuda
    output: str | None = None  # folder for the results; null = beside the checkpoint

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence where the model or the data are missing."""
        if not (self.model and self.test_data):
            yield "give a run's folder, a checkpoint or a model's name, and --test_data PACK.tsv"


def evaluate_command(given: Mapping[str, Any], open_exported: Callable[..., ExportedTagger]) -> str:
    """Evaluate a model, write its results, and return the summary to print: `run.py evaluate`.

    Args:
        given: name → value, see `EvaluateOptions`; None is not given.
        open_exported: opens a model that is an .onnx file, as `tagging.engines.open_engine` does.

    Raises:
        UserError: options, model or data are invalid.
    """
    faults = Faults("the command")
    options = read_options(EvaluateOptions, {key: value for key, value in given.items() if value is not None}, faults)
    faults.raise_if_any()
    assert options is not None
    source, precision = options.model, Precision(options.mode, choose_device(options.device))
    is_exported = source.lower().endswith(ONNX)
    if is_exported:
        chosen = options.model_dump(include={"weights", "head", "token_merging", "device"})
        exported, data = _open_evaluation(
            lambda: open_exported(source, **chosen), options.test_data, source, options.verify
        )
        metrics = evaluate_scores(predict_exported(exported, data.pack), data.multi_hot(), exported.labels)
    else:
        chosen = options.model_dump(include={"weights", "head", "token_merging"})

        def load() -> AudioTagger:
            tagger = load_tagger(source, device=precision.device, **chosen)
            check_classes(tagger, source)
            return tagger

        model, data = _open_evaluation(load, options.test_data, options.weights or source, options.verify)
        _warn_of_missing_band(model, data.pack)
        metrics = evaluate(
            model, data, batch_size=options.batch_size, num_workers=options.num_workers, precision=precision
        )
    folder = Path(options.output) if options.output else _beside(source)
    written = write_results(folder, _name_results(options, is_exported), metrics, data)
    used = f"clips used: {len(data.pack)}, missing from the pack: {data.pack.n_missing}"
    return f"{metrics.summary()}\n{used}\nresults: {written}"


def _name_results(options: EvaluateOptions, is_exported: bool) -> str:
    """Name the files of results after the data and everything that makes them differ."""
    parts = ["evaluation", Path(options.test_data).stem]
    if is_exported:  # several may be in one folder
        parts.append(Path(options.model).stem)
    if options.head is not None:
        parts.append(f"head_{Path(options.head).stem}")
    r, proportional = split_setting(options.token_merging)
    if r is not None:
        parts.append("merging_" + re.sub("[^0-9.-]+", "_", str(r)).strip("_"))
    if not proportional:
        parts.append("plain")
    return "_".join(parts)


def _beside(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    return path.parent if path.is_file() else Path("experiments") / "evaluations" / path.name
