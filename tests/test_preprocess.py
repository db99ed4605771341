"""Images from files: orientation, modes, and the same tensors as timm's evaluation."""

import pytest
import torch
from PIL import Image

from pvt_fast.preprocess import Preprocess, read_image, to_mode

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


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
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
        ({"size": 0}, "size must be an int of at least 1, got 0"),
        ({"size": 32.0}, "size must be an int of at least 1, got 32.0"),
        ({"crop": 0.0}, r"crop must lie in \(0, 1\], got 0.0"),
        ({"crop": 1.5}, r"crop must lie in \(0, 1\], got 1.5"),
        ({"interpolation": "nearest"}, "interpolation must be one of bilinear, bicubic; got 'nearest'"),
        ({"mean": (0.5,)}, "mean and std must both have 1 or 3 entries, got 1 and 3"),
        ({"mean": (0.5, 0.5), "std": (1.0, 1.0)}, "mean and std must both have 1 or 3 entries, got 2 and 2"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
    ],
)
def test_impossible_preprocessing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**arguments)
