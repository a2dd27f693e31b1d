"""What is exported, as modules that PyTorch traces: the network, or one step of the sampling loop.

    network   prediction = network(sample, timestep)
    step      x, history, images = step(x, history, images; t, c)

A step is that of `ddim.diffusion.loop.generative_step`: the same functions, with the coefficients c of its equation as
a tensor instead of numbers, so that one graph serves all steps. Steps that look back on fewer predictions than others
have zeros as factors of the rest of the history, and as that history. The images are those of the predicted x_prev: a
few operations, which save the exported loop a second graph after its last step.

Graphs compute in float32, whatever the dtype of the weights.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ddim.diffusion.equations import Coefficients, ddim_step
from ddim.diffusion.guidance import Conditions, predict_guided
from ddim.diffusion.sampling_config import SamplingConfig
from ddim.diffusion.solvers import add_corrections, history_length
from ddim.engine.base import EagerEngine
from ddim.io.class_labels import Labels
from ddim.pipeline import DDIMPipeline
from ddim.sampler import Sampler, SamplingPlan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that weights are stored in."""
EXAMPLE_BATCH = 2
"""The batch size at which graphs are traced; the batch size of a file is free."""


def check_exportable(pipe: DDIMPipeline) -> None:
    """Check that a pipeline's network can be exported.

    Args:
        pipe: the pipeline.

    Raises:
        TypeError: for a network that is not a PyTorch module.
        ValueError: for one on another device than the CPU, of another dtype than float32, float16 and bfloat16, without
            a sample size, or with other conditions than class labels.

    Example:
        >>> check_exportable(DDIMPipeline.from_pretrained("mnist"))
    """
    if not isinstance(pipe.unet, nn.Module):
        raise TypeError(f"export requires a network that is a PyTorch module, got {type(pipe.unet).__name__}")
    if pipe.device.type != "cpu":
        raise ValueError(f"export requires the network on the CPU, got {pipe.device}; use pipe.to('cpu')")
    if pipe.dtype not in DTYPES:
        raise ValueError(f"export requires a network in float32, float16 or bfloat16, got {pipe.dtype}")
    config: Any = pipe.unet.config
    if config.sample_size is None:
        raise ValueError("export requires a model whose configuration has a sample_size")
    if getattr(pipe.unet, "class_embedding", None) is not None and pipe.classes is None:
        raise ValueError("export supports class labels, got a network that takes other conditions")


def float_sampler(pipe: DDIMPipeline) -> Sampler:
    """Return a pipeline's sampler, with its network in float32.

    Args:
        pipe: the pipeline; a network in another dtype is copied.
    """
    unet = pipe.unet if pipe.dtype == torch.float32 else copy.deepcopy(pipe.unet).float()
    return Sampler(unet, pipe.scheduler, "eager")


class Graph(nn.Module):
    """A module that is traced, with names for what goes in and comes out.

    Args:
        sampler: has the network, in float32 on the CPU.

    Attributes:
        input_names: of the tensors that it takes, in order.
        output_names: of the tensors that it returns, in order.
    """

    input_names: list[str]
    output_names: list[str]

    def __init__(self, sampler: Sampler) -> None:
        super().__init__()
        self.network = sampler.unet  # registered, so that its weights are those of the graph
        self.label_names = [] if sampler.classes is None else ["class_labels"]
        self._shape = (EXAMPLE_BATCH, *sampler.sample_shape)
        self._predict = sampler.predictor((), None, EagerEngine(sampler.unet))

    def examples(self) -> list[Tensor]:
        """Return inputs to trace with, no two of them the same tensor."""
        raise NotImplementedError

    def _labels(self) -> list[Tensor]:
        return [torch.zeros(EXAMPLE_BATCH, dtype=torch.int64) for _ in self.label_names]


