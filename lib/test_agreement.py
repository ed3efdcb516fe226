"""What DINO-WM and V-JEPA 2-AC released computes here what the released code computes.

test_agreement.json holds numbers that the released code itself gave, once (gaoyuezhou/dino_wm at 0a9492f,
facebookresearch/dinov2 at b8931f7, facebookresearch/vjepa2 at c2963a4). Weights and inputs are not in the file, because
they follow from a formula, `pattern`.
"""

import json
import math
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import encoders
import plan
import predictor
from lib import released
from lib.common import to_tensor

REFERENCE = json.loads((Path(__file__).parent / "test_agreement.json").read_text())

# -- what these tests call of the project --------------------------------------------------------------------


def open_run(run):
    return predictor.load_model(run, weights="random")


read_checkpoint = released.read_pickle


def predict(model, obs, actions):
    """The latents {"visual": (B, T, N, d), "proprio": (B, T, copies, e)} predicted to follow those of `obs`."""
    z, _ = model.predictor(model.pack(model.encode(obs)), model.encode_action(actions))
    N, d, e = model.encoder.num_patches, model.encoder.dim, model.proprio_dim
    visual, proprio = z.split([N * d, z.shape[-1] - N * d], -1)
    return {"visual": visual.unflatten(-1, (N, d)), "proprio": proprio.unflatten(-1, (-1, e))}


def losses(model, obs, actions):
    """The loss, and those of the visual and of the proprio's part by themselves."""
    loss, parts = model.loss(obs | {"action": actions})
    return torch.stack([loss, parts["visual"], parts["proprio"]])


def rollout(model, obs, actions):
    """The latents {"visual": (B, T + 1, N, d), "proprio": (B, T + 1, e)} that T actions lead to."""
    return model.rollout(model.encode(obs), actions)


def costs(model, obs, goal, actions, objective):
    """What actions cost (B,) in planning from one known frame to another."""
    numpy = lambda obs: {name: x.numpy() for name, x in obs.items()}  # noqa: E731
    goal = {name: x[:, 0] for name, x in goal.items()}
    worlds = types.SimpleNamespace(
        route=None, past=numpy(obs), goal_obs=numpy(goal), taken=np.zeros((len(actions), 0, 10), "f4")
    )
    cost = plan.latent_cost(model, worlds, torch.device("cpu"), objective, alpha=0.5, base=3.0)
    return cost(np.arange(len(actions)))(actions[:, None]).flatten()


def paint(model, tokens, frames):
    """The images (B, T, 3, H, W) that tokens decode to, and the decoder's loss, its reconstruction's and its codes'."""
    return model.decoder(tokens)[0], torch.stack(model.decoder_loss(tokens, frames))


def ac_tokens(path, tokens, actions, states):
    """Three frames of four tokens of six numbers through the V-JEPA 2-AC predictor in the file `path`."""
    ac = predictor.ACPredictor(4, 3, 6, 3, 3, width=32, depth=2, heads=2, mlp_dim=128)
    ac.load_released(path)
    return ac.transformer(tokens, actions, states)[0]


def seen_by_dinov2(frames):
    """What the backbone of the encoder `dinov2` is given for frames (S, 224, 224, 3)."""
    encoder, seen = encoders.build_encoder("dinov2", weights="random"), []
    encoder.vit.forward_features = lambda x: seen.append(x) or torch.zeros(len(x), 197, 384)
    encoder(to_tensor(frames))
    return seen[0]


# -- weights and inputs --------------------------------------------------------------------------------------


def pattern(shape, k, scale=1.0):
    """Numbers from -scale to scale in no apparent order, the same on every machine."""
    n = torch.arange(math.prod(shape))
    return ((n * n * 7919 + n * k * 4729 + k * 389) % 65521 / 32760.5 - 1).mul(scale).reshape(shape)


def pattern_frames(shape, k):
    return (pattern(shape, k, 127.5) + 127.5).round().byte()


def pattern_weights(shapes):
    """{name: tensor} of {name: shape}: matrices and kernels of a moderate size, and all else around 0 or 1."""
    state = {}
    for k, (name, shape) in enumerate(sorted(shapes.items())):
        if len(shape) > 1 and name.endswith("weight"):
            state[name] = pattern(shape, k, math.sqrt(3 / min(shape[:2]) / math.prod(shape[2:])))
        else:
            state[name] = pattern(shape, k, 0.4) + float(name.endswith(("weight", "cluster_size")))
    return state


