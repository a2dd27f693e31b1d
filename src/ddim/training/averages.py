"""Averages of any length after training: two are tracked, snapshots of them are kept, others are combined from these.

    RUN/averages/step-00000128.safetensors           snapshots of all tracked averages in float16, with a SHA-256
    RUN/checkpoints/step-00002000/averages.safetensors   the same of a checkpoint, in float32, from which a run resumes

Snapshots are taken every k steps, where k is 1 at first and doubles whenever there would be more of them than
`ema.snapshots`; those between multiples of the new k are deleted. Their number is bounded whatever the length of the
run, and which of them exist is a function of the step alone, so that a run may be made longer and a resumed one has the
same. The mathematics is that of `ddim.training.power_average`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddim.discrete.pipeline import open_pipeline
from ddim.io.atomic import atomic_write
from ddim.io.runs import CHECKPOINTS, checkpoint_step, list_checkpoints, verify_checksums
from ddim.io.weights import read_tensors, write_safetensors
from ddim.pipeline import ImagePipeline
from ddim.training.checkpoint import TENSOR_FILES
from ddim.training.power_average import Profile, combine, decay
from ddim.validation import choice, shorten

AVERAGES = "averages"
"""Name of a run's folder of snapshots, and of the averages in a checkpoint."""
SNAPSHOT_FILE = re.compile(r"step-(\d{8,})\.safetensors")


