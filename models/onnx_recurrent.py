"""Layers of nn.LSTM and nn.GRU as single operators of ONNX graphs.

PyTorch's exporter would write out every step of the example that it traces.

Letters: B batch, T steps, F inputs, D units, G gates.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

# Operator, and PyTorch's gates in the order of ONNX: input, output, forget, cell; update, reset, hidden.
_OPERATORS: dict[type[nn.Module], tuple[str, tuple[int, ...]]] = {
    nn.LSTM: ("LSTM", (0, 3, 1, 2)),
    nn.GRU: ("GRU", (1, 0, 2)),
}


def order_gates(layer: nn.RNNBase, rows: Tensor) -> Tensor:
    """Order the rows of a weight or bias (G D,..) of an nn.LSTM or nn.GRU by gate, as ONNX has them."""
    gates = _OPERATORS[type(layer)][1]
    parts = rows.chunk(len(gates))
    return torch.cat([parts[gate] for gate in gates])


class RecurrentOperator(nn.Module):
    """One layer as an operator, for tracing only.

    Its weights keep the names of the layer's: (1,G D,F) and (1,G D,D) in ONNX's order. The two biases are one tensor,
    (1,2 G D).

    Args:
        layer: with one direction, biases and `batch_first`, and without projection.
    """

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_l0: Tensor

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.quantize_input = getattr(layer, "activation_quantizer", nn.Identity())
        self.operator, self.hidden_size = _OPERATORS[type(layer)][0], layer.hidden_size
        ordered = {name: order_gates(layer, value.detach()) for name, value in layer.named_parameters(recurse=False)}
        for name in ("weight_ih_l0", "weight_hh_l0"):
            self.register_buffer(name, ordered[name][None])
        self.register_buffer("bias_l0", torch.cat([ordered["bias_ih_l0"], ordered["bias_hh_l0"]])[None])

    def forward(self, x: Tensor, before: None = None) -> tuple[Tensor, None]:
        """(B,T,F) -> (B,T,D), from a state of zeros."""
        x = self.quantize_input(x)
        # PyTorch's reset gate acts on the product of matrix and state, not on the state.
        linear = {"linear_before_reset": 1} if self.operator == "GRU" else {}
        y = torch.onnx.ops.symbolic(
            self.operator,
            (x.transpose(0, 1), self.weight_ih_l0, self.weight_hh_l0, self.bias_l0),
            {"hidden_size": self.hidden_size, **linear},
            dtype=x.dtype,
            shape=(x.shape[1], 1, x.shape[0], self.hidden_size),
        )
        return y.squeeze(1).transpose(0, 1), None


def replace_recurrent_layers(model: Model) -> Model:
    """Return a copy of a model in which single layers of nn.LSTM and nn.GRU are operators."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if type(layer) in _OPERATORS and isinstance(layer, nn.RNNBase):
            is_single = layer.num_layers == 1 and not layer.bidirectional
            if is_single and layer.batch_first and layer.bias and not layer.proj_size:
                model.set_submodule(name, RecurrentOperator(layer))
    return model