class NetworkGraph(Graph):
    """The network alone. A learned variance, which DDIM does not use, is left out.

    Args:
        sampler: has the network, in float32 on the CPU.

    Example:
        >>> graph = NetworkGraph(DDIMPipeline.from_pretrained("mnist").sampler)
        >>> graph.input_names, [tuple(example.shape) for example in graph.examples()]
        (['sample', 'timestep'], [(2, 1, 28, 28), (2,)])
    """

    def __init__(self, sampler: Sampler) -> None:
        super().__init__(sampler)
        self.input_names = ["sample", "timestep", *self.label_names]
        self.output_names = ["prediction"]

    def examples(self) -> list[Tensor]:
        """Return inputs to trace with."""
        return [torch.zeros(self._shape), torch.zeros(EXAMPLE_BATCH, dtype=torch.int64), *self._labels()]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Predict.

        Args:
            inputs: x_t (N, C, H, W); timesteps, int64 (N,); for a network with classes labels, int64 (N,).

        Returns:
            The prediction, (N, C, H, W).
        """
        sample, timestep, *labels = inputs
        return self._predict(sample, timestep, labels[0] if labels else None)


class StepGraph(Graph):
    """A step of the sampling loop.

    Args:
        sampler: has the network, in float32 on the CPU, and the scheduler.
        config: the settings of the loop.
        guidance_scale: w of `ddim.diffusion.guidance`.
        negative_label: a class to guide away from; `None` for the null class.

    Attributes:
        plan: the steps.
        state_names: of the inputs that become the outputs of the step, in order: x, the history, the images.
        conditions: of classes and guidance, with a label that stands for those of the input; `None` without classes.

    Raises:
        ValueError: for settings that the model does not take, or eta above 0.
        TypeError: for a scheduler that does not take the steps of `DDIMScheduler`.

    Example:
        >>> graph = StepGraph(DDIMPipeline.from_pretrained("mnist").sampler, SamplingConfig(4, order=2))
        >>> graph.input_names
        ['x', 'epsilon_1', 'images', 'timestep', 'coefficients']
        >>> x = torch.randn(1, 1, 28, 28)
        >>> x_prev, epsilon, images = graph(x, torch.zeros_like(x), x, *(row[0] for row in graph.tables()))
        >>> bool((images >= 0).all())
        True
    """

    def __init__(
        self,
        sampler: Sampler,
        config: SamplingConfig,
        guidance_scale: float = 1.0,
        negative_label: Labels | None = None,
    ) -> None:
        super().__init__(sampler)
        if config.eta > 0:
            raise ValueError(f"an exported loop requires eta=0 (deterministic sampling), got eta={config.eta:g}")
        sampler.check_output("pt")
        label = None if sampler.classes is None else 0
        self.conditions: Conditions | None = sampler.conditions(
            1, label, guidance_scale=guidance_scale, negative_labels=negative_label
        )
        self.plan: SamplingPlan = sampler.plan(config)
        self.history_length = history_length(self.plan.steps)
        self.state_names = ["x", *(f"epsilon_{back + 1}" for back in range(self.history_length)), "images"]
        self.input_names = [*self.state_names, "timestep", "coefficients", *self.label_names]
        self.output_names = [f"next_{name}" for name in self.state_names]
        self._prediction_type, self._clip = sampler.scheduler.config.prediction_type, sampler.scheduler.clip
        self._to_output = sampler.to_output

    def tables(self) -> tuple[Tensor, Tensor]:
        """Return what differs from step to step.

        Returns:
            The timesteps, int64 (S,), and the coefficients, float32 (S, 8).
        """
        coefficients = torch.tensor([step.coefficients() for step in self.plan.steps], dtype=torch.float32)
        return torch.tensor(self.plan.timesteps), coefficients

    def examples(self) -> list[Tensor]:
        """Return inputs to trace with."""
        timesteps, coefficients = self.tables()
        states = [torch.zeros(self._shape) for _ in self.state_names]
        return [*states, timesteps[0], coefficients[0], *self._labels()]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Take the step.

        Args:
            inputs: x (N, C, H, W); the epsilons of the steps before, the last one first, and the images of the step
                before, which are not used, all of the shape of x; the timestep, int64 (); the coefficients, (8,); for a
                network with classes labels, int64 (N,).

        Returns:
            The states after the step, of the shape of x, in order.
        """
        x, *history = inputs[: 1 + self.history_length]
        timestep, row, *labels = inputs[len(self.state_names) :]
        coefficients = Coefficients(*row.unbind())
        if self.conditions is None:
            output = self._predict(x, timestep, None)
        else:
            output = predict_guided(self._predict, x, timestep, replace(self.conditions, labels=labels[0]))
        clipped = self.plan.config.use_clipped_model_output
        x_prev, x0 = ddim_step(output, x, coefficients, self._prediction_type, self._clip, clipped)
        if self.history_length:
            x_prev, epsilon = add_corrections(x_prev, x0, x, coefficients, history)
            # An output of the graph must not be one of its inputs.
            history = [epsilon, *(earlier.clone() for earlier in history)][: self.history_length]
        return x_prev, *history, self._to_output(x_prev, "pt")
