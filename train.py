"""Fit a world model on a data set of trajectories, in the latent space of a frozen encoder.

The encoder is frozen, so every frame is encoded once into a token cache. Then windows of num_hist + rollout_steps model
steps are drawn, and the transition model learns to predict the next latents (`WorldModel.loss` in predictor.py).

    python train.py                                  # laptop: PointMaze, PCA latent, no download, minutes
    python train.py --encoder vae                    # the V of World Models instead
    python train.py --encoder dinov2 --img-size 224  # DINO-WM as released, 196 patches; needs a GPU
    python train.py --encoder dinov3 --weights model.safetensors
    python train.py --rollout-steps 5 --name own     # learns from its own predictions, too
    python train.py --predictor rwm --encoder state  # the Robotic World Model on the true state
    python train.py --predictor vjepa2_ac            # V-JEPA 2-AC
    python train.py --variant paper                  # DINO-WM's text, where its code differs from it
    python train.py --decoder                        # and a decoder, to see what it imagines
    python train.py --system dreamer                 # another world model, with an encoder of its own (lib/systems.py)
    torchrun --nproc-per-node 8 train.py --encoder dinov2    # on eight GPUs, with the same global batch

Writes runs/NAME/: args.json, config.json and model.safetensors (the model), log.csv, curves.png; with a decoder
imagined.png and imagined.gif. A run that was interrupted goes on from its last epoch when the same command is given
again, and ends bit for bit (on the CPU) where it would have.
"""

import math
import time

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import data
from encoders import build_encoder
from lib import common, pictures, processes
from lib.common import RANK, WORLD_SIZE, UserError, positive, tqdm
from lib.logs import LOGS, open_log
from lib.speed import bench_training
from lib.systems import SYSTEM_SIZES, SYSTEMS, system_args, system_class
from lib.worlds import can_be_set
from predictor import LAPTOP, PREDICTORS, SIZES, WorldModel

FIT_FRAMES = 20_000  # how many training frames are shown to an encoder that is fitted
DECODER_LR = 3e-4  # Adam's, as released
# The budget of training where no flag sets it: DINO-WM's for patches, and what suits a laptop for one token a frame.
BUDGETS = {
    "batch_size": {"patches": 32, "one token, vit": 512, "one token, rwm or vjepa2_ac": 128},
    "epochs": {"patches": 100, "one token, vit": 12, "one token, rwm or vjepa2_ac": 20},
    "lr": {"patches": 5e-4, "one token, vit": 2e-3, "one token, rwm or vjepa2_ac": 5e-4},
}


