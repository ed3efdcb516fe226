"""Fit a world model on a data set of trajectories, in the latent space of a frozen encoder.

The encoder is frozen, so every frame is encoded once into a token cache; then windows of num_hist + rollout_steps
model steps are drawn and the transition model learns to predict the next latents (predictor.py has the loss).

    python train.py                                  # laptop: PointMaze, PCA latent, no download, minutes
    python train.py --encoder vae                    # the V of World Models instead
    python train.py --encoder dinov2 --img-size 224  # DINO-WM at the paper's size; wants a GPU
    python train.py --encoder dinov3 --weights model.safetensors
    python train.py --rollout-steps 5 --name own     # learns from its own predictions, too
    python train.py --predictor rwm --encoder state  # the Robotic World Model on the true state
    python train.py --predictor vjepa2_ac            # V-JEPA 2-AC
    python train.py --variant paper                  # what DINO-WM's text says where its code does otherwise
    python train.py --decoder                        # and a decoder, to look at what it imagines

Writes runs/NAME/: args.json, model.pt, log.csv, curves.png; with a decoder imagined.png and imagined.gif. A run that
was interrupted goes on from its last epoch when the same command is given again, and ends bit for bit (on the CPU)
where it would have.
"""

import hashlib
import json
import math
import shutil
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import data
import released
from data import Parser, UserError, Windows, natural, positive, read_json, run_script, write_atomic, write_csv
from decoders import beside, likeness, write_gif, write_strips
from encoders import chunks
from predictor import PREDICTORS, WorldModel, build_eyes, load_checkpoint
from vae_mdnrnn import available_device, to_tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The transition model's size: vit has the paper's for patch tokens and one that suits a laptop for a single token, rwm
# the paper's, vjepa2_ac a small one (the paper's is width 1024, depth 24, heads 16, mlp_dim 4096).
PAPER = dict(depth=6, heads=16, dim_head=64, mlp_dim=2048, dropout=0.1)
LAPTOP = dict(depth=4, heads=4, dim_head=32, mlp_dim=256, dropout=0.0)
RWM = dict(width=256, depth=2, mlp_dim=128)
AC = dict(width=128, depth=4, heads=4, mlp_dim=512)
COMPOSITION = dict(concat_dim=1, num_proprio_repeat=1, num_action_repeat=1)  # of vit's tokens
DECODER_LR, DECODER_FRAMES = 3e-4, 32  # Adam's, as released; frames a step, the last of a window each: windows overlap
FIT_FRAMES = 20_000  # of the training episodes, for encoders that learn from frames


