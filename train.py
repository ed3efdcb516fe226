"""Fit a world model on a data set of trajectories, in the latent space of a frozen encoder.

The encoder is frozen, so every frame is encoded once into a token cache. Then windows of num_hist + rollout_steps model
steps are drawn, and the transition model learns to predict the next latents (`WorldModel.loss` in predictor.py).

    python train.py                                  # laptop: PointMaze, PCA latent, no download, minutes
    python train.py --encoder vae                    # the V of World Models instead
    python train.py --encoder dinov2 --img-size 224  # DINO-WM at the paper's size; wants a GPU
    python train.py --encoder dinov3 --weights model.safetensors
    python train.py --rollout-steps 5 --name own     # learns from its own predictions, too
    python train.py --predictor rwm --encoder state  # the Robotic World Model on the true state
    python train.py --predictor vjepa2_ac            # V-JEPA 2-AC
    python train.py --variant paper                  # what DINO-WM's text says where its code does otherwise
    python train.py --decoder                        # and a decoder, to see what it imagines
    python train.py --system dreamer                 # a world model with eyes of its own (lib/systems.py)

Writes runs/NAME/: args.json, model.pt, log.csv, curves.png; with a decoder imagined.png and imagined.gif. A run that
was interrupted goes on from its last epoch when the same command is given again, and ends bit for bit (on the CPU)
where it would have.
"""

import math
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import data
from encoders import build_encoder
from lib import common, pictures
from lib.common import UserError, positive
from lib.systems import SIZES as SYSTEM_SIZES
from lib.systems import SYSTEMS, system_class
from predictor import PREDICTORS, WorldModel, load_checkpoint

FIT_FRAMES = 20_000  # how many training frames are shown to an encoder that is fitted
DECODER_LR = 3e-4  # Adam's, as released
DECODER_FRAMES = 32  # how many frames the decoder sees in a step: the last of each window, since windows overlap


