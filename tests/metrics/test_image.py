import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_embodied.metrics.image import psnr, ssim


def picture(seed: int, *lead: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*lead, side, side, 3), dtype=np.uint8)


def test_psnr_of_a_known_error():
    image = np.full((8, 8, 3), 100, np.uint8)
    assert psnr(image, image + np.uint8(5)) == pytest.approx(20 * np.log10(255 / 5))
    assert psnr(image, image) == np.inf
    one = image.copy()
    one[0, 0] += 8  # one pixel of 64
    assert psnr(one, image) == pytest.approx(20 * np.log10(255) - 10 * np.log10(1.0))


def test_psnr_is_symmetric_and_does_not_wrap():
    dark, light = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    assert psnr(dark, light) == psnr(light, dark) == pytest.approx(0.0)


def test_psnr_counts_only_the_mask():
    image = np.full((2, 8, 8, 3), 100, np.uint8)
    other = image.copy()
    other[:, :4] += 10
    mask = np.zeros((2, 8, 8), bool)
    mask[0, :2] = True
    first, none = psnr(image, other, mask)
    assert first == pytest.approx(20 * np.log10(255 / 10))
    assert np.isnan(none)


def reference_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """The definition, window by window."""
    offsets = np.arange(-5, 6)
    gauss = np.exp(-0.5 * (offsets / 1.5) ** 2)
    window = np.outer(gauss, gauss) / gauss.sum() ** 2
    values = []
    for channel in range(3):
        a, b = x[..., channel].astype(float), y[..., channel].astype(float)
        for row in range(x.shape[0] - 10):
            for column in range(x.shape[1] - 10):
                p, q = a[row : row + 11, column : column + 11], b[row : row + 11, column : column + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 60))
def test_ssim_is_its_definition(seed, noise):
    x = picture(seed)
    y = np.clip(x + np.random.default_rng(seed + 1).integers(-noise, noise + 1, x.shape), 0, 255).astype(np.uint8)
    assert ssim(x, y) == pytest.approx(reference_ssim(x, y), abs=1e-9)


def test_ssim_of_the_same_and_of_batches():
    batch, other = picture(0, 2, 3), picture(1, 2, 3)
    assert np.allclose(ssim(batch, batch), 1.0)
    values = ssim(batch, other)
    assert values.shape == (2, 3)
    assert values[1, 2] == pytest.approx(float(ssim(batch[1, 2], other[1, 2])))


def test_refusals():
    with pytest.raises(ValueError, match="one shape"):
        psnr(picture(0), picture(0, side=8))
    with pytest.raises(ValueError, match="uint8"):
        ssim(picture(0), picture(0).astype(np.float32))
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(picture(0, side=8), picture(0, side=8))
