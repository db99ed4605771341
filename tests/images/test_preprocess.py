"""Images from files: orientation, modes, and the same tensors as timm's evaluation."""

import math
import os
import struct
import zlib
from contextlib import suppress
from random import Random

import pytest
import torch
from PIL import Image

from pvt_fast.images.preprocess import Preprocess, read_image, to_mode

SIZES = [(640, 427), (100, 333), (224, 224), (31, 57), (249, 500)]  # (width, height)


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    """A smooth ramp with noise on it: a shift by one pixel or another filter shows."""
    ramp = torch.linspace(0, 200, width * height * channels).view(height, width, channels)
    values = (ramp + torch.randint(0, 56, ramp.shape, generator=torch.Generator().manual_seed(1))).to(torch.uint8)
    return Image.frombytes("RGB" if channels == 3 else "L", (width, height), values.numpy().tobytes())


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_equals_timm_evaluation(size):
    from timm.data import create_transform

    transform = create_transform((3, 224, 224), is_training=False, interpolation="bicubic", crop_pct=0.9)
    image = noise(*size)
    torch.testing.assert_close(Preprocess()(image), transform(image))


def test_keeps_the_centre_and_scales_to_the_statistics():
    image = Image.new("L", (64, 32), 0)
    image.paste(255, (16, 0, 48, 32))
    actual = Preprocess(size=32, crop=1.0, mean=(0.5,), std=(0.25,))(image)
    assert torch.equal(actual, torch.full((1, 32, 32), 2.0))


def resized_as_a_whole(image: Image.Image, size: int, crop: float) -> torch.Tensor:
    """What the preprocessing is by definition: all of the image resized, then its centre; pixels (3, size, size)."""
    shorter, (width, height) = math.floor(size / crop), image.size
    to = (shorter, shorter * height // width) if width <= height else (shorter * width // height, shorter)
    image = image.resize(to, Image.Resampling.BICUBIC)
    left, top = round((to[0] - size) / 2), round((to[1] - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def pixels_of(image: Image.Image, size: int, crop: float) -> torch.Tensor:
    values = Preprocess(size=size, crop=crop, mean=(0.0,) * 3, std=(1.0,) * 3)(image)
    return (values * 255).round().to(torch.uint8)


SHAPES = [(1, 1), (1, 16), (16, 1), (1, 17), (17, 1), (3, 49), (7, 7), (20, 13), (40, 639), (333, 30), (1000, 63)]


@pytest.mark.parametrize("size", SHAPES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize(("side", "crop"), [(32, 0.9), (30, 1.0), (33, 0.7)])
def test_images_up_to_sixteen_times_as_long_as_wide_are_resized_as_a_whole(size, side, crop):
    image = noise(*size)
    assert torch.equal(pixels_of(image, side, crop), resized_as_a_whole(image, side, crop))


@pytest.mark.parametrize(
    "size", [(1, 400), (400, 1), (1, 401), (3, 400), (401, 2), (5, 83)], ids="{0[0]}x{0[1]}".format
)
def test_of_longer_images_the_same_middle_is_seen(size):
    """To a pixel of the result, by another rounding; half a pixel of the image, up to sixteen there, would show."""
    image = noise(*size)
    actual, expected = pixels_of(image, 32, 0.9).double(), resized_as_a_whole(image, 32, 0.9).double()
    assert (actual - expected).abs().mean() < 0.25 * expected.std()


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (2, 1_000_000)], ids="{0[0]}x{0[1]}".format)
def test_very_long_images_take_little_memory(size, monkeypatch):
    largest = 0
    resize = Image.Image.resize

    def watched(image, to, *arguments):
        nonlocal largest
        largest = max(largest, to[0] * to[1])
        return resize(image, to, *arguments)

    monkeypatch.setattr(Image.Image, "resize", watched)
    assert torch.equal(pixels_of(Image.new("RGB", size, (10, 20, 30)), 224, 0.9)[:, 0, 0], torch.tensor([10, 20, 30]))
    assert 0 < largest < 18 * 248**2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb_and_grey(mode):
    image = noise(50, 40).convert(mode)
    colour, grey = Preprocess(size=32)(image), Preprocess(size=32, mean=(0.5,), std=(0.5,))(image)
    assert colour.shape == (3, 32, 32)
    assert grey.shape == (1, 32, 32)
    assert torch.equal(colour, Preprocess(size=32)(image.convert("RGB")))
    assert colour.std() > 0.1


def test_transparent_palette_is_read_without_a_warning(tmp_path):
    image = noise(20, 20).quantize(16)
    image.save(tmp_path / "palette.png", transparency=bytes([0, 128] * 8))
    opaque = image.convert("RGB")
    assert to_mode(read_image(tmp_path / "palette.png"), "RGB").tobytes() == opaque.tobytes()


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = torch.arange(256, dtype=torch.int32).mul(257).to(torch.uint16).view(16, 16)
    Image.frombytes("I;16", (16, 16), values.numpy().tobytes()).save(tmp_path / "deep.png")
    assert to_mode(read_image(tmp_path / "deep.png"), "L").tobytes() == bytes(range(256))


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16L", "I;16B"])
def test_sixteen_bit_grey_in_any_order_of_bytes(mode):
    image = Image.new(mode, (8, 8), 200 * 256 + 17)
    assert to_mode(image, "L").getpixel((0, 0)) == 200
    assert to_mode(image, "RGB").getpixel((0, 0)) == (200, 200, 200)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("I", (4, 4), 70_000), "image must have at most 16 bits a channel, got values from 70000 to 70000"),
        (Image.new("I", (4, 4), -1), "image must have at most 16 bits a channel, got values from -1 to -1"),
        (Image.new("F", (4, 4), 0.5), "image must have one of the modes .*, got F"),
        (Image.new("LAB", (4, 4)), "image must have one of the modes .*, got LAB"),
        (Image.new("RGB", (0, 4)), "image must have pixels, got a size of 0x4"),
        (Image.new("L", (4, 0)), "image must have pixels, got a size of 4x0"),
    ],
    ids=["32 bits", "negative", "float", "LAB", "no width", "no height"],
)
def test_what_has_no_right_answer_is_refused(image, message):
    with pytest.raises(ValueError, match=f"Preprocess: {message}"):
        Preprocess(size=8)(image)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_of_an_animation_the_first_image_is_read(tmp_path, suffix):
    first, second = Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 200))
    first.save(tmp_path / f"two.{suffix}", save_all=True, append_images=[second])
    red, _, blue = to_mode(read_image(tmp_path / f"two.{suffix}"), "RGB").getpixel((4, 4))
    assert red > 190
    assert blue < 10


