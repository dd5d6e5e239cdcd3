"""How this project runs ONNX files."""

import onnxruntime

# Products with quantized weights would otherwise round their inputs to 8 bits: probabilities are off by up to 5e-3.
SESSION_OPTIONS = {"session.qdq_matmulnbits_accuracy_level": "0"}


def create_options() -> onnxruntime.SessionOptions:
    """Return options of a session in which matrices of 2 to 8 bits are multiplied in float32."""
    options = onnxruntime.SessionOptions()
    for key, value in SESSION_OPTIONS.items():
        options.add_session_config_entry(key, value)
    return options
