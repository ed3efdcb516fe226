"""Latent dynamics: a frame-causal transformer over patch tokens, and the world model that binds it to its eyes.

DINO-WM (Zhou et al., 2024, arXiv:2411.04983), section 3.2, as in the released code:

    z_t = enc(o_t)                          (N, d)   visual tokens of a frozen encoder
    x_t = [z_t, phi(p_t), psi(a_t)]         (N, D)   proprio and action embedded, repeated over the N tokens
    x^_{t+1} = ViT(x_{t-H+1}, ..., x_t)              causal by frame, free within a frame
    L = mean ||[z, phi(p)]^_{t+1} - sg[z, phi(p)]_{t+1}||^2      over all H next frames in parallel

The part of the output where the action stands is in no loss; a rollout overwrites it by the next action.

    python predictor.py            # the shapes on their way through one forward pass, and its speed
"""

import argparse
import io
import pickle
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data import UserError, run_script, write_atomic
from encoders import build_encoder
from vae_mdnrnn import to_tensor

# ---------------------------------------------------------------------------------------------------------
# The transition model


class Attention(nn.Module):
    """Multi-head self-attention with a pre-norm, (B, L, D) -> (B, L, D)."""

    def __init__(self, dim, heads, dim_head, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def forward(self, x, mask):
        B, L, _ = x.shape
        qkv = self.to_qkv(self.norm(x)).view(B, L, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, dim_head)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return F.dropout(self.to_out(out.transpose(1, 2).reshape(B, L, -1)), self.dropout, self.training)


class FeedForward(nn.Sequential):
    def __init__(self, dim, mlp_dim, dropout):
        inner = [nn.Linear(dim, mlp_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_dim, dim), nn.Dropout(dropout)]
        super().__init__(nn.LayerNorm(dim), *inner)


class ViTPredictor(nn.Module):
    """The transition model: a pre-norm transformer over the tokens of up to `num_frames` frames.

    Args:
        num_patches, num_frames: N tokens a frame, H frames at most.
        dim: D, the width of a token and of the residual stream.
        depth, heads, dim_head, mlp_dim, dropout: the paper's sizes by default.
    """

    def __init__(self, num_patches, num_frames, dim, depth=6, heads=16, dim_head=64, mlp_dim=2048, dropout=0.1):
        super().__init__()
        length = num_frames * num_patches
        self.pos_embedding = nn.Parameter(torch.randn(1, length, dim))
        self.blocks = nn.ModuleList(
            nn.ModuleList([Attention(dim, heads, dim_head, dropout), FeedForward(dim, mlp_dim, dropout)])
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        frame = torch.arange(length) // num_patches
        self.register_buffer("mask", frame[:, None] >= frame[None, :], persistent=False)  # query sees key

    def forward(self, x):
        """(B, T*N, D) -> (B, T*N, D), T <= num_frames; frame t of the output predicts frame t+1."""
        L = x.shape[1]
        x = x + self.pos_embedding[:, :L]
        for attention, feed_forward in self.blocks:
            x = x + attention(x, self.mask[:L, :L])
            x = x + feed_forward(x)
        return self.norm(x)


# ---------------------------------------------------------------------------------------------------------
# The world model


class WorldModel(nn.Module):
    """Encoder + proprio + action + transition. B batch, T frames, N tokens, d their width, e the embedding's.

    Args:
        encoder: from `encoders.build_encoder`, frozen.
        action_stats, proprio_stats: (mean, std) of one environment action (DoF,) and of the proprio (P,);
            actions and proprio come in the world's units and are normalised here.
        num_hist, num_pred, frameskip: H source frames, the shift of the targets, environment steps per step.
        emb_dim: e, for proprio and action each.
        world: where the data came from, {"env": name, "img_size": of its frames, "data": folder}.
        vit: keyword arguments of `ViTPredictor`.
    """

    def __init__(
        self,
        encoder,
        action_stats,
        proprio_stats,
        num_hist=3,
        num_pred=1,
        frameskip=5,
        emb_dim=10,
        world=None,
        **vit,
    ):
        super().__init__()
        self.encoder = encoder
        self.num_hist, self.num_pred, self.frameskip, self.emb_dim = num_hist, num_pred, frameskip, emb_dim
        self.world, self.vit = world, vit
        for name, (mean, std) in {"action": action_stats, "proprio": proprio_stats}.items():
            repeat = frameskip if name == "action" else 1
            self.register_buffer(f"{name}_mean", torch.as_tensor(mean, dtype=torch.float32).repeat(repeat))
            self.register_buffer(f"{name}_std", torch.as_tensor(std, dtype=torch.float32).repeat(repeat))
        self.action_encoder = nn.Linear(len(self.action_mean), emb_dim)  # the release's Conv1d of kernel size 1
        self.proprio_encoder = nn.Linear(len(self.proprio_mean), emb_dim)
        self.predictor = ViTPredictor(encoder.num_patches, num_hist, encoder.dim + 2 * emb_dim, **vit)

    @property
    def action_dim(self):
        """A = frameskip * DoF, the length of a model step's action."""
        return len(self.action_mean)

    def encode(self, obs):
        """obs {"visual": frames (B, T, H, W, 3) uint8 or their tokens (B, T, N, d), "proprio": (B, T, P)} ->
        latents {"visual": (B, T, N, d), "proprio": (B, T, e)}."""
        visual = obs["visual"]
        if visual.dtype == torch.uint8:
            visual = self.encoder(to_tensor(visual.flatten(0, 1), visual.device)).unflatten(0, visual.shape[:2])
        proprio = (obs["proprio"] - self.proprio_mean) / self.proprio_std
        return {"visual": visual.float(), "proprio": self.proprio_encoder(proprio)}

    def encode_action(self, actions):
        """(B, T, A) in the world's units -> (B, T, e)."""
        return self.action_encoder((actions - self.action_mean) / self.action_std)

    def predict(self, z, action_emb):
        """Latents of T <= num_hist frames and the actions taken there -> latents of the T next frames."""
        visual, N = z["visual"], z["visual"].shape[2]
        tile = lambda e: e[:, :, None].expand(-1, -1, N, -1)  # noqa: E731  (B, T, e) -> (B, T, N, e)
        x = torch.cat([visual, tile(z["proprio"]), tile(action_emb)], dim=-1)  # (B, T, N, D)
        x = self.predictor(x.flatten(1, 2)).view(x.shape)
        visual, proprio, _ = x.split([self.encoder.dim, self.emb_dim, self.emb_dim], dim=-1)
        return {"visual": visual, "proprio": proprio}  # proprio (B, T, N, e): one copy a token

    def loss(self, batch):
        """One-step-ahead loss of H frames in parallel.

        batch: {"visual": tokens (B, H + num_pred, N, d), "proprio": (B, H + num_pred, P), "action": (.., A)}.
        Returns the loss and its parts, {"visual", "proprio"}, each the mean over its own numbers.
        """
        z = self.encode(batch)
        source = {name: latent[:, : self.num_hist] for name, latent in z.items()}
        target = {name: latent[:, self.num_pred :].detach() for name, latent in z.items()}
        predicted = self.predict(source, self.encode_action(batch["action"][:, : self.num_hist]))
        visual = F.mse_loss(predicted["visual"], target["visual"])
        proprio = F.mse_loss(predicted["proprio"], target["proprio"][:, :, None].expand_as(predicted["proprio"]))
        d, e = self.encoder.dim, self.emb_dim
        loss = (d * visual + e * proprio) / (d + e)  # the mean over all numbers but the action's
        return loss, {"visual": visual.item(), "proprio": proprio.item()}

    def rollout(self, z0, actions):
        """Imagines what `actions` lead to.

        z0: latents of the first frames (B, T0, ...), usually T0 = 1, as `encode` returns them.
        actions: (B, T, A), one per frame from the first of z0 on, in the world's units.
        Returns latents of T + 1 frames. The window grows to num_hist frames, then slides.
        """
        z, action_emb, H = z0, self.encode_action(actions), self.num_hist
        for t in range(z0["visual"].shape[1], actions.shape[1] + 1):  # t frames are known
            window = {name: latent[:, -H:] for name, latent in z.items()}
            after = self.predict(window, action_emb[:, max(t - H, 0) : t])
            z = {
                "visual": torch.cat([z["visual"], after["visual"][:, -1:]], dim=1),
                "proprio": torch.cat([z["proprio"], after["proprio"][:, -1:, 0]], dim=1),
            }
        return z

    # -- checkpoints: tensors and plain values only, so that they load with weights_only=True ----------------

    def save(self, directory, **extra):
        """Writes `directory`/model.pt, atomically; `extra` is for what a resumed training needs."""
        config = dict(
            encoder=self.encoder.name, img_size=self.encoder.img_size, num_hist=self.num_hist, num_pred=self.num_pred,
            frameskip=self.frameskip, emb_dim=self.emb_dim, world=self.world, vit=self.vit,
        )  # fmt: skip
        content = {"config": config, "model": self.state_dict(), **extra}
        buffer = io.BytesIO()  # so that a full disk is an OSError, which torch.save would hide
        torch.save(content, buffer)
        write_atomic(Path(directory) / "model.pt", lambda path: path.write_bytes(buffer.getbuffer()))

    @classmethod
    def load(cls, directory, device="cpu"):
        """The model that `save` wrote to `directory`, in eval mode. UserError if it is missing or not ours."""
        content = load_checkpoint(directory, device)
        try:
            config, state = dict(content["config"]), content["model"]
            stats = [(state[f"{name}_mean"], state[f"{name}_std"]) for name in ("action", "proprio")]
            stats[0] = tuple(s[: len(s) // config["frameskip"]] for s in stats[0])  # of one environment action
            encoder = build_encoder(config.pop("encoder"), config.pop("img_size"), weights="random")
            model = cls(encoder, *stats, **config.pop("vit"), **config)
            model.load_state_dict(state)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:150]
            raise UserError(f"{directory}/model.pt is not a checkpoint of this version ({reason})") from None
        return model.to(device).eval()


def available_device(text):
    """An `argparse` type: the name of a device that torch can use here."""
    try:
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(f"torch cannot use the device '{text}' here") from None
    return text


def load_checkpoint(directory, device="cpu"):
    """The dictionary in `directory`/model.pt; never executes a pickle."""
    path = Path(directory) / "model.pt"
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: train one with python train.py, or give --ckpt runs/NAME")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError):
        raise UserError(f"{path} is damaged, or not a checkpoint of this project") from None
    if not isinstance(content, dict) or not {"config", "model"} <= content.keys():
        raise UserError(f"{path} is not a checkpoint of this project (it lacks 'config' and 'model')")
    return content


# ---------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=4)
    batch_size = parser.parse_args().batch_size
    for name, vit in (("pca", dict(depth=4, heads=4, mlp_dim=512)), ("dinov2", {})):
        encoder = build_encoder(name, weights="random")
        stats = (torch.zeros(2), torch.ones(2)), (torch.zeros(4), torch.ones(4))
        model = WorldModel(encoder, *stats, **vit)
        size = encoder.img_size
        obs = {
            "visual": torch.zeros(batch_size, 3, size, size, 3, dtype=torch.uint8),
            "proprio": torch.zeros(batch_size, 3, 4),
        }
        actions = torch.zeros(batch_size, 3, model.action_dim)
        print(f"{name}: {sum(p.numel() for p in model.predictor.parameters()) / 1e6:.2f} M parameters in the predictor")
        with torch.no_grad():
            z = model.encode(obs)
            after = model.predict(z, model.encode_action(actions))
            for what, tensor in {
                "frames": obs["visual"], "actions": actions, "visual tokens": z["visual"],
                "proprio embedding": z["proprio"], "predicted tokens": after["visual"],
            }.items():  # fmt: skip
                print(f"  {what:18} {tuple(tensor.shape)}")
            start, n = time.perf_counter(), 0
            while time.perf_counter() - start < 1:
                model.predict(z, model.encode_action(actions))
                n += batch_size
        print(f"  {n * 3 / (time.perf_counter() - start):.3g} frames predicted per second, batch {batch_size}\n")


if __name__ == "__main__":
    run_script(main)