class PowerAverages:
    """Power-function averages of a network's weights, tracked in float32 on the network's device.

    Args:
        model: the network.
        sigma_rels: lengths of the averages: standard deviations relative to the number of steps.

    Attributes:
        model: the network.
        averages: tensors by name of the parameter, by length.

    References:
        Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, arXiv 2312.02696, section 3.1.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False).requires_grad_(False)
        >>> averages = PowerAverages(layer, [0.1])
        >>> for step in (1, 2):
        ...     _ = layer.weight.fill_(step)
        ...     averages.update(step)
        >>> averages.state_dict()["0.1/weight"] > 1.9
        tensor([[True]])
    """

    def __init__(self, model: nn.Module, sigma_rels: Sequence[float]) -> None:
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._model_parameters: list[Tensor] = list(model.parameters())
        self.averages = {
            sigma_rel: {name: torch.clone(tensor) for name, tensor in parameters.items()} for sigma_rel in sigma_rels
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after a step into all averages.

        Args:
            step: number of steps taken, from 1.
        """
        for sigma_rel, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), self._model_parameters, 1 - decay(sigma_rel, step))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages: tensors by `LENGTH/NAME`, without a copy."""
        return {
            f"{sigma_rel}/{name}": tensor
            for sigma_rel, average in self.averages.items()
            for name, tensor in average.items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from saved averages.

        Args:
            tensors: as `state_dict` returns them.

        Raises:
            ValueError: if they are of other lengths or another network.
        """
        own = self.state_dict()
        if own.keys() != tensors.keys() or any(own[name].shape != tensor.shape for name, tensor in tensors.items()):
            raise ValueError("the averages in the checkpoint are of other lengths (ema.sigma_rels) or another model")
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def snapshot_interval(step: int, maximum: int) -> int:
    """Compute the number of steps between snapshots: the smallest power of two that leaves at most `maximum` of them.

    Args:
        step: number of steps taken.
        maximum: number of snapshots to keep.

    Example:
        >>> [snapshot_interval(step, 16) for step in (16, 17, 34, 2000)]
        [1, 2, 4, 128]
    """
    return int(1 << (step // (maximum + 1)).bit_length())


def save_snapshot(folder: Path, step: int, tensors: Mapping[str, Tensor], maximum: int) -> None:
    """Write the snapshot of a step atomically, in float16, and delete those that are not kept beside it.

    Args:
        folder: the run's folder of snapshots; created where it is missing.
        step: number of steps taken, a multiple of `snapshot_interval(step, maximum)`.
        tensors: the averages, as `PowerAverages.state_dict` returns them.
        maximum: number of snapshots to keep.

    Raises:
        OSError: if it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for step in (1, 2, 4):
        ...         save_snapshot(Path(folder), step, {"0.1/w": torch.zeros(1)}, maximum=2)
        ...     [path.name for path in list_snapshots(Path(folder))]
        ['step-00000002.safetensors', 'step-00000004.safetensors']
    """
    folder.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()}
    with atomic_write(folder / f"step-{step:08d}.safetensors") as temporary:
        write_safetensors(halves, temporary)
    interval = snapshot_interval(step, maximum)
    for path in list_snapshots(folder):
        if snapshot_step(path) % interval:
            path.unlink()


def list_snapshots(folder: Path) -> list[Path]:
    """List the snapshots in a folder, the earliest first.

    Args:
        folder: a run's folder of snapshots; may be missing.

    Example:
        >>> list_snapshots(Path("missing"))
        []
    """
    return sorted((path for path in folder.glob("step-*") if SNAPSHOT_FILE.fullmatch(path.name)), key=snapshot_step)


def snapshot_step(path: Path) -> int:
    """Return the step in a snapshot's name.

    Args:
        path: file of the snapshot.

    Example:
        >>> snapshot_step(Path("averages/step-00001000.safetensors"))
        1000
    """
    return int(path.stem.removeprefix("step-"))


def remove_snapshots_after(folder: Path, step: int) -> None:
    """Delete the snapshots of steps beyond the one that a run resumes from, which it takes anew.

    Args:
        folder: the run's folder of snapshots; may be missing.
        step: the step resumed from.

    Example:
        >>> remove_snapshots_after(Path("missing"), 0)
    """
    for path in list_snapshots(folder):
        if snapshot_step(path) > step:
            path.unlink()


def take_over_snapshots(checkpoint: Path, folder: Path) -> None:
    """Copy the snapshots up to a checkpoint of another run, which a run in another folder resumes from.

    Args:
        checkpoint: folder of the checkpoint.
        folder: the resuming run's folder of snapshots.

    Raises:
        OSError: if they cannot be written.
    """
    source = checkpoint.parent.parent / AVERAGES
    if source.resolve() == folder.resolve():
        return
    for path in list_snapshots(source):
        if snapshot_step(path) <= checkpoint_step(checkpoint):
            folder.mkdir(exist_ok=True)
            with atomic_write(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)


class Reconstruction(NamedTuple):
    """An average that was not tracked.

    Attributes:
        pipe: the pipeline with its weights, on the CPU.
        step: number of steps averaged over.
        snapshots: number of snapshots that it is combined from.
        residual: root mean square of what its profile lacks, relative to the profile: 0.01 is one percent.
    """

    pipe: ImagePipeline
    step: int
    snapshots: int
    residual: float


class RunAverages:
    """The averages of a run that was trained with `ema.sigma_rels`: reconstructs any length at a checkpoint.

    Args:
        run: folder of the run, or of one of its checkpoints.
        step: the checkpoint whose steps are averaged over; defaults to the newest.

    Attributes:
        checkpoint: folder of the checkpoint.
        step: its step.
        sigma_rels: lengths that were tracked.

    Raises:
        FileNotFoundError: if the run or the checkpoint does not exist.
        ValueError: if the run did not track averages, or the checkpoint is damaged.

    References:
        Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, arXiv 2312.02696, section 3.2.
    """

    def __init__(self, run: str | Path, step: int | None = None) -> None:
        self.checkpoint = find_checkpoint(Path(run), step)
        self.step = checkpoint_step(self.checkpoint)
        if not (self.checkpoint / TENSOR_FILES[AVERAGES]).is_file():
            raise ValueError(
                f"{self.checkpoint} has no averages to combine: its run was trained with ema.sigma_rels=[], or by an "
                "earlier version"
            )
        verify_checksums(self.checkpoint)
        self._newest = read_tensors(self.checkpoint / TENSOR_FILES[AVERAGES])
        self.sigma_rels = sorted({_length(name) for name in self._newest})
        folder = self.checkpoint.parent.parent / AVERAGES
        self._snapshots = [path for path in list_snapshots(folder) if snapshot_step(path) < self.step]

    def reconstruct(self, sigma_rel: float) -> Reconstruction:
        """Combine the stored averages to the one of a length.

        Args:
            sigma_rel: the length: standard deviation relative to the number of steps.

        Returns:
            A pipeline of its own with the averaged weights, and how well they are met.

        Raises:
            ValueError: if the length is out of range, or a snapshot is damaged.
        """
        steps = [*map(snapshot_step, self._snapshots), self.step]
        profiles = [Profile(step, length) for step in steps for length in self.sigma_rels]
        coefficients, residual = combine(profiles, Profile(self.step, sigma_rel))
        by_profile = dict(zip(profiles, coefficients.tolist(), strict=True))
        total: dict[str, Tensor] = {}
        for step, tensors in self._stored():
            for name, tensor in tensors.items():
                _, _, parameter = name.partition("/")
                part = by_profile[Profile(step, _length(name))] * tensor.double()
                total[parameter] = total[parameter] + part if parameter in total else part
        pipe = open_pipeline(self.checkpoint)
        pipe.unet.load_state_dict(total)
        return Reconstruction(pipe, self.step, len(steps), residual)

    def _stored(self) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        """Yield the steps and tensors of all snapshots, one at a time in memory, and of the checkpoint."""
        for path in self._snapshots:
            tensors = read_tensors(path)
            if tensors.keys() != self._newest.keys():
                raise ValueError(f"{path} is not of the run of {self.checkpoint}: its averages have other names")
            yield snapshot_step(path), tensors
        yield self.step, self._newest


def find_checkpoint(run: Path, step: int | None = None) -> Path:
    """Find a checkpoint of a run.

    Args:
        run: folder of the run, or of one of its checkpoints.
        step: its step; defaults to the newest.

    Returns:
        Its folder.

    Raises:
        FileNotFoundError: if the run or the checkpoint does not exist.
        ValueError: if `run` is a checkpoint of another step, or the run has none of this one.

    Example:
        >>> find_checkpoint(Path("missing"))
        Traceback (most recent call last):
        FileNotFoundError: missing is not a training run with checkpoints
    """
    is_checkpoint = run.parent.name == CHECKPOINTS and run in list_checkpoints(run.parent)
    checkpoints = [run] if is_checkpoint else list_checkpoints(run / CHECKPOINTS)
    if not checkpoints:
        raise FileNotFoundError(f"{shorten(str(run))} is not a training run with checkpoints")
    by_step = {checkpoint_step(path): path for path in checkpoints}
    return checkpoints[0] if step is None else by_step[choice("step", step, sorted(by_step))]


def _length(name: str) -> float:
    """Return the length in a tensor's name, `LENGTH/NAME`."""
    return float(name.partition("/")[0])
