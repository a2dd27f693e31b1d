"""OpenVINO models, converted from ONNX models.

OpenVINO reads the conversions of weights in half precision as part of the weights and computes them, so that its file
would hold them in float32: they are made half again, each with its conversion.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import onnx
    import openvino

METADATA = "ddim"
"""The section of a model's runtime info that holds its metadata."""


def convert_model(model: onnx.ModelProto, weights_dtype: torch.dtype) -> openvino.Model:
    """Convert an ONNX model, its metadata included.

    Args:
        model: as `ddim.export.onnx_format.make_model` returns it.
        weights_dtype: of its weights.

    Returns:
        The model of OpenVINO.
    """
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        source.write_bytes(model.SerializeToString())
        converted = openvino.convert_model(source)
    if weights_dtype != torch.float32:
        for part in _with_bodies(converted):
            _store_weights(part, weights_dtype)
    for entry in model.metadata_props:
        converted.set_rt_info(entry.value, [METADATA, entry.key])
    return converted


def _with_bodies(model: openvino.Model) -> Iterator[openvino.Model]:
    """Yield a model, and those inside its loops."""
    yield model
    for operation in model.get_ops():
        if hasattr(operation, "get_body"):
            yield from _with_bodies(operation.get_body())


def _store_weights(model: openvino.Model, dtype: torch.dtype) -> None:
    """Store the float32 constants that a dtype holds exactly in it, as `ddim.export.onnx_format.store_weights` does."""
    import openvino
    from openvino import opset13 as operators

    stored_type = {torch.float16: openvino.Type.f16, torch.bfloat16: openvino.Type.bf16}[dtype]
    for operation in model.get_ops():
        if operation.get_type_name() != "Constant" or operation.get_element_type() != openvino.Type.f32:
            continue
        values = torch.from_numpy(np.array(operation.data))
        if values.ndim and torch.equal(values.to(dtype).float(), values):
            stored = operators.constant(values.numpy(), dtype=stored_type)
            converted = operators.convert(stored, "f32").output(0)
            for consumer in operation.output(0).get_target_inputs():
                consumer.replace_source_output(converted)
