"""Record the results of a checkout, and compare two records: a refactoring must not change a bit.

    python scripts/benchmarks/behaviour.py record CHECKOUT RECORD.json [--sections runs,models,...]
    python scripts/benchmarks/behaviour.py record OTHER_CHECKOUT OTHER.json [--artefacts RECORD.files]
    python scripts/benchmarks/behaviour.py compare RECORD.json OTHER.json

`record` runs the commands of a checkout (any commit of this project) in separate processes, each on one thread, and
records the losses of 50 steps and the hashes of the final weights for every kind of training, tags, embeddings and
initial weights of every registered model, and the outputs of exported graphs. The files of the runs (packs, stores,
checkpoints, exports) are kept in RECORD.files; with `--artefacts` another checkout reads the files of an earlier
record. `compare` lists every entry that differs, and exits with status 1 if there is one. Both records must be made on
one machine: the last bits of a matrix product differ between processors.

This file imports no module of the project, so that those of the checkout can be imported.
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

CLASSES = ("hum", "tone", "hiss", "click")
RATE, N_CLIPS = 16000, 48
PLAN: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())


def digest(*arrays: np.ndarray) -> str:
    """Return a hash of the bytes, types and shapes of arrays."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def summarise(array: np.ndarray) -> dict[str, Any]:
    """Return a hash of an array with its first values, which show how large a difference is."""
    return {"hash": digest(array), "first": [float(value) for value in array.reshape(-1)[:8]]}


