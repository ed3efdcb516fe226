"""Pretrained weights: found in a file, a folder or on the Hugging Face hub, renamed from any released format to the
names of the model that runs here, and loaded whole or not at all."""

import math
import re
import urllib.error
import urllib.request
from pathlib import Path

import torch
import torch.nn.functional as F

import data
from data import UserError
from vae_mdnrnn import load_tensors


def load_weights(model, weights, repository, names):
    """Loads `weights` (a file, a folder, a Hugging Face repository; None for `repository`) into `model`."""
    if weights == "random":
        return
    if weights is None and repository is None:
        raise UserError("R3M's weights are on no hub: get model.pt as its README says, and give --weights PATH")
    files = weight_files(weights or repository)
    load_state(model, {k: v for file in files for k, v in read_tensors(file).items()}, names, files[0])


def load_state(model, state, names, source):
    """Loads a dictionary of tensors from the file `source`, its keys renamed by `names`, into `model`, whole or not at
    all."""
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


def weight_files(source):
    """The local files of `source`: itself, what a folder holds, or a Hugging Face repository's."""
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        whole, shards = path / "model.safetensors", sorted(path.glob("model-*.safetensors"))
        if whole.is_file() or shards:
            return [whole] if whole.is_file() else shards
        raise UserError(f"no model.safetensors in the folder {path}")
    if re.fullmatch(r"[\w-]+/[\w.-]+", str(source)) and path.suffix not in (".pth", ".pt", ".safetensors"):
        return [Path(download(str(source)))]
    raise UserError(f"no weights at {path}: --weights takes a file, a folder, a Hugging Face repository, or 'random'")


def download(repository):
    """The local path of a Hugging Face repository's model.safetensors, from the cache or the network."""
    import huggingface_hub as hub

    filename = "model.safetensors"
    try:
        return hub.hf_hub_download(repository, filename, local_files_only=True)
    except hub.errors.LocalEntryNotFoundError:
        pass
    except hub.errors.HFValidationError:
        raise UserError(f"{repository} is neither a file nor a folder, nor the name of a repository") from None
    url, help = hub.hf_hub_url(repository, filename), "download it elsewhere and give --weights PATH"
    try:
        headers = hub.utils.build_hf_headers()
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD", headers=headers), timeout=10)
        return hub.hf_hub_download(repository, filename)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UserError(
                f"{repository} is gated (accept its licence there and log in), private, or not there: or {help}"
            ) from None
        raise UserError(f"{repository} answers {error.code} for {filename}: {help}") from None
    except OSError as error:
        if error.errno in data.DISK_ERRORS:
            raise
        raise UserError(f"the weights {repository}/{filename} are not here, and no network: {help}") from None


def read_tensors(path):
    """The dictionary in a .safetensors, .pth or .pt file; never executes a pickle."""
    if path.suffix != ".safetensors":
        return load_tensors(path)
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception:  # the library raises whatever it likes on a damaged file
        raise UserError(f"{path} is damaged, or no file of safetensors") from None


def resample_positions(positions, length):
    """DINOv2's position embeddings (1, 1 + M^2, d) for a grid of another size, (1, length, d), as its released code
    does it (`interpolate_pos_encoding`): bicubic, without antialias, and with the 0.1 its weights were tested with."""
    old, new = math.isqrt(positions.shape[1] - 1), math.isqrt(length - 1)
    if positions.shape[1] == length or old**2 + 1 != positions.shape[1]:
        return positions
    grid = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, d, M, M)
    grid = F.interpolate(grid.float(), scale_factor=(new + 0.1) / old, mode="bicubic")
    return torch.cat([positions[:, :1], grid.flatten(2).mT], dim=1)


def rename(state, rules, drop="(?!)"):
    """The keys renamed by regular expressions, one after the other, without those in which `drop` is found."""
    renamed = {}
    for key, tensor in state.items():
        if not re.search(drop, key):
            for pattern, new in rules:
                key = re.sub(pattern, new, key)
            renamed[key] = tensor
    return renamed


def vit_names(vit, state):
    """DINOv2's and DINOv3's names -> timm's. Sources: the models in facebookresearch/dinov2 and dinov3, and the
    conversion scripts convert_dinov2_to_hf.py and convert_dinov3_vit_to_hf.py in huggingface/transformers."""
    unused = r"mask_token$|^rope_embed\.|\.qkv\.bias_mask$"  # of training; derived from the image size; constant
    state = rename(state, [
        (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),  # transformers' -> the original
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
    ], drop=unused)  # fmt: skip
    dinov3 = "pos_embed" not in state
    no_bias = not any(key.endswith(("bias", "q_bias")) and ".attn.q" in key for key in state)
    for attn in (f"blocks.{i}.attn." for i in range(len(vit.blocks))):
        for kind in ("weight", "bias"):
            q, k, v = (state.pop(f"{attn}{part}.{kind}", None) for part in "qkv")
            if dinov3 and kind == "bias" and q is not None:
                k = torch.zeros_like(q)  # its keys have no bias; the original multiplies one by zeros
            if all(part is not None for part in (q, k, v)):
                state[f"{attn}qkv.{kind}"] = torch.cat([q, k, v])
        if dinov3 and no_bias:  # timm's files lack the biases, which are zeros in those that it has
            state[f"{attn}qkv.bias"] = torch.zeros(3 * vit.embed_dim)
        if dinov3 and f"{attn}qkv.bias" in state:
            state[f"{attn}q_bias"], _, state[f"{attn}v_bias"] = state.pop(f"{attn}qkv.bias").chunk(3)
    rules = [(r"^storage_tokens$", "reg_token"), (r"\.ls(\d)\.gamma$", r".gamma_\1")]
    return rename(state, rules) if dinov3 else state


def vjepa2_names(state):
    """V-JEPA 2's names -> those of the encoder in transformers' VJEPA2Model. Sources: src/hub/backbones.py in
    facebookresearch/vjepa2, convert_vjepa2_to_hf.py in huggingface/transformers."""
    if "encoder" in state:  # the original file: {"encoder", "predictor", "opt", "epoch", ...}
        unused = "pos_embed$"  # there, but positions are rotary
        state = rename(state["encoder"], [
            (r"^(module\.)?(backbone\.)?", ""),
            (r"^patch_embed\.", "embeddings.patch_embeddings."),
            (r"^blocks\.", "layer."),
            (r"\.attn\.", ".attention."),
            (r"^norm\.", "layernorm."),
        ], drop=unused)  # fmt: skip
        for key in [k for k in state if ".qkv." in k]:
            q, k, v = state.pop(key).chunk(3)
            state |= {key.replace("qkv", name): part for name, part in (("query", q), ("key", k), ("value", v))}
    return rename(state, [(r"^encoder\.", "")], drop=r"^predictor\.")


def resnet_names(state):
    """torchvision's and R3M's names -> timm's, which are torchvision's. Source: r3m/__init__.py in
    facebookresearch/r3m, whose files hold {"r3m": the state of a DataParallel with `convnet` and a language head}."""
    rules = [(r"^module\.", ""), (r"^convnet\.", "")]
    state = rename(state.get("r3m", state), rules, drop=r"(^|\.)(lang_(enc|rew)|fc)\.")  # fc: ImageNet's classes
    means = [key for key in state if key.endswith("running_mean")]  # older files lack the counters, which eval ignores
    return {key.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for key in means} | state
