"""`torch.hub.load` of a copy of this project, by processes that run in a folder of their own."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch

from models import attach_head, create_model, list_models, save_checkpoint
from models.headed import Head
from models.heads import save_head
from tests.conftest import ROOT, run_command

BEGIN = """
import json, sys, warnings
import numpy as np, torch
copy, sound = sys.argv[1], np.load("sound.npy")
def show(**values): print("RESULT " + json.dumps(values))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project's files in another folder, as `git clone` would put them there."""
    target = tmp_path_factory.mktemp("clone") / "ced"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode != 0:
        pytest.skip("needs git and a repository to list the project's files")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and name.split("/")[0] not in ("tests", "trainconfig"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture
def elsewhere(tmp_path):
    """A folder of a user, with a sound of 16 bits."""
    sound = np.random.default_rng(0).integers(-9000, 9000, (2, 16000)).astype(np.int16)
    np.save(tmp_path / "sound.npy", sound)
    return tmp_path


def run(elsewhere, copy, code, *words):
    (elsewhere / "use.py").write_text(BEGIN + code)
    done = run_command("use.py", copy, *words, cwd=elsewhere, env={"PYTHONPATH": "", "TORCH_HOME": str(elsewhere)})
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return (results[0] if results else None), done


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model("audiotransformer_pico", num_classes=3, labels=["a", "b", "c"]).eval()


@torch.no_grad()
def test_models_by_name_and_checkpoints_predict_and_embed_as_here(elsewhere, copy):
    own = model()
    save_checkpoint(elsewhere / "mine.pt", own)
    save_head(elsewhere / "heads" / "birds.pt", attach_head(own, Head(own.embed_dim, 2, labels=["x", "y"])).head)
    code = """
torch.manual_seed(0)
settings = {"num_classes": 3, "labels": ["a", "b", "c"]}
by_name = torch.hub.load(copy, "audiotransformer_pico", source="local", pretrained=False, **settings)
plain = torch.hub.load(copy, "audiotransformer_pico", source="local", num_classes=2)
weights = torch.hub.load(copy, "audiotransformer_pico", source="local", weights="mine.pt")
mine = torch.hub.load(copy, "tagger", "mine.pt", source="local")
birds = torch.hub.load(copy, "tagger", "mine.pt", head="birds", source="local")
ssondo = torch.hub.load(copy, "ssondo", "mine.pt", source="local")
assert not any(network.training for network in (by_name, plain, weights, mine, birds, ssondo))
import models.token_merging  # what is imported later on is found
from audio.io import resample  # as are the other packages
with torch.no_grad():
    show(
        probabilities=[network.predict(sound).tolist() for network in (by_name, weights, mine)],
        embeddings=[network.embed(sound)[0].tolist() for network in (by_name, weights, mine)],
        segments=ssondo.get_embeddings(sound).tolist(),
        birds=birds.predict(sound).tolist(),
        labels=[mine.labels, birds.labels, [str(plain.num_classes)]],
        files=sorted({sys.modules[name].__file__ for name in ("models", "common.errors", "audio.io")}),
    )
"""
    found, done = run(elsewhere, copy, code)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert all(name.startswith(str(copy)) for name in found["files"])
    sound = torch.from_numpy(np.load(elsewhere / "sound.npy"))
    for values in found["probabilities"]:
        torch.testing.assert_close(torch.tensor(values), own.predict(sound), atol=1e-6, rtol=0)
    for values in (*found["embeddings"], found["segments"]):
        torch.testing.assert_close(torch.tensor(values), own.embed(sound)[0], atol=1e-5, rtol=0)
    assert found["labels"] == [["a", "b", "c"], ["x", "y"], ["2"]]
    assert np.shape(found["birds"]) == (2, 2)


def test_every_model_is_an_entry_point_and_describes_its_arguments(elsewhere, copy):
    code = """
from torch.hub import _add_to_sys_path, _import_module
with _add_to_sys_path(copy):
    hub = _import_module("hubconf", copy + "/hubconf.py")
names = [name for name in dir(hub) if callable(getattr(hub, name)) and not name.startswith("_")]  # as `torch.hub.list`
show(names=names, dependencies=hub.dependencies, mini=hub.ced_mini.__doc__, pico=hub.audiotransformer_pico.__doc__)
"""
    found, done = run(elsewhere, copy, code)
    assert done.returncode == 0, done.stderr
    assert set(found["names"]) == {*list_models(), "tagger", "ssondo"}
    assert "True: there are published weights" in found["mini"]
    assert "False: there are none" in found["pico"]
    for name in found["dependencies"]:
        __import__(name)


def test_a_mistake_is_a_sentence(elsewhere, copy):
    code = """
try:
    torch.hub.load(copy, "tagger", "nowhere.pt", source="local")
except Exception as error:
    show(kind=type(error).__name__, text=str(error))
"""
    found, _ = run(elsewhere, copy, code)
    assert found["kind"] == "UserError"
    assert "nowhere.pt" in found["text"]


def test_a_package_of_the_users_own_of_the_same_name_is_reported(elsewhere, copy):
    load = 'torch.hub.load(copy, "audiotransformer_pico", source="local", pretrained=False, num_classes=3)'
    (elsewhere / "models").mkdir()
    found, done = run(elsewhere, copy, f"network = {load}\nshow(n=network.num_classes)")
    assert (found, "Warning" in done.stderr) == ({"n": 3}, False)  # a folder of weights is no package
    (elsewhere / "models" / "__init__.py").write_text("mine = 1\n")
    found, done = run(elsewhere, copy, f"network = {load}\nshow(shape=list(network.predict(sound).shape))")
    assert found == {"shape": [2, 3]}
    assert f"imports the packages of {copy}, and no longer {elsewhere / 'models' / '__init__.py'}" in done.stderr
    _, done = run(elsewhere, copy, f"import models\n{load}")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: the package 'models' of {elsewhere / 'models' / '__init__.py'} is imported")
    assert "in a separate process, or rename yours" in last


def test_a_relative_path_will_do_and_the_model_goes_to_other_processes(elsewhere, copy):
    code = """
import os
if __name__ == "__main__":
    home = os.getcwd()
    os.chdir(os.path.dirname(copy))
    network = torch.hub.load("ced", "audiotransformer_pico", source="local", pretrained=False, num_classes=3)
    os.chdir(home)
    import torch.multiprocessing as processes
    context = processes.get_context("spawn")
    with context.Pool(1) as pool:
        there = pool.apply(network.predict, (torch.from_numpy(sound),))
    show(difference=(there - network.predict(sound)).abs().max().item())
"""
    found, done = run(elsewhere, copy, code)
    assert done.returncode == 0, done.stderr
    assert found["difference"] < 1e-6
