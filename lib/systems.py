"""World models that bring their own eyes, trained together with the dynamics: what all of them share.

They stand beside `predictor.WorldModel`, whose encoder is frozen, and have the same methods. `train.py --system NAME`
trains one, and `plan.py --ckpt` plans with it without knowing which it is. To add one, subclass `System`, give the class
a line in SYSTEMS, and write

    encode({"visual": frames (B, T, H, W, 3) of 0 to 255}) -> {"visual": (B, T, N, d), "proprio": (B, T, 0)}
    loss({"visual": frames (B, T, H, W, 3), "action": (B, T, A)}) -> loss, parts     T = num_frames; parts["visual"] is
                                                 the error of the next frame's latent, by `criterion` (log.csv, `copy`)
    rollout(z0, actions (B, T, A)) -> the latents of T + 1 frames                    z0: `encode` of the first frames
    decode(visual (B, T, N, d)) -> frames (B, T, H, W, 3) uint8 (NumPy)              if it has a `decoder`

Actions are in the world's units, all the frameskip * DoF numbers of a model step. `criterion(z, target, reduction=)` is
what a plan costs, number by number. A system that plans without a cost has a method instead that `plan.solve` calls:

    plan(past {"visual": (B, history, H, W, 3) uint8}, goal {"visual": (B, H, W, 3)}, steps) -> actions (B, steps, A)

The systems see images and actions alone, as DINO-WM's paper has it for those that it compares with. No single frame
shows a speed, so they plan from the last `history` frames.
"""

import importlib

import torch
import torch.nn.functional as F
from torch import nn

from lib.common import UserError, load_state, number
from predictor import WorldModel, load_checkpoint

# name: the module and the class, imported when it is wanted
SYSTEMS = {
    "dreamer": "lib.dreamer.Dreamer",
    "iris": "lib.iris.IRIS",
    "tdmpc2": "lib.tdmpc2.TDMPC2",
    "lewm": "lib.tdmpc2.LeWM",
    "avdc": "lib.avdc.AVDC",
}
SIZES = dict.fromkeys(
    "width deter groups classes mlp_dim dim depth heads channels codes".split(), number(int, 1, 10**5)
)


def system_class(name):
    """The class of a system. UserError if there is none of this name."""
    if name not in SYSTEMS:
        raise UserError(f"unknown system '{name}'; known: {', '.join(SYSTEMS)}")
    module, name = SYSTEMS[name].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


class System(nn.Module):
    """Arguments as `WorldModel`'s, and `sizes`: what differs from the class's own. A subclass sets `name`, how it is
    trained (`num_frames` of a window, `batch_size`, `steps` and `lr` of AdamW) and its default `sizes`."""

    num_patches, num_hist, history, context = (
        1,
        1,
        3,
        3,
    )  # N; frames that the dynamics sees, planning and films begin with
    proprio_dim, variant = 0, "repository"
    criterion = staticmethod(F.mse_loss)

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
        content = load_checkpoint(directory, device)
        try:
            config, state = dict(content["config"]), content["model"]
            if (system := config.pop("system")) != cls.name:
                raise ValueError(f"its system is {system}, not {cls.name}")
            stats = [(state[f"{name}_mean"], state[f"{name}_std"]) for name in ("action", "proprio")]
            stats[0] = tuple(s[: len(s) // config["frameskip"]] for s in stats[0])  # of one environment action
            model = cls(*stats, config["frameskip"], config["world"], **config["sizes"])
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())[:150]
            raise UserError(f"{directory}/model.pt is not a checkpoint of this version ({reason})") from None
        load_state(model, state, f"{directory}/model.pt")
        return model.to(device).eval()
