"""Record what a checkout computes, and compare two records: a change of structure must not change a bit.

    python scripts/benchmarks/behaviour.py record CHECKOUT RECORD.json [--sections runs,models,...]
    python scripts/benchmarks/behaviour.py record OTHER_CHECKOUT OTHER.json [--artefacts RECORD.files]
    python scripts/benchmarks/behaviour.py compare RECORD.json OTHER.json

`record` runs the commands of a checkout (any commit of this project) in processes of their own, each on one thread, and
writes down the losses of 50 steps and the hashes of the final weights for every kind of training, tags, embeddings and
fresh weights of every registered model, and the outputs of exported graphs. What the runs leave on disk (packs,
stores, checkpoints, exports) is kept in RECORD.files; with `--artefacts` another checkout reads what an earlier one
wrote. `compare` lists every entry that differs, and exits with status 1 if there is one. Both records must be made on
one machine: the last bits of a product of matrices differ between processors.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml

STEPS_AN_EPOCH, EPOCHS = 10, 5
CLASSES = ("hum", "tone", "hiss", "click")
RATE, N_CLIPS = 16000, 48

# name -> settings on top of `BASE`; they are trained in this order, since some learn from the ones before
BASE: dict[str, Any] = {
    "train_data": "packs/labels/clips.tsv",
    "eval_data": "packs/labels/clips.tsv",
    "valid_fraction": 0.25,
    "model": "audiotransformer_pico",
    "model_args": {"depth": 2, "pooling": "logit"},
    "pretrained": False,
    "loss": "BCEWithLogitsLoss",
    "batch_size": 8,
    "epoch_length": STEPS_AN_EPOCH,
    "epochs": EPOCHS,
    "schedule": "cosine",
    "warmup_iters": 5,
    "optimizer": "AdamW",
    "optimizer_args": {"lr": 0.002},
    "num_workers": 0,
    "log_every": 1,
    "outputpath": "experiments/",
    "baseline": False,
}
MASKS: dict[str, Any] = {
    "wavtransforms": {"Shift": {"min_shift": -0.5, "max_shift": 0.5}},
    "spectransforms": [
        {"TimeMasking": {"time_mask_param": 24, "max_share": 0.2}},
        {"FrequencyMasking": {"freq_mask_param": 8, "max_share": 0.25}},
    ],
    "mask_fill": "mean",
}
RUNS: dict[str, dict[str, Any]] = {
    "supervised": {**MASKS, "mixup": 0.5, "ema": 0.9, "init_from_data": True},
    "patch_out": {
        **MASKS,
        "model": "passt_pico",
        "model_args": {"time_patch_out": 2, "freq_patch_out": 2, "depth": 2},
        "loss": "CrossEntropyLoss",
    },
    "waveform_mixup": {**MASKS, "model": "resnet10_small", "model_args": {}, "mixup": 0.5, "mixup_on": "waveform"},
    "stored": {"logitspath": "logits/supervised/clips/chunk_10", "mixup": 0.5},
    "stored_fresh_masks": {"logitspath": "logits/supervised/clips/chunk_10", "disable_consistency": True},
    "online": {**MASKS, "teacher": "experiments/supervised/audiotransformer_pico/latest", "mixup": 0.5},
    "cmkd": {
        "logitspath": "logits/supervised/clips/chunk_10",
        "objective": "cmkd",
        "objective_args": {"lambda": 0.3},
        "model": "ast_pico",
        "model_args": {"depth": 2, "token_merging": 2},
        "mixup": 0.5,
        "accumulate": 2,
    },
    "cosine": {
        "embeddingspath": "embeddings/supervised/clips/chunk_10",
        "objective": "cosine",
        "model": "resnet10_small",
        "model_args": {},
        "valid_fraction": None,
        "eval_data": None,
        "fill_chunks": True,
    },
    "contrastive": {
        **MASKS,
        "teacher": "experiments/supervised/audiotransformer_pico/latest",
        "objective": "contrastive",
        "objective_args": {"lambda": 0.2, "hidden": 32},
        "mixup": 0.5,
        "layer_decay": 0.8,
        "grad_clip": 1.0,
    },
}
STORES: dict[str, dict[str, Any]] = {
    "logits": {"epochs": 3, **MASKS},
    "embeddings": {"targets": "embeddings", "outputpath": "embeddings/"},
}
TAGGED = ("supervised", "patch_out", "waveform_mixup", "cmkd")  # runs whose models tag and are exported


def digest(*arrays: np.ndarray) -> str:
    """Return a hash of the bytes, types and shapes of arrays."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def summarise(array: np.ndarray) -> dict[str, Any]:
    """Return a hash of an array with its first values, so that a difference says how large it is."""
    return {"hash": digest(array), "first": [float(value) for value in array.reshape(-1)[:8]]}