def make_sounds(folder: Path) -> None:
    """Write clips of 0.6, 1 and 1.4 s of four kinds, and a list with their labels."""
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
        else:
            # Both are drawn, whichever is used: existing records depend on the order of draws.
            wave += (0.2 * rng.standard_normal(n), 0.8 * (rng.random(n) < 0.002))[kind - 2]
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
        """Run a script of the checkout and return its output.

        Raises:
            RuntimeError: it failed; with the end of its output.
        """
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.root), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(self.root / script) if script.endswith(".py") else script, *arguments]
        done = subprocess.run(command, cwd=self.files, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done.stdout

    def compute(self, name: str, *arguments: str) -> Any:
        """Call a function of `FUNCTIONS` in a process that imports the modules of the checkout; return its result."""
        output = self.run("-u", str(Path(__file__).resolve()), "_compute", name, *arguments)
        return json.loads(output.splitlines()[-1])


def write_yaml(path: Path, settings: dict[str, Any]) -> str:
    """Write a configuration; return its path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def record_runs(checkout: Checkout) -> Iterator[tuple[str, Any]]:
    """Train every kind of run; yield its losses and the hashes of its final weights."""
    files = checkout.files
    make_sounds(files / "sounds")
    checkout.run("scripts/wavlist_to_hdf5.py", "sounds/clips.tsv", "packs", "-n", "0")
    for name, changes in PLAN["runs"].items():
        settings = {key: value for key, value in (PLAN["base"] | changes).items() if value is not None}
        config = write_yaml(files / "configurations" / f"{name}.yaml", settings)
        checkout.run("run.py", "--seed=7", "train", config)
        (folder,) = (files / "experiments" / name).glob("*/2*")
        entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        kept = ("loss", "lr", "loss_labels", "loss_teacher", "cosine", "valid_mAP")
        yield name, [{key: entry[key] for key in kept if key in entry} for entry in entries]
        yield f"{name} weights", checkout.compute("weights", *map(str, sorted(folder.glob("*.pt"))))
        if name == "supervised":
            for kind, more in PLAN["stores"].items():
                teacher = f"experiments/{name}/{settings['model']}/latest"
                store = {"train_data": settings["train_data"], "model": teacher, "name": name, "num_workers": 0} | more
                checkout.run("save_logits.py", write_yaml(files / "configurations" / f"{kind}.yaml", store))


def record_tags(checkout: Checkout) -> Iterator[tuple[str, Any]]:
    """Tag sounds with trained models, evaluate and export these; yield the results."""
    for name in PLAN["tagged"]:
        (model,) = (checkout.files / "experiments" / name).glob("*/latest")
        tags = checkout.files / "tags" / f"{name}.csv"
        tags.parent.mkdir(exist_ok=True)
        checkout.run("inference.py", "sounds", "-m", str(model), "--output", str(tags), "--quiet", "--overwrite")
        yield f"{name} tags", sorted(tags.read_text().splitlines())
        graph = checkout.files / "exports" / name / "model.onnx"
        graph.parent.mkdir(parents=True, exist_ok=True)
        checkout.run("export_onnx.py", "-m", str(model), "--output", str(graph))
        yield f"{name} onnx", checkout.compute("onnx", str(graph))
        options = ("--test_data", PLAN["base"]["eval_data"], "--num_workers=0", "--output=results")
        yield f"{name} evaluated", checkout.run("run.py", "evaluate", str(model), *options).splitlines()[:8]


def record_models(checkout: Checkout) -> Iterator[tuple[str, Any]]:
    """Yield initial weights, tags and embeddings of every registered model for a fixed seed."""
    for name in checkout.compute("names"):
        yield name, checkout.compute("model", name)


SECTIONS: dict[str, Callable[[Checkout], Iterator[tuple[str, Any]]]] = {
    "runs": record_runs,
    "tags": record_tags,
    "models": record_models,
}


def _list_models() -> list[str]:
    from models import list_models

    return list_models()


def _hash_checkpoints(*paths: str) -> dict[str, str]:
    import torch

    states = {Path(path).name: torch.load(path, weights_only=True) for path in paths}
    return {name: _hash_weights(state.get("model", state)) for name, state in states.items()}


def _run_graph(path: str) -> dict[str, Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    shape = session.get_inputs()[0].shape
    features = np.random.default_rng(0).standard_normal((2, shape[1], 100)).astype(np.float32)
    return summarise(session.run(None, {session.get_inputs()[0].name: features})[0])


def _run_model(name: str) -> dict[str, Any]:
    import torch

    from models import create_model

    torch.manual_seed(0)
    model = create_model(name).eval()
    generator = torch.Generator().manual_seed(1)
    waveform = 0.1 * torch.randn(2, 2 * model.sample_rate, generator=generator)
    lengths = torch.tensor([2 * model.sample_rate, model.sample_rate])
    results: dict[str, Any] = {"weights": _hash_weights(model.state_dict())}
    with torch.inference_mode():
        if model.num_classes:
            results["tags"] = summarise(model.predict(waveform, lengths).numpy())
        clip, frames = model.embed(waveform, lengths)
    return results | {"clip": summarise(clip.numpy()), "frames": summarise(frames.numpy())}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "names": _list_models,
    "weights": _hash_checkpoints,
    "onnx": _run_graph,
    "model": _run_model,
}


def _hash_weights(state: dict[str, Any]) -> str:
    """Return a hash of names, shapes and values in their order, since stored hashes depend on that order."""
    found = hashlib.sha256()
    for name, tensor in state.items():
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def record(root: Path, output: Path, sections: list[str], artefacts: Path | None) -> None:
    """Record a checkout into `output`; its files are written beside it, into a copy of `artefacts` if given."""
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
    """Print every entry that differs between two records; return their number."""
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
    """Run the command of the command line."""
    if arguments[:1] == ["_compute"]:
        print(json.dumps(FUNCTIONS[arguments[1]](*arguments[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("checkout", type=Path)
    recording.add_argument("output", type=Path, metavar="RECORD.json")
    recording.add_argument("--sections", default=",".join(SECTIONS), help="default %(default)s")
    recording.add_argument("--artefacts", type=Path, metavar="RECORD.files", help="files of an earlier record")
    comparing = commands.add_parser("compare")
    comparing.add_argument("one", type=Path)
    comparing.add_argument("other", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "compare":
        sys.exit(compare(options.one, options.other) > 0)
    record(options.checkout, options.output, options.sections.split(","), options.artefacts)


if __name__ == "__main__":
    main(sys.argv[1:])
