"""Images of all formats and modes, damaged ones, and headers that promise too much.

An accepted image must have the pixels that were written, converted as documented; a damaged one those that PIL decodes
from the same bytes, and where its format has checksums, those that were written.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ddim.io.image_files import read_image
from ddim.io.images import FORMATS, fit_image, to_samples
from fuzz.harness import Refused, attempt, empty, expect
from fuzz.mutations import MUTATIONS, Mutation, mutate

SAVED_MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("1", "L", "P"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("L", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "TGA": ("L", "RGB"),
    "ICO": ("RGBA",),
    "PCX": ("L", "RGB"),
    "EPS": ("L", "RGB"),
    "SGI": ("L", "RGB"),
    "DDS": ("RGB",),
    "JPEG2000": ("L", "RGB"),
}
ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}
"""What EXIF's orientations say how to turn stored pixels."""
LARGE = 9400
"""Height and width just below the limit of PIL."""
LARGE_FORMATS = ("PNG", "TIFF", "GIF", "PPM", "BMP")
"""Those that are written in no time."""
GRAY = np.array([0.299, 0.587, 0.114])


class Picture(NamedTuple):
    """An image file.

    Attributes:
        format: PIL's name.
        mode: of the pixels.
        size: width and height.
        values: how the pixels are chosen: `random`, `flat`, `dark` (255 of 16 bits), `wild` (out of range), `nan`.
        orientation: of EXIF.
        is_transparent: whether a palette or a color key makes pixels transparent.
        frames: more than one make an animation.
        header: width and height to claim in the header instead.
        mutations: damage to the bytes.
    """

    format: str
    mode: str
    size: tuple[int, int]
    values: str = "random"
    orientation: int = 1
    is_transparent: bool = False
    frames: int = 1
    header: tuple[int, int] | None = None
    mutations: list[Mutation] = []  # noqa: RUF012 - a default of a named tuple, never changed


KINDS = st.sampled_from([(name, mode) for name, modes in SAVED_MODES.items() for mode in modes])
SIDES = st.integers(1, 12)
CLAIMED = st.sampled_from([0, 1, 2, 13, 20_000, 65_535, 100_000, 2**31 - 1])


@st.composite
def pictures(draw: Callable[[Any], Any]) -> Picture:
    """Draw a whole image, a damaged one, one with another header, or a large one."""
    name, mode = draw(KINDS)
    kind = draw(st.sampled_from(["whole"] * 4 + ["damaged"] * 5 + ["header"] * 2))
    if name in LARGE_FORMATS and draw(st.integers(0, 60)) == 7:
        kind = "large"
    picture = Picture(
        name,
        mode,
        (LARGE, LARGE) if kind == "large" else (draw(SIDES), draw(SIDES)),
        "flat" if kind == "large" else draw(st.sampled_from(["random", "random", "flat", "dark", "wild", "nan"])),
        draw(st.integers(1, 8)) if name in ("JPEG", "PNG", "TIFF", "WEBP") else 1,
        draw(st.booleans()),
        draw(st.sampled_from([1] * 9 + [3])),
    )
    if kind == "damaged":
        return picture._replace(mutations=draw(MUTATIONS))
    return picture._replace(header=(draw(CLAIMED), draw(CLAIMED))) if kind == "header" else picture


EXAMPLES = pictures()


def make_check(folder: Path) -> Callable[[Picture], None]:
    """Return the check of an image file."""
    Image.init()

    def check(picture: Picture) -> None:
        path = empty(folder / "images") / "x.png"
        pixels = make_pixels(picture)
        whole = encode(picture, pixels)
        data = mutate(whole, picture.mutations)
        if picture.header:
            data = claim_size(data, picture.format, *picture.header)
        path.write_bytes(data)
        is_whole = data == whole
        if picture.size[0] >= LARGE:
            # The memory is that of the reader, not of this check.
            del data, whole
        image = attempt(read_image, path, naming=(str(path),))
        expect(picture.format in FORMATS, f"a file of {picture.format} was read")
        if is_whole:
            with Image.open(path) as opened:
                expect(getattr(opened, "n_frames", 1) == 1, "an animation was read")
            check_pixels(image, picture, pixels)
        else:
            check_damaged(image, data, whole, picture)

    return check


