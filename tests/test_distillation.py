"""`ddim.distillation`: students in folders, sampled by both libraries; resuming; what is refused before any work."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
import torch
import yaml

from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim.distillation import distill
from ddim.distillation.samples import choose_count
from ddim.distillation.settings import fit_lengths
from ddim.distillation.stages import Stage, plan_stages
from ddim.inversion import invertible_steps
from ddim.io.runs import checkpoint_step, list_checkpoints
from digits import TINY_MODEL, write_digits
from helpers import environment, messages, randn, seeded
from programs import run_cli, start_cli

TINY = {"max_steps": 3, "batch_size": 8, "samples.count": 4, "trackers": []}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny network of random weights that predicts epsilon, slightly, so that its images are of moderate size."""
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_MODEL)
    folder = tmp_path_factory.mktemp("models") / "teacher"
    DDIMPipeline(unet, DDIMScheduler(prediction_type="v_prediction")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_digits(tmp_path_factory.mktemp("digits"), 24))


@pytest.fixture(scope="module")
def students(teacher: str, images: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Students of 4 and 2 steps."""
    out = tmp_path_factory.mktemp("out") / "students"
    return distill(teacher, out, [4, 2], images, overrides=TINY, device="cpu")


def contents(folder: Path) -> dict[str, bytes]:
    """The weights and configurations of all students in a folder."""
    files = [*folder.glob("[0-9]*/**/*.json"), *folder.glob("[0-9]*/**/*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class TestStudents:
    def test_each_has_a_folder_and_a_run(self, students: list[Path]) -> None:
        out = students[0].parent
        assert students == [out / "4", out / "2"]
        assert sorted(path.name for path in out.iterdir() if path.name[0] != ".") == [
            "2",
            "4",
            "distillation.yaml",
            "runs",
        ]
        configs = [yaml.safe_load((out / "runs" / name / "config.yaml").read_text())["config"] for name in ("4", "2")]
        assert [config["distill"]["substeps"] for config in configs] == [8, 2]
        assert configs[1]["distill"]["teacher"] == configs[1]["init"] == str(out / "runs" / "4" / "final")

    def test_diffusers_samples_the_same_images(self, students: list[Path]) -> None:
        for folder, steps in zip(students, (4, 2), strict=True):
            arguments = {"batch_size": 3, "num_inference_steps": steps, "output_type": "np"}
            theirs = diffusers.DDIMPipeline.from_pretrained(folder)
            theirs.set_progress_bar_config(disable=True)
            expected = theirs(generator=seeded(5), **arguments).images
            ours = DDIMPipeline.from_pretrained(folder)
            ours.set_progress_bar_config(disable=True)
            images = ours(generator=seeded(5), **arguments).images
            assert theirs.scheduler.timesteps.tolist() == ours.scheduler.make_timesteps(steps)
            assert np.abs(images - expected).max() < 1 / 255
            assert images.std() > 0.05

    def test_inversion_and_interpolation(self, students: list[Path]) -> None:
        pipe = DDIMPipeline.from_pretrained(students[0])
        pipe.set_progress_bar_config(disable=True)
        images = pipe(seeds=[0, 1], num_inference_steps=4).images
        encoded = pipe.encode(images, num_inference_steps=4)
        # All steps are inverted, up to the one that leads to the image.
        assert (encoded.evaluations > 0).all()
        assert invertible_steps(pipe.scheduler, 4)[-1].alpha_prev == pytest.approx(0.9999)
        decoded = pipe.decode(encoded, num_inference_steps=4).images
        # An untrained network is far from invertible in its last step, which is a fourth of all.
        pairs = zip(images, decoded, strict=True)
        errors = [np.square(np.asarray(a, float) - np.asarray(b, float)).mean() / 255**2 for a, b in pairs]
        assert max(errors) < 3e-3
        frames = pipe.interpolate(*encoded.latents, frames=3, num_inference_steps=4).images
        assert len(frames) == 3

    def test_another_number_of_steps_warns(self, students: list[Path], caplog: pytest.LogCaptureFixture) -> None:
        pipe = DDIMPipeline.from_pretrained(students[0])
        pipe.set_progress_bar_config(disable=True)
        pipe(num_inference_steps=4)
        assert not caplog.messages
        pipe(num_inference_steps=2)
        pipe(num_inference_steps=4, order=2)
        pipe(num_inference_steps=4, eta=1)
        assert caplog.messages == 3 * [
            "this model was distilled to 4 steps of order 1 and eta 0 at its own timesteps; at others its images are "
            "worse"
        ]

    def test_more_steps_than_it_has_are_not_taken(self, students: list[Path], caplog: pytest.LogCaptureFixture) -> None:
        pipe = DDIMPipeline.from_pretrained(students[0])
        pipe.set_progress_bar_config(disable=True)
        given: dict[str, Any] = {"seeds": [5], "output_type": "pt"}
        assert torch.equal(pipe(**given).images, pipe(num_inference_steps=4, **given).images)
        assert caplog.messages == ["this model was distilled to 4 steps and takes no more; 50 were asked for"]
        with pytest.raises(ValueError, match="num_inference_steps must be at most 4"):
            pipe.scheduler.make_timesteps(50, "leading")

    def test_evaluation_requires_its_number_of_steps(self, students: list[Path], tmp_path: Path) -> None:
        """The default is 50, and the report would say so."""
        command = ["evaluate", students[0], "--reference", "digits", "--features", "pixels", "-n", "4"]
        result = run_cli(*command, env=environment(tmp_path))
        assert result.returncode == 1
        assert messages(result.stderr) == ["ddim: --steps must be at most 4, those of this distilled model, got 50"]
        table = ["evaluate", students[0], "--reference", "digits", "--table", "2", "--table-steps", "8", "-n", "4"]
        result = run_cli(*table, env=environment(tmp_path))
        assert result.returncode == 1
        assert messages(result.stderr)[-1].endswith("must be at most 4, those of this distilled model, got 8")

    def test_same_call_changes_nothing(self, students: list[Path], teacher: str, images: str) -> None:
        out = students[0].parent
        before = contents(out)
        checkpoints = [path.stat().st_mtime_ns for path in out.glob("runs/*/checkpoints/*")]
        assert distill(teacher, out, [4, 2], images, overrides=TINY, device="cpu") == students
        assert contents(out) == before
        assert [path.stat().st_mtime_ns for path in out.glob("runs/*/checkpoints/*")] == checkpoints

    def test_card_says_what_was_distilled(self, students: list[Path], teacher: str) -> None:
        card = (students[0] / "README.md").read_text()
        assert f"| distilled from | 32 steps of order 2 of `{teacher}` |" in card
        assert "| steps | 4, and no other number |" in card

    def test_student_is_a_teacher_of_its_own_steps(self, students: list[Path]) -> None:
        scheduler = DDIMPipeline.from_pretrained(students[0]).scheduler
        assert scheduler.distilled_steps == 4
        assert plan_stages([2, 1], scheduler) == [Stage((3, 1), (3, 1), 2), Stage((3,), (1,), 2)]
        with pytest.raises(ValueError, match="teacher_steps must be an integer from 1 to 4, got 8"):
            plan_stages([2], scheduler, teacher_steps=8)


def test_without_data_the_models_own_samples_are_used(teacher: str, tmp_path: Path) -> None:
    overrides = TINY | {"max_steps": 2}
    (student,) = distill(teacher, tmp_path / "out", [1], count=24, direct=True, overrides=overrides, device="cpu")
    assert np.load(tmp_path / "out" / "samples.npz")["arr_0"].shape == (24, 8, 8, 1)
    config = yaml.safe_load((tmp_path / "out" / "runs" / "1" / "config.yaml").read_text())["config"]
    assert (config["data"]["source"], config["distill"]["substeps"]) == (str(tmp_path / "out" / "samples.npz"), 32)
    assert DDIMPipeline.from_pretrained(student).scheduler.config.prediction_type == "v_prediction"


def test_teacher_with_a_variance(images: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_MODEL | {"out_channels": 2})
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "teacher")
    (folder,) = distill(str(tmp_path / "teacher"), tmp_path / "out", [2], images, overrides=TINY, device="cpu")
    student = DDIMPipeline.from_pretrained(folder)
    assert student.unet.config.out_channels == 1
    assert student(num_inference_steps=2, output_type="pt").images.shape == (1, 1, 8, 8)


def test_direct_students_learn_from_the_model() -> None:
    starts = (999, 749, 499, 249)
    assert plan_stages([4, 2, 1], DDIMScheduler(), 16, direct=True) == [
        Stage(starts, starts, 4),
        Stage((999, 499), (999, 499), 8),
        Stage((999,), (999,), 16),
    ]


def test_students_share_their_timesteps() -> None:
    """The noise of those of further students is that of the first's."""
    stages = plan_stages([4, 2], DDIMScheduler(), starts=[999, 700, 450, 200])
    assert stages == [Stage((999, 700, 450, 200), (999, 700, 450, 200), 8), Stage((999, 450), (3, 1), 2)]


def test_chosen_timesteps(teacher: str, images: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"overrides": TINY, "device": "cpu"}
    folders = distill(teacher, tmp_path / "out", [4, 2], images, starts=[999, 700, 450, 200], **given)
    alphas = DDIMScheduler().alphas_cumprod_float64
    for folder, timesteps in zip(folders, ([999, 700, 450, 200], [999, 450]), strict=True):
        scheduler = DDIMPipeline.from_pretrained(folder).scheduler
        np.testing.assert_allclose(scheduler.alphas_cumprod_float64[::-1], alphas[timesteps], rtol=1e-9)
    assert "| teacher's timesteps | 999, 700, 450, 200 |" in (folders[0] / "README.md").read_text()
    with pytest.raises(ValueError, match=r"holds another distillation \(starts: expected \[999, 700, 450, 200\]"):
        distill(teacher, tmp_path / "out", [4, 2], images, **given)


def test_student_starts_as_its_teacher(teacher: str, images: str, tmp_path: Path) -> None:
    """The teacher predicts v: at its own timesteps the untrained student does the same."""
    overrides = TINY | {"max_steps": 1, "optim.lr": 1e-12}
    (folder,) = distill(teacher, tmp_path / "out", [3], images, starts=[999, 600, 300], overrides=overrides)
    student, model = (DDIMPipeline.from_pretrained(name).unet for name in (folder, teacher))
    for told, timestep in enumerate([300, 600, 999]):
        x = randn(1, 1, 8, 8)
        torch.testing.assert_close(student(x, told).sample, model(x, timestep).sample, atol=1e-5, rtol=1e-4)


def test_lengths_fit_into_a_time() -> None:
    stages = plan_stages([4, 2, 1], DDIMScheduler())
    lengths = fit_lengths(stages, seconds_per_step=1.1, seconds=1000)
    # A training step costs its evaluations of the teacher, and three for the student.
    seconds = [length * (stage.substeps + 3) / 10 for length, stage in zip(lengths, stages, strict=True)]
    assert 800 < sum(seconds) < 1000
    assert seconds[0] == pytest.approx(0.7 * sum(seconds), rel=0.01)
    repeated = fit_lengths(stages, seconds_per_step=1.1, seconds=1000, repeats=4)
    assert repeated[0] == pytest.approx(lengths[0] * (8 + 3) / (8 / 4 + 3), abs=2)


def test_killed_run_equals_uninterrupted_run(teacher: str, images: str, tmp_path: Path) -> None:
    """SIGKILL in each stage, then the same command."""
    settings = ["--set", "checkpoints.every=3", "--set", "trackers=[]", "--set", "samples.count=4"]
    command = ["distill", teacher, "--steps", "2,1", "--data", images, "--max-steps", "12", "--batch-size", "8"]
    command += [*settings, "--device", "cpu", "--out"]
    env = environment(tmp_path)
    out, uninterrupted = tmp_path / "killed", tmp_path / "uninterrupted"
    for stage, step in (("2", 6), ("1", 3)):
        with start_cli(*command, out, env=env) as process:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None:
                checkpoints = list_checkpoints(out / "runs" / stage / "checkpoints")
                if checkpoints and checkpoint_step(checkpoints[0]) >= step:
                    break
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (out / stage).exists()
    results = [run_cli(*command, folder, env=env) for folder in (out, uninterrupted)]
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    assert results[0].stdout.split() == [str(out / "2"), str(out / "1")]
    assert contents(out).keys() == contents(uninterrupted).keys()
    assert contents(out) == contents(uninterrupted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": [0]}, "num_inference_steps must be an integer from 1 to 1000, got 0"),
        ({"starts": [999, 500]}, "starts must be 4, one for each step of the first student, got 2"),
        ({"starts": [998, 700, 400, 100]}, "starts must decrease from 999, where the noise is sampled, to at"),
        ({"starts": [999, 700, 697, 100]}, "substeps must be at most 3, the timesteps from 700 to 698, got 8"),
        ({"steps": [2, 4]}, "num_inference_steps must decrease, each number dividing the one before, got 4 after 2"),
        ({"steps": [5, 2]}, "num_inference_steps must decrease, each number dividing the one before, got 2 after 5"),
        ({"steps": []}, "num_inference_steps must be at least one number, got none"),
        ({"teacher_steps": 30}, "teacher_steps must be a multiple of the first number of steps, 4, and larger, got 30"),
        ({"teacher_steps": 4}, "teacher_steps must be a multiple of the first number of steps, 4, and larger, got 4"),
        ({"teacher_steps": 2000}, "teacher_steps must be an integer from 1 to 1000, got 2000"),
        ({"model": "no/such/folder"}, "no/such/folder"),
        ({"settings": ["optim.lr=-1"]}, "training configuration, optim.lr: must be greater than 0, got -1"),
        ({"overrides": {"epochs": 2}}, "epochs cannot be set: .* decide it; use max_steps"),
        ({"settings": ["distill.teacher=mnist"]}, "distill.teacher cannot be set: the model and the arguments"),
        ({"settings": ["distill.starts=[999, 9]"]}, "distill.starts cannot be set"),
        ({"settings": ["scheduler.timestep_spacing=leading"]}, "scheduler.timestep_spacing cannot be set"),
        ({"settings": ["data.source=other"]}, "data.source cannot be set"),
        ({"settings": ["model.sample_size=16"]}, "model.sample_size cannot be set"),
        ({"settings": ["init=mnist"]}, "init cannot be set"),
        ({"settings": ["scheduler.prediction_type=epsilon"]}, "prediction_type of a student must be"),
        ({"count": 4}, "count is of the model's own samples, and data gives images; leave one of them out"),
        ({"max_minutes": 1e-6, "overrides": {}}, "max_minutes is too short for 20 training steps of each student"),
        ({"max_minutes": 0}, "max_minutes must be"),
        ({"data": "no/such/images"}, "no/such/images"),
        ({"data": None, "count": 4, "overrides": {"batch_size": 8}}, "batch_size must be at most the number of images"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    teacher: str, images: str, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"model": teacher, "out": tmp_path / "out", "steps": [4], "data": images, "device": "cpu"}
    with pytest.raises((ValueError, OSError), match=f"^.*{message}"):
        distill(**given | arguments)
    assert not (tmp_path / "out").exists()


def test_paths_and_a_single_number_of_steps(teacher: str, images: str, tmp_path: Path) -> None:
    (folder,) = distill(Path(teacher), tmp_path / "a", 2, Path(images), overrides=TINY, device="cpu")
    assert distill(folder, tmp_path / "b", [1], Path(images), overrides=TINY, device="cpu") == [tmp_path / "b" / "1"]


def test_lengths_of_students_that_others_learned_from_are_kept(
    teacher: str, images: str, tmp_path: Path, students: list[Path]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(students[0].parent, out)
    before = contents(out)
    with pytest.raises(ValueError, match="max_steps must be 3 as before: students of fewer steps have learned from"):
        distill(teacher, out, [4, 2], images, overrides=TINY | {"max_steps": 4}, device="cpu")
    assert contents(out) == before


def test_number_of_samples_fits_a_time(teacher: str) -> None:
    pipe = DDIMPipeline.from_pretrained(teacher)
    pipe.set_progress_bar_config(disable=True)
    assert choose_count(pipe, torch.device("cpu"), 1.0, 1e-9) == 256
    assert choose_count(pipe, torch.device("cpu"), 1.0, math.inf) == 4096


def test_time_that_is_too_short_keeps_the_samples(teacher: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"overrides": {**TINY, "max_steps": None}, "device": "cpu"}
    with pytest.raises(ValueError, match="max_minutes is too short"):
        distill(teacher, tmp_path / "out", 4, count=8, max_minutes=1e-6, **arguments)
    assert (tmp_path / "out" / "samples.npz").is_file()
    with pytest.raises(ValueError, match=r"holds another distillation \(count: expected 8, got 9\)"):
        distill(teacher, tmp_path / "out", 4, count=9, **arguments)
    assert distill(teacher, tmp_path / "out", 4, overrides=TINY, device="cpu") == [tmp_path / "out" / "4"]


def test_teacher_of_few_timesteps(tmp_path: Path) -> None:
    scheduler = DDIMScheduler(10)
    assert plan_stages([5], scheduler) == [Stage((9, 7, 5, 3, 1), (9, 7, 5, 3, 1), 2)]
    assert plan_stages([4], scheduler) == [Stage((9, 7, 4, 1), (9, 7, 4, 1), 2)]
    with pytest.raises(ValueError, match="teacher_steps must be an integer from 1 to 10, got 20"):
        plan_stages([10], scheduler)


def test_folder_with_other_content_is_refused(teacher: str, students: list[Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="is not empty and does not hold a distillation"):
        distill(teacher, tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"holds another distillation \(steps: expected \[4, 2\], got \[4\]"):
        distill(teacher, students[0].parent, [4], device="cpu")


def save_model(folder: Path, **arguments: Any) -> str:
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_MODEL, **arguments)
    DDIMPipeline(unet, DDIMScheduler(prediction_type="v_prediction")).save_pretrained(folder)
    return str(folder)


class TestClasses:
    ARGUMENTS: ClassVar = {"num_class_embeds": 4, "class_names": ("cat", "dog", "frog"), "has_null_class": True}

    @pytest.fixture(scope="class")
    def pets(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        return save_model(tmp_path_factory.mktemp("models") / "pets", **self.ARGUMENTS)

    def test_students_have_the_classes_of_their_teacher(self, pets: str, tmp_path: Path) -> None:
        folders = distill(
            pets, tmp_path / "out", [2, 1], count=12, teacher_steps=4, guidance_scale=2, overrides=TINY, device="cpu"
        )
        for folder in folders:
            student = DDIMPipeline.from_pretrained(folder)
            assert student.classes == DDIMPipeline.from_pretrained(pets).classes
            student.set_progress_bar_config(disable=True)
            by_class = student(
                3,
                class_labels=["cat", "dog", "frog"],
                num_inference_steps=1,
                latents=randn(1, 1, 8, 8).expand(3, -1, -1, -1),
            )
            assert len({image.tobytes() for image in by_class.images}) == 3
        configs = [yaml.safe_load((tmp_path / f"out/runs/{name}/config.yaml").read_text())["config"] for name in "21"]
        assert [config["distill"]["guidance_scale"] for config in configs] == [2.0, 1.0]
        labels = np.load(tmp_path / "out/samples.npz")["arr_1"]
        assert np.bincount(labels).tolist() == [4, 4, 4]
        assert "of order 2 of" in (folders[0] / "README.md").read_text()
        assert "with guidance 2" in (folders[0] / "README.md").read_text()
        with pytest.raises(ValueError, match="guidance_scale: expected 2"):
            distill(pets, tmp_path / "out", [2, 1], count=12, teacher_steps=4, overrides=TINY, device="cpu")

    def test_images_may_have_the_classes_in_another_order(self, pets: str, tmp_path: Path) -> None:
        for name in ("frog", "cat"):
            write_digits(tmp_path / "images" / name, 6)
        (folder,) = distill(pets, tmp_path / "out", [2], str(tmp_path / "images"), overrides=TINY, device="cpu")
        assert DDIMPipeline.from_pretrained(folder).classes.names == ("cat", "dog", "frog")  # type: ignore[union-attr]
        write_digits(tmp_path / "images" / "cow", 6)
        with pytest.raises(ValueError, match="must be from 0 to 2 or one of cat, dog, frog, got 'cow'"):
            distill(pets, tmp_path / "other", [2], str(tmp_path / "images"), overrides=TINY, device="cpu")

    def test_images_without_labels_are_refused(self, pets: str, images: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"data has no labels, and .* has classes; give images with labels, or"):
            distill(pets, tmp_path / "out", [2], images, overrides=TINY, device="cpu")
        assert not (tmp_path / "out").exists()

    def test_guidance_requires_a_null_class(self, teacher: str, tmp_path: Path) -> None:
        without = save_model(tmp_path / "model", num_class_embeds=3)
        for model in (without, teacher):
            with pytest.raises(ValueError, match="guidance_scale requires a model with classes and a null class"):
                distill(model, tmp_path / "out", guidance_scale=1.5, device="cpu")
        with pytest.raises(ValueError, match="guidance_scale must be a number of at least 0"):
            distill(teacher, tmp_path / "out", guidance_scale=-1, device="cpu")

    def test_other_conditions_are_refused(self, tmp_path: Path) -> None:
        model = save_model(tmp_path / "model", class_embed_type="timestep")
        with pytest.raises(ValueError, match="takes other conditions"):
            distill(model, tmp_path / "out", device="cpu")
        model = save_model(tmp_path / "fourier", time_embedding_type="fourier")
        with pytest.raises(ValueError, match="model must embed timesteps as positional or learned"):
            distill(model, tmp_path / "out", device="cpu")


def test_command_translates_arguments(teacher: str, tmp_path: Path) -> None:
    env: Callable[..., Any] = environment
    arguments = ("--steps", "3", "--starts", "990,600,300", "--out", tmp_path / "out")
    result = run_cli("distill", teacher, *arguments, env=env(tmp_path))
    assert result.returncode == 1
    assert messages(result.stderr) == [
        "ddim: --starts must decrease from 999, where the noise is sampled, to at least 0, got 990, 600, 300"
    ]
    assert not (tmp_path / "out").exists()
