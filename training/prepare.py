"""Preparing a run: from a configuration file to a `Run` that is ready to start, or one error with all faults."""

import logging
import os
import shlex
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import Faults, UserError
from common.files import sha256
from distill.embeddings import StoredEmbeddings
from distill.joined_embeddings import JoinedEmbeddings
from distill.mask_check import MaskFindings, check_masks
from distill.objectives import TrainingFacts
from distill.sound_check import compute_fingerprint
from distill.store import StoreItems
from models import Ensemble
from models.devices import choose_device
from training.automatic import Choice, fill_timed, list_automatic_keys, name_model, resolve
from training.band_limit import describe_unusable_bands, measure_band_limits
from training.budget import choose_epochs, choose_pace, time_run
from training.config import AUTO, TrainConfig
from training.data import TrainingData, open_training
from training.learning_causes import check_sounds
from training.loop import Run, RunParts
from training.needs import load_online_teacher, plan_run
from training.parallel import Ranks
from training.run_folder import SOUNDS, RunFolder, choose_folder, log_to, recall_choices, run_identity
from training.settings import check_settings, read_settings
from training.smoke import smoke
from training.student import create_student, downloads_start

logger = logging.getLogger(__name__)


@dataclass
class PreparedRun:
    """A run that is ready to start or to resume.

    Attributes:
        run: the run.
        folder: its folder on disk.
        state: the state to resume from, on rank 0; None at the beginning.
    """

    run: Run
    folder: RunFolder
    state: dict[str, Any] | None

    def fit(self) -> dict[str, Any]:
        """Train to the end; return the metrics of the final model and the path of its weights."""
        try:
            result = self.run.fit(self.state)
            if self.run.ranks.is_main:
                self.folder.finish(result)
        finally:
            self.folder.unlock()  # the same process may resume a run that was stopped
        return result


def prepare_run(
    config_file: str, overrides: dict[str, Any], seed: int, *, resume: str = "auto", ranks: Ranks | None = None
) -> PreparedRun:
    """Check a configuration and its data, build the model, find or create the run's folder and start its log.

    Args:
        config_file: a YAML file, see `trainconfig/`.
        overrides: key → value, in place of those of the file.
        seed: of everything random; the caller has seeded PyTorch, from which initial weights are drawn.
        resume: `auto`, `never`, or the path of a run or of one of its states: see `training.run_folder.choose_folder`.
        ranks: the processes of the run.

    Raises:
        UserError: all faults of the configuration, its data, its model and its objective; nothing has been written.
    """
    ranks = ranks or Ranks()
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        resume = "auto"  # torchrun repeats the command after a crash: resume the run that it started
    faults = Faults(config_file)
    given, config, choices = _read_config(config_file, overrides, seed, resume, ranks, faults)
    name, train_data = Path(config_file).stem, config.train_data if config else None
    if config and config.smoke:
        faults.raise_if_any()
        name = f"{name}_smoke"  # a folder of its own, so that `latest` of the real runs does not change
        config = ranks.broadcast(smoke(config, Path(config.outputpath) / name / "data") if ranks.is_main else None)
    has_own_data = config is not None and config.train_data == train_data
    parts, mask_warning = _build_parts(config, choices, seed, faults, has_own_data=has_own_data)
    assert config is not None
    if given and given.get("epochs") == AUTO and "epochs" not in choices and not config.smoke:
        timed = _time_and_choose(config, given, parts, ranks)
        choices |= timed
        config = config.model_copy(update={key: choice.value for key, choice in timed.items()})

    identity = run_identity(config, seed, _hash_data(config, parts.data, parts.teacher))
    parent = Path(config.outputpath) / name / config.model
    found = choose_folder(parent, identity, resume) if ranks.is_main else None
    path, state_path, is_resumed = ranks.broadcast((found[0].path, *found[1:]) if found else None)
    folder = found[0] if found else RunFolder(path)
    run = Run(config, parts, path, ranks)
    state = None
    if ranks.is_main:
        if not is_resumed:
            folder.make(config, parts.data.labels, identity, given, choices)
        log_to(path / config.logfile, debug=config.debug)
        state = _load_state(run, state_path) if is_resumed else None
        _log_start(run, is_resumed, state)
        for key, choice in choices.items():
            logger.info("chosen automatically: %s: %s (%s)", key, choice.value, choice.reason)
        limits = None if config.smoke else measure_band_limits(parts.data.pack)
        bands = None if limits is None else describe_unusable_bands(limits, parts.model, config.train_data)
        for warning in filter(None, (mask_warning, bands)):
            logger.warning("%s", warning)
    return PreparedRun(run, folder, state)