def check_pixels(image: Image.Image, picture: Picture, pixels: np.ndarray) -> None:
    """Compare a whole image with what was written."""
    turned = ORIENTATIONS[picture.orientation](pixels)
    height, width = turned.shape[:2]
    expect(image.size == (width, height), f"size {image.size} instead of {(width, height)}")
    if picture.size[0] >= LARGE:
        attempt(fit_image, image, 32, 32, 3, naming=(str(image.filename),))  # type: ignore[attr-defined]
        return
    for channels in (1, 3):
        fitted = attempt(fit_image, image, height, width, channels, naming=(str(image.filename),))  # type: ignore[attr-defined]
        expect(has_known_range(picture.mode, pixels), "pixels of an unknown range were read")
        actual = np.asarray(fitted, np.float32).reshape(height, width, channels)
        expected = convert(turned, picture)
        expected = expected @ GRAY[:, None] if channels == 1 else expected
        bound = 1.01 if picture.format != "JPEG" and picture.mode not in ("CMYK", "YCbCr") else 20
        error = float(np.abs(actual - expected).max())
        expect(error <= bound, f"pixels differ by {error:.1f} of 255 in {channels} channels")
        samples = attempt(to_samples, [image], channels, height, width, resize=True)
        bytes_again = samples[0].permute(1, 2, 0).numpy() * 127.5 + 127.5
        expect(float(np.abs(bytes_again - actual).max()) < 0.01, "samples differ")


def has_known_range(mode: str, pixels: np.ndarray) -> bool:
    """Return whether it is known what values of a mode mean: 8 or 16 bits, or [0, 1]."""
    largest = float(pixels.max())
    return (
        mode != "LAB" and (mode != "F" or largest <= 1.001) and (mode != "I" or largest == 0 or 255 < largest < 65536)
    )


def check_damaged(image: Image.Image, data: bytes, whole: bytes, picture: Picture) -> None:
    """Compare a damaged image with what PIL decodes, and with what was written if it has checksums."""
    try:
        reference = plain_decode(data)
    except Exception as error:
        expect(False, f"read, although PIL alone does not: {error}")
        raise
    if reference.mode == "I" and image.mode == "I;16":
        reference = Image.fromarray(np.asarray(reference).astype(np.uint16))
    expect((image.mode, image.size) == (reference.mode, reference.size), f"{image} is not {reference}")
    expect(same_pixels(image, reference), "other pixels than those that PIL decodes")
    if picture.format == "PNG" and not has_valid_checksums(data):
        expect(same_pixels(image, plain_decode(whole)), "a damaged PNG, whose checksums differ, gives other pixels")
    for channels in (1, 3):
        try:
            attempt(fit_image, image, 8, 8, channels, naming=(str(image.filename),))  # type: ignore[attr-defined]
        except Refused:
            return


