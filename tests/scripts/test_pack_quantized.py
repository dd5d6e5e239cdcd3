"""From a checkpoint of float weights to a packed file, and what takes that file for a model, by their commands."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from distill.targets import SoftTargetStore
from models import AudioTagger, attach_head, create_model, load_model, save_checkpoint
from models.headed import Head
from models.packing import count_bytes
from models.quantization_recipe import Quantization
from models.quantizers import FakeQuantize
from scripts import check_pack, export_hf, pack_quantized, quantize
from tests.conftest import ROOT, run_command, write_tones

LABELS = ["tone 0", "tone 1", "tone 2"]


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = create_model("audiotransformer_pico", labels=LABELS, depth=1)
    torch.nn.init.normal_(model.outputlayer[1].weight, std=0.3)
    save_checkpoint("mine.pt", model)
    return model.eval()


def test_a_checkpoint_is_quantized_and_its_loss_and_packed_size_are_those_printed(checkpoint, capsys):
    quantize.main(["mine.pt", "--bits", "3", "--clip", "absmax", "--skip", "patch_embed*,outputlayer.1"])
    printed = capsys.readouterr().out
    loaded = load_model("mine_3bit.pt")
    recipe = Quantization(weights=3, clip="absmax", skip=("patch_embed*", "outputlayer.1"))
    assert loaded.arguments["quantize"] == recipe.describe()
    energy = lost = 0.0
    for name, weight in checkpoint.blocks.named_parameters():
        if weight.ndim > 1:
            expected = FakeQuantize(weight.detach(), recipe).eval()(weight.detach())
            assert torch.equal(loaded.blocks.get_parameter(name), expected)
            energy += float(weight.detach().double().square().sum())
            lost += float((weight.detach() - expected).double().square().sum())
    assert torch.equal(loaded.outputlayer[1].weight, checkpoint.outputlayer[1].weight)
    for kind in ("linear", "all"):
        assert re.search(rf"^{kind} +[\d,]+ +{lost / energy:.3%}$", printed, re.MULTILINE)
    pack_quantized.main(["mine_3bit.pt"])
    n_bytes = Path("mine_3bit.ceq").stat().st_size
    assert f"packed, {n_bytes:,} bytes, {n_bytes / count_bytes(checkpoint):.2%} of float32" in printed


def test_the_table_has_the_bytes_of_the_file_its_parts_the_student_and_the_teacher(checkpoint, tmp_path, capsys):
    quantize.main(["mine.pt", "-o", "q.pt"])
    capsys.readouterr()
    pack_quantized.main(["q.pt", "-o", "small.ceq", "--entropy", "--rest", "fp16", "--teacher", "resnet10_small"])
    printed = capsys.readouterr().out
    lines = [re.split(r" {2,}", line.strip()) for line in printed.splitlines()[1:-1]]
    sizes = {line[0]: int(line[1].replace(",", "")) for line in lines}
    student, teacher = count_bytes(checkpoint), count_bytes(create_model("resnet10_small"))
    assert sizes["file"] == (tmp_path / "small.ceq").stat().st_size == sum(list(sizes.values())[1:5])
    assert sizes["student in fp32"] == student
    assert sizes["teacher in fp32"] == teacher
    assert lines[0][2:] == [f"{sizes['file'] / student:.2%}", f"{sizes['file'] / teacher:.2%}"]
    assert "all other tensors rounded to float16, so that predictions differ slightly" in printed


def test_a_file_becomes_a_folder_of_transformers_and_is_checked_for_damage(checkpoint, tmp_path, capsys):
    quantize.main(["mine.pt"])
    pack_quantized.main(["mine_4bit.pt", "-o", "mine.ceq"])
    export_hf.main(["-m", "mine.ceq", "folder"])
    sound = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_model("folder").predict(sound), load_model("mine_4bit.pt").predict(sound))
    check_pack.main(["mine.ceq"])
    assert "mine.ceq: model intact" in capsys.readouterr().out
    with open("mine.ceq", "r+b") as file:
        file.seek(-9, 2)
        file.write(b"x")
    with pytest.raises(SystemExit) as end:
        check_pack.main(["mine.ceq"])
    assert end.value.code == 1
    assert "its content does not have its checksum" in capsys.readouterr().out


def test_the_head_of_a_model_stays_float(checkpoint):
    head = Head(checkpoint.embed_dim, 2, labels=["x", "y"])
    torch.nn.init.normal_(head.layers[0].weight)
    save_checkpoint("headed.pt", attach_head(checkpoint, head))
    quantize.main(["headed.pt", "--bits", "2"])
    pack_quantized.main(["headed_2bit.pt"])
    read: AudioTagger = load_model("headed_2bit.ceq")
    assert read.labels == ["x", "y"]
    assert torch.equal(read.head.layers[0].weight, head.layers[0].weight)


@pytest.mark.parametrize(
    ("command", "words", "sentence", "status"),
    [
        (quantize, "twice.pt", "twice.pt would be quantized twice: it has weights of 4 bits already", 1),
        (quantize, "mine.pt -o mine.pt", "mine.pt is the checkpoint of float weights, which would be lost", 1),
        (quantize, "mine.pt -o no/x.pt", "its folder does not exist", 1),
        (quantize, "mine.pt --skip head.*", "the pattern 'head.*' in skip fits no weight", 1),
        (quantize, "mine.pt --scheme levels --clip mse", "leave clip out", 1),
        (quantize, "mine.pt --fold_batch_norm", "no batch norm follows a convolution", 1),
        (quantize, "mine.pt --bits 9", "--bits is 9; expected", 2),
        (quantize, "mine.pt -o x.ceq", "--output expects a name that ends in .pt", 2),
        (quantize, "", "CHECKPOINT is missing", 2),
        (pack_quantized, "mine.pt", "audiotransformer_pico is not quantized: run scripts/quantize.py", 1),
        (pack_quantized, "twice.pt -o no/x.ceq", "its folder does not exist", 1),
        (pack_quantized, "twice.pt -o x.pt", "--output expects a name that ends in .ceq", 2),
        (pack_quantized, "twice.pt --rest fp8", "--rest is 'fp8'; expected", 2),
        (pack_quantized, "twice.pt --teacher nothing", "nothing: no such file", 1),
    ],
)
def test_faults_are_one_sentence_and_nothing_is_written(command, words, sentence, status, checkpoint, tmp_path, capsys):
    save_checkpoint("twice.pt", load_model("mine.pt", quantize={"weights": 4}))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit) as end:
        command.main(words.split())
    assert end.value.code == status
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.long
def test_a_file_is_taken_wherever_a_checkpoint_is(checkpoint, tmp_path):
    listed = write_tones(tmp_path, 9, 3, 16000, 1.0)
    quantize.main(["mine.pt"])
    pack_quantized.main(["mine_4bit.pt", "-o", "mine.ceq"])
    packed = "out/labels/tones.tsv"
    store = f"model: MODEL\nname: NAME\ntrain_data: {packed}\nepochs: 1\ntopk: 3\nnum_workers: 1\nspectransforms: []\n"
    Path("store.yaml").write_text(store)
    commands = [
        "inference.py sounds -m MODEL --output NAME.csv",
        "run.py evaluate MODEL --test_data PACK --output NAME_scores",
        "run.py probe MODEL --name NAME --train_data PACK --test_data PACK",
        "save_logits.py store.yaml --model MODEL --name NAME",
        "export_onnx.py -m MODEL --precision fp32 --output NAME.onnx",
    ]
    assert run_command(ROOT / "scripts" / "wavlist_to_hdf5.py", listed, "out", cwd=tmp_path).returncode == 0
    for command in commands:
        for model, name in (("mine_4bit.pt", "plain"), ("mine.ceq", "packed")):
            words = command.replace("MODEL", model).replace("NAME", name).replace("PACK", packed).split()
            done = run_command(ROOT / words[0], *words[1:], cwd=tmp_path)
            assert done.returncode == 0, done.stderr
    tables = [pd.read_csv(f"{name}.csv") for name in ("plain", "packed")]
    pd.testing.assert_frame_equal(*tables, atol=1e-5)  # batches may differ
    scores = [json.loads(Path(f"{name}_scores/evaluation_tones.json").read_text()) for name in ("plain", "packed")]
    assert scores[0]["mAP"] == scores[1]["mAP"]
    stores = [SoftTargetStore(next(Path("logits", name).rglob("meta.json")).parent) for name in ("plain", "packed")]
    for key, values in stores[0].read_arrays(1).items():
        assert (values == stores[1].read_arrays(1)[key]).all()
    assert Path("plain.onnx").stat().st_size == Path("packed.onnx").stat().st_size