def train(args):
    dataset = data.open_dataset(args.data) if args.data else None
    meta = dataset.meta if dataset else {}
    env, img_size = args.env or meta.get("env", "pointmaze"), args.img_size or meta.get("img_size", 64)
    kinds = [kind for kind in (args.predictor, args.variant) if kind not in ("vit", "repository")]
    directory = common.output_folder("runs", args.name or "_".join([env, args.system or args.encoder, *kinds]))
    device = torch.device(args.device)

    # a run that is there goes on with the flags that it was begun with
    resumed, flags = None, {name: value for name, value in vars(args).items() if name != "device"}
    if (directory / "model.pt").exists():
        resumed = load_checkpoint(directory, device)
        common.same_flags(directory, flags)
        if "optimizer" not in resumed:
            print(f"{directory} is trained already: python plan.py --ckpt {directory}, or choose another --name")
            return

    # the encoder, the data, and the windows
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    system = system_class(args.system) if args.system else None
    if system is None:
        encoder = build_encoder(args.encoder, encoder_img_size(args), args.weights if resumed is None else "random")
        single = encoder.num_patches == 1
        sizes = transition_sizes(args, single)
    dataset = dataset or open_or_collect(args, env, img_size)
    for flag, wanted in (("env", env), ("img_size", img_size)):
        if dataset.meta[flag] != wanted:
            raise UserError(f"{dataset.path} has --{flag.replace('_', '-')} {dataset.meta[flag]}, and not {wanted}")
    print(f"{dataset.path}: {len(dataset)} episodes, frameskip {dataset.meta['frameskip']}")
    train_episodes, val_episodes = dataset.split()
    num_frames = system.num_frames if system else args.num_hist + args.rollout_steps
    train_windows = data.Windows(dataset, train_episodes, num_frames, args.frameskip)
    val_windows = data.Windows(dataset, val_episodes, num_frames, args.frameskip)
    if resumed is None and system is None and hasattr(encoder, "fit"):
        encoder.to(device).fit(frames_to_fit(encoder, dataset, train_episodes, rng), seed=args.seed)

    # the model
    stats, world = dataset.statistics(train_episodes), dict(env=env, img_size=img_size, data=str(dataset.path))
    kind = dict(frameskip=args.frameskip, world=world)
    if system:
        model = system(stats["action"], stats["proprio"], **kind, **args.sizes).to(device)
    else:
        kind |= dict(predictor=args.predictor, variant=args.variant)
        sizes |= {"emb_dim": encoder.dim if sizes.get("concat_dim") == 0 else 10}
        sizes |= {"decoder": decoder_sizes(args, img_size, single) if args.decoder else None}
        model = WorldModel(encoder, stats["action"], stats["proprio"], args.num_hist, **kind, **sizes).to(device)
    if args.predictor_weights and resumed is None:
        model.predictor.load_released(args.predictor_weights)
    decoder = list(model.decoder.parameters()) if args.decoder else []
    taught = {id(p) for p in decoder}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taught]
    groups = [{"params": rest}]
    if decoder:
        groups.append({"params": decoder, "lr": DECODER_LR, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=args.lr)

    # the budget
    batch_size = args.batch_size or (128 if single else 32)
    steps_per_epoch = -(-len(train_windows) // batch_size)
    total_steps = args.steps or (args.epochs or (20 if single else 100)) * steps_per_epoch
    epochs = -(-total_steps // steps_per_epoch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, total_steps))
    log = []
    if resumed is not None:
        common.load_state(model, resumed["model"], directory / "model.pt")
        try:
            optimizer.load_state_dict(resumed["optimizer"])
            schedule.load_state_dict(resumed["schedule"])
            log = resumed["log"]
        except (KeyError, RuntimeError, ValueError):
            raise UserError(f"{directory}/model.pt does not go on with this version: remove {directory}") from None
        print(f"{directory}: going on after epoch {len(log)} of {epochs}")
    tokens = dataset.frames if system else data.token_cache(model.encoder, dataset, device)
    rollout = () if system else (args.rollout_steps,)
    common.write_json(directory / "args.json", flags)

    # the loop
    bar = tqdm(total=total_steps, initial=len(log) * steps_per_epoch, desc="train", unit="step")
    for epoch in range(len(log), epochs):
        torch.manual_seed(args.seed * 100_003 + epoch)  # dropout and order depend on (seed, epoch) alone
        steps = min(steps_per_epoch, total_steps - epoch * steps_per_epoch)
        order = torch.randperm(len(train_windows)).numpy()[: steps * batch_size]
        model.train()
        start, total = time.perf_counter(), torch.zeros((), device=device)
        for batch in train_windows.batches(order, tokens, batch_size, device, frames=1 if decoder else 0):
            decoder_loss = 0.0
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, _ = model.loss(batch, *rollout)
                if decoder:
                    visual = model.encode(batch)["visual"][:DECODER_FRAMES, -1:]
                    decoder_loss, *_ = model.decoder_loss(visual, batch["frames"][:DECODER_FRAMES])
            optimizer.zero_grad(set_to_none=True)
            (loss + decoder_loss).backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
            bar.update()
        entry = {"epoch": epoch + 1, "train": total.item() / steps}
        entry |= validate(model, val_windows, tokens, batch_size, device, rollout)
        if not math.isfinite(entry["train"] + entry["val"]):
            raise UserError(f"the loss is not finite in epoch {epoch + 1}: try a smaller --lr")
        if model.decoder is not None:
            entry |= show_imagination(model, dataset, val_episodes, num_frames, tokens, device, directory)
        log.append(entry | {"seconds": round(time.perf_counter() - start, 2)})
        bar.set_postfix_str(f"val {entry['val']:.4f}, copying {entry['copy']:.4f}")
        common.write_csv(directory / "log.csv", log)
        styles = {"train": "-", "val": "-", "copy": ":"}
        pictures.write_log_plot(directory / "curves.png", log, "epoch", styles, ylabel="latent error", yscale="log")
        unfinished = dict(optimizer=optimizer.state_dict(), schedule=schedule.state_dict(), log=log)
        model.save(directory, **(unfinished if epoch + 1 < epochs else {}))
    bar.close()
    print(f"{directory}: next-latent error {log[-1]['val_visual']:.4f}, copying the last frame {log[-1]['copy']:.4f}")
    print(f"plan with it: python plan.py --ckpt {directory}")


def learning_rate(step, total_steps, warmup=0.05):
    """Fraction of --lr at a step: linear warm-up, then half a cosine to zero."""
    done = (step + 0.5) / total_steps
    return min(done / warmup, 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def validate(model, windows, tokens, batch_size, device, rollout):
    """Validation losses {"val", "val_visual", "val_proprio", with rollouts "val_rollout"}, and "copy": the visual error
    of predicting no change."""
    model.eval()
    sums = {}
    for batch in windows.batches(np.arange(len(windows)), tokens, batch_size, device):
        loss, parts = model.loss(batch, *rollout)
        visual = model.encode(batch)["visual"][:, : model.num_hist + 1]
        values = {"val": loss, **{f"val_{name}": part for name, part in parts.items()}}
        values["copy"] = model.criterion(visual[:, :-1], visual[:, 1:])
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(visual) / len(windows)
    return sums


@torch.no_grad()
def show_imagination(model, dataset, episodes, num_frames, tokens, device, directory, count=8):
    """Draws what is imagined from the first true frames of some validation windows, and measures how good it is.

    Returns mean squared errors of decoded true latents ("recon", "vq") and of decoded one-step predictions
    ("recon_pred", which is in no loss), and the `likeness` of what is imagined. imagined.png has three rows for each of
    four windows: the frames, their latents decoded, the imagined latents decoded.
    """
    lengths = (dataset.episode_ends - dataset.episode_starts)[episodes]
    longest = lengths.max() * dataset.meta["frameskip"] // model.frameskip
    windows = data.Windows(dataset, episodes, max(num_frames, min(10, longest)), model.frameskip)
    order = np.linspace(0, len(windows) - 1, count).astype(int)
    (batch,) = windows.batches(order, tokens, count, device, windows.num_frames)
    z, frames, H, known = model.encode(batch), batch["frames"], model.num_hist, model.context
    errors = {}
    if isinstance(model, WorldModel):
        packed, _ = model.predictor(model.pack(z)[:, :H], model.encode_action(batch["action"][:, :H]))
        _, recon, vq = model.decoder_loss(z["visual"], frames)
        _, recon_pred, _ = model.decoder_loss(model.unpack(packed)["visual"], frames[:, 1 : H + 1])
        errors = {"recon": recon.item(), "vq": vq.item(), "recon_pred": recon_pred.item()}
    start = {name: latent[:, :known] for name, latent in z.items()}
    imagined = model.decode(model.rollout(start, batch["action"][:, :-1])["visual"])
    real, decoded = frames.byte().cpu().numpy(), model.decode(z["visual"])
    pictures.write_strips(directory / "imagined.png", *(f[i] for i in range(4) for f in (real, decoded, imagined)))
    films = np.concatenate([pictures.beside(real[i], imagined[i]) for i in range(4)])
    pictures.write_gif(directory / "imagined.gif", films, duration=50 * model.frameskip)
    return errors | pictures.likeness(imagined[:, known:], real[:, known:])


# ---- Data and sizes ------------------------------------------------------------------------------


def open_or_collect(args, env, img_size):
    """The default data set of a world, which is collected first if it is not there."""
    path = data.default_folder(env, img_size)
    if not path.exists():
        data.collect(path, env, 3000, 20, args.frameskip, img_size)
    return data.open_dataset(path)


def frames_to_fit(encoder, dataset, episodes, rng):
    """The frames (S, H, W, 3) that an encoder is fitted to: FIT_FRAMES at random, in clips as long as it wants them."""
    clip = encoder.clip_frames
    starts = data.Windows(dataset, episodes, clip, dataset.meta["frameskip"]).starts
    first = np.sort(rng.choice(starts, min(FIT_FRAMES // clip, len(starts)), replace=False))
    return dataset.frames[(first[:, None] + np.arange(clip)).ravel()]


def encoder_img_size(args):
    """The paper shows DINOv2 224 px, which makes 256 patches; the release shows it 196, for its decoder's sake."""
    return args.encoder_img_size or (224 if args.variant == "paper" and args.encoder.startswith("dino") else None)


# vit has the paper's sizes for patch tokens, and sizes that suit a laptop for a single token; rwm has the paper's;
# vjepa2_ac has small ones (the paper's: width=1024,depth=24,heads=16,mlp_dim=4096).
COMPOSITION = dict(concat_dim=1, num_proprio_repeat=1, num_action_repeat=1)  # of vit's tokens
PAPER = dict(depth=6, heads=16, dim_head=64, mlp_dim=2048, dropout=0.1) | COMPOSITION
LAPTOP = dict(depth=4, heads=4, dim_head=32, mlp_dim=256, dropout=0.0) | COMPOSITION
RWM, AC = dict(width=256, depth=2, mlp_dim=128), dict(width=128, depth=4, heads=4, mlp_dim=512)
SIZES = {"vit": PAPER, "rwm": RWM, "vjepa2_ac": AC}
KNOWN_SIZES = {name: common.number(int, 1, 10**5) for sizes in SIZES.values() for name in sizes}
KNOWN_SIZES["depth"] = common.number(int, 1, 1000)
KNOWN_SIZES |= {"dropout": common.number(float, 0, 0.99), "concat_dim": common.number(int, 0, 1)}


def transition_sizes(args, single):
    """The transition model's keyword arguments: its default sizes, and what --sizes says otherwise."""
    sizes = LAPTOP if single and args.predictor == "vit" else SIZES[args.predictor]
    if unknown := args.sizes.keys() - sizes.keys():
        raise UserError(f"--predictor {args.predictor} has no size {', '.join(unknown)}; it has {', '.join(sizes)}")
    return sizes | args.sizes


def decoder_sizes(args, img_size, single):
    """The decoder's keyword arguments: the release's sizes for its frames, and less for smaller ones."""
    small = dict(depth=16) if single else dict(channel=64, n_res_block=2, n_res_channel=32)
    quantize = {"quantize": True} if args.decoder == "vq" else {}
    return {"img_size": img_size} | (small if img_size < 224 else {}) | quantize


def get_args(argv=None):
    parser = common.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--env", help="the world; its data are collected if they are not there (default: the data set's, or pointmaze)")
    add("--data", help="data set folder, ours or DINO-WM's point_maze (default: datasets/ENV, or datasets/ENV_SIZE)")
    add("--img-size", type=positive, help="side of the frames in the data set, in pixels (default: its own, or 64)")
    add("--system", metavar="NAME", help=f"a world model with eyes of its own instead: {', '.join(SYSTEMS)}")
    add("--encoder", default="pca", help="encoder of the frames: python encoders.py lists them, and `state` sees none")
    add("--encoder-img-size", type=positive, help="side to which the encoder resizes frames (default: its own)")
    add(
        "--weights",
        help="the encoder's weights: a file, folder, hub repository or 'random' (default: the released)",
    )
    add("--frameskip", type=positive, default=5, help="environment steps per model step")
    add("--num-hist", type=positive, default=3, help="number of frames that the transition model sees")
    add("--predictor", default="vit", choices=PREDICTORS, help="the transition model")
    add("--predictor-weights", metavar="PATH", help="released predictor from which vjepa2_ac starts")
    sizes = common.key_values(SYSTEM_SIZES | KNOWN_SIZES)
    add("--sizes", type=sizes, default={}, help="sizes of the transition or system: depth=2,heads=4")
    add("--rollout-steps", type=positive, help="frames imagined in training (default: vit 1, rwm 8, vjepa2_ac 2)")
    variant = "follow DINO-WM's released code, or its text: DINOv2 sees 224 px, an MLP embeds actions, no proprio"
    add("--variant", choices=("repository", "paper"), default="repository", help=variant)
    add("--decoder", nargs="?", const="plain", choices=("plain", "vq"), help="train a decoder, too; vq has a codebook")
    add("--epochs", type=positive, help="passes over the windows (default: 100 for patches, 20 for one token)")
    add("--steps", type=positive, help="gradient steps in all, instead of --epochs (default: a system's own)")
    add("--batch-size", type=positive, help="windows per step (default: 32; 128 for one token; or a system's own)")
    lr = common.number(float, 0, 1, open_low=True)
    add("--lr", type=lr, help="peak learning rate of AdamW (default: 5e-4, a system's own)")
    add("--seed", type=common.seed_number, default=0, help="the same seed gives the same run")
    add("--name", help="name of the run under runs/ (default: ENV_ENCODER, and _PREDICTOR if it is not vit)")
    add("--device", type=common.available_device, default=common.default_device(), help="where to compute")
    args = parser.parse_args(argv)
    if args.system:
        return system_args(args, sys.argv[1:] if argv is None else argv)
    args.lr = args.lr or 5e-4
    args.rollout_steps = args.rollout_steps or PREDICTORS[args.predictor].rollout_steps
    if args.variant == "paper" and args.predictor != "vit":
        raise UserError(f"--variant paper is DINO-WM's, for --predictor vit, not {args.predictor}")
    if args.predictor_weights and args.predictor != "vjepa2_ac":
        raise UserError(f"--predictor-weights is for --predictor vjepa2_ac, not {args.predictor}")
    transition_sizes(args, single=True)  # a wrong name is reported before anything is built
    return args


def system_args(args, argv):
    """The arguments of a system: its own defaults, and no flag that it does not have."""
    system, given = system_class(args.system), {word.partition("=")[0] for word in argv}
    foreign = "encoder encoder-img-size weights num-hist predictor predictor-weights rollout-steps variant decoder"
    if unknown := [f"--{name}" for name in foreign.split() if f"--{name}" in given]:
        raise UserError(f"--system {args.system} has no {', '.join(unknown)}: it has eyes and a dynamics of its own")
    if unknown := args.sizes.keys() - system.sizes.keys():
        raise UserError(f"--system {args.system} has no size {', '.join(unknown)}; it has {', '.join(system.sizes)}")
    args.batch_size, args.lr = args.batch_size or system.batch_size, args.lr or system.lr
    args.steps = args.steps or (None if args.epochs else system.steps)
    return args


if __name__ == "__main__":
    common.run_script(lambda: train(get_args()))
