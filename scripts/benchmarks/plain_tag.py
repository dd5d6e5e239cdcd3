"""Tag files in the simplest way: one file and one window at a time, attention weights materialised.

    python scripts/benchmarks/plain_tag.py CHECKPOINT OUTPUT.json CHUNK_SECONDS FILE...

`scripts/benchmark.py tag` times it as a whole process.
"""

import json
import sys
from pathlib import Path
from typing import cast

import soundfile
import soxr
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models import load_model
from models.audiotransformer import AudioTransformer
from models.ced_mel import CedMel
from scripts.benchmarks.plain import plain_logits, plain_mel


def main(checkpoint: str, output: str, chunk_seconds: str, *files: str) -> None:
    """Write {file: [probabilities of each window]}."""
    model = cast(AudioTransformer, load_model(checkpoint))
    front_end = cast(CedMel, model.front_end)
    size = round(float(chunk_seconds) * model.sample_rate)
    tagged = {}
    with torch.inference_mode():
        for file in files:
            samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
            waveform = torch.from_numpy(soxr.resample(samples.mean(axis=1), rate, model.sample_rate))
            tagged[file] = [
                plain_logits(model, plain_mel(front_end, window[None])).sigmoid()[0].tolist()
                for window in waveform.split(size)
                if len(window) == size or len(waveform) < size
            ]
    Path(output).write_text(json.dumps(tagged))


if __name__ == "__main__":
    main(*sys.argv[1:])
