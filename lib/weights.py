"""Pretrained weights of an encoder, in any of the released formats, from a file, a folder or the Hugging Face hub. The
tensors get the names that the model here uses, and they are loaded only if they fit it exactly."""

import math
import re
import urllib.error
import urllib.request
from pathlib import Path

import torch
import torch.nn.functional as F

from lib.common import DISK_ERRORS, UserError, check_finite, load_tensors


def load_weights(model, weights, repository, names):
    """Loads `weights` into `model`: a file, a folder or a Hugging Face repository; None stands for `repository`, and
    "random" for no weights at all. `names` is a function that renames the tensors, for example `vit_names`."""
    if weights == "random":
        return
    if weights is None and repository is None:
        raise UserError("R3M's weights are on no hub: download model.pt as R3M's README says, and give --weights PATH")
    files = weight_files(weights or repository)
    load_renamed(model, {k: v for file in files for k, v in read_tensors(file).items()}, names, files[0])


def load_renamed(model, state, names, source):
    """Renames the tensors `state`, which were read from the file `source`, by `names`, and loads them into `model`.
    UserError unless they are exactly the tensors of the model, and finite."""
    own = model.state_dict()
    try:
        state = names(state)
        if "pos_embed" in own and "pos_embed" in state:
            state["pos_embed"] = resample_positions(state["pos_embed"], own["pos_embed"].shape[1])
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{source} does not hold the weights of a {type(model).__name__}") from None
    shapes = {k for k in own.keys() & state.keys() if own[k].shape != getattr(state[k], "shape", None)}
    kinds = {"missing": own.keys() - state.keys(), "unknown": state.keys() - own.keys(), "of another shape": shapes}
    if problems := [f"{len(keys)} {kind}, e.g. {min(keys)}" for kind, keys in kinds.items() if keys]:
        raise UserError(f"{source} is a checkpoint of another architecture: keys {'; '.join(problems)}")
    model.load_state_dict(state)
    check_finite(model, source)


def weight_files(source):
    """The local files that `source` stands for: a file itself, the files in a folder, or a repository's file."""
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        if files := sorted(path.glob("model.safetensors")) or sorted(path.glob("model-*.safetensors")):
            return files
        raise UserError(f"there is no model.safetensors in the folder {path}")
    if re.fullmatch(r"[\w-]+/[\w.-]+", str(source)) and path.suffix not in (".pth", ".pt", ".safetensors"):
        return [Path(download(str(source)))]
    raise UserError(f"no weights at {path}: --weights takes a file, a folder, a Hugging Face repository, or 'random'")


def download(repository):
    """The local path of the model.safetensors of a Hugging Face repository, from the cache or the network."""
    import huggingface_hub as hub

    filename = "model.safetensors"
    try:
        return hub.hf_hub_download(repository, filename, local_files_only=True)
    except hub.errors.LocalEntryNotFoundError:
        pass
    except hub.errors.HFValidationError:
        raise UserError(f"{repository} is neither a file nor a folder, nor the name of a repository") from None
    url, advice = hub.hf_hub_url(repository, filename), f"download {filename} elsewhere and give --weights PATH"
    try:
        headers = hub.utils.build_hf_headers()
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD", headers=headers), timeout=10)
        return hub.hf_hub_download(repository, filename)
    except urllib.error.HTTPError as error:
        gated = "is gated, private or does not exist: accept its licence there and log in, or"
        reason = gated if error.code in (401, 403) else f"answers {error.code}:"
        raise UserError(f"{repository} {reason} {advice}") from None
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        raise UserError(f"the weights {repository} are not here, and no network reaches them: {advice}") from None


def read_tensors(path):
    """The dictionary of tensors in a .safetensors, .pth or .pt file. It never executes a pickle."""
    if path.suffix != ".safetensors":
        return load_tensors(path)
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception:  # a damaged file can fail in any way
        raise UserError(f"{path} is damaged, or is not a safetensors file") from None


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
    """Applies the regular expressions `rules` to every key, in order, and leaves out the keys that match `drop`."""
    renamed = {}
    for key, tensor in state.items():
        if not re.search(drop, key):
            for pattern, new in rules:
                key = re.sub(pattern, new, key)
            renamed[key] = tensor
    return renamed


