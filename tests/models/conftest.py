import pytest
import torch

from models import create_model


@pytest.fixture(scope="module")
def pico():
    """A small transformer whose head is large enough for differences to show."""
    torch.manual_seed(0)
    model = create_model("audiotransformer_pico", num_classes=7).eval()
    torch.nn.init.normal_(model.outputlayer[1].weight, std=0.2)
    return model
