"""World models that bring their own encoder, trained together with the dynamics: what all of them share.

They stand beside `predictor.WorldModel`, whose encoder is frozen, and have the same methods. `train.py --system NAME`
trains one, and `plan.py --ckpt` plans with it without knowing which it is. To add one, write a subclass of `System`,
give it a line in SYSTEMS and its sizes a place in SYSTEM_SIZES. It needs

    build(img_size, **sizes)                              makes the networks
    encode({"visual": frames (B, T, H, W, 3) of 0 to 255}) -> {"visual": (B, T, N, d), "proprio": (B, T, 0)}
    loss({"visual": frames (B, T, H, W, 3), "action": (B, T, A)}, *_) -> the loss, and its parts {name: number}, which
                                                          log.csv shows; "visual" is the error of one step ahead (of
                                                          avdc, of one step of denoising), and T = num_frames (what
                                                          else train.py gives is ignored)
    rollout(z0, actions (B, T, A)) -> the latents of T + 1 frames, the first of which are known: z0, from `encode`
    paint(latents (n, N, d)) -> images (n, 3, H, W) in [0, 1]                          if it has a `decoder`

Actions are in the world's units, all the frameskip * DoF numbers of a model step. `criterion(z, target, reduction)` is
the planning cost; its signature is F.mse_loss's. A system that generates its plans needs, instead of `rollout`,

    plan(worlds, problems (B,), steps) -> actions (B, steps, A), in standard deviations of the data's

where `worlds` is plan.Worlds, with what is seen and the goals. The systems see images and actions alone, as the text of
DINO-WM's paper has it. No single frame shows a velocity, so they plan from the last `history` frames.
"""

import importlib

import torch
import torch.nn.functional as F
from torch import nn

from lib.common import WORLD_SIZE, UserError, number, to_frames
from predictor import WorldModel

# name: the class, imported when it is wanted
SYSTEMS = {"dreamer": "lib.dreamer.Dreamer", "iris": "lib.iris.IRIS", "tdmpc2": "lib.tdmpc2.TDMPC2"}
SYSTEMS |= {"lewm": "lib.tdmpc2.LeWM", "avdc": "lib.avdc.AVDC"}
SYSTEM_SIZES = "channels deter mlp_dim groups classes dim width depth heads codes first"  # of any system
SYSTEM_SIZES = dict.fromkeys(SYSTEM_SIZES.split(), number(int, 1, 10**5))
# flags of train.py that no system has, as argparse names them
FOREIGN = "encoder encoder_img_size weights num_hist predictor predictor_weights rollout_steps variant decoder bench"


def system_class(name):
    """The class of a system. UserError if there is none of this name."""
    if name not in SYSTEMS:
        raise UserError(f"unknown system '{name}'; known: {', '.join(SYSTEMS)}")
    module, name = SYSTEMS[name].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def system_args(args, parser):
    """train.py's arguments for a system, with its own budget. UserError if they ask for what it does not have."""
    system = system_class(args.system)
    given = [f"--{n.replace('_', '-')}" for n in FOREIGN.split() if getattr(args, n) != parser.get_default(n)]
    unknown = args.sizes.keys() - system.sizes.keys()
    for what, wrong in {
        f"has no {', '.join(given)}: its encoder and its dynamics are its own": given,
        f"has no size {', '.join(unknown)}; it has {', '.join(system.sizes)}": unknown,
        "trains in one process: start it without torchrun": WORLD_SIZE > 1,
    }.items():
        if wrong:
            raise UserError(f"--system {args.system} {what}")
    args.batch_size, args.lr = args.batch_size or system.batch_size, args.lr or system.lr
    args.steps = args.steps or (None if args.epochs else system.steps)
    return args


def each(network, x):
    """Applies a network to every frame of x (B, T, ...)."""
    return network(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Background(nn.Module):
    """Subtracts the mean image of the first batch of a training, which shows what never changes: the maze."""

    def __init__(self, side):
        super().__init__()
        self.register_buffer("image", torch.zeros(3, side, side))

    def forward(self, images):  # (..., 3, side, side)
        if self.training and not self.image.any():
            self.image.copy_(images.flatten(0, -4).mean(0))
        return images - self.image


class System(nn.Module):
    """Arguments as `WorldModel`'s, and `sizes` where they differ from the class's own. A subclass has a `name`, default
    `sizes`, and how it is trained: `num_frames` of a window, `batch_size`, `steps` and `lr` of AdamW (its weight
    decay is torch's 0.01, where the releases of DreamerV3, TD-MPC2 and AVDC have none)."""

    num_patches, num_hist = 1, 1  # N tokens of a frame, and how many frames the dynamics sees
    history = context = 3  # true frames from which planning and pictures start
    proprio_dim, variant, wide, criterion = 0, "repository", False, staticmethod(F.mse_loss)
    alone = True  # whether the latent of a frame depends on this frame alone

    def __init__(self, action_stats, proprio_stats, num_hist=None, frameskip=5, world=None, **sizes):
        super().__init__()
        self.config = dict(system=self.name, num_hist=self.num_hist, frameskip=frameskip, world=world, sizes=sizes)
        self.frameskip, self.world, self.decoder = frameskip, world, None
        self.keep_statistics(action_stats, proprio_stats)
        self.build(world["img_size"], **self.sizes | sizes)

    def encode_action(self, actions):
        """(B, T, A) in the world's units -> the same in standard deviations of the data."""
        return (actions - self.action_mean) / self.action_std

    def forward(self, batch, *_):
        """The training objective, and the loss that is logged."""
        loss, _ = self.loss(batch)
        return loss, loss.detach()

    def decode(self, visual):
        """Latents (B, T, N, d) -> frames (B, T, H, W, 3) uint8."""
        frames = to_frames(self.paint(visual.flatten(0, 1)).clamp(0, 1))
        return frames.reshape(*visual.shape[:2], *frames.shape[1:])

    keep_statistics, save_pretrained = WorldModel.keep_statistics, WorldModel.save_pretrained
