"""From a configuration file to a run that is ready to start, or to one message with all that is wrong."""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from common.errors import Faults, UserError
from common.files import sha256
from distill.embeddings import StoredEmbeddings
from distill.mask_check import MaskFindings, check_masks
from distill.objectives import TrainingFacts
from distill.store import MatchedItems
from models import Ensemble
from models.devices import choose_device
from training.automatic import Choice, automatic_keys, name_model, resolve, without_timed
from training.band_limit import describe_unusable_bands, measure_band_limits
from training.budget import choose_epochs, choose_pace, time_run
from training.config import AUTO, TrainConfig
from training.data import TrainingData, open_training
from training.loop import Run
from training.needs import load_online_teacher, plan_run
from training.parallel import Ranks
from training.run_folder import RunFolder, choose_folder, log_to, recall_choices, run_identity
from training.settings import check_settings, read_settings
from training.smoke import smoke
from training.student import create_student

logger = logging.getLogger(__name__)


@dataclass
class Prepared:
    """A run that is ready to start or to go on.

    Attributes:
        run: to be fitted.
        folder: its place on disk.
        state: to go on from, on rank 0; None at the beginning.
    """

    run: Run
    folder: RunFolder
    state: dict[str, Any] | None

    def fit(self) -> dict[str, Any]:
        """Train to the end; return the figures of the final model and the path of its weights."""
        result = self.run.fit(self.state)
        if self.run.ranks.is_main:
            self.folder.finish(result)
            self.run.states.clear()
        return result


def prepare_run(
    config_file: str, overrides: dict[str, Any], seed: int, *, resume: str = "auto", ranks: Ranks | None = None
) -> Prepared:
    """Check a configuration and the data it names, build the model, find or make the run's folder and log into it.

    Args:
        config_file: a YAML file, see `trainconfig/`.
        overrides: key → value laid over it.
        seed: of everything random; the caller has seeded PyTorch, which initial weights draw from.
        resume: `auto`, `never`, or the path of a run or of one of its states: see `training.run_folder.choose_folder`.
        ranks: the processes that train together.

    Raises:
        UserError: every fault of the configuration, its data, its model and its objective; nothing was written then.
    """
    ranks = ranks or Ranks()
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        resume = "auto"  # torchrun repeats the command after a crash: on with what it has begun
    faults = Faults(config_file)
    stem = Path(config_file).stem
    given, config, chosen = _read(config_file, overrides, seed, resume, ranks, faults)
    train_data = config.train_data if config else None
    if config and config.smoke:
        faults.raise_if_any()
        stem = f"{stem}_smoke"  # beside the real runs, whose `latest` stays theirs
        config = ranks.from_main(smoke(config, Path(config.outputpath) / stem / "data") if ranks.is_main else None)
        assert config is not None
    plan = data = model = device = teacher = None
    masks = MaskFindings()
    if config:
        with faults.noted():
            device = choose_device(config.device)
        plan = plan_run(config, faults)
        if plan:
            with faults.noted():
                teacher = load_online_teacher(config, plan.needs) if config.teacher else None
            data = open_training(config, seed, faults, plan.needs, teacher.labels if teacher else None)
        if data and config.train_data == train_data:  # sounds that stand in for missing ones are short
            masks = _check_masks(config, data, faults)
        with faults.noted():
            if plan:
                model = create_student(config, data.labels if data else None, plan.needs)
    faults.raise_if_any()
    if config is None or data is None or plan is None or model is None or device is None:
        raise AssertionError("a part is missing, and no fault was noted")
    width = 0
    if plan.needs.targets == "embeddings":
        width = teacher.single.embed_dim if teacher else cast(StoredEmbeddings, data.source).width
    objective = plan.build(model, TrainingFacts(seed, width)).to(device)
    if teacher:
        teacher.to(device)

    if given and given.get("epochs") == AUTO and "epochs" not in chosen and not config.smoke:
        timed = (config, data, model, objective, plan.needs, device, seed, ranks.world_size, teacher)
        timing = ranks.from_main(time_run(*timed) if ranks.is_main else None)
        absent = {"epoch_length": AUTO}  # a pass, unless the budget is shorter
        fitting = choose_epochs(config, len(data.items), timing)
        fitting = {key: choice for key, choice in fitting.items() if (absent | given).get(key) == AUTO}
        chosen |= fitting
        config = config.model_copy(update={key: choice.value for key, choice in fitting.items()})

    identity = run_identity(config, seed, _data_identity(config, data, teacher))
    parent = Path(config.outputpath) / stem / config.model
    found = choose_folder(parent, identity, resume) if ranks.is_main else None
    path, state_path, there = ranks.from_main((found[0].path, found[1], found[2]) if found else None)
    run_folder = found[0] if found else RunFolder(path)
    run = Run(config, data, model.to(device), objective, plan.needs, path, device, seed, ranks, teacher)
    state = None
    if ranks.is_main:
        if not there:
            run_folder.make(config, data.labels, identity, given, chosen)
        log_to(path / config.logfile, debug=config.debug)
        state = run.states.load(state_path) if there else None
        if there and state is None and _has_learned(path):
            raise UserError(
                f"{path} was being trained, but its checkpoints in {run.states.folder} are gone; bring them back, or "
                "begin a new run with --resume never"
            )
        _describe(run, there, state)
        for key, choice in chosen.items():
            logger.info("chosen for these data: %s: %s (%s)", key, choice.value, choice.reason)
        limits = None if config.smoke else measure_band_limits(data.pack)
        bands = None if limits is None else describe_unusable_bands(limits, model, config.train_data)
        for warning in filter(None, (masks.warning, bands)):
            logger.warning("%s", warning)
    return Prepared(run, run_folder, state)