def sample(x, count):
    """`count` of the numbers in x, spread over all of its axes; all of them in order, if there are no more."""
    if x.numel() <= count:
        return x.flatten()
    return x.flatten()[torch.arange(1, count + 1) * 104729 % x.numel()]


def batch(img_size, tokens):
    """Two windows of four frames, their tokens, states and actions in the world's units, and two actions more."""
    return dict(frames=pattern_frames((2, 4, img_size, img_size, 3), 5), tokens=pattern((2, 4, tokens, 384), 6, 1.7),
                states=pattern((2, 4, 4), 3), actions=pattern((2, 6, 10), 4))  # fmt: skip


# -- a run in the release's format ---------------------------------------------------------------------------


def released_weights(described, layers=2, **sizes):
    """{name: tensor} of a part of the release that is described as {"head.*.tail": "weight 3 D, bias 3"}, where * is
    the number of a layer and a letter one of `sizes`."""
    shapes = {}
    for owner, tensors in described.items():
        for i in range(layers if "*" in owner else 1):
            for leaf, *shape in map(str.split, tensors.split(", ")):
                name = ".".join(filter(None, [owner.replace("*", str(i)), leaf]))
                shapes[name] = [sizes.get(n) or int(n) for n in shape]
    return pattern_weights(shapes)


def as_modules(state):
    """Nested modules with these tensors, which behave as nothing."""
    root = nn.Module()
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            module = module._modules.setdefault(parent, nn.Module())
        module.register_parameter(leaf, nn.Parameter(tensor))
    return root


SETTINGS = """
frameskip: 5
num_hist: 3
num_pred: 1
env: {name: point_maze, dataset: {normalize_action: true, data_path: point_maze}}
encoder: {_target_: models.dino.DinoV2Encoder, name: dinov2_vits14, feature_key: x_norm_patchtokens}
predictor: {_target_: models.vit.ViTPredictor, depth: 2, heads: 2, mlp_dim: 16, dropout: 0.1, pool: mean}
"""


def write_run(name="one copy", own_encoder=False, spoil=lambda content: None):
    """Writes the run `name` of the reference, and the data set that it was trained on, into the current folder, and
    returns the run's path. It may have a trained DINOv2 of its own, and `spoil` may change its checkpoint."""
    made, parts = REFERENCE["runs"][name], REFERENCE["parts"]
    (p, a), (copies_p, copies_a) = made["widths"], made["repeats"]
    write_data_set(Path("point_maze"), made["img_size"])

    if made["concat_dim"] == 1:
        tokens, width = made["tokens"], 384 + copies_p * p + copies_a * a
    else:
        tokens, width = made["tokens"] + 2, 384
    sizes = dict(L=3 * tokens, D=width, P=p, A=a)
    content = {
        part: as_modules(released_weights(parts[part], **sizes))
        for part in ("predictor", "proprio_encoder", "action_encoder")
    }
    for layer in (0, 1):  # the mask is an attribute there, and no buffer
        attention = content["predictor"].get_submodule(f"transformer.layers.{layer}.0")
        attention.bias = torch.ones(1, 1, 3 * tokens, 3 * tokens)
    if own_encoder:
        content["encoder"] = as_modules(released_weights(parts["encoder"], layers=12))
    kind = "transposed_conv" if made["tokens"] == 1 else "vq"
    if "images" in made["numbers"]:
        content["decoder"] = as_modules(released_weights(parts[kind]))
    optimizer = torch.optim.AdamW(content["predictor"].parameters(), lr=0)
    for parameter in content["predictor"].parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # now it has a state, as a trained one
    content |= {"epoch": 3, "predictor_optimizer": optimizer}

    settings = yaml.safe_load(SETTINGS) | {k: made[k] for k in ("img_size", "concat_dim")}
    settings |= dict(proprio_emb_dim=p, action_emb_dim=a, num_proprio_repeat=copies_p, num_action_repeat=copies_a)
    settings["has_decoder"] = "decoder" in content
    settings["decoder"] = dict(channel=4, n_embed=3, n_res_block=1, n_res_channel=2, quantize=name == "copies")
    if kind == "transposed_conv":
        settings["encoder"]["feature_key"] = "x_norm_clstoken"
        settings["decoder"] = dict(observation_shape=[3, 112, 112], depth=4, kernel_size=5, stride=3)
    run = Path("outputs") / "pm"
    (run / "checkpoints").mkdir(parents=True)
    (run / "hydra.yaml").write_text(yaml.safe_dump(settings))
    spoil(content)
    torch.save(content, run / "checkpoints" / "model_latest.pth")
    return run