def _read_config(
    config_file: str, overrides: dict[str, Any], seed: int, resume: str, ranks: Ranks, faults: Faults
) -> tuple[dict[str, Any] | None, TrainConfig | None, dict[str, Choice]]:
    """Read a configuration and replace `auto`: by the choices of an unfinished run with the same settings, or new ones.

    Returns:
        The settings as given, the configuration, and the choices. `epochs: auto` and the keys that depend on it have a
        placeholder until the run has been timed.
    """
    given = read_settings(config_file, overrides, faults)
    if given is None:
        return None, None, {}
    with faults.noted():
        given = name_model(given)
    if "budget" in overrides and given.get("epochs") != AUTO:
        faults.add(
            f"budget chooses the number of epochs, but epochs is {given.get('epochs', 120)}; drop one of them, or set "
            "epochs: auto"
        )
    settings, choices = dict(given), {}
    if list_automatic_keys(given):
        if ranks.is_main:
            parent = Path(str(given.get("outputpath", "experiments/"))) / Path(config_file).stem
            recalled = recall_choices(parent, given, seed, resume)
            choices = resolve(given, faults) if recalled is None else recalled
        choices, faults.sentences[:] = ranks.broadcast((choices, faults.sentences))
        settings |= {key: choice.value for key, choice in choices.items()}
    if isinstance(settings.get("epochs"), int):
        pace = {key: choice for key, choice in choose_pace(settings["epochs"]).items() if settings.get(key) == AUTO}
        choices |= pace
        settings |= {key: choice.value for key, choice in pace.items()}
    return given, check_settings(TrainConfig, fill_timed(settings), faults), choices


def _build_parts(
    config: TrainConfig | None, choices: Collection[str], seed: int, faults: Faults, *, has_own_data: bool
) -> tuple[RunParts, str | None]:
    """Open the data and build student, objective and teacher; return them and a warning about masks.

    Args:
        config: None if it could not be read.
        choices: keys whose values were chosen automatically.
        seed: of the run.
        faults: raised here with all faults of configuration, data, model and objective.
        has_own_data: whether the data are those of the configuration, not the short sounds of a smoke run, for which
            masks would be too long.
    """
    data = model = plan = device = teacher = None
    masks = MaskFindings()
    if config:
        with faults.noted():
            device = choose_device(config.device)
        plan = plan_run(config, faults, choices)
        if plan:
            with faults.noted():
                teacher = load_online_teacher(config, plan.needs) if config.teacher else None
            data = open_training(config, seed, faults, plan.needs, teacher.labels if teacher else None)
        if data and has_own_data:
            stores = " and ".join(config.stores) or None
            masks = check_masks(data.source.replay, data.source.n_reference[data.items], stores)
            if masks.fault:
                faults.add(masks.fault)
        with faults.noted():
            # before a download, which may take long, other faults are reported
            if plan and not (faults.sentences and downloads_start(config)):
                model = create_student(config, data.labels if data else None, plan.needs)
    faults.raise_if_any()
    if data is None or plan is None or model is None or device is None:
        raise AssertionError("a part is missing, and no fault was noted")
    widths: tuple[int, ...] = ()
    if isinstance(data.source, StoredEmbeddings | JoinedEmbeddings):
        widths = data.source.widths
    elif plan.needs.targets == "embeddings" and teacher:
        widths = teacher.embed_dims
    objective = plan.build(model, TrainingFacts(seed, widths)).to(device)
    if teacher:
        teacher.to(device)
    return RunParts(data, model.to(device), objective, plan.needs, device, seed, teacher), masks.warning