def make_sounds(folder: Path) -> None:
    """Write clips of 0.6 to 1.4 s of four kinds and a list with their labels; a few lengths come several times."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows = ["filename\tlabels"]
    for number in range(N_CLIPS):
        n = (9600, 16000, 22400)[number % 3]
        time = np.arange(n) / RATE
        kind = number % len(CLASSES)
        wave = 0.02 * rng.standard_normal(n)
        if kind < 2:
            wave += 0.3 * np.sin(2 * np.pi * (150, 1800)[kind] * rng.uniform(0.8, 1.2) * time)
        wave += (0.2 * rng.standard_normal(n), 0.8 * (rng.random(n) < 0.002))[kind - 2] if kind >= 2 else 0.0
        soundfile.write(folder / f"clip{number}.wav", wave.astype(np.float32), RATE, subtype="PCM_16")
        rows.append(f"clip{number}.wav\t{CLASSES[kind]}")
    (folder / "clips.tsv").write_text("\n".join(rows) + "\n")


class Checkout:
    """A checkout whose commands are run in a folder of files.

    Args:
        root: of the checkout.
        files: the working folder of its commands.
    """

    def __init__(self, root: Path, files: Path) -> None:
        self.root, self.files = root.resolve(), files.resolve()

    def run(self, script: str, *arguments: str) -> str:
        """Run a script of the checkout; return what it printed.

        Raises:
            RuntimeError: it failed; with the end of its output.
        """
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.root), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(self.root / script) if script.endswith(".py") else script, *arguments]
        done = subprocess.run(command, cwd=self.files, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done.stdout

    def inside(self, section: str, *arguments: str) -> Any:
        """Compute a section in a process that imports the checkout's own modules; return its result."""
        return json.loads(
            self.run("-u", str(Path(__file__).resolve()), "_inside", section, *arguments).splitlines()[-1]
        )


