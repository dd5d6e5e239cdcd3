"""Writes a model as a folder of Hugging Face's transformers, which carries the code of the model.

The code is this project's own: three of the files beside this one (configuration and model are each architecture's
own) and all that they import, laid flat, with their imports made relative, as transformers' loader of custom code
requires them.
"""

import ast
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any

import torch

from common.errors import UserError, some
from common.files import reserve_partial, write_json, write_text
from models import AudioTagger, load_model
from models.audiotransformer import AudioTransformer
from models.headed import HeadedTagger
from models.huggingface import CLASS_PREFIXES, get_network, model_type, write_huggingface
from models.resnet import STRIDE, ResNet10

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent.parent
_OWN_IMPORT = re.compile(r"^from (?:common|models|scripts\.hf)\.(\w+) import", re.MULTILINE)
_OWN = ("audio", "common", "distill", "models", "scripts", "tagging", "training")


def export(model: AudioTagger, folder: Path, *, overwrite: bool = False) -> None:
    """Write a folder that transformers' Auto classes load with `trust_remote_code=True`.

    It is read back before it takes its place.

    Args:
        model: an audio transformer, a ResNet-10, or one of them with a head on it.
        folder: what to write; it may exist if it is empty.
        overwrite: replace the files of an export in a folder that exists; README.md and other files in it stay.

    Raises:
        UserError: another kind of model, or a folder that is in use.
    """
    network = get_network(model)
    kind = model_type(network)
    folder = folder.resolve()  # "." has no name
    if folder.is_file():
        raise UserError(f"{folder} is a file: give the name of a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{folder} is not empty: give another folder, or --overwrite to replace an export in it")
    with _whole_folder(folder) as partial:
        write_huggingface(partial, model, {"auto_map": _auto_map(kind)})
        write_json(partial / "preprocessor_config.json", _preprocessor(network))
        for name, text in code_files(kind).items():
            write_text(partial / name, text)
        write_text(partial / "LICENSE-CODE", (ROOT / "LICENSE").read_text(encoding="utf-8"))
        write_text(partial / "README.md", _format_card(model, network, folder))
        _check(partial, model)


def _auto_map(kind: str) -> dict[str, str]:
    """The classes behind transformers' Auto classes."""
    prefix = CLASS_PREFIXES[kind]
    return {
        "AutoConfig": f"configuration_{kind}.{prefix}Config",
        "AutoModel": f"modeling_{kind}.{prefix}Model",
        "AutoModelForAudioClassification": f"modeling_{kind}.{prefix}ForAudioClassification",
    }


def code_files(kind: str = "ced") -> dict[str, str]:
    """Return the code of an exported folder: file names and their text.

    Args:
        kind: the `model_type` of its network.

    Raises:
        ValueError: a file imports what cannot be laid flat (a fault of this project).
    """
    files: dict[str, str] = {}
    for name in (f"configuration_{kind}.py", "feature_extraction_ced.py", f"modeling_{kind}.py"):
        path = Path(__file__).parent / name
        needed = _collect_files(path)
        for name, source in needed.items():
            files.setdefault(name, _OWN_IMPORT.sub(r"from .\1 import", source.read_text(encoding="utf-8")))
        others = "".join(
            f"    from .{Path(name).stem} import __doc__\n" for name in sorted(needed) if name != path.name
        )
        files[path.name] += f"\nif False:  # transformers 4 copies only the files that are named in this one\n{others}"
    return files


def _collect_files(start: Path) -> dict[str, Path]:
    """A file of ours and all of ours that it imports, by name."""
    found = {start.name: start}
    waiting = [start]
    while waiting:
        for module in _own_imports(waiting.pop()):
            path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
            if path.name not in found:
                waiting.append(path)
            if found.setdefault(path.name, path) != path:
                raise ValueError(f"{path} and {found[path.name]} would be one file")
    return found


