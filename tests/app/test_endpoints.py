"""The endpoints of `ddim app`: the command line's images, messages for mistakes, many clients, cancellation."""

from __future__ import annotations

import io
import re
import struct
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from app_server import AppServer
from ddim.io.image_files import make_grid
from ddim.pipeline import DDIMPipeline

LONG: dict[str, Any] = {"count": 16, "steps": 1000}
"""Minutes of work, unless cancelled."""


def pixels(path: str | Path | io.BytesIO) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def make_pixel_grid(paths: list[str]) -> np.ndarray:
    return np.asarray(make_grid([Image.open(path) for path in paths]))


# --- results


SAME: dict[str, tuple[dict[str, Any], list[str]]] = {
    "16 digits": ({"count": 16, "steps": 5}, ["-n", "16", "--steps", "5"]),
    "order": (
        {"count": 4, "steps": 6, "seed": 7, "order": 2},
        ["-n", "4", "--steps", "6", "--seed", "7", "--order", "2"],
    ),
    "spacing": (
        {"count": 3, "steps": 5, "spacing": "trailing", "order": 2},
        ["-n", "3", "--steps", "5", "--spacing", "trailing", "--order", "2"],
    ),
    "faces": ({"model": "faces", "count": 2, "steps": 2}, ["-m", "faces", "-n", "2", "--steps", "2"]),
    "eta": ({"count": 5, "steps": 7, "eta": 0.5}, ["-n", "5", "--steps", "7", "--eta", "0.5"]),
    "class": (
        {"model": "mnist-labels", "count": 4, "steps": 5, "label": "7", "guidance": 1.5},
        ["-m", "mnist-labels", "-n", "4", "--steps", "5", "--label", "7", "--guidance", "1.5"],
    ),
    "no class": (
        {"model": "mnist-labels", "count": 2, "steps": 3},
        ["-m", "mnist-labels", "-n", "2", "--steps", "3"],
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_images_match_ddim_sample(server: AppServer, run_command: Callable[[list[str]], Path], name: str) -> None:
    result = server.call("/sample", **SAME[name][0])
    grid = run_command(["sample", *SAME[name][1], "--scale", "1", "--out", f"{name}.png"])
    assert np.array_equal(make_pixel_grid(result["images"]), pixels(grid))
    count, steps = SAME[name][0]["count"], SAME[name][0]["steps"]
    first = SAME[name][0].get("seed", 0)
    assert result["seeds"] == list(range(first, first + count))
    assert result["evaluations"] == count * steps * (2 if "guidance" in SAME[name][0] else 1)


def test_all_classes_share_the_images(server: AppServer, run_command: Callable[[list[str]], Path]) -> None:
    result = server.call("/sample", model="tiny", count=4, steps=2, label="all")
    arguments = ["-m", "tiny", "-n", "4", "--steps", "2", "--label", "all"]
    expected = np.load(run_command(["sample", *arguments, "--out", "all.npz"]))["arr_0"]
    for path, image in zip(result["images"], expected, strict=True):
        assert np.array_equal(pixels(path), image[..., 0])


def test_progress_is_reported(server: AppServer) -> None:
    job = server.client().submit(count=1, steps=20, api_name="/sample")
    reports = [update for update in job if "done" in update]
    done = [update["done"] for update in reports]
    assert done == sorted(done)
    assert done[-1] == 20
    assert len(done) >= 2
    assert {update["total"] for update in reports} == {20}


def test_consistency(server: AppServer) -> None:
    rows = server.call("/consistency", model="tiny", count=1, seed=5)["rows"]
    assert [(row["method"], row["steps"]) for row in rows] == [
        *(("DDIM", steps) for steps in (5, 10, 20, 50, 100)),
        ("DDPM", 200),
    ]
    hundred, ddpm = (pixels(row["images"][0]).astype(float) for row in rows[-2:])
    fifty = pixels(rows[-3]["images"][0]).astype(float)
    assert np.abs(hundred - fifty).mean() < np.abs(hundred - ddpm).mean()


def test_interpolation_passes_through_seeds_and_images(server: AppServer, tiny: DDIMPipeline, tmp_path: Path) -> None:
    image = tiny(seeds=[3], num_inference_steps=10).images[0]
    image.save(tmp_path / "three.png")
    picture = handle_file(tmp_path / "three.png")
    result = server.call("/interpolate", model="tiny", seeds=[1], pictures=[picture], frames=4, steps=10)
    frames = [pixels(path).astype(int) for path in result["images"]]
    assert len(frames) == 4
    # Inversion is exact: the path ends at the image.
    assert np.abs(frames[-1] - np.asarray(image)).mean() < 1
    assert np.abs(frames[0] - frames[-1]).mean() > 5


def test_interpolation_goes_from_class_to_class(server: AppServer, run_command: Callable[[list[str]], Path]) -> None:
    result = server.call(
        "/interpolate", model="mnist-labels", seeds=[5, 5], frames=3, steps=3, label="3,8", guidance=1.5
    )
    options = ["-m", "mnist-labels", "--frames", "3", "--steps", "3", "--label", "3,8", "--guidance", "1.5"]
    expected = np.load(run_command(["interpolate", "5", "5", *options, "--out", "classes.npz"]))["arr_0"]
    assert not np.array_equal(expected[0], expected[2])
    for path, frame in zip(result["images"], expected, strict=True):
        assert np.array_equal(pixels(path), frame[..., 0])


def test_interpolation_between_classes_passes_through_images(
    server: AppServer, tiny: DDIMPipeline, tmp_path: Path
) -> None:
    image = tiny(seeds=[3], class_labels=1, num_inference_steps=10).images[0]
    image.save(tmp_path / "three.png")
    result = server.call(
        "/interpolate",
        model="tiny",
        seeds=[1],
        pictures=[handle_file(tmp_path / "three.png")],
        frames=2,
        steps=10,
        label="dog,cat",
        guidance=1.5,
    )
    assert np.abs(pixels(result["images"][-1]).astype(int) - np.asarray(image)).mean() < 1


def test_reconstruction(server: AppServer, tiny: DDIMPipeline, tmp_path: Path) -> None:
    image = tiny(seeds=[3], num_inference_steps=5).images[0]
    image.save(tmp_path / "three.png")
    result = server.call("/reconstruct", model="tiny", picture=handle_file(tmp_path / "three.png"), steps=5)
    expected = tiny.reconstruct(image, 5)
    assert result["exact"]["mse"] == pytest.approx(float(expected.mse[0]), rel=0.1, abs=1e-8)
    assert result["exact"]["mse"] < result["euler"]["mse"]
    assert result["euler"]["evaluations"] < result["exact"]["evaluations"]
    assert np.array_equal(pixels(result["exact"]["image"]), np.asarray(expected.images[0]))


def test_edits(server: AppServer, mnist: DDIMPipeline, tmp_path: Path) -> None:
    image = mnist(seeds=[3], num_inference_steps=5).images[0]
    image.save(tmp_path / "three.png")
    edits = server.call("/edit", picture=handle_file(tmp_path / "three.png"), strength=0.4, count=2, steps=5, seed=9)
    assert edits["seeds"] == [9, 10]
    expected_edits = mnist.edit([image] * 2, 0.4, 5, seeds=[9, 10]).images
    for path, edit in zip(edits["images"], expected_edits, strict=True):
        assert np.array_equal(pixels(path), np.asarray(edit))


def test_reconstruction_and_edits_of_a_class(server: AppServer, tiny: DDIMPipeline, tmp_path: Path) -> None:
    image = tiny(seeds=[3], class_labels=0, num_inference_steps=5).images[0]
    image.save(tmp_path / "three.png")
    condition: dict[str, Any] = {"model": "tiny", "steps": 5, "label": "dog", "guidance": 2}
    result = server.call("/reconstruct", picture=handle_file(tmp_path / "three.png"), **condition)
    expected = tiny.reconstruct(image, 5, exact=False, class_labels=1, guidance_scale=2)
    assert result["euler"]["mse"] == pytest.approx(float(expected.mse[0]), rel=1e-3)
    edits = server.call("/edit", picture=handle_file(tmp_path / "three.png"), strength=0.8, count=1, **condition)
    expected_edit = tiny.edit(image, 0.8, 5, seeds=[0], class_labels=1, guidance_scale=2).images[0]
    assert np.array_equal(pixels(edits["images"][0]), np.asarray(expected_edit))


def make_mask(box: tuple[int, int, int, int], size: tuple[int, int] = (28, 28)) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def test_inpainting_matches_ddim_inpaint(
    server: AppServer, run_command: Callable[[list[str]], Path], mnist: DDIMPipeline, tmp_path: Path
) -> None:
    mnist(seeds=[3], num_inference_steps=5).images[0].save(tmp_path / "three.png")
    make_mask((7, 7, 21, 21)).save(tmp_path / "hole.png")
    result = server.call(
        "/inpaint",
        picture=handle_file(tmp_path / "three.png"),
        mask=handle_file(tmp_path / "hole.png"),
        count=2,
        steps=5,
        seed=9,
    )
    arguments = [str(tmp_path / "three.png"), "--box", "7,7,14,14", "-n", "2", "--steps", "5", "--seed", "9"]
    expected = np.load(run_command(["inpaint", *arguments, "--out", "filled.npz"]))["arr_0"][..., 0]
    answers = np.stack([pixels(path) for path in result["images"]])
    assert np.array_equal(answers, expected)
    assert result["seeds"] == [9, 10]
    known = np.asarray(make_mask((7, 7, 21, 21))) == 0
    assert np.array_equal(pixels(result["measurement"])[known], pixels(tmp_path / "three.png")[known])
    assert np.abs(pixels(result["mean"]) - answers.mean(0)).max() <= 1
    spread = pixels(result["spread"]) / 255 * result["max_spread"]
    assert np.abs(spread - answers.std(0, ddof=1) / 255).max() < 0.01


def test_super_resolution_matches_ddim_super_resolve(
    server: AppServer, run_command: Callable[[list[str]], Path], tiny: DDIMPipeline, tmp_path: Path
) -> None:
    """Of an image that the endpoint makes small, and of the small one itself."""
    tiny(seeds=[3], num_inference_steps=5).images[0].save(tmp_path / "three.png")
    call: dict[str, Any] = {"model": "tiny", "factor": 4, "kernel": "bicubic", "count": 2, "steps": 5}
    result = server.call("/super_resolve", picture=handle_file(tmp_path / "three.png"), **call)
    small = result["measurement"]
    assert pixels(small).shape == (2, 2)
    again = server.call("/super_resolve", picture=handle_file(small), **call)
    options = ["-m", "tiny", "--factor", "4", "--kernel", "bicubic", "-n", "2", "--steps", "5"]
    expected = np.load(run_command(["super-resolve", str(small), *options, "--out", "large.npz"]))["arr_0"][..., 0]
    for one, other, image in zip(result["images"], again["images"], expected, strict=True):
        assert np.array_equal(pixels(one), image)
        assert np.array_equal(pixels(other), image)


def test_info(server: AppServer) -> None:
    facts = server.call("/info")
    assert facts["parameters"] == 1_805_121
    assert facts["scheduler"]["prediction_type"] == "epsilon"
    assert "MNIST" in facts["card"]
    assert "found" not in facts


def test_documented_example_runs(server: AppServer, tmp_path: Path, monkeypatch: Any) -> None:
    text = (Path(__file__).parents[2] / "docs" / "web-page.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    digit = Image.new("L", (28, 28))
    digit.paste(255, (12, 4, 16, 24))
    digit.save(tmp_path / "digit.png")
    monkeypatch.chdir(tmp_path)
    assert "http://127.0.0.1:7860" in example
    scope: dict[str, Any] = {}
    exec(example.replace("http://127.0.0.1:7860", server.url).replace("steps=20", "steps=2"), scope)
    assert len(scope["result"]["images"]) == 4


# --- mistakes


CLASSES = {"model": "mnist-labels"}
NO_FILES: dict[str, Any] = {"picture": None, "mask": None}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "negative steps": ("/sample", {"steps": -5}, "steps must be an integer from 1 to 1000, got -5"),
    "huge steps": ("/sample", {"steps": 10**30}, "steps must be an integer from 1 to 1000, got 1000"),
    "words as steps": ("/sample", {"steps": "many"}, "steps must be an integer .*, got 'many'"),
    "fractional steps": ("/sample", {"steps": 2.5}, "steps must be an integer from 1 to 1000, got 2.5"),
    "label without classes": ("/sample", {"label": "3"}, "label and guidance require a model with classes"),
    "guidance without classes": ("/sample", {"guidance": 2}, "label and guidance require a model with classes"),
    "guidance without a label": ("/sample", {**CLASSES, "guidance": 2}, "guidance requires a label"),
    "unknown label": ("/sample", {**CLASSES, "label": "ten"}, "label must be from 0 to 9 or one of 0, .*, got 'ten'"),
    "empty label": ("/sample", {**CLASSES, "label": ""}, "labels must be indices or names, .*, got ''"),
    "many labels": ("/sample", {**CLASSES, "label": "all"}, "count must be a multiple of the 10 labels, got 16"),
    "list as label": ("/sample", {**CLASSES, "label": [1]}, r"label must be any, all, or a class, got \[1\]"),
    "words as guidance": ("/sample", {**CLASSES, "label": "3", "guidance": "x"}, "guidance must be a number, got 'x'"),
    "large guidance": ("/sample", {**CLASSES, "label": "3", "guidance": 101}, "guidance must be .* 0 to 100, got 101"),
    "labels of endpoints": (
        "/interpolate",
        {**CLASSES, "seeds": [1, 2, 3], "label": "3,8"},
        "the number of endpoints must be a multiple of the 2 labels, got 3",
    ),
    "label of steps": ("/consistency", {"label": "3"}, "label and guidance require a model with classes"),
    "no steps": ("/sample", {"steps": None}, "steps must be an integer .*, got None"),
    "true steps": ("/sample", {"steps": True}, "steps must be an integer .*, got True"),
    "many images": ("/sample", {"count": 65}, "count must be an integer from 1 to 64, got 65"),
    "lists": ("/sample", {"count": [1, 2]}, r"count must be an integer .*, got \[1, 2\]"),
    "eta": ("/sample", {"eta": -0.1}, "eta must be a number from 0 to 2, got -0.1"),
    "words as eta": ("/sample", {"eta": "1"}, "eta must be a number, got '1'"),
    "seed": ("/sample", {"seed": -1}, "seed must be an integer from 0 to .*, got -1"),
    "huge seed": ("/sample", {"seed": 2**63}, "seed must be an integer from 0 to .*, got 9223"),
    "order": ("/sample", {"order": 5}, "order must be an integer from 1 to 4, got 5"),
    "order and eta": ("/sample", {"order": 2, "eta": 1}, "order=2 requires eta=0"),
    "spacing": ("/sample", {"spacing": "even"}, "spacing must be one of the model's own, leading, .*, got 'even'"),
    "long word": ("/sample", {"spacing": "x" * 1000}, r"spacing must be .*, got 'x{30,60}\.\.\."),
    "model": (
        "/sample",
        {"model": "monalisa"},
        "model must be mnist, color, .*faces.*, or a hub id .*, got 'monalisa'",
    ),
    "folder": ("/sample", {"model": "/etc"}, "model must be .*, got '/etc'; .*allow_paths=True"),
    "folder above": ("/info", {"model": "../../etc"}, "model must be .*, got '../../etc'; .*allow_paths=True"),
    "hub": ("/info", {"model": "nobody/nothing"}, "the model nobody/nothing is neither a folder nor in the cache"),
    "number as model": ("/info", {"model": 7}, "model must be .*, got 7"),
    "many latents": ("/consistency", {"count": 9}, "count must be an integer from 1 to 8, got 9"),
    "no ends": ("/interpolate", {}, "a path must have 2 to 8 endpoints, got 0"),
    "one end": ("/interpolate", {"seeds": [1]}, "a path must have 2 to 8 endpoints, got 1"),
    "many ends": ("/interpolate", {"seeds": list(range(9))}, "seeds must be a list of 0 to 8 entries, got 9 entries"),
    "words as seeds": ("/interpolate", {"seeds": ["a", "b"]}, "seed must be an integer .*, got 'a'"),
    "frames": ("/interpolate", {"seeds": [1, 2], "frames": 1}, "frames must be an integer from 2 to 33, got 1"),
    "closed": ("/interpolate", {"seeds": [1, 2], "closed": "yes"}, "closed must be one of True or False, got 'yes'"),
    "no image": ("/reconstruct", {"picture": None}, "picture must be an uploaded file, got None"),
    "path": ("/reconstruct", {"picture": {"path": "/etc/passwd"}}, "picture must be a file that was uploaded here"),
    "no path": ("/reconstruct", {"picture": {"path": "\0"}}, "picture must be a file that was uploaded here"),
    "many answers": ("/inpaint", {**NO_FILES, "count": 9}, "count must be an integer from 1 to 8, got 9"),
    "many steps": ("/super_resolve", {"picture": None, "steps": 1001}, "steps must be an integer from 1 to 1000, got"),
    "no image to fill": ("/inpaint", NO_FILES, "picture must be an uploaded file, got None"),
    "label of answers": ("/inpaint", {**NO_FILES, "label": "3"}, "label and guidance require a model with classes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_reported_in_one_sentence(server: AppServer, name: str) -> None:
    endpoint, arguments, sentence = REFUSED[name]
    with pytest.raises(AppError, match=sentence) as caught:
        server.call(endpoint, **arguments)
    assert "Traceback" not in str(caught.value)


UNFIT: dict[str, tuple[str, dict[str, Any], str]] = {
    "nothing": ("/inpaint", {"mask": make_mask((0, 0, 0, 0))}, "masks must leave some pixels and miss others"),
    "everything": ("/inpaint", {"mask": make_mask((0, 0, 28, 28))}, "masks must leave some pixels and miss others"),
    "size": (
        "/inpaint",
        {"mask": make_mask((0, 0, 5, 5), (14, 28))},
        "mask must have the 28 x 28 pixels of the image, got 14 x 28",
    ),
    "no mask": ("/inpaint", {"mask": None}, "mask must be an uploaded file, got None"),
    "path": ("/inpaint", {"mask": {"path": "/etc/passwd"}}, "mask must be a file that was uploaded here"),
    "factor": ("/super_resolve", {"factor": 3}, "factor must be one of 2, 4, 7, 14, or 28, got 3"),
    "words as factor": ("/super_resolve", {"factor": "box:4"}, "factor must be an integer .*, got 'box:4'"),
    "kernel": ("/super_resolve", {"kernel": "lanczos"}, "kernel must be one of box or bicubic, got 'lanczos'"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_measurements_are_refused(server: AppServer, tmp_path: Path, name: str) -> None:
    endpoint, given, sentence = UNFIT[name]
    arguments = {"picture": make_mask((3, 3, 20, 20))} | given
    for key, value in arguments.items():
        if isinstance(value, Image.Image):
            value.save(tmp_path / f"{key}.png")
            arguments[key] = handle_file(tmp_path / f"{key}.png")
    with pytest.raises(AppError, match=sentence) as caught:
        server.call(endpoint, steps=2, **arguments)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000])
def test_invalid_json_numbers_are_refused(server: AppServer, number: str) -> None:
    body = f'{{"data": ["mnist", 1, {number}, 0, 0, 1, "the model\'s own"]}}'
    posted = server.http.post("/gradio_api/call/sample", content=body, headers={"content-type": "application/json"})
    assert "Traceback" not in posted.text
    if posted.is_success:
        answer = server.http.get(f"/gradio_api/call/sample/{posted.json()['event_id']}").text
        assert re.search("steps must be an integer from 1 to 1000, got ", answer)
    else:
        assert posted.status_code in (400, 422)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is so large, with hardly a row in it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def truncated_jpeg() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(file, "JPEG")
    return file.getvalue()[:2000]


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
UPLOADS: dict[str, tuple[Callable[[], bytes], str]] = {
    "text.png": (lambda: b"I am a text.\n" * 100, "text.png is not an image of a known format; give PNG, JPEG, "),
    "empty.png": (lambda: b"", "empty.png is not an image of a known format"),
    "huge.png": (lambda: png_header(30_000, 30_000), "huge.png must have at most 25 million pixels"),
    "large.png": (
        lambda: png_header(6_000, 6_000),
        "large.png must have at most 25 million pixels, .*, got 6000 x 6000",
    ),
    "drawing.svg": (lambda: SVG, "drawing.svg is not an image of a known format"),
    "svg.png": (lambda: SVG, "svg.png is not an image of a known format"),
    "half.jpg": (truncated_jpeg, "half.jpg cannot be read: .*truncated"),
    "50 MB.png": (lambda: bytes(50_000_000), "exceeds the maximum file size of 10000000 bytes"),
}


@pytest.mark.parametrize("name", UPLOADS)
def test_hostile_uploads_are_refused(server: AppServer, tmp_path: Path, name: str) -> None:
    make, sentence = UPLOADS[name]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(Exception, match=sentence) as caught:
        server.call("/reconstruct", picture=handle_file(tmp_path / name), steps=2)
    assert "Traceback" not in str(caught.value)
    assert len(server.call("/sample", count=1, steps=1)["images"]) == 1


def test_addresses_are_not_fetched(server: AppServer) -> None:
    picture = {"path": "https://example.org/digit.png", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(AppError, match="give the image itself; this server fetches nothing from other addresses"):
        server.call("/reconstruct", picture=picture, steps=2)


def test_server_refuses_large_uploads(server: AppServer) -> None:
    """The client above checks the size of the file itself."""
    answer = server.http.post("/gradio_api/upload", files={"files": ("x.png", bytes(50_000_000))})
    assert answer.status_code == 413
    assert "Traceback" not in answer.text
    assert not [path for path in server.folder.rglob("*") if path.is_file() and path.stat().st_size > 10_000_000]


def test_large_bodies_are_refused(server: AppServer) -> None:
    answer = server.http.post("/gradio_api/call/sample", content=b"x" * 3_000_000)
    assert (answer.status_code, answer.text) == (413, "a request has at most 2,000,000 bytes")


def test_files_of_the_machine_are_not_served(server: AppServer) -> None:
    (server.folder / "mine.txt").write_text("secret")
    for path in ("/etc/passwd", server.folder / "mine.txt", server.log, Path(__file__)):
        answer = server.http.get(f"/gradio_api/file={path}")
        assert answer.status_code in (403, 404)
        assert "secret" not in answer.text


def test_content_security_policy_forbids_other_hosts(server: AppServer) -> None:
    answer = server.http.get("/")
    assert answer.headers["content-security-policy"].startswith("default-src 'self'; ")
    config = server.http.get("/config").json()
    assert config["analytics_enabled"] is False


# --- many clients, and cancellation


def test_twenty_clients_at_once(server: AppServer, tiny: DDIMPipeline) -> None:
    def ask(seed: int) -> str | np.ndarray:
        try:
            answer = server.run("/sample", model="tiny", count=1, steps=2, seed=seed)
        except httpx.HTTPStatusError as error:  # where the queue was full when the request came
            return error.response.text
        if "error" in answer:
            return str(answer["error"])
        return pixels(io.BytesIO(server.http.get(answer["images"][0]["url"]).content))

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(ask, range(20)))
        before = server.memory()
        answers = list(pool.map(ask, range(100, 120)))
    num_sampled = 0
    for seed, answer in zip(range(100, 120), answers, strict=True):
        if isinstance(answer, str):
            assert "queue is full" in answer.lower()
        else:
            num_sampled += 1
            (expected,) = tiny(seeds=[seed], num_inference_steps=2).images
            assert np.array_equal(answer, np.asarray(expected))
    assert num_sampled >= 1
    assert server.memory() < 1.1 * before


def test_full_queue_refuses_runs(server: AppServer) -> None:
    client = server.client()
    long = client.submit(api_name="/sample", **LONG)
    wait_until_it_runs(long)
    waiting = [client.submit(model="tiny", count=1, steps=1, seed=seed, api_name="/sample") for seed in range(18)]
    for job in waiting:
        while not (job.done() or job.outputs()):
            time.sleep(0.05)
    long.cancel()
    refused = [job for job in waiting if job.exception(timeout=120) is not None]
    assert len(refused) == 2
    for seed, job in enumerate(waiting):
        if job in refused:
            assert "queue is full" in str(job.exception()).lower()
        else:
            assert job.result()["seeds"] == [seed]


def wait_until_it_runs(job: Any) -> None:
    end = time.monotonic() + 60
    while not job.outputs():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_cancellation_frees_the_queue(server: AppServer) -> None:
    job = server.client().submit(api_name="/sample", **LONG)
    wait_until_it_runs(job)
    job.cancel()
    assert len(server.call("/sample", count=1, steps=1)["images"]) == 1
    assert job.outputs()[-1]["done"] < LONG["steps"] / 2


def test_disconnected_client_frees_the_queue(server: AppServer) -> None:
    with server.listen("/sample", server.post("/sample", **LONG)) as reports:
        next(report for report in reports if "done" in report)
    assert len(server.call("/sample", count=1, steps=1)["images"]) == 1