def _time_and_choose(config: TrainConfig, given: dict[str, Any], parts: RunParts, ranks: Ranks) -> dict[str, Choice]:
    """Time the run, and choose the number of epochs and the keys that depend on it, as far as they are `auto`."""
    timing = ranks.broadcast(time_run(config, parts, ranks.world_size) if ranks.is_main else None)
    settings = {"epoch_length": AUTO} | given  # an epoch is a pass, unless the budget is shorter
    choices = choose_epochs(config, len(parts.data.items), timing, saturates=parts.needs.targets != "none")
    return {key: choice for key, choice in choices.items() if settings.get(key) == AUTO}


def _hash_data(config: TrainConfig, data: TrainingData, teacher: Ensemble | None) -> dict[str, Any]:
    """Return facts and hashes of the clips, labels, store and teacher, which must not change when a run is resumed."""
    facts: dict[str, Any] = {"labels": data.labels, "items": len(data.items)}
    facts["train_data_sha256"] = sha256(data.pack.manifest)
    facts[SOUNDS] = compute_fingerprint(data.pack)  # a new pack may have other sounds under the same names
    meta = Path(config.logitspath or "") / "meta.json"
    facts["soft_targets_sha256"] = sha256(meta) if config.logitspath and meta.is_file() else None
    facts["teacher_sha256"] = teacher.fingerprint() if teacher else None
    if config.embeddingspath:
        hashes = [sha256(Path(store) / "meta.json") for store in config.stores]
        facts["embeddings_sha256"] = hashes[0] if len(hashes) == 1 else hashes
    if config.clusters:
        facts["clusters_sha256"] = sha256(config.clusters)
    return facts


def _load_state(run: Run, path: Path | None) -> dict[str, Any] | None:
    """Load the state to resume from; None if the run was stopped before its first one."""
    state = run.states.load(path)
    journal = run.folder / "metrics.jsonl"
    has_steps = any(run.folder.glob("best_epoch=*.pt")) or (journal.is_file() and journal.stat().st_size > 0)
    if state is None and has_steps:
        raise UserError(
            f"{run.folder} has training steps, but its checkpoints in {run.states.folder} are missing; restore them, "
            "or start a new run with --resume never"
        )
    return state


def _log_start(run: Run, is_resumed: bool, state: dict[str, Any] | None) -> None:
    config, data, model = run.config, run.data, run.model
    logger.info("command: %s", shlex.join(sys.argv))
    if not is_resumed:
        logger.info("NEW RUN, from step 0, in %s", run.folder)
    elif state is None:
        logger.warning("RESUMING %s, which was stopped before its first checkpoint: from step 0", run.folder)
    logger.info(
        "%s, %.2f M parameters, on %s x %d; %d training chunks of %d clips",
        config.model,
        sum(p.numel() for p in model.parameters()) / 1e6,
        run.device,
        run.ranks.world_size,
        len(data.items),
        len(data.pack),
    )
    if run.teacher is not None:
        logger.info("online teacher: %s", run.teacher.name)
    teachers = config.embedding_stores
    if run.teacher is not None and run.needs.targets == "embeddings":
        teachers = [member.full_name for member in run.teacher.taggers]
    for number, name in enumerate(teachers, start=1) if len(teachers) > 1 else ():
        logger.info("teacher %d, of cosine_%d and loss_teacher_%d: %s", number, number, number, name)
    on_eval = data.valid is not None and data.valid is data.evaluation
    logger.log(logging.WARNING if on_eval and config.select_on is None else logging.INFO, "%s", data.selection)
    if run.needs.targets == "none":  # with targets, the learning check reports them
        for sentence in check_sounds(run):
            logger.warning("%s", sentence)
    if isinstance(data.source, StoreItems | JoinedEmbeddings):
        logger.info("%d stored epochs of targets, used in order and then repeated", len(data.source.epochs))
