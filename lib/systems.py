"""World models that bring their own eyes, trained together with the dynamics: what all of them share.

They stand beside `predictor.WorldModel`, whose encoder is frozen, and have the same methods. `train.py --system NAME`
trains one, and `plan.py --ckpt` plans with it without knowing which it is. To add one, subclass `System`, give the
class a line in SYSTEMS, and write

    build(img_size, **sizes)                              makes the networks
    encode({"visual": frames (B, T, H, W, 3) of 0 to 255, "proprio"}) -> {"visual": (B, T, N, d), "proprio": (B, T, 0)}
    loss({"visual": frames (B, T, H, W, 3), "action": (B, T, A)}) -> loss, parts       T = num_frames; parts["visual"]
                                                          is the error of one step ahead; log.csv has all parts
    rollout(z0, actions (B, T, A)) -> the latents of T + 1 frames, the first of which are known: z0, from `encode`
    decode(visual (B, T, N, d)) -> frames (B, T, H, W, 3) uint8, in NumPy              if it has a `decoder`

Actions are in the world's units, all the frameskip * DoF numbers of a model step. `criterion(z, target, reduction)` is
what a plan costs, as F.mse_loss. A system that plans without a cost has a method more,

    plan(past {"visual": (B, history, H, W, 3) uint8}, goal {"visual": (B, H, W, 3)}, steps) -> actions (B, steps, A)

which `plan.solve` calls. The systems see images and actions alone, which is the fair comparison with the paper's, since
its text has no more either. No single frame shows a speed, so they plan from the last `history` frames.
"""

import importlib

import torch
import torch.nn.functional as F
from torch import nn

from lib.common import UserError, load_state, number
from predictor import WorldModel, load_checkpoint

# name: the class, imported when it is wanted
SYSTEMS = {"dreamer": "lib.dreamer.Dreamer", "iris": "lib.iris.IRIS", "tdmpc2": "lib.tdmpc2.TDMPC2"}
SYSTEMS |= {"lewm": "lib.tdmpc2.LeWM", "avdc": "lib.avdc.AVDC"}
SIZES = "channels deter mlp_dim groups classes dim width depth heads codes"  # of any system
SIZES = dict.fromkeys(SIZES.split(), number(int, 1, 10**5))


def system_class(name):
    """The class of a system. UserError if there is none of this name."""
    if name not in SYSTEMS:
        raise UserError(f"unknown system '{name}'; known: {', '.join(SYSTEMS)}")
    module, name = SYSTEMS[name].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


class System(nn.Module):
    """Arguments as `WorldModel`'s, and `sizes` where they differ from the class's own. A subclass has a `name`, default
    `sizes`, and how it is trained: `num_frames` of a window, `batch_size`, `steps` and `lr` of AdamW."""

    num_patches, num_hist = 1, 1  # N tokens of a frame, and how many frames the dynamics sees
    history = context = 3  # true frames from which planning and pictures start
    proprio_dim, variant, criterion = 0, "repository", staticmethod(F.mse_loss)

    def __init__(self, action_stats, proprio_stats, frameskip=5, world=None, **sizes):
        super().__init__()
        self.config = dict(system=self.name, frameskip=frameskip, world=world, sizes=sizes)
        self.frameskip, self.world, self.decoder = frameskip, world, None
        for name, (mean, std), repeat in (("action", action_stats, frameskip), ("proprio", proprio_stats, 1)):
            self.register_buffer(f"{name}_mean", torch.as_tensor(mean, dtype=torch.float32).repeat(repeat))
            self.register_buffer(f"{name}_std", torch.as_tensor(std, dtype=torch.float32).repeat(repeat))
        self.action_dim = len(self.action_mean)  # of a model step: frameskip * DoF
        self.build(world["img_size"], **self.sizes | sizes)

    def encode_action(self, actions):
        """(B, T, A) in the world's units -> the same in standard deviations of the data."""
        return (actions - self.action_mean) / self.action_std

    save = WorldModel.save

    @classmethod
    def load(cls, directory, device="cpu"):
        """The model that `save` wrote to `directory`, in eval mode. UserError if it is missing or another system's."""
        content, path = load_checkpoint(directory, device), f"{directory}/model.pt"
        try:
            config, state = dict(content["config"]), content["model"]
            if (system := config.pop("system", None)) != cls.name:
                raise UserError(f"{path} is of the system {system}, not {cls.name}")
            stats = [(state[f"{name}_mean"], state[f"{name}_std"]) for name in ("action", "proprio")]
            stats[0] = tuple(s[: len(s) // config["frameskip"]] for s in stats[0])  # of one environment action
            model = cls(*stats, **config.pop("sizes"), **config)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())[:150]
            raise UserError(f"{path} is not a checkpoint of this version ({reason}): train it again") from None
        load_state(model, state, path)
        return model.to(device).eval()