def vit_names(vit, state):
    """Renames DINOv2's and DINOv3's tensors to timm's names. Sources: the models in facebookresearch/dinov2 and dinov3;
    convert_dinov2_to_hf.py and convert_dinov3_vit_to_hf.py in huggingface/transformers."""
    unused = r"mask_token$|^rope_embed\.|\.qkv\.bias_mask$"  # for training; given by the image size; a constant
    state = rename(state, VIT_RULES, drop=unused)
    dinov3, no_bias = "pos_embed" not in state, not any(re.search(r"\.attn\.q.*bias$", key) for key in state)
    for attn in (f"blocks.{i}.attn." for i in range(len(vit.blocks))):
        for kind in ("weight", "bias"):
            q, k, v = (state.pop(f"{attn}{part}.{kind}", None) for part in "qkv")
            if dinov3 and kind == "bias" and q is not None:
                k = torch.zeros_like(q)  # DINOv3's keys have no bias: the original code multiplies it by zeros
            if all(part is not None for part in (q, k, v)):
                state[f"{attn}qkv.{kind}"] = torch.cat([q, k, v])
        if dinov3 and no_bias:  # some of timm's files leave the biases out: they are zeros
            state[f"{attn}qkv.bias"] = torch.zeros(3 * vit.embed_dim)
        if dinov3 and f"{attn}qkv.bias" in state:
            state[f"{attn}q_bias"], _, state[f"{attn}v_bias"] = state.pop(f"{attn}qkv.bias").chunk(3)
    return rename(state, [(r"^storage_tokens$", "reg_token"), (r"\.ls(\d)\.gamma$", r".gamma_\1")]) if dinov3 else state


def resample_positions(positions, length):
    """Resamples DINOv2's position embeddings (1, 1 + M^2, d) to (1, length, d), as its `interpolate_pos_encoding` does:
    bicubic, without antialias, and with the offset of 0.1 with which its weights were tested."""
    old, new = math.isqrt(positions.shape[1] - 1), math.isqrt(length - 1)
    if positions.shape[1] == length or old**2 + 1 != positions.shape[1]:
        return positions
    grid = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, d, M, M)
    grid = F.interpolate(grid.float(), scale_factor=(new + 0.1) / old, mode="bicubic")
    return torch.cat([positions[:, :1], grid.flatten(2).mT], dim=1)


def vjepa2_names(state):
    """Renames V-JEPA 2's tensors to those of the encoder in transformers' VJEPA2Model. Sources: src/hub/backbones.py in
    facebookresearch/vjepa2; convert_vjepa2_to_hf.py in huggingface/transformers."""
    if "encoder" in state:  # the original file holds {"encoder", "predictor", "opt", "epoch", ...}
        state = rename(state["encoder"], VJEPA2_RULES, drop="pos_embed$")  # its rotary positions leave it unused
        for key in [k for k in state if ".qkv." in k]:
            parts = zip(("query", "key", "value"), state.pop(key).chunk(3), strict=True)
            state |= {key.replace("qkv", name): part for name, part in parts}
    return rename(state, [(r"^encoder\.", "")], drop=r"^predictor\.")


def resnet_names(state):
    """Renames R3M's tensors to torchvision's names, which timm shares. Source: r3m/__init__.py in facebookresearch/r3m,
    whose files hold {"r3m": the state of a DataParallel with a `convnet` and a language head}."""
    rules = [(r"^module\.", ""), (r"^convnet\.", "")]
    state = rename(state.get("r3m", state), rules, drop=r"(^|\.)(lang_(enc|rew)|fc)\.")  # fc: ImageNet's classes
    means = [key for key in state if key.endswith("running_mean")]  # older files lack the counters, which eval ignores
    return {key.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for key in means} | state