def write_yaml(path: Path, settings: dict[str, Any]) -> str:
    """Write a configuration; return its path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def record_runs(checkout: Checkout) -> Iterator[tuple[str, Any]]:
    """Train every kind of run; yield its losses and the hashes of the weights that it kept."""
    files = checkout.files
    make_sounds(files / "sounds")
    checkout.run("scripts/wavlist_to_hdf5.py", "sounds/clips.tsv", "packs", "-n", "0")
    for name, changes in RUNS.items():
        settings = {key: value for key, value in (BASE | changes).items() if value is not None}
        config = write_yaml(files / "configurations" / f"{name}.yaml", settings)
        checkout.run("run.py", "--seed=7", "train", config)
        (folder,) = (files / "experiments" / name).glob("*/2*")
        entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        kept = ("loss", "lr", "loss_labels", "loss_teacher", "cosine", "valid_mAP")
        yield name, [{key: entry[key] for key in kept if key in entry} for entry in entries]
        yield f"{name} weights", checkout.inside("weights", *map(str, sorted(folder.glob("*.pt"))))
        if name == "supervised":
            for kind, more in STORES.items():
                teacher = f"experiments/{name}/{settings['model']}/latest"
                store = {"train_data": BASE["train_data"], "model": teacher, "name": name, "num_workers": 0, **more}
                checkout.run("save_logits.py", write_yaml(files / "configurations" / f"{kind}.yaml", store))


def record_tags(checkout: Checkout) -> Iterator[tuple[str, Any]]:
    """Tag sounds with trained models, evaluate and export them; yield what came out."""
    for name in TAGGED:
        (model,) = (checkout.files / "experiments" / name).glob("*/latest")
        if not (checkout.files / "tags").exists():
            (checkout.files / "tags").mkdir()
        tags = checkout.files / "tags" / f"{name}.csv"
        checkout.run("inference.py", "sounds", "-m", str(model), "--output", str(tags), "--quiet", "--overwrite")
        yield f"{name} tags", sorted(tags.read_text().splitlines())
        graph = checkout.files / "exports" / name / "model.onnx"
        graph.parent.mkdir(parents=True, exist_ok=True)
        checkout.run("export_onnx.py", "-m", str(model), "--output", str(graph))
        yield f"{name} onnx", checkout.inside("onnx", str(graph))
        yield (
            f"{name} evaluated",
            checkout.run(
                "run.py",
                "evaluate",
                str(model),
                "--test_data",
                BASE["eval_data"],
                "--num_workers=0",
                "--output=results",
            ).splitlines()[:8],
        )


def record_models(checkout: Checkout) -> Iterator[tuple[str, Any]]:
    """Yield fresh weights, tags and embeddings of every registered model for a fixed seed."""
    for name in checkout.inside("names"):
        yield name, checkout.inside("model", name)


SECTIONS: dict[str, Callable[[Checkout], Iterator[tuple[str, Any]]]] = {
    "runs": record_runs,
    "tags": record_tags,
    "models": record_models,
}


def _inside(section: str, arguments: list[str]) -> Any:
    """Compute a section with the modules of the checkout on the path."""
    import torch

    if section == "names":
        from models import list_models

        return list_models()
    if section == "weights":
        states = {Path(path).name: torch.load(path, weights_only=True) for path in arguments}
        return {name: _weights(state.get("model", state)) for name, state in states.items()}
    if section == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(arguments[0])
        shape = session.get_inputs()[0].shape
        features = np.random.default_rng(0).standard_normal((2, shape[1], 100)).astype(np.float32)
        return summarise(session.run(None, {session.get_inputs()[0].name: features})[0])
    from models import create_model

    torch.manual_seed(0)
    model = create_model(arguments[0]).eval()
    generator = torch.Generator().manual_seed(1)
    waveform = 0.1 * torch.randn(2, 2 * model.sample_rate, generator=generator)
    lengths = torch.tensor([2 * model.sample_rate, model.sample_rate])
    found: dict[str, Any] = {"weights": _weights(model.state_dict())}
    with torch.inference_mode():
        if model.num_classes:
            found["tags"] = summarise(model.predict(waveform, lengths).numpy())
        clip, frames = model.embed(waveform, lengths)
    return found | {"clip": summarise(clip.numpy()), "frames": summarise(frames.numpy())}


def _weights(state: dict[str, Any]) -> str:
    """Return a hash of names, shapes and values, in their order: it feeds hashes that heads and stores keep."""
    found = hashlib.sha256()
    for name, tensor in state.items():
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def record(root: Path, output: Path, sections: list[str], artefacts: Path | None) -> None:
    """Record a checkout into `output`, its files into a folder beside it (or those of `artefacts`, copied)."""
    files = output.with_suffix(".files")
    shutil.rmtree(files, ignore_errors=True)
    if artefacts is not None:
        shutil.copytree(artefacts, files, symlinks=True)
    files.mkdir(exist_ok=True)
    checkout = Checkout(root, files)
    found: dict[str, dict[str, Any]] = {}
    for section in sections:
        found[section] = {}
        for name, value in SECTIONS[section](checkout):
            print(f"{section}: {name}", flush=True)
            found[section][name] = value
    output.write_text(json.dumps(found, indent=1))


def compare(one: Path, other: Path) -> int:
    """Print every entry of two records that differs; return how many there are."""
    before, after = json.loads(one.read_text()), json.loads(other.read_text())
    n_equal, different = 0, []
    for section in before.keys() & after.keys():
        for name in before[section] | after[section]:
            pair = before[section].get(name), after[section].get(name)
            if pair[0] == pair[1]:
                n_equal += 1
            else:
                different.append(f"{section}: {name}\n    {str(pair[0])[:300]}\n    {str(pair[1])[:300]}")
    print("\n".join([*different, f"{n_equal} entries are equal, {len(different)} differ"]))
    return len(different)


def main(arguments: list[str]) -> None:
    """Do what the command line says."""
    if arguments[:1] == ["_inside"]:
        print(json.dumps(_inside(arguments[1], arguments[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("checkout", type=Path)
    recording.add_argument("output", type=Path, metavar="RECORD.json")
    recording.add_argument("--sections", default=",".join(SECTIONS), help="default %(default)s")
    recording.add_argument("--artefacts", type=Path, metavar="RECORD.files", help="files that an earlier record left")
    comparing = commands.add_parser("compare")
    comparing.add_argument("one", type=Path)
    comparing.add_argument("other", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "compare":
        sys.exit(compare(options.one, options.other) > 0)
    record(options.checkout, options.output, options.sections.split(","), options.artefacts)


if __name__ == "__main__":
    main(sys.argv[1:])