@pytest.mark.parametrize("limit", [None, Image.MAX_IMAGE_PIXELS])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, limit):
    """20,000 x 20,000 pixels in 60 bytes, also where PIL's own limit was lifted."""
    head = zlib.crc32(body := b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    data = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", 13) + body + struct.pack(">I", head)]
    chunks.append(struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data)))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"path must be a readable image, got '.*bomb\.png' \(.*pixels"):
        read_image(tmp_path / "bomb.png")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"path must be a readable image, got '.*pipe\.png' \(not a regular file\)"):
        read_image(tmp_path / "pipe.png")


@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "tiff", "webp", "bmp"])
def test_damaged_files_are_read_or_refused(tmp_path, suffix):
    path, random = tmp_path / f"image.{suffix}", Random(suffix)
    noise(24, 16).save(path)
    whole = path.read_bytes()
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(random.choice((1, 3, 9))):
            data[random.randrange(min(len(data), random.choice((60, 400, 4000))))] = random.randrange(256)
        path.write_bytes(data[: random.choice((len(data), random.randrange(len(data))))])
        with suppress(ValueError):  # anything else is a fault
            assert Preprocess(size=8)(read_image(path)).shape == (3, 8, 8)


# What a viewer must do to the stored pixels: EXIF 2.3, tag 0x0112.
@pytest.mark.parametrize(
    ("orientation", "to_stored"),
    [(1, None), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)],
)
def test_exif_orientation_is_honoured(tmp_path, orientation, to_stored):
    upright = Image.new("RGB", (96, 64), "red")
    upright.paste("blue", (0, 32, 96, 64))
    upright.paste("lime", (48, 0, 96, 32))
    stored = upright if to_stored is None else upright.transpose(to_stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.jpg", exif=exif, quality=95, subsampling=0)

    image = read_image(tmp_path / "photo.jpg")
    assert image.size == (96, 64)
    loudest = [max(range(3), key=image.getpixel(point).__getitem__) for point in ((24, 16), (72, 16), (24, 48))]
    assert loudest == [0, 1, 2]  # red, green, blue
    expected = Preprocess(size=32)(upright)
    assert (Preprocess(size=32)(image) - expected).abs().mean() < 0.2


def test_unreadable_files_are_named(tmp_path):
    noise(64, 64).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    for name in ("cut.jpg", "text.png", "empty.png", "."):
        with pytest.raises(ValueError, match="path must be a readable image, got"):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"path must be an existing file, got '.*absent\.png'"):
        read_image(tmp_path / "absent.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"size": 32.0}, "size must be an int, got 32.0"),
        ({"size": 4097, "crop": 1}, "size and crop must make a shorter side of at most 4096 pixels, got 4097 and 1"),
        (
            {"size": 1, "crop": 1e-300},
            "size and crop must make a shorter side of at most 4096 pixels, got 1 and 1e-300",
        ),
        ({"std": (1, 1e-9, 1)}, "std must be positive, at least 1e-06, got"),
        ({"crop": 0.0}, r"crop must lie in \(0, 1\], got 0.0"),
        ({"crop": 1.5}, r"crop must lie in \(0, 1\], got 1.5"),
        ({"interpolation": "nearest"}, "interpolation must be one of bilinear, bicubic; got 'nearest'"),
        ({"mean": (0.5,)}, "mean and std must both have 1 or 3 entries, got 1 and 3"),
        ({"mean": (0.5, 0.5), "std": (1.0, 1.0)}, "mean and std must both have 1 or 3 entries, got 2 and 2"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
    ],
)
def test_impossible_preprocessing_is_refused(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Preprocess(**arguments)
