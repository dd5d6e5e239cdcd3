"""How this project runs ONNX files."""

import onnxruntime

SESSION_OPTIONS = {
    # Products with weights of 2 to 8 bits would otherwise round their inputs to 8 bits, which costs up to 5e-3.
    "session.qdq_matmulnbits_accuracy_level": "0",
    # Weights become float32 once, when a file is opened, and not at every run; batch norms are folded into them.
    "session.disable_quant_qdq": "1",
}


def create_options() -> onnxruntime.SessionOptions:
    """Return options of a session in which matrices of 2 to 8 bits are multiplied in float32."""
    options = onnxruntime.SessionOptions()
    for key, value in SESSION_OPTIONS.items():
        options.add_session_config_entry(key, value)
    return options
