"""ONNX models of networks and sampling loops.

The graph is traced by `torch.onnx.export` (its exporter on `torch.export`), in an opset that all common runtimes know.
Group normalization is an InstanceNormalization of reshaped maps there, attention two MatMuls and a Softmax, upsampling
a Resize. A loop is the node Scan, whose body is the graph of one step:

    states     x, history, images, class labels    from step to step, starting from the inputs and zeros
    scanned    timesteps, coefficients             a row per step
    body       the step, with the weights          in the file once; it refers to nothing outside, which not all
                                                   runtimes take
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddim.export.graphs import EXAMPLE_BATCH, Graph, StepGraph
from ddim.version import __version__

if TYPE_CHECKING:
    import onnx

OPSET = 18
"""The version of the operators."""
TABLES = ("timestep", "coefficients")
"""The inputs of a step of which the loop has a row per step."""
MAX_BYTES = 2**31 - 2**24
"""Weights of a file: ONNX limits it to 2 GiB, with the graph, if it is to be one file."""


def make_model(graph: Graph, weights_dtype: torch.dtype, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """Return a graph as an ONNX model: the network, or the loop over a step.

    Args:
        graph: in evaluation mode.
        weights_dtype: of the weights in the file: what they have been rounded to before.
        metadata: texts by name.

    Returns:
        The model, checked.

    Raises:
        ValueError: if the weights exceed what an ONNX file can hold.
    """
    import onnx

    num_bytes = weights_dtype.itemsize * sum(parameter.numel() for parameter in graph.parameters())
    if num_bytes > MAX_BYTES:
        raise ValueError(
            f"an ONNX file holds at most 2 GiB, and the weights take {num_bytes / 2**30:.1f} GiB in "
            f"{str(weights_dtype).removeprefix('torch.')}"
        )
    model = _trace(graph)
    if weights_dtype != torch.float32:
        store_weights(model, weights_dtype)
    if isinstance(graph, StepGraph):
        model = _make_loop(model, graph)
    model.producer_name, model.producer_version = "ddim", __version__
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    return model


def _trace(graph: Graph) -> onnx.ModelProto:
    examples = graph.examples()
    batch = torch.export.Dim("N")
    shapes = tuple({0: batch} if _is_batch(x) else None for x in examples)
    with torch.no_grad(), _silent():
        program = torch.onnx.export(
            graph,
            tuple(examples),
            dynamo=True,
            opset_version=OPSET,
            input_names=graph.input_names,
            output_names=graph.output_names,
            dynamic_shapes=(shapes,),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for name, example, value in zip(graph.input_names, examples, model.graph.input, strict=True):
        is_free = not _is_batch(example) or value.type.tensor_type.shape.dim[0].dim_param
        if value.name != name or not is_free:
            raise ValueError("the network cannot be exported: it computes with the batch size as a number")
    _remove_notes(model)
    return model


def _is_batch(example: Tensor) -> bool:
    return example.ndim > 0 and len(example) == EXAMPLE_BATCH


def _remove_notes(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes on each node: lines of source code, with the paths of this machine."""
    del model.metadata_props[:]
    model.ClearField("doc_string")
    parts = [model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer]
    for part in (*parts, *model.graph.input, *model.graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the exporter's notes about itself, such as packages that it could use, from the user."""
    exporter = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def _make_loop(step: onnx.ModelProto, graph: StepGraph) -> onnx.ModelProto:
    """Return the model of the loop over a step."""
    from onnx import TensorProto, helper, numpy_helper

    shape = ["N", *graph.examples()[0].shape[1:]]
    latents, images = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("latents", "images"))
    labels = [helper.make_tensor_value_info(name, TensorProto.INT64, ["N"]) for name in graph.label_names]
    tables = [
        numpy_helper.from_array(rows.numpy(), f"all_{name}") for name, rows in zip(TABLES, graph.tables(), strict=True)
    ]
    zeros = ["zeros"] * (len(graph.state_names) - 1)
    last = [f"last_{name}" for name in (*graph.state_names, *graph.label_names)]
    last[len(zeros)] = images.name
    nodes = [
        helper.make_node("Shape", [latents.name], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node(
            "Scan",
            [latents.name, *zeros, *graph.label_names, *(rows.name for rows in tables)],
            last,
            body=_as_body(step.graph, graph),
            num_scan_inputs=len(tables),
        ),
    ]
    loop = helper.make_graph(nodes, "loop", [latents, *labels], [images], tables)
    return helper.make_model(loop, opset_imports=step.opset_import, ir_version=step.ir_version)


def _as_body(body: onnx.GraphProto, graph: StepGraph) -> onnx.GraphProto:
    """Return the graph of a step as the body of a loop: its states first, each of them an output as well."""
    from onnx import TensorProto, helper

    inputs = {value.name: value for value in body.input}
    for name in graph.label_names:
        # Labels are states that stay what they are.
        body.node.append(helper.make_node("Identity", [name], [f"next_{name}"]))
        body.output.append(helper.make_tensor_value_info(f"next_{name}", TensorProto.INT64, ["N"]))
    del body.input[:]
    body.input.extend(inputs[name] for name in (*graph.state_names, *graph.label_names, *TABLES))
    return body


def store_weights(model: onnx.ModelProto, dtype: torch.dtype) -> None:
    """Store a model's weights in half precision, and have them converted to float32 when the model is loaded.

    Weights are those of the float32 tensors that the dtype holds exactly: numbers that were rounded to it before.

    Args:
        model: the model, which is changed.
        dtype: float16 or bfloat16.
    """
    from onnx import TensorProto, helper, numpy_helper

    target = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}[dtype]
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or not tensor.dims:
            continue
        values = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        halves = values.to(dtype)
        if not torch.equal(halves.float(), values):
            continue
        stored = f"{tensor.name}_stored"
        casts.append(helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
        tensor.CopyFrom(helper.make_tensor(stored, target, tensor.dims, _bytes(halves), raw=True))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _bytes(halves: Tensor) -> bytes:
    """Return the bits of numbers of 16 bits, as ONNX stores them: little-endian."""
    return halves.contiguous().view(torch.int16).numpy().astype("<i2").tobytes()
