"""How fast models learn, imagine and dream: what train.py --bench, plan.py --bench and vae_mdnrnn.py bench measure."""

from functools import partial

import torch

import vae_mdnrnn as wm
from encoders import build_encoder
from lib import common, processes
from predictor import LAPTOP, PAPER, WorldModel


def untrained_model(size, device):
    """A world model of the "laptop" or the "paper" size with random weights, by which speed is measured."""
    encoder, sizes = (("dinov2", 196), PAPER) if size == "paper" else (("pca", None), LAPTOP)
    statistics = (torch.zeros(2), torch.ones(2)), (torch.zeros(4), torch.ones(4))
    return WorldModel(build_encoder(*encoder, "random"), *statistics, **sizes | {"dropout": 0.0}).to(device)


def bench_training(size, device):
    """Measures how many windows a second an untrained model learns from, with tokens that come out of the cache and
    with frames that are encoded in every step."""
    model = untrained_model(size, device).train()
    N, d, batch_size = model.encoder.num_patches, model.encoder.dim, 512 if size == "laptop" else 32
    if device.type == "cpu" and size == "paper":
        batch_size = 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    rest = {"proprio": torch.randn(batch_size, 4, 4), "action": torch.randn(batch_size, 4, 10)}

    def learn(visual):
        batch = {name: tensor.to(device) for name, tensor in {"visual": visual, **rest}.items()}
        with common.bfloat16(device, device.type == "cuda"):
            loss, _ = model(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()  # waits for the device

    frames = torch.randint(256, (batch_size, 4, 64, 64, 3), dtype=torch.uint8)
    calls = {"cached tokens": partial(learn, torch.randn(batch_size, 4, N, d)), "frames": partial(learn, frames)}
    rates = processes.per_second(calls, seconds=10)
    print(f"{size} size, {N} x {d} numbers a frame, {batch_size} windows, {torch.get_num_threads()} threads, {device}")
    for name, rate in rates.items():
        print(f"  from {name:13} {batch_size * rate:9.3g} windows/s, {rate / rates['frames']:.2f} x")


def bench_planning(size, device):
    """Measures how many candidates a second move on by a step in the imagination of an untrained model."""
    model = untrained_model(size, device)
    N, d, candidates = model.encoder.num_patches, model.encoder.dim, 8 if size == "paper" else 1000
    obs = {"visual": torch.randn(candidates, 1, N, d), "proprio": torch.randn(candidates, 1, 4)}
    obs, actions = {name: o.to(device) for name, o in obs.items()}, torch.randn(candidates, 5, 10, device=device)

    @torch.no_grad()
    def imagine(how, dtype):
        model.train(how == "plain")  # nothing is remembered in training
        with common.bfloat16(device, dtype == "bfloat16"):
            return model.rollout(model.encode(obs), actions)["visual"].sum().item()  # waits for the device

    dtypes = ("float32", "bfloat16") if common.has_bfloat16(device) else ("float32",)
    kinds = [(how, dtype) for dtype in dtypes for how in ("plain", "cached")]
    rates = processes.per_second({kind: partial(imagine, *kind) for kind in kinds}, seconds=10)
    print(
        f"{size} size, {N} x {d} numbers a frame, {candidates} candidates, {device}, {torch.get_num_threads()} threads"
    )
    for kind, rate in rates.items():
        ratio = rate / rates["plain", "float32"]
        print(f"  {' '.join(kind):16} {5 * candidates * rate:9.3g} candidate-steps/s, {ratio:.2f} x")


def bench_dreaming(args):
    """Measures how many steps a second untrained M and C make in dreams, of which 1, 64 and 1,024 run at once."""
    rnn = wm.make_rnn(args, args.heads).eval().requires_grad_(False)
    rnn = rnn.to(args.device, common.fast_dtype(args.device))
    dream = wm.Dream(rnn, torch.zeros(2, 1, args.z_dim), 1.0, 10**9, args.cell)
    controller, rates = wm.make_controller(args), []
    for batch in (1, 64, 1024):
        params = torch.randn(batch, controller.num_params, device=dream.device)
        features = dream.reset(torch.arange(batch))

        def step(params=params, features=features):
            return dream.step(controller(params, features))[1].sum().item()  # waits for the device

        rates.append(batch * processes.per_second({"step": step})["step"])
        print(f"{batch:5} dreams at once: {rates[-1]:9.0f} dream steps/s, {rates[-1] / rates[0]:6.1f} x one")