def plain_decode(data: bytes) -> Image.Image:
    """Decode an image without the library."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        try:
            return ImageOps.exif_transpose(image)
        except Exception:
            return image.copy()


def same_pixels(first: Image.Image, second: Image.Image) -> bool:
    """Return whether two images have equal pixels, palettes applied."""
    if first.size != second.size:
        return False
    if "P" in (first.mode, second.mode):
        first, second = first.convert("RGBA"), second.convert("RGBA")
    return np.array_equal(np.asarray(first), np.asarray(second), equal_nan=first.mode == "F")


def make_pixels(picture: Picture) -> np.ndarray:
    """Return stored pixels: (H, W) or (H, W, channels)."""
    width, height = picture.size
    random = np.random.default_rng(width * 100 + height)
    shape: tuple[int, ...] = (height, width)
    if picture.mode in ("1", "L", "P", "I;16", "I", "F"):
        pass
    else:
        shape = (height, width, len(Image.new(picture.mode, (1, 1)).getbands()))
    if picture.size[0] >= LARGE:
        kinds = {"F": np.float32, "I": np.int32, "I;16": np.uint16}
        value = np.full((1,) * len(shape), 999 if picture.mode == "I" else 1, kinds.get(picture.mode, np.uint8))
        return np.broadcast_to(value, shape)
    values = np.full(shape, 0.5) if picture.values == "flat" else random.random(shape)
    if picture.mode == "F":
        scaled = values.astype(np.float32) * (1000 if picture.values == "wild" else 1)
        if picture.values == "nan":
            scaled[0, 0] = np.nan
        return scaled
    if picture.mode in ("I;16", "I"):
        largest = {"dark": 255, "wild": 70_000 if picture.mode == "I" else 65_535}.get(picture.values, 65_535)
        return (values * largest).round().astype(np.uint16 if picture.mode == "I;16" else np.int32)
    return (values * 255).round().astype(np.uint8)


def encode(picture: Picture, pixels: np.ndarray) -> bytes:
    """Return the file of an image."""
    if picture.mode == "1":
        image = Image.fromarray(np.where(pixels > 127, 255, 0).astype(np.uint8)).convert("1")
    elif picture.mode == "P":
        image = Image.frombytes("P", picture.size, pixels.tobytes())
        image.putpalette(palette().tobytes())
    elif picture.mode in ("L", "I;16", "I", "F"):
        image = Image.fromarray(pixels)
    else:
        image = Image.frombytes(picture.mode, picture.size, pixels.tobytes())
    stream, options = io.BytesIO(), dict[str, Any]()
    if picture.orientation != 1:
        exif = Image.Exif()
        exif[0x112] = picture.orientation
        options["exif"] = exif
    if is_keyed(picture):
        options["transparency"] = 7
    if picture.format == "WEBP":
        options["lossless"] = options["exact"] = True
    if picture.format == "JPEG":
        options |= {"quality": 100, "subsampling": 0}
    if picture.format == "TIFF" and picture.size[0] >= LARGE:
        options["compression"] = "packbits"
    if picture.format == "PNG" and picture.size[0] >= LARGE:
        options["compress_level"] = 1
    if picture.frames > 1 and picture.format in ("GIF", "WEBP", "TIFF", "PNG") and picture.size[0] < LARGE:
        frames = [image.rotate(90 * i) for i in range(1, picture.frames)]
        options |= {"save_all": True, "append_images": frames}
    try:
        image.save(stream, picture.format, **options)
    except (OSError, ValueError, KeyError, SystemError):
        # A format that does not take the combination; then without what is special.
        stream = io.BytesIO()
        image.convert("RGB" if picture.mode not in ("L", "RGB", "RGBA") else picture.mode).save(stream, picture.format)
    return stream.getvalue()


def is_keyed(picture: Picture) -> bool:
    """Return whether value 7 of a palette is transparent."""
    return picture.is_transparent and picture.mode == "P" and picture.format in ("PNG", "GIF")


def palette() -> np.ndarray:
    """Return 256 colors, uint8 (256, 3)."""
    return np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)


def convert(pixels: np.ndarray, picture: Picture) -> np.ndarray:
    """Return the colors that stored pixels stand for, (H, W, 3) in [0, 255], as the documentation says."""
    mode, values = picture.mode, pixels.astype(np.float64)
    if mode == "1":
        return np.repeat(np.where(pixels > 127, 255.0, 0.0)[..., None], 3, 2)
    if mode == "P":
        colors = palette()[pixels].astype(np.float64)
        return np.where((pixels == 7)[..., None], 255.0, colors) if is_keyed(picture) else colors
    if mode in ("LA", "RGBA"):
        alpha = values[..., -1:] / 255
        blended = values[..., :-1] * alpha + 255 * (1 - alpha)
        return np.broadcast_to(blended, (*pixels.shape[:2], 3))
    if mode in ("L", "I;16", "I", "F"):
        scale = {"L": 1, "F": 255}.get(mode, 1 / 257)
        return np.repeat(values[..., None] * scale, 3, 2)
    if mode in ("CMYK", "YCbCr"):
        image = Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), np.ascontiguousarray(pixels).tobytes())
        return np.asarray(image.convert("RGB"), np.float64)
    return values[..., :3]


def claim_size(data: bytes, name: str, width: int, height: int) -> bytes:
    """Return a file whose header claims another size, with correct checksums."""
    if name == "PNG":
        header = struct.pack(">II", width, height) + data[24:29]
        return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]
    if name == "BMP":
        return data[:18] + struct.pack("<II", width, height) + data[26:]
    if name == "GIF":
        return data[:6] + struct.pack("<HH", width % 65536, height % 65536) + data[10:]
    if name == "PPM":
        return data[:3] + f"{width} {height}\n".encode() + data.split(b"\n", 2)[2]
    if name == "JPEG" and (at := data.find(b"\xff\xc0")) > 0:
        return data[: at + 5] + struct.pack(">HH", height % 65536, width % 65536) + data[at + 9 :]
    if name == "TIFF":
        return rewrite_tags(data, {256: width, 257: height})
    return data


def rewrite_tags(data: bytes, values: dict[int, int]) -> bytes:
    """Return a little-endian TIFF with other values of some tags."""
    changed = bytearray(data)
    start = struct.unpack_from("<I", data, 4)[0]
    for at in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        if (tag := struct.unpack_from("<H", data, at)[0]) in values:
            struct.pack_into("<HII", changed, at + 2, 4, 1, values[tag] % 2**32)
    return bytes(changed)


def chunks(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """Yield the names of a PNG's chunks, and whether their checksums are right."""
    at = 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        end = at + 8 + length
        yield data[at + 4 : at + 8], zlib.crc32(data[at + 4 : end]) == int.from_bytes(data[end : end + 4], "big")
        at = end + 4


def has_valid_checksums(data: bytes) -> bool:
    """Return whether a file is a PNG with all its parts."""
    parts = list(chunks(data))
    names = [name for name, _ in parts]
    return data[:8] == b"\x89PNG\r\n\x1a\n" and names[-1:] == [b"IEND"] and all(valid for _, valid in parts)