def _own_imports(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    modules = []
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        modules += [name for name in names if name.split(".")[0] in _OWN]
    if len(modules) != len(_OWN_IMPORT.findall(text)):
        raise ValueError(f"{path} imports {some(modules)}: write each as `from models.file import name` on a line")
    return modules


def _preprocessor(network: AudioTransformer | ResNet10) -> dict[str, Any]:
    front_end = network.front_end
    return {
        "auto_map": {"AutoFeatureExtractor": "feature_extraction_ced.CedFeatureExtractor"},
        "feature_extractor_type": "CedFeatureExtractor",
        "feature_size": front_end.n_mels,
        "sampling_rate": front_end.sample_rate,
        **{
            key: getattr(front_end, key)
            for key in ("f_min", "f_max", "n_fft", "win_size", "hop_size", "center", "min_frames")
        },
        **({} if front_end.band_limit is None else {"band_limit": front_end.band_limit}),
        "padding_side": "right",
        "return_attention_mask": True,
    }


def _format_card(model: AudioTagger, network: AudioTransformer | ResNet10, folder: Path) -> str:
    softmax = model.activation == "softmax"
    head = ", and a head on its embeddings" if isinstance(model, HeadedTagger) else ""
    seconds_a_frame = network.front_end.hop_size / model.sample_rate
    if isinstance(network, ResNet10):
        kind, what = "ResNet-10 on CED's log-mels", f"{network.name}, embeddings of width {network.embed_dim}"
        frames_a_step = STRIDE
        long_clips = "Clips\nof any length are taken whole."
    else:
        kind, what = (
            "CED audio transformer",
            f"{network.name}, {len(network.blocks)} blocks of width {network.embed_dim}",
        )
        frames_a_step = network.patch_stride
        joined = "embeddings are averaged" if head else f"probabilities are joined ({network.eval_avg})"
        long_clips = (
            f"Clips\nabove {network.target_length * seconds_a_frame:.2f} s are cut into chunks of that length, and the "
            f"chunks' {joined}."
        )
    return Template((Path(__file__).parent / "card.md").read_text(encoding="utf-8")).substitute(
        title=folder.resolve().name,
        folder=folder.resolve().name,
        tag=model_type(network),
        n_classes=model.num_classes,
        some_labels=some(model.labels),
        network=f"{kind} ({what}{head})",
        parameters=f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        sample_rate=model.sample_rate,
        probabilities="exactly one of the classes" if softmax else "a probability for each class, independently",
        function="softmax" if softmax else "sigmoid",
        applied=".softmax(-1)" if softmax else ".sigmoid()",
        top_k=min(3, model.num_classes),
        long_clips=long_clips,
        width=model.embed_dim,
        step_ms=f"{frames_a_step * seconds_a_frame * 1000:g}",
    )


@torch.inference_mode()
def _check(folder: Path, model: AudioTagger) -> None:
    """Read a written folder back; it must give what the model gives."""
    again = load_model(folder).eval()
    was_training, device = model.training, next(model.parameters()).device
    wave = torch.randn(1, model.sample_rate, generator=torch.Generator().manual_seed(0)) * 0.1
    difference = (again.predict(wave) - model.eval().predict(wave.to(device)).cpu()).abs().max()
    model.train(was_training)
    if not difference < 1e-4 or again.labels != model.labels or again.activation != model.activation:
        raise UserError(f"{model.name} cannot be written for transformers: what is read back is another model")


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """Give a folder to write to; on a clean exit its files are in `target`, on an error nothing has changed.

    Into a folder that holds files they are moved one by one, config.json last: until then it is no model's folder. A
    README.md that is there stays, with what its owner wrote into it.
    """
    with reserve_partial(target) as partial:
        partial.mkdir()
        yield partial
        if target.is_dir() and any(target.iterdir()):
            (target / "config.json").unlink(missing_ok=True)
            if (target / "README.md").exists():
                logger.info("%s is left as it is", target / "README.md")
                (partial / "README.md").unlink()
            for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, target / path.name)
        else:
            os.replace(partial, target)
