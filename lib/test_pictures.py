"""The claims of lib/pictures.py."""

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision import models

from lib import pictures


def test_psnr_and_ssim_are_as_defined(monkeypatch):
    x, y = torch.full((2, 3, 20, 20), 0.5), torch.rand(2, 3, 20, 20)
    assert pictures.psnr(x, x + 0.1).item() == pytest.approx(20, abs=1e-4)
    assert pictures.ssim(y, y).item() == pytest.approx(1, abs=1e-5) and pictures.ssim(y, y.flip(3)) < 0.2
    line = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    a, b = (torch.rand(1, 1, 11, 11).expand(1, 3, 11, 11) for _ in range(2))
    mean = lambda v: (v[0, 0].numpy() * np.outer(line, line) / line.sum() ** 2).sum()  # noqa: E731
    m_a, m_b = mean(a), mean(b)
    s_a, s_b, s_ab = mean(a * a) - m_a**2, mean(b * b) - m_b**2, mean(a * b) - m_a * m_b
    expected = (2 * m_a * m_b + 1e-4) * (2 * s_ab + 9e-4) / ((m_a**2 + m_b**2 + 1e-4) * (s_a + s_b + 9e-4))
    convolve = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args, **options: convolve(*args, **options)[..., 5:6, 5:6])
    assert pictures.ssim(a, b).item() == pytest.approx(expected, rel=1e-4)  # the one whole window


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_lpips_is_measured_where_its_weights_are_at_hand(tmp_path, monkeypatch):
    a, b = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64, 3), dtype=np.uint8)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(pictures, "perceptual_metric", pictures.perceptual_metric.__wrapped__)
    assert pictures.likeness(a, b).keys() == {"psnr", "ssim"}
    state = models.vgg16(init_weights=False).state_dict()
    state |= {name: torch.zeros(()).expand(w.shape) for name, w in state.items() if "classifier" in name}  # not stored
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub/checkpoints/vgg16-397923af.pth")
    assert pictures.likeness(a, a)["lpips"] == 0 and pictures.likeness(a, b)["lpips"] > 0.01


def test_films_and_strips_show_every_frame(tmp_path):
    film = np.zeros((3, 64, 64, 3), np.uint8)
    film[np.arange(3), :, :, np.arange(3)] = 255  # red, green, blue
    both = pictures.beside(film, film[:1])
    assert np.array_equal(both[:, :, 66:], film[[0, 0, 0]]) and np.array_equal(both[:, :, :64], film)
    pictures.write_gif(tmp_path / "a.gif", both)
    pictures.write_strips(tmp_path / "a.png", film, film)
    gif, strips = imageio.imread(tmp_path / "a.gif"), imageio.imread(tmp_path / "a.png")
    assert np.array_equal(gif[:, ::4, ::4], both) and strips.shape == (2 * 66, 3 * 66, 3)
    assert np.array_equal(strips[67:131, 67:131], film[1])
