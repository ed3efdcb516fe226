"""What is done for speed changes no result that it should not change:  python -m pytest -q lib/test_speed.py"""

import pytest
import torch

import encoders
import plan
import predictor
from lib import common, processes, speed
from lib.vjepa import attend
from test_all import refused


def test_attention_frame_by_frame_is_attention_under_a_mask():
    torch.manual_seed(0)
    for frames, tokens in ((3, 4), (1, 5), (4, 1)):
        q, k, v = torch.randn(3, 2, 2, frames * tokens, 8)
        frame = torch.arange(frames * tokens) // tokens
        scores = (q @ k.mT / 8**0.5).masked_fill(frame[:, None] < frame, -torch.inf)
        out, kept = attend(q, k, v, tokens)
        torch.testing.assert_close(out, scores.softmax(-1) @ v)
        earlier = [x[:, :, :-tokens] for x in kept]  # and the newest frame alone, after those before it
        newest, _ = attend(*(x[:, :, -tokens:] for x in (q, k, v)), tokens, earlier)
        torch.testing.assert_close(newest, out[:, :, -tokens:])


def test_bfloat16_is_refused_where_it_would_be_imitated(monkeypatch):
    monkeypatch.setattr(common, "has_bfloat16", lambda device: False)
    with refused("the device cpu has no arithmetic for bfloat16: take --dtype float32"):
        plan.get_args(["--dtype", "bfloat16"])


def test_pca_sees_the_same_in_bfloat16():
    images = torch.rand(300, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    encoder = encoders.build_encoder("pca")
    encoder.fit((images.permute(0, 2, 3, 1) * 255).byte().numpy())
    expected = encoder(images[:4])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(images[:4]), expected)


@pytest.mark.parametrize("name", ["train", "plan"])
def test_bench_compares_two_sizes(script, monkeypatch, name):
    """The paper's size is made smaller here. Every function that is timed runs once."""
    monkeypatch.setattr(speed, "PAPER", predictor.LAPTOP | {"depth": 1})
    monkeypatch.setattr(processes, "per_second", lambda calls, seconds: {n: 1 + abs(f()) for n, f in calls.items()})
    code, out, err = script(name, "--bench")
    assert code == 0, err
    assert "laptop size, 1 x 32 numbers a frame" in out and "paper size, 196 x 384 numbers a frame" in out
    assert out.count("1.00 x") >= 2


def test_bench_dreams_in_three_sizes(script, monkeypatch):
    monkeypatch.setattr(processes, "per_second", lambda calls: {name: call() + 1 for name, call in calls.items()})
    code, out, _ = script("vae_mdnrnn", "bench", "--sizes", "hidden=8")
    assert code == 0 and out.count("dream steps/s") == 3