def get_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--env", help="the world; its data are collected if they are not there (default: the data set's, or pointmaze)")
    add("--data", help="data set folder, ours or DINO-WM's point_maze (default: datasets/ENV, or datasets/ENV_SIZE)")
    add("--episodes", type=positive, help="episodes to collect if there is no data set (default: 3000)")
    add("--img-size", type=positive, help="side of the frames in the data set, in pixels (default: its own, or 64)")
    add("--encoder", default="pca", help="what turns a frame into tokens; python encoders.py lists them. "
        "state: no frames, the true state")  # fmt: skip
    add("--encoder-size", help="of its backbone: small, base, large, huge, giant, as far as it has them")
    add("--encoder-img-size", type=positive, help="side that the encoder resizes frames to (default: its own)")
    add("--weights", help="the encoder's: a file, folder or Hugging Face repository, or 'random' (default: pretrained)")
    add("--frameskip", type=positive, default=5, help="environment steps per model step")
    add("--num-hist", type=positive, default=3, help="frames that the transition model sees")
    add("--predictor", default="vit", choices=PREDICTORS, help="the transition model")
    add("--predictor-weights", metavar="PATH", help="where vjepa2_ac starts from: a released predictor of its size")
    add("--rollout-steps", type=positive, help="frames that it imagines in training; "
        "1 is teacher forcing alone (default: its paper's, vit 1, rwm 8, vjepa2_ac 2)")  # fmt: skip
    add("--rollout-grad", type=positive, metavar="N", help="the gradient goes through the last N of them alone "
        "(default: through all)")  # fmt: skip
    add("--rollout-decay", type=float, default=1.0, help="weight of an imagined frame, over that of the one before")
    add("--width", type=positive, help="of the stream of vjepa2_ac or the GRU of rwm (default: 128, 256)")
    add("--depth", type=positive, help="layers of the transition model (default: vit 6 for patches, else 4; rwm 2)")
    add("--heads", type=positive, help="attention heads (default: vit 16 for patches, else 4)")
    add("--dim-head", type=positive, help="numbers of an attention head of vit (default: 64 for patches, else 32)")
    add("--mlp-dim", type=positive, help="width of its feed-forward layers (default: vit 2048 for patches, else 256; "
        "rwm 128; vjepa2_ac 512)")  # fmt: skip
    add("--dropout", type=float, help="of vit (default: 0.1 for patches, else 0)")
    add("--concat-dim", type=int, choices=(0, 1), help="of vit: proprio and action go onto every token (1, the "
        "default), or are two tokens more (0)")  # fmt: skip
    add("--num-proprio-repeat", type=positive, help="copies of proprio on a token, with --concat-dim 1 (default: 1)")
    add("--num-action-repeat", type=positive, help="copies of the action there (default: 1)")
    add("--variant", choices=("repository", "paper"), default="repository", help="DINO-WM as released, or as its text "
        "has it: 224 px into DINOv2, no proprio, an MLP for actions, a loss on the next frame alone")  # fmt: skip
    add("--decoder", nargs="?", const="plain", choices=("plain", "vq"), help="train one, too, to look at what is "
        "imagined; vq: with a codebook")  # fmt: skip
    add("--epochs", type=positive, help="passes over the windows (default: 100 for patches, 20 for one token)")
    add("--steps", type=positive, help="gradient steps in all, instead of --epochs")
    add("--batch-size", type=positive, help="windows per step (default: 32 for patches, 128 for one token)")
    add("--lr", type=float, default=5e-4, help="AdamW's learning rate at its peak")
    add("--seed", type=natural, default=0, help="one seed makes the run repeatable")
    add("--name", help="of the run, under runs/ (default: ENV_ENCODER, and _PREDICTOR if it is not vit)")
    add("--overwrite", action="store_true", help="start anew although runs/NAME is there")
    add("--device", type=available_device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    world = released.open_dataset(args.data).meta if args.data else {"env": "pointmaze", "img_size": 64}
    args.env, args.img_size = args.env or world["env"], args.img_size or world["img_size"]
    if args.encoder_size:
        args.encoder += f"-{args.encoder_size}"
    other = f"_{args.predictor}" * (args.predictor != "vit") + "_paper" * (args.variant == "paper")
    args.name = args.name or f"{args.env}_{args.encoder}{other}"
    args.rollout_steps = args.rollout_steps or PREDICTORS[args.predictor].rollout_steps
    for option in ("lr", "dropout"):
        value = getattr(args, option)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"--{option} {value} is not between 0 and 1")
    if args.variant == "paper":
        if args.predictor != "vit":
            raise UserError(f"--variant paper is DINO-WM's, of --predictor vit, not {args.predictor}")
        if args.encoder.startswith("dino"):  # 256 patches; the release makes them 196, for its decoder's sake
            args.encoder_img_size = args.encoder_img_size or 224
    if not 0 < args.rollout_decay <= 1:
        raise UserError(f"--rollout-decay {args.rollout_decay} is not above 0 and at most 1")
    if args.predictor_weights and args.predictor != "vjepa2_ac":
        raise UserError(f"--predictor-weights are for --predictor vjepa2_ac, not {args.predictor}")
    return args


def transition_sizes(args, single):
    """The transition model's keyword arguments: its default sizes, and what the flags say otherwise."""
    vit = (LAPTOP if single else PAPER) | COMPOSITION
    sizes = dict({"vit": vit, "rwm": RWM, "vjepa2_ac": AC}[args.predictor])
    for name in ("width", "depth", "heads", "dim_head", "mlp_dim", "dropout", *COMPOSITION):
        if (value := getattr(args, name)) is not None:
            if name not in sizes:
                raise UserError(f"--predictor {args.predictor} has no --{name.replace('_', '-')}")
            sizes[name] = value
    return sizes


def decoder_sizes(args, single):
    """The decoder's keyword arguments, or None: the release's sizes for its frames, and less for smaller ones."""
    if args.decoder is None:
        return None
    sizes = dict(img_size=args.img_size)
    if args.img_size < 224:
        sizes |= dict(depth=16) if single else dict(channel=64, n_res_block=2, n_res_channel=32)
    return sizes | (dict(quantize=True) if args.decoder == "vq" else {})


def open_dataset(args):
    """The data set of --data, or the default one of --env, which is collected first if it is not there: the same for
    every --seed."""
    if args.data:
        return released.open_dataset(args.data, env=args.env, img_size=args.img_size)
    default = Path(f"datasets/{args.env}" + (f"_{args.img_size}" if args.img_size != 64 else ""))
    if not default.exists():
        data.collect(default, args.env, args.episodes or 3000, 20, args.frameskip, args.img_size)
    dataset = released.open_dataset(default, env=args.env, img_size=args.img_size)
    if args.episodes and args.episodes != len(dataset):
        raise UserError(f"{default} has {len(dataset)} episodes, not {args.episodes}: remove it, or this --episodes")
    return dataset


def fit_frames(encoder, dataset, episodes, rng):
    """The frames (S, H, W, 3) that an encoder is fitted to: FIT_FRAMES at random, in clips as long as it wants them."""
    clip = encoder.clip_frames
    starts = Windows(dataset, episodes, clip, dataset.meta["frameskip"]).starts
    first = np.sort(rng.choice(starts, min(FIT_FRAMES // clip, len(starts)), replace=False))
    return dataset.frames[(first[:, None] + np.arange(clip)).ravel()]


@torch.no_grad()
def token_cache(encoder, dataset, device, batch_size=256):
    """Tokens (S, N, d) of all frames: computed once per encoder, kept in the data set's folder, memory-mapped."""
    digest = hashlib.sha256(f"{encoder.name} {encoder.img_size}".encode())
    for tensor in encoder.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy())
    path = dataset.path / f"tokens_{encoder.name}_{digest.hexdigest()[:12]}.npy"
    if not path.is_file():
        shape = (len(dataset.frames), encoder.num_patches, encoder.dim)
        dtype = np.float32 if encoder.num_patches == 1 else np.float16  # 196 x 384 numbers a frame: halve them
        free, needed = shutil.disk_usage(dataset.path).free, np.prod(shape) * dtype().nbytes
        if needed > free:
            raise UserError(f"the tokens of {dataset.path} need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")

        def write(temporary):
            writer = data.NpyWriter(temporary, np.empty((0, *shape[1:]), dtype))
            for i in tqdm(range(0, shape[0], batch_size), desc=f"encode with {encoder.name}", unit="batch"):
                writer.append(encoder(to_tensor(dataset.frames[i : i + batch_size], device)).cpu().numpy())
            writer.close()

        write_atomic(path, write)
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError):
        raise UserError(f"{path} is damaged: remove it") from None


class TokensOnDemand:
    """The token cache's stand-in for a run too short to see every frame: encodes those that are asked for."""

    def __init__(self, encoder, dataset, device):
        self.encoder, self.dataset, self.device = encoder, dataset, device

    @torch.no_grad()
    def __getitem__(self, rows):
        """rows (B, T) -> tokens (B, T, N, d)."""
        seen, where = np.unique(rows, return_inverse=True)
        tokens = [self.encoder(to_tensor(frames, self.device)) for frames in chunks(self.dataset.frames[seen], 64)]
        return torch.cat(tokens).cpu().numpy()[where.reshape(rows.shape)]


def batches(windows, tokens, batch_size, device, order, frames=0):
    """Yields the windows in the given order as dictionaries of tensors."""
    for i in range(0, len(order), batch_size):
        batch = windows.batch(order[i : i + batch_size], tokens, frames)
        yield {name: torch.from_numpy(array).to(device, torch.float32) for name, array in batch.items()}


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
    for batch in batches(windows, tokens, batch_size, device, np.arange(len(windows))):
        loss, parts = model.loss(batch, *rollout)
        visual = model.encode(batch)["visual"][:, : model.num_hist + model.num_pred]
        copy = model.predictor.criterion(visual[:, : model.num_hist], visual[:, model.num_pred :])
        values = {"val": loss, **{f"val_{name}": part for name, part in parts.items()}, "copy": copy}
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(visual) / len(windows)
    return sums


@torch.no_grad()
def look(model, windows, tokens, device, directory, count=8):
    """Pictures of what is imagined from the first true frames of some windows on, and how good they are: mean squared
    errors of decoded true latents ("recon", "vq") and of decoded one-step predictions, which is in no loss; the
    `likeness` of what is imagined.

    imagined.png has three rows for each of four windows: the frames, their latents decoded, the imagined ones decoded.
    """
    model.eval()
    order = np.linspace(0, len(windows) - 1, count).astype(int)
    (batch,) = batches(windows, tokens, count, device, order, windows.num_frames)
    z, frames, H, known = model.encode(batch), batch["frames"], model.num_hist, model.context
    source = {name: latent[:, :H] for name, latent in z.items()}
    predicted = model.predict(source, model.encode_action(batch["action"][:, :H]))["visual"]
    _, recon, vq = model.decoder_loss(z["visual"], frames)
    _, recon_pred, _ = model.decoder_loss(predicted, frames[:, 1 : H + 1])
    start = {name: latent[:, :known] for name, latent in z.items()}
    imagined = model.decode(model.rollout(start, batch["action"][:, :-1])["visual"])
    real, decoded = frames.byte().cpu().numpy(), model.decode(z["visual"])
    write_strips(directory / "imagined.png", *(film[i] for i in range(4) for film in (real, decoded, imagined)))
    films = np.concatenate([beside(real[i], imagined[i]) for i in range(4)])
    write_gif(directory / "imagined.gif", films.repeat(model.frameskip, axis=0))
    errors = {"recon": recon.item(), "vq": vq.item(), "recon_pred": recon_pred.item()}
    return errors | likeness(imagined[:, known:], real[:, known:])


def write_log(directory, log):
    """log.csv and curves.png from the list of epochs."""

    def draw(path):
        figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
        for name, style in (("train", "-"), ("val", "-"), ("copy", ":")):
            axes.plot([e["epoch"] for e in log], [e[name] for e in log], style, label=name)
        axes.set(xlabel="epoch", ylabel="latent error", yscale="log")
        axes.legend(frameon=False)
        figure.savefig(path, dpi=120)
        plt.close(figure)

    write_csv(directory / "log.csv", log)
    write_atomic(directory / "curves.png", draw)


def train(args):
    directory, device = Path("runs") / args.name, torch.device(args.device)
    flags = {name: value for name, value in vars(args).items() if name not in ("overwrite", "device")}
    resumed = None
    if (directory / "model.pt").exists() and not args.overwrite:
        resumed = load_checkpoint(directory, device)
        before = read_json(path) if (path := directory / "args.json").is_file() else {}
        changed = [f"--{k.replace('_', '-')}" for k in flags if before.get(k) != flags[k]]
        if changed:
            raise UserError(f"{directory} was trained with other {', '.join(changed)}: choose a --name, or --overwrite")
        if "optimizer" not in resumed:
            print(f"{directory} is trained already: python plan.py --ckpt {directory} (or --overwrite)")
            return

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    encoder = build_eyes(args.encoder, args.encoder_img_size, args.weights if resumed is None else "random")
    single = encoder.num_patches == 1
    sizes = transition_sizes(args, single)
    dataset = open_dataset(args)
    print(f"{dataset.path}: {len(dataset)} episodes, frameskip {dataset.meta['frameskip']}")
    train_episodes, val_episodes = dataset.split()
    num_frames = args.num_hist + args.rollout_steps
    rollout = args.rollout_steps, args.rollout_decay, args.rollout_grad
    train_windows = Windows(dataset, train_episodes, num_frames, args.frameskip)
    val_windows = Windows(dataset, val_episodes, num_frames, args.frameskip)
    if args.decoder:
        lengths = (dataset.episode_ends - dataset.episode_starts)[val_episodes]
        longest = lengths.max() * dataset.meta["frameskip"] // args.frameskip
        look_windows = Windows(dataset, val_episodes, max(num_frames, min(10, longest)), args.frameskip)

    if resumed is None and hasattr(encoder, "fit"):
        encoder.to(device).fit(fit_frames(encoder, dataset, train_episodes, rng), seed=args.seed)
    epochs, batch_size = args.epochs or (20 if single else 100), args.batch_size or (128 if single else 32)
    stats = dataset.statistics(train_episodes)
    model = WorldModel(
        encoder, stats["action"], stats["proprio"], args.num_hist, frameskip=args.frameskip,
        emb_dim=encoder.dim if args.concat_dim == 0 else 10,
        world=dict(env=args.env, img_size=args.img_size, data=str(dataset.path)), predictor=args.predictor,
        variant=args.variant, decoder=decoder_sizes(args, single), **sizes,
    ).to(device)  # fmt: skip
    if args.predictor_weights and resumed is None:
        model.predictor.load_released(args.predictor_weights)
    decoder = [] if model.decoder is None else list(model.decoder.parameters())
    trained = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("decoder.")]
    groups = [{"params": trained}]
    if decoder:
        groups.append({"params": decoder, "lr": DECODER_LR, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    steps_per_epoch = -(-len(train_windows) // batch_size)
    total_steps = args.steps or epochs * steps_per_epoch
    epochs = -(-total_steps // steps_per_epoch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, total_steps))
    log = []
    if resumed is not None:
        try:
            model.load_state_dict(resumed["model"])
            optimizer.load_state_dict(resumed["optimizer"])
            schedule.load_state_dict(resumed["schedule"])
            log = resumed["log"]
        except (KeyError, RuntimeError, ValueError):
            raise UserError(f"{directory}/model.pt does not go on with these flags: --overwrite") from None
        print(f"{directory}: going on after epoch {len(log)} of {epochs}")
    if args.encoder == "state":
        tokens = dataset.states[:, None]
    elif total_steps * batch_size * num_frames < len(dataset.frames):
        tokens = TokensOnDemand(model.encoder, dataset, device)
        val_windows.starts = val_windows.starts[:: -(-len(val_windows) // batch_size)]  # one batch of them
    else:
        tokens = token_cache(model.encoder, dataset, device)

    if resumed is None and (directory / "model.pt").exists():  # --overwrite
        shutil.rmtree(directory)
    write_atomic(directory / "args.json", lambda path: path.write_text(json.dumps(flags, indent=1)))
    bar = tqdm(total=total_steps, initial=len(log) * steps_per_epoch, desc="train", unit="step")
    for epoch in range(len(log), epochs):
        torch.manual_seed(args.seed * 100_003 + epoch)  # dropout and order depend on (seed, epoch) alone
        order = torch.randperm(len(train_windows)).numpy()
        steps = min(steps_per_epoch, total_steps - epoch * steps_per_epoch)
        model.train()
        start, total = time.perf_counter(), torch.zeros((), device=device)
        for batch in batches(train_windows, tokens, batch_size, device, order[: steps * batch_size], bool(decoder)):
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
        if not total.isfinite():
            raise UserError(f"the loss is not finite in epoch {epoch + 1}: try a smaller --lr")
        entry = {"epoch": epoch + 1, "train": total.item() / steps}
        entry |= validate(model, val_windows, tokens, batch_size, device, rollout)
        if decoder:
            entry |= look(model, look_windows, tokens, device, directory)
        log.append(entry | {"seconds": round(time.perf_counter() - start, 2)})
        bar.set_postfix_str(f"val {entry['val']:.4f}, copying {entry['copy']:.4f}")
        unfinished = dict(optimizer=optimizer.state_dict(), schedule=schedule.state_dict(), log=log)
        write_log(directory, log)
        model.save(directory, **(unfinished if epoch + 1 < epochs else {}))
    bar.close()
    print(f"{directory}: next-latent error {log[-1]['val_visual']:.4f}, copying the last frame {log[-1]['copy']:.4f}")
    print(f"plan with it: python plan.py --ckpt {directory}")


if __name__ == "__main__":
    run_script(lambda: train(get_args()))