def write_data_set(path, img_size):
    """Three short episodes in the release's format; their means and deviations are what a run normalises by."""
    (path / "obses").mkdir(parents=True)
    torch.save(pattern((3, 8, 4), 1), path / "states.pth")
    torch.save(pattern((3, 8, 2), 2), path / "actions.pth")
    torch.save(torch.tensor([8, 6, 7]), path / "seq_lengths.pth")
    for episode in range(3):
        frames = torch.zeros(8, img_size, img_size, 3, dtype=torch.uint8)
        torch.save(frames, path / "obses" / f"episode_{episode:03d}.pth")


# -- the tests -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def part(obs, first, last):
    return {name: x[:, first:last] for name, x in obs.items()}


def check(results, numbers):
    """Every result, a tensor, has the numbers that the release gives, and none is left out."""
    assert results.keys() == numbers.keys()
    for name, tensor in results.items():
        expected = torch.tensor(numbers[name])
        torch.testing.assert_close(
            sample(tensor, len(expected)), expected, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", REFERENCE["runs"])
@torch.no_grad()
def test_a_released_run_computes_what_the_released_code_does(name):
    model, made = open_run(write_run(name)), REFERENCE["runs"][name]
    assert (model.encoder.img_size, model.encoder.num_patches) == (made["encoder_img_size"], made["tokens"])
    given = batch(made["img_size"], made["tokens"])
    obs, actions = {"visual": given["tokens"], "proprio": given["states"]}, given["actions"]
    predicted = predict(model, part(obs, 0, 3), actions[:, :3])
    imagined = rollout(model, part(obs, 0, 1), actions[:, :5])
    later = rollout(model, part(obs, 0, 2), actions)
    results = {"losses": losses(model, obs, actions[:, :4])}
    for kind in ("visual", "proprio"):
        results[f"predicted {kind}"] = predicted[kind]
        results[f"rollout {kind}"], results[f"rollout from two, {kind}"] = imagined[kind], later[kind]
    for objective in ("last", "all"):
        results[objective] = costs(model, part(obs, 0, 1), part(obs, 3, 4), actions[:, :5], objective)
    if name != "two tokens more":  # which has no decoder
        results["images"], results["decoder losses"] = paint(model, given["tokens"], given["frames"])
    check(results, made["numbers"])


@torch.no_grad()
def test_frames_go_through_a_released_run_with_a_trained_encoder():
    """From pixels to the cost of a plan: resizing, DINOv2 with resampled positions, rollout, objectives."""
    model, given = open_run(write_run("one copy", own_encoder=True)), batch(32, 4)
    obs, actions = {"visual": given["frames"], "proprio": given["states"]}, given["actions"][:, :5]
    results = {f"encoded {kind}": latent for kind, latent in model.encode(obs).items()}
    results["rollout visual"] = rollout(model, part(obs, 0, 1), actions)["visual"]
    for objective in ("last", "all"):
        results[objective] = costs(model, part(obs, 0, 1), part(obs, 3, 4), actions, objective)
    check(results, REFERENCE["from frames"])


def test_dinov2_sees_what_it_sees_in_the_release():
    made, seen = REFERENCE["observation"], seen_by_dinov2(pattern_frames((2, 224, 224, 3), 7))
    assert list(seen.shape) == made["shape"]
    check({"numbers": seen}, {"numbers": made["numbers"]})


@torch.no_grad()
def test_a_released_ac_predictor_computes_what_the_released_code_does(tmp_path):
    state = released_weights(REFERENCE["ac"]["shapes"])
    torch.save({"predictor": {f"module.{name}": x for name, x in state.items()}, "epoch": 3}, tmp_path / "ac.pt")
    inputs = pattern((2, 12, 6), 1, 1.7), pattern((2, 3, 3), 2), pattern((2, 3, 3), 3)
    check({"numbers": ac_tokens(tmp_path / "ac.pt", *inputs)}, {"numbers": REFERENCE["ac"]["numbers"]})


def test_every_class_in_a_released_checkpoint_is_known(tmp_path):
    """All that a checkpoint of the released code names, with AdamW's states and a DINOv2 of its own, can be read."""
    names = [(module, name) for module, classes in REFERENCE["classes"].items() for name in classes.split()]
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
        asked = b"".join(f"c{module}\n{name}\n0".encode() for module, name in names)  # each is looked up and dropped
        file.writestr("x/data.pkl", b"\x80\x02" + asked + b"}.")
    assert read_checkpoint(tmp_path / "x.pth") == {}