def _read(
    config_file: str, overrides: dict[str, Any], seed: int, resume: str, ranks: Ranks, faults: Faults
) -> tuple[dict[str, Any] | None, TrainConfig | None, dict[str, Choice]]:
    """Read a configuration and replace `auto`: by what an unfinished run of the same settings chose, else by the data.

    Returns:
        The settings as they were given, the configuration, and what was chosen. What waits for a timing (`epochs`, and
        what goes with it) has a value that only completes the configuration.
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
    settings, chosen = dict(given), {}
    if automatic_keys(given):
        if ranks.is_main:
            folder = Path(str(given.get("outputpath", "experiments/"))) / Path(config_file).stem
            recalled = recall_choices(folder, given, seed, resume)
            chosen = resolve(given, faults) if recalled is None else recalled
        chosen, faults.sentences[:] = ranks.from_main((chosen, faults.sentences))
        settings |= {key: choice.value for key, choice in chosen.items()}
    if isinstance(settings.get("epochs"), int):
        pace = {key: choice for key, choice in choose_pace(settings["epochs"]).items() if settings.get(key) == AUTO}
        chosen |= pace
        settings |= {key: choice.value for key, choice in pace.items()}
    return given, check_settings(TrainConfig, without_timed(settings), faults), chosen


def _has_learned(path: Path) -> bool:
    journal = path / "metrics.jsonl"
    return any(path.glob("best_epoch=*.pt")) or (journal.is_file() and journal.stat().st_size > 0)


def _check_masks(config: TrainConfig, data: TrainingData, faults: Faults) -> MaskFindings:
    """Look at the masks beside the clips' lengths; note in `faults` where too little would be left to learn from."""
    store = config.logitspath or config.embeddingspath
    found = check_masks(data.source.replay, data.source.n_reference[data.items], store)
    if found.fault:
        faults.add(found.fault)
    return found


def _data_identity(config: TrainConfig, data: TrainingData, teacher: Ensemble | None) -> dict[str, Any]:
    """What must not change under a run: the lists of its clips, the labels, the store's description, the teacher."""
    facts: dict[str, Any] = {"labels": data.labels, "items": len(data.items)}
    facts["train_data_sha256"] = sha256(data.pack.manifest)
    meta = Path(config.logitspath or "") / "meta.json"
    facts["soft_targets_sha256"] = sha256(meta) if config.logitspath and meta.is_file() else None
    facts["teacher_sha256"] = teacher.fingerprint() if teacher else None
    if config.embeddingspath:
        facts["embeddings_sha256"] = sha256(Path(config.embeddingspath) / "meta.json")
    if config.clusters:
        facts["clusters_sha256"] = sha256(config.clusters)
    return facts


def _describe(run: Run, there: bool, state: dict[str, Any] | None) -> None:
    config, data, model = run.config, run.data, run.model
    logger.info("command: %s", " ".join(sys.argv))
    if not there:
        logger.info("NEW RUN, from step 0, in %s", run.folder)
    elif state is None:
        logger.warning("GOING ON in %s, which was stopped before its first checkpoint: from step 0", run.folder)
    logger.info(
        "%s, %.2f M parameters, on %s x %d; %d chunks of %d clips to learn from",
        config.model,
        sum(p.numel() for p in model.parameters()) / 1e6,
        run.device,
        run.ranks.world_size,
        len(data.items),
        len(data.pack),
    )
    if run.teacher is not None:
        logger.info("the output of %s is computed while the student learns", run.teacher.name)
    on_eval = data.valid is not None and data.valid is data.evaluation
    logger.log(logging.WARNING if on_eval and config.select_on is None else logging.INFO, "%s", data.selection)
    if isinstance(data.source, MatchedItems):
        stored = len(data.source.epochs)
        logger.info("%d stored epochs of targets, used in order and from the start again", stored)