def train(args):
    dataset = data.open_dataset(args.data) if args.data else None
    meta = dataset.meta if dataset else {}
    env, img_size = args.env or meta.get("env", "pointmaze"), args.img_size or meta.get("img_size", 64)
    kinds = [kind for kind in (args.predictor, args.variant) if kind not in ("vit", "repository")]
    directory = common.output_folder("runs", args.name or "_".join([env, args.system or args.encoder, *kinds]))
    device = processes.join(args.device)

    # an existing run resumes with the flags that it was begun with
    resumed, flags = None, {name: value for name, value in vars(args).items() if name not in ("device", "log", "bench")}
    unfinished = directory / "model.unfinished.pt"
    if unfinished.exists() or (directory / "model.safetensors").exists():
        common.same_flags(directory, flags)
        if not unfinished.exists():
            print(f"{directory} is trained already: python plan.py --ckpt {directory}, or choose another --name")
            return
        resumed = common.load_tensors(unfinished, device)

    # the encoder, which a system brings along; the data, and the windows
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    system = system_class(args.system) if args.system else None
    weights = args.weights if resumed is None else "random"  # a resumed run holds them
    encoder = None if system else build_encoder(args.encoder, encoder_img_size(args), weights)
    single = not system and encoder.num_patches == 1
    sizes = args.sizes if system else transition_sizes(args, single)
    kind = "patches" if not single else f"one token, {'vit' if args.predictor == 'vit' else 'rwm or vjepa2_ac'}"
    batch_size, epochs, lr = (getattr(args, name) or BUDGETS[name][kind] for name in BUDGETS)
    if batch_size % WORLD_SIZE:
        raise UserError(f"{WORLD_SIZE} processes cannot share a --batch-size of {batch_size} evenly")
    dataset = dataset or open_or_collect(args, env, img_size)
    for flag, wanted in (("env", env), ("img_size", img_size)):
        if dataset.meta[flag] != wanted:
            raise UserError(f"{dataset.path} has --{flag.replace('_', '-')} {dataset.meta[flag]}, and not {wanted}")
    if args.encoder == "state" and not dataset.states.shape[1]:
        raise UserError(f"--encoder state has nothing to see: {dataset.path} has no states")
    print(f"{dataset.path}: {len(dataset)} episodes, frameskip {dataset.meta['frameskip']}")
    train_episodes, val_episodes = dataset.split()
    num_frames = system.num_frames if system else args.num_hist + args.rollout_steps
    train_windows = data.Windows(dataset, train_episodes, num_frames, args.frameskip)
    val_windows = data.Windows(dataset, val_episodes, num_frames, args.frameskip)
    if resumed is None and hasattr(encoder, "fit") and RANK == 0:
        encoder.to(device).fit(frames_to_fit(encoder, dataset, train_episodes, rng), seed=args.seed)

    # the model
    stats, world = dataset.statistics(train_episodes), dict(env=env, img_size=img_size, data=str(dataset.path))
    if len({str(seen) for seen in processes.gather((len(dataset.frames), stats))}) > 1:
        raise UserError(f"the processes of torchrun see different data at {dataset.path}: give all of them the same")
    if args.predictor_weights:  # the release's predictor takes states and actions in the world's own units
        stats = {name: (np.zeros_like(mean), np.ones_like(std)) for name, (mean, std) in stats.items()}
    settings = dict(frameskip=args.frameskip, world=world)
    if system:
        model = system(stats["action"], stats["proprio"], **settings, **sizes).to(device)
    else:
        processes.use_threads(device, encoder.num_patches)
        settings |= dict(predictor=args.predictor, variant=args.variant)
        sizes |= {"emb_dim": encoder.dim if sizes.get("concat_dim") == 0 else 10}
        sizes |= {"decoder": decoder_sizes(args, img_size, single) if args.decoder else None}
        model = WorldModel(encoder, stats["action"], stats["proprio"], args.num_hist, **settings, **sizes).to(device)
    if args.predictor_weights and resumed is None:
        model.predictor.load_released(args.predictor_weights)
    decoder = list(model.decoder.parameters()) if args.decoder else []  # a system's own learns with the rest
    known = set(decoder)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad and p not in known]}]
    if decoder:
        groups.append({"params": decoder, "lr": DECODER_LR, "weight_decay": 0.0})

    # the budget
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    steps_per_epoch = -(-len(train_windows) // batch_size)
    total_steps = args.steps or epochs * steps_per_epoch
    epochs = -(-total_steps // steps_per_epoch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, total_steps))
    log = []
    if resumed is not None:
        common.load_state(model, resumed.get("model"), unfinished)
        try:
            optimizer.load_state_dict(resumed["optimizer"])
            schedule.load_state_dict(resumed["schedule"])
            log = resumed["log"]
        except (KeyError, RuntimeError, ValueError):
            raise UserError(f"{unfinished} does not go on with this version: remove {directory}") from None
        print(f"{directory}: going on after epoch {len(log)} of {epochs}")
    parallel = DistributedDataParallel(model) if WORLD_SIZE > 1 else model  # all begin with the first one's weights
    tokens = dataset.frames if system else data.token_cache(encoder, dataset, device)
    if RANK == 0:
        common.write_json(directory / "args.json", flags)

    # the loop
    report = open_log(args.log, directory, flags)
    bar = tqdm(total=total_steps, initial=len(log) * steps_per_epoch, desc="train", unit="step")
    for epoch in range(len(log), epochs):
        torch.manual_seed(args.seed * 100_003 + epoch)  # dropout and order depend on (seed, epoch) alone
        steps = min(steps_per_epoch, total_steps - epoch * steps_per_epoch)
        order = torch.randperm(len(train_windows)).numpy()[: steps * batch_size]
        if RANK:
            torch.manual_seed(args.seed * 100_003 + epoch + RANK * 2**48)  # another process drops other numbers out
        model.train()
        start, total = time.perf_counter(), torch.zeros((), device=device)
        for batch in train_windows.batches(order, tokens, batch_size, device, frames=1 if decoder else 0):
            with common.bfloat16(device, device.type == "cuda"):
                objective, loss = parallel(batch, args.rollout_steps)
            optimizer.zero_grad(set_to_none=True)
            (objective * batch["weight"]).backward()
            optimizer.step()
            schedule.step()
            total += loss * batch["weight"]
            bar.update()
        entry = {"epoch": epoch + 1, "train": sum(processes.gather(total.item())) / WORLD_SIZE / steps}
        entry |= validate(model, val_windows, tokens, batch_size, device, args.rollout_steps)
        if not math.isfinite(entry["train"] + entry["val"]):
            raise UserError(f"the loss is not finite in epoch {epoch + 1}: try a smaller --lr")
        if RANK:
            log.append(entry)
            continue  # the first process alone writes
        if model.decoder is not None:
            entry |= show_imagination(model, dataset, val_episodes, num_frames, tokens, device, directory)
        log.append(entry | {"seconds": round(time.perf_counter() - start, 2)})
        report("train", epoch + 1, entry)
        bar.set_postfix_str(f"next latent {entry['val_visual']:.4f}, copying {entry['copy']:.4f}")
        common.write_csv(directory / "log.csv", log)
        styles = {"train": "-", "val": "-", "val_visual": "--", "copy": ":"}  # the last two are of the next latent
        pictures.write_log_plot(directory / "curves.png", log, "epoch", styles, ylabel="loss, error", yscale="log")
        if epoch + 1 < epochs:
            states = {"model": model, "optimizer": optimizer, "schedule": schedule}
            states = {name: part.state_dict() for name, part in states.items()}
            common.save_tensors(unfinished, {**states, "log": log})
        model.save_pretrained(directory)
    if RANK == 0:  # after it has written the model
        common.remove(unfinished)
    bar.close()
    print(f"{directory}: next-latent error {log[-1]['val_visual']:.4f}, copying the last frame {log[-1]['copy']:.4f}")
    what = "plan with it: python plan.py" if can_be_set(env) else "see how far it imagines: python -m extras.horizon"
    print(f"{what} --ckpt {directory}")


def learning_rate(step, total_steps, warmup=0.05):
    """Fraction of --lr at a step: linear warm-up, then half a cosine to zero."""
    done = (step + 0.5) / total_steps
    return min(done / warmup, 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def validate(model, windows, tokens, batch_size, device, rollout_steps):
    """Validation losses {"val", "val_visual", "val_proprio", with rollouts "val_rollout"}, and "copy": the visual error
    of predicting no change."""
    model.eval()
    sums = {}
    for batch in windows.batches(np.arange(len(windows)), tokens, batch_size, device):
        loss, parts = model.loss(batch, rollout_steps)
        seen = {name: batch[name][:, : model.num_hist + 1] for name in ("visual", "proprio")}
        visual = model.encode(seen)["visual"]
        values = {"val": loss, **{f"val_{name}": part for name, part in parts.items()}}
        values["copy"] = model.criterion(visual[:, :-1], visual[:, 1:])
        weight = len(visual) / len(windows) if batch["weight"] else 0.0
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.item() * weight
    parts = processes.gather(sums)
    return {name: sum(part[name] for part in parts) for name in sums}


@torch.no_grad()
def show_imagination(model, dataset, episodes, num_frames, tokens, device, directory):
    """Draws what is imagined from the first true frames of some validation windows, and measures how good it is.

    Returns the `likeness` of what is imagined, and for a WorldModel the mean squared errors of decoded true latents
    ("recon"), of the codes that a vq decoder finds for them ("vq"), and of decoded one-step predictions ("recon_pred",
    which is in no loss). imagined.png has three rows for each of four windows: the frames, their latents decoded, the
    imagined latents decoded.
    """
    lengths = (dataset.episode_ends - dataset.episode_starts)[episodes]
    longest = lengths.max() * dataset.meta["frameskip"] // model.frameskip
    windows = data.Windows(dataset, episodes, max(num_frames, min(10, longest)), model.frameskip)
    order = np.linspace(0, len(windows) - 1, 8).astype(int)
    batch = windows.batch(order, tokens, device, windows.num_frames)
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
    if RANK == 0 and not path.exists():
        data.collect(path, env, data.EPISODES, data.STEPS, args.frameskip, img_size)
    processes.gather(None)  # the other processes wait for the first one
    return data.open_dataset(path)


def frames_to_fit(encoder, dataset, episodes, rng):
    """The frames (S, H, W, 3) that an encoder is fitted to: FIT_FRAMES at random, in clips as long as it wants them."""
    clip = encoder.clip_frames
    starts = data.Windows(dataset, episodes, clip, dataset.meta["frameskip"]).starts
    first = np.sort(rng.choice(starts, min(FIT_FRAMES // clip, len(starts)), replace=False))
    frames = dataset.frames[(first[:, None] + np.arange(clip)).ravel()]
    if all((frame == frames[0]).all() for frame in frames):
        raise UserError(f"all frames of {dataset.path} are the same, so there is nothing to learn from them")
    return frames


def encoder_img_size(args):
    """The paper shows DINOv2 224 px, which makes 256 patches; the release shows it 196, for its decoder's sake."""
    return args.encoder_img_size or (224 if args.variant == "paper" and args.encoder.startswith("dino") else None)


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
    add("--system", metavar="NAME", help=f"a world model with an encoder of its own instead: {', '.join(SYSTEMS)}")
    add("--encoder", default="pca", help="encoder of the frames: python encoders.py lists them, and `state` sees none")
    add("--encoder-img-size", type=positive, help="side to which the encoder resizes frames (default: its own)")
    add("--weights", help="the encoder's weights: a file, folder, hub repository or 'random' (default: the released)")
    add("--frameskip", type=positive, default=5, help="environment steps per model step")
    add("--num-hist", type=positive, default=3, help="number of frames that the transition model sees")
    add("--predictor", default="vit", choices=PREDICTORS, help="the transition model")
    add("--predictor-weights", metavar="PATH", help="released predictor from which vjepa2_ac starts")
    sizes = common.key_values(SYSTEM_SIZES | KNOWN_SIZES)
    add("--sizes", type=sizes, default={}, help="sizes of the transition or the system: depth=2,heads=4")
    add("--rollout-steps", type=positive, help="frames imagined in training (default: vit 1, rwm 8, vjepa2_ac 2)")
    variant = "follow DINO-WM's released code, or its text: DINOv2 sees 224 px, an MLP embeds actions, no proprio"
    add("--variant", choices=("repository", "paper"), default="repository", help=variant)
    add("--decoder", nargs="?", const="plain", choices=("plain", "vq"), help="train a decoder, too; vq has a codebook")
    default = {name: "; ".join(f"{tokens}: {n}" for tokens, n in known.items()) for name, known in BUDGETS.items()}
    default = {name: f"(default by the tokens of a frame, {known})" for name, known in default.items()}
    add("--epochs", type=positive, help=f"passes over the windows {default['epochs']}")
    add("--steps", type=positive, help="gradient steps in all, instead of --epochs")
    add("--batch-size", type=positive, help=f"windows per step {default['batch_size']}")
    peak = common.number(float, 0, 1, open_low=True)
    add("--lr", type=peak, help=f"peak learning rate of AdamW {default['lr']}")
    add("--seed", type=common.seed_number, default=0, help="the same seed gives the same run")
    name = "ENV_ENCODER or ENV_SYSTEM, and _PREDICTOR and _VARIANT where they are not the defaults"
    add("--name", help=f"name of the run under runs/ (default: {name})")
    add("--device", type=common.available_device, default=common.default_device(), help="where to compute")
    add("--log", choices=LOGS, help="also send the numbers of log.csv there")
    add("--bench", action="store_true", help="measure how fast models of two sizes learn, instead of training one")
    args = parser.parse_args(argv)
    if args.system:
        return system_args(args, parser)
    args.rollout_steps = args.rollout_steps or PREDICTORS[args.predictor].rollout_steps
    if args.variant == "paper" and args.predictor != "vit":
        raise UserError(f"--variant paper is DINO-WM's, for --predictor vit, not {args.predictor}")
    if args.predictor_weights and args.predictor != "vjepa2_ac":
        raise UserError(f"--predictor-weights is for --predictor vjepa2_ac, not {args.predictor}")
    transition_sizes(args, single=True)  # a wrong name is reported before anything is built
    return args


def main():
    args = get_args()
    if args.bench:
        return [bench_training(size, torch.device(args.device)) for size in ("laptop", "paper")]
    train(args)


if __name__ == "__main__":
    common.run_script(main)
