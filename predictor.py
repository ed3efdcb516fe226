"""Latent dynamics: three transition models behind one interface, and the world model that binds them to its eyes.

`vit`, DINO-WM (Zhou et al., 2024, arXiv:2411.04983), section 3.2, as in the released code:

    z_t = enc(o_t)                          (N, d)   visual tokens of a frozen encoder
    x_t = [z_t, phi(p_t), psi(a_t)]         (N, D)   proprio and action embedded, repeated over the N tokens
    x^_{t+1} = ViT(x_{t-H+1}, ..., x_t)              causal by frame, free within a frame
    L = mean ||[z, phi(p)]^_{t+1} - sg[z, phi(p)]_{t+1}||^2      over all H next frames in parallel

The part of the output where the action stands is in no loss; a rollout overwrites it by the next action. With
`concat_dim` 0 phi and psi are as wide as z and stand beside the N tokens as two more. The paper's text and the code
disagree; `variant` says which of them is followed, "repository" or "paper":

    psi: one linear layer, or an MLP     proprio: as above, or none     L: over all H next frames, or the last alone

`rwm`, the Robotic World Model (Li, Krause & Hutter, 2025, arXiv:2501.10100), section 3, for one token a frame:

    h = GRU(o_{t-H+1..t}, o^_{t+1..t+k-1}, a_{t-H+1..t+k-1})       reads the history, then its own predictions  (1)
    o^_{t+k} ~ N(mu(h), sigma(h)^2)
    L = 1/K sum_{k=1..K} alpha^k ||o^_{t+k} - o_{t+k}||^2                                                   (2)

`vjepa2_ac`, V-JEPA 2-AC (Assran et al., 2025, arXiv:2506.09985), section 3, its tokens layer-normalised:

    z^_{t+1} = P(a_1, s_1, z_1, ..., a_t, s_t, z_t)      causal by frame; rotary positions in time, height and width
    L = mean |z^_{t+1} - z_{t+1}|  +  mean |z^_k - z_k| over K frames imagined from the first

All are trained by teacher forcing on H frames plus, with K = `rollout_steps` > 1, on K frames of their own imagination.

    python predictor.py            # the shapes on their way through one forward pass, and its speed
"""

import io
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import Parser, UserError, per_second, positive, run_script, write_atomic
from decoders import build_decoder, from_pixels, to_pixels
from encoders import build_encoder
from vae_mdnrnn import load_tensors, to_tensor
from vjepa import RotaryBlock, rotary_angles

# ---------------------------------------------------------------------------------------------------------
# The transition models. Each offers
#     step(z, action) -> z        latents of T <= num_frames frames {"visual": (B, T, N, d), "proprio": (B, T, copies,
#                                 e)} and the actions taken there (B, T, a) -> those of the T next frames; a "memory"
#                                 among them comes back with the next window
#     criterion                   the error that it is trained on and plans by
#     embeds                      whether phi and psi come before it, or it takes normalised proprio and actions
#     normalises                  whether tokens are layer-normalised, so that each has mean 0 and variance 1
#     needs_history               whether a training rollout starts from num_frames frames, or from one, as planning
#     rollout_steps               K, as in its paper
#     weights                     of the visual and of the proprio's mean error in that of all numbers


def frame_causal(num_frames, tokens):
    """The mask (L, L) of frames of `tokens` tokens: True where the query's frame is not before the key's."""
    frame = torch.arange(num_frames * tokens) // tokens
    return frame[:, None] >= frame[None, :]


# With dropout, attention on the CPU keeps its scores (B, heads, L, L) for the gradient, some four times over. A layer
# with more of them than this makes them again instead: a step of 32 windows at the paper's size then takes 13 GB.
KEPT_SCORES = 2**26


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
        attend = partial(F.scaled_dot_product_attention, attn_mask=mask, dropout_p=dropout)
        if dropout and q.is_cpu and B * self.heads * L**2 > KEPT_SCORES:
            out = checkpoint(attend, q, k, v, use_reentrant=False)
        else:
            out = attend(q, k, v)
        return F.dropout(self.to_out(out.transpose(1, 2).reshape(B, L, -1)), self.dropout, self.training)


class FeedForward(nn.Sequential):
    def __init__(self, dim, mlp_dim, dropout):
        inner = [nn.Linear(dim, mlp_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_dim, dim), nn.Dropout(dropout)]
        super().__init__(nn.LayerNorm(dim), *inner)


class ViTPredictor(nn.Module):
    """DINO-WM's transition: a pre-norm transformer over the tokens of up to `num_frames` frames.

    Args:
        num_patches, num_frames: N tokens a frame, H frames at most.
        dim, proprio_dim, action_dim: their sum is D, the width of a token and of the residual stream.
        depth, heads, dim_head, mlp_dim, dropout: the paper's sizes by default.
        concat_dim: 1, proprio and action are repeated onto every token; 0, they are two tokens more, and D = d.
        num_proprio_repeat, num_action_repeat: how often a token has them, with concat_dim 1.
    """

    criterion = staticmethod(F.mse_loss)
    embeds, normalises, needs_history, rollout_steps = True, False, False, 1

    def __init__(
        self, num_patches, num_frames, dim, proprio_dim=0, action_dim=0,
        depth=6, heads=16, dim_head=64, mlp_dim=2048, dropout=0.1,
        concat_dim=1, num_proprio_repeat=1, num_action_repeat=1,
    ):  # fmt: skip
        super().__init__()
        self.concat_dim, self.repeats = concat_dim, (num_proprio_repeat, num_action_repeat)
        if concat_dim == 1:
            width = dim + num_proprio_repeat * proprio_dim + num_action_repeat * action_dim
            self.weights = dim, num_proprio_repeat * proprio_dim
        elif dim == proprio_dim == action_dim:
            self.weights = num_patches * dim, dim
            num_patches, width = num_patches + 2, dim
        else:
            raise UserError(
                f"--concat-dim 0 wants proprio and action as wide as a token, {dim}, not {proprio_dim} and {action_dim}"
            )
        self.pos_embedding = nn.Parameter(torch.randn(1, num_frames * num_patches, width))
        self.blocks = nn.ModuleList(
            nn.ModuleList([Attention(width, heads, dim_head, dropout), FeedForward(width, mlp_dim, dropout)])
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mask", frame_causal(num_frames, num_patches), persistent=False)

    def forward(self, x):
        """(B, T*N, D) -> (B, T*N, D), T <= num_frames; frame t of the output predicts frame t+1."""
        L = x.shape[1]
        x = x + self.pos_embedding[:, :L]
        for attention, feed_forward in self.blocks:
            x = x + attention(x, self.mask[:L, :L])
            x = x + feed_forward(x)
        return self.norm(x)

    def step(self, z, action):
        parts = [z["visual"], z["proprio"], action[:, :, None]]
        N, e = parts[0].shape[2], parts[1].shape[-1]
        if self.concat_dim == 1:
            for i, repeat in enumerate(self.repeats, 1):  # (B, T, 1 or N * repeat, e) -> (B, T, N, repeat * e)
                parts[i] = parts[i].expand(-1, -1, N * repeat, -1).unflatten(2, (N, repeat)).flatten(3)
        dim = 2 + self.concat_dim
        x = torch.cat(parts, dim)  # (B, T, N, D), or (B, T, N + 2, d)
        visual, proprio, _ = self(x.flatten(1, 2)).view(x.shape).split([part.shape[dim] for part in parts], dim)
        if self.concat_dim == 1:
            proprio = proprio.unflatten(-1, (self.repeats[0], e)).flatten(2, 3)
        return {"visual": visual, "proprio": proprio}


class RWMPredictor(nn.Module):
    """The Robotic World Model's transition: a GRU over history and predictions, heads for the mean and the deviation.

    In training a sample is what the loss sees and what the next step reads; else it is the mean. As in the release the
    GRU's state is carried on (the paper's window slides), the mean is a change of the last state, and the loss is the
    sample's squared error, which teaches a deviation to shrink to its bound; the bounds are those from which the
    release's learned ones start. No privileged heads: the worlds here have no such signals.

    Args:
        num_patches, num_frames: 1 token a frame, a history of H frames at most.
        dim, proprio_dim, action_dim: d, e, a.
        width, depth, mlp_dim: of the GRU, its layers, of the heads; the paper's (table S7) by default.
    """

    criterion = staticmethod(F.mse_loss)
    embeds, normalises, needs_history, rollout_steps = False, False, True, 8
    LOG_STD = -5.0, -4.0

    def __init__(self, num_patches, num_frames, dim, proprio_dim=0, action_dim=0, width=256, depth=2, mlp_dim=128):
        super().__init__()
        if num_patches != 1:
            raise UserError(f"--predictor rwm takes one token a frame, not {num_patches}: try --encoder pca or state")
        state_dim, self.weights = dim + proprio_dim, (dim, proprio_dim)
        self.gru = nn.GRU(state_dim + action_dim, width, depth, batch_first=True)
        self.mean, self.log_std = (
            nn.Sequential(nn.Linear(width, mlp_dim), nn.ReLU(), nn.Linear(mlp_dim, state_dim)) for _ in range(2)
        )

    def forward(self, state, action, memory=None):
        """States (B, T, d + e), actions (B, T, a), the GRU's state (depth, B, width) before them -> mean and deviation
        of the T next states, the GRU's state after them."""
        h, memory = self.gru(torch.cat([state, action], dim=-1), memory)  # (B, T, width): inner autoregression
        low, high = self.LOG_STD
        log_std = low + (high - low) * torch.sigmoid(self.log_std(h))
        return state + self.mean(h), log_std.exp(), memory

    def step(self, z, action):
        state, memory = torch.cat([z["visual"], z["proprio"]], dim=-1)[:, :, 0], z.get("memory")
        if memory is not None:  # the last frame alone is new
            state, action = state[:, -1:], action[:, -1:]
        mean, std, memory = self(state, action, memory)
        state = mean + std * torch.randn_like(std) if self.training else mean  # reparameterised
        visual, proprio = state[:, :, None].split([z["visual"].shape[-1], z["proprio"].shape[-1]], dim=-1)
        return {"visual": visual, "proprio": proprio, "memory": memory}


def rotary_tables(num_frames, side, head_dim):
    """cos and sin (L, head_dim) of the angles of frames of 2 + side^2 tokens, as V-JEPA 2-AC has them: the action and
    the state of a frame have its time, and neither row nor column."""
    patch = torch.cat([torch.zeros(2, dtype=torch.long), torch.arange(side**2)]).repeat(num_frames)
    frame = torch.arange(num_frames).repeat_interleave(2 + side**2)
    return rotary_angles(torch.stack([frame, patch // side, patch % side], -1), head_dim, released=True)


class ACPredictor(nn.Module):
    """V-JEPA 2-AC's transition: a transformer over frames of one action, one state and N patch tokens.

    The next state is the state plus a head on its token, which the release lacks: there an action *is* the change of
    the robot's pose. `integrate=True` adds the actions up instead (angles, too, where the release composes rotations);
    it wants a world where that holds, and the statistics (0, 1) for both, so that their units agree. Training imagines
    the states, too, as planning does; the release reads the true ones.

    Args:
        num_patches, num_frames: N tokens a frame, on a square grid; H frames at most.
        dim, proprio_dim, action_dim: d, P, A (the release: 1408, 7, 7).
        width, depth, heads, mlp_dim: the release's 300 M parameters by default.
    """

    criterion = staticmethod(F.l1_loss)
    embeds, normalises, needs_history, rollout_steps = False, True, False, 2

    def __init__(
        self, num_patches, num_frames, dim, proprio_dim=7, action_dim=7,
        width=1024, depth=24, heads=16, mlp_dim=4096, integrate=False,
    ):  # fmt: skip
        super().__init__()
        side = math.isqrt(num_patches)
        if side**2 != num_patches:
            raise UserError(f"--predictor vjepa2_ac takes a square grid of tokens a frame, not {num_patches}")
        if width % (2 * heads):
            raise UserError(f"--width {width} is not a multiple of twice --heads {heads}")
        if integrate and (proprio_dim == 0 or action_dim % proprio_dim):
            raise UserError(f"actions of {action_dim} numbers are no changes of a state of {proprio_dim}")
        self.num_patches, self.weights = num_patches, (dim, proprio_dim)
        self.predictor_embed = nn.Linear(dim, width)
        self.action_encoder = nn.Linear(action_dim, width)
        self.state_encoder = nn.Linear(proprio_dim, width)
        self.predictor_blocks = nn.ModuleList(RotaryBlock(width, heads, mlp_dim) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, dim)
        self.state_head = None if integrate else nn.Linear(width, proprio_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for i, block in enumerate(self.predictor_blocks, 1):  # the deeper, the less it adds at first
            for linear in (block.attn["proj"], block.mlp["fc2"]):
                linear.weight.data /= math.sqrt(2 * i)
        tables = *rotary_tables(num_frames, side, width // heads), frame_causal(num_frames, 2 + num_patches)
        for name, table in zip(("cos", "sin", "mask"), tables, strict=True):
            self.register_buffer(name, table, persistent=False)

    def forward(self, x, actions, states):
        """Tokens (B, T*N, d), actions (B, T, A), states (B, T, P) -> tokens and states of the T next frames."""
        patches = self.predictor_embed(x).unflatten(1, (-1, self.num_patches))  # (B, T, N, width)
        a, s = self.action_encoder(actions)[:, :, None], self.state_encoder(states)[:, :, None]
        x = torch.cat([a, s, patches], dim=2).flatten(1, 2)  # (B, L, width), L = T * (2 + N)
        L = x.shape[1]
        for block in self.predictor_blocks:
            x = block(x, self.cos[:L], self.sin[:L], self.mask[:L, :L])
        x = self.predictor_norm(x).unflatten(1, (-1, 2 + self.num_patches))  # (B, T, 2 + N, width)
        if self.state_head is None:
            change = actions.unflatten(-1, (-1, states.shape[-1])).sum(-2)  # of all actions of a model step
        else:
            change = self.state_head(x[:, :, 1])
        return self.predictor_proj(x[:, :, 2:]).flatten(1, 2), states + change

    def step(self, z, action):
        visual, proprio = self(z["visual"].flatten(1, 2), action, z["proprio"][:, :, 0])
        visual = F.layer_norm(visual, visual.shape[-1:]).view(z["visual"].shape)
        return {"visual": visual, "proprio": proprio[:, :, None]}

    def load_released(self, path):
        """Loads a released checkpoint, or a predictor's own state dict, whole or not at all; the state head stays.

        Raises UserError, naming keys, if it is of another architecture or action dimension.
        """
        content = load_tensors(path, "cpu")
        state = {str(name).replace("module.", ""): tensor for name, tensor in content.get("predictor", content).items()}
        state = {name: tensor for name, tensor in state.items() if not name.startswith("extrinsics_encoder.")}
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("state_head.")}
        if different := sorted(own.keys() ^ state.keys()):
            raise UserError(f"{path} is no V-JEPA 2-AC predictor: {len(different)} keys differ, e.g. {different[0]}")
        for name in ("action_encoder.weight", "state_encoder.weight", *own):  # what it acts on comes first
            if own[name].shape != state[name].shape:
                theirs, ours = tuple(state[name].shape), tuple(own[name].shape)
                raise UserError(f"{path} is a V-JEPA 2-AC predictor of another size: {name} is {theirs}, not {ours}")
        self.load_state_dict(state, strict=False)


PREDICTORS = {"vit": ViTPredictor, "rwm": RWMPredictor, "vjepa2_ac": ACPredictor}


# ---------------------------------------------------------------------------------------------------------
# The world model


class StateEncoder(nn.Module):
    """No eyes: a frame's one token is its normalised proprio, of PointMaze the whole state (`WorldModel.encode`)."""

    name, num_patches, dim, img_size = "state", 1, 0, None  # dim: as the world's


def build_eyes(name, img_size=None, weights=None):
    """The encoder called `name`, or the state in the place of one."""
    return StateEncoder() if name == "state" else build_encoder(name, img_size, weights)


class WorldModel(nn.Module):
    """Encoder + proprio + action + transition. B batch, T frames, N tokens, d their width, e the proprio's.

    Args:
        encoder: from `build_eyes`, frozen.
        action_stats, proprio_stats: (mean, std) of one environment action (DoF,) and of the proprio (P,);
            actions and proprio come in the world's units and are normalised here.
        num_hist, num_pred, frameskip: H source frames, the shift of the targets, environment steps per step.
        emb_dim, action_emb_dim: of the embeddings phi and psi (default: as phi), for the transitions that want them.
        world: where the data came from, {"env": name, "img_size": of its frames, "data": folder}.
        predictor: the transition's name in PREDICTORS, sizes: its keyword arguments.
        variant: "repository" or "paper", see above.
        decoder: `build_decoder`'s keyword arguments, or None for none.
    """

    def __init__(
        self, encoder, action_stats, proprio_stats, num_hist=3, num_pred=1, frameskip=5, emb_dim=10, world=None,
        predictor="vit", variant="repository", decoder=None, action_emb_dim=None, **sizes,
    ):  # fmt: skip
        super().__init__()
        self.encoder = encoder
        self.num_hist, self.num_pred, self.frameskip, self.variant = num_hist, num_pred, frameskip, variant
        self.emb_dim, self.action_emb_dim = emb_dim, action_emb_dim or emb_dim
        self.world, self.predictor_name, self.sizes, self.decoder_sizes = world, predictor, sizes, decoder
        for name, (mean, std) in {"action": action_stats, "proprio": proprio_stats}.items():
            repeat = frameskip if name == "action" else 1
            self.register_buffer(f"{name}_mean", torch.as_tensor(mean, dtype=torch.float32).repeat(repeat))
            self.register_buffer(f"{name}_std", torch.as_tensor(std, dtype=torch.float32).repeat(repeat))
        transition, A, P = PREDICTORS[predictor], len(self.action_mean), len(self.proprio_mean)
        if encoder.name == "state":
            encoder.dim, P = P, 0  # the proprio is the token
        if variant == "paper":
            P = 0  # its text has images and actions alone
        self.action_encoder, self.proprio_encoder, self.proprio_dim = nn.Identity(), nn.Identity(), P
        if transition.embeds:
            a = self.action_emb_dim
            if variant == "paper":  # an MLP, of a size that it does not say
                self.action_encoder = nn.Sequential(nn.Linear(A, 64), nn.GELU(), nn.Linear(64, a))
            else:
                self.action_encoder = nn.Linear(A, a)  # the release's Conv1d of kernel size 1
            A = a
            if P:
                self.proprio_encoder, self.proprio_dim = nn.Linear(P, emb_dim), emb_dim
        self.predictor = transition(encoder.num_patches, num_hist, encoder.dim, self.proprio_dim, A, **sizes)
        # true frames that a training rollout starts from; the paper's loss leaves shorter windows untrained
        self.context = num_hist if transition.needs_history or variant == "paper" else 1
        self.decoder = build_decoder(encoder.num_patches, encoder.dim, **decoder) if decoder else None

    @property
    def action_dim(self):
        """A = frameskip * DoF, the length of a model step's action."""
        return len(self.action_mean)

    def encode(self, obs):
        """obs {"visual": frames (B, T, H, W, 3) uint8 or their tokens (B, T, N, d), "proprio": (B, T, P)} ->
        latents {"visual": (B, T, N, d), "proprio": (B, T, e)}."""
        visual, proprio = obs["visual"], (obs["proprio"] - self.proprio_mean) / self.proprio_std
        if self.encoder.name == "state":
            visual = proprio[:, :, None]
        elif visual.dtype == torch.uint8:
            visual = self.encoder(to_tensor(visual.flatten(0, 1), visual.device)).unflatten(0, visual.shape[:2])
        visual = visual.float()
        if self.predictor.normalises:
            visual = F.layer_norm(visual, visual.shape[-1:])
        if not self.proprio_dim:
            proprio = proprio[..., :0]
        return {"visual": visual, "proprio": self.proprio_encoder(proprio)}

    def encode_action(self, actions):
        """(B, T, A) in the world's units -> (B, T, a)."""
        return self.action_encoder((actions - self.action_mean) / self.action_std)

    def predict(self, z, action_emb):
        """Latents of T <= num_hist frames and the actions taken there -> latents of the T next frames; the proprio
        (B, T, copies, e), where `vit` predicts a copy with every token and takes them, too. `rwm` adds a memory and,
        given it, predicts the last frame's successor alone."""
        copies = z["proprio"] if z["proprio"].ndim == 4 else z["proprio"][:, :, None]
        return self.predictor.step(z | {"proprio": copies}, action_emb)

    def error(self, predicted, target):
        """The mean error of `predict`'s visual latents and that of the proprio, weighed as the transition says (`vit`:
        to the mean over all numbers but the action's); and the two by themselves."""
        (d, e), criterion = self.predictor.weights, self.predictor.criterion
        visual = criterion(predicted["visual"], target["visual"])
        proprio = target["proprio"][:, :, None].expand_as(predicted["proprio"])
        proprio = criterion(predicted["proprio"], proprio) if e else visual.new_zeros(())
        return (d * visual + e * proprio) / (d + e), visual, proprio

    def loss(self, batch, rollout_steps=1, decay=1.0, grad_steps=None):
        """Teacher forcing, one step ahead of H frames in parallel; with K = `rollout_steps` > 1 also the mean over K
        imagined frames, the k-th weighed by decay^k, with the gradient through the last `grad_steps` (None: all).

        batch: {"visual": tokens (B, H + K, N, d), "proprio": (B, H + K, P), "action": (B, H + K, A)}.
        Returns the loss and its parts, {"visual", "proprio"} of the first term, each the mean over its own numbers, and
        "rollout".
        """
        z, H = self.encode(batch), self.num_hist
        frames = lambda first, last: {name: latent[:, first:last] for name, latent in z.items()}  # noqa: E731
        target = {name: latent.detach() for name, latent in z.items()}
        after = {name: latent[:, self.num_pred : H + self.num_pred] for name, latent in target.items()}
        predicted = self.predict(frames(0, H), self.encode_action(batch["action"][:, :H]))
        if self.variant == "paper":  # the loss on the next frame alone
            predicted, after = ({k: latent[:, -1:] for k, latent in part.items()} for part in (predicted, after))
        loss, visual, proprio = self.error(predicted, after)
        parts = {"visual": visual.detach(), "proprio": proprio.detach()}
        if rollout_steps > 1:
            start, rollout = self.context, 0.0
            imagined = self.rollout(frames(0, start), batch["action"][:, : start + rollout_steps - 1], grad_steps)
            for k in range(rollout_steps):
                now = slice(start + k, start + k + 1)
                predicted = {"visual": imagined["visual"][:, now], "proprio": imagined["proprio"][:, now, None]}
                error, *_ = self.error(predicted, {name: latent[:, now] for name, latent in target.items()})
                rollout = rollout + decay ** (k + 1) * error / rollout_steps
            loss, parts["rollout"] = loss + rollout, rollout.detach()
        return loss, parts

    def rollout(self, z0, actions, grad_steps=None):
        """Imagines what `actions` lead to.

        z0: latents of the first frames (B, T0, ...), as `encode` returns them; planning knows one.
        actions: (B, T, A), one per frame from the first of z0 on, in the world's units.
        grad_steps: a gradient goes from prediction to prediction through the last so many imagined frames; those before
            them learn from their own errors alone. None: through all.
        Returns latents of T + 1 frames. The window grows to num_hist frames, then slides; `rwm` remembers all.
        """
        memory, action_emb, H = {}, self.encode_action(actions), self.num_hist
        z = z0 | {"proprio": z0["proprio"][:, :, None]}  # (B, T0, copies, e)
        T0, cut = z0["visual"].shape[1], actions.shape[1] + 1 - grad_steps if grad_steps else 0
        for t in range(T0, actions.shape[1] + 1):  # t frames are known
            window = {name: latent[:, -H:] for name, latent in z.items()}
            if cut > T0:
                window = {k: torch.cat([v[:, :T0], v[:, T0:cut].detach(), v[:, cut:]], 1)[:, -H:] for k, v in z.items()}
            after = self.predict(window | memory, action_emb[:, max(t - H, 0) : t])
            memory = {k: after[k].detach() if t < cut else after[k] for k in after.keys() - z.keys()}
            copies = z["proprio"].expand(-1, -1, after["proprio"].shape[2], -1)  # `vit` goes on from every token's own
            z = {
                "visual": torch.cat([z["visual"], after["visual"][:, -1:]], dim=1),
                "proprio": torch.cat([copies, after["proprio"][:, -1:]], dim=1),
            }
        return z | {"proprio": z["proprio"][:, :, 0]}

    # -- the decoder: a window into the latents, from which nothing flows back --------------------------------

    def decode(self, visual):
        """Visual latents (B, T, N, d) -> frames (B, T, H, W, 3) uint8."""
        return from_pixels(self.decoder(visual)[0])

    def decoder_loss(self, visual, frames):
        """What the decoder learns by, and its two parts, given visual latents (B, T, N, d) and their frames
        (B, T, H, W, 3) of 0 to 255: the error of the reconstruction, pixels being in [-1, 1], + 0.25 of the codes'."""
        images, codes = self.decoder(visual.detach())
        reconstruction = F.mse_loss(images, to_pixels(frames))
        return reconstruction + 0.25 * codes, reconstruction, codes

    # -- checkpoints: tensors and plain values only, so that they load with weights_only=True ----------------

    def save(self, directory, **extra):
        """Writes `directory`/model.pt, atomically; `extra` is for what a resumed training needs."""
        config = dict(
            encoder=self.encoder.name, img_size=self.encoder.img_size, num_hist=self.num_hist, num_pred=self.num_pred,
            frameskip=self.frameskip, emb_dim=self.emb_dim, world=self.world, predictor=self.predictor_name,
            sizes=self.sizes, variant=self.variant, decoder=self.decoder_sizes, action_emb_dim=self.action_emb_dim,
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
            encoder = build_eyes(config.pop("encoder"), config.pop("img_size"), weights="random")
            model = cls(encoder, *stats, **config.pop("sizes"), **config)
            model.load_state_dict(state)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:150]
            raise UserError(f"{directory}/model.pt is not a checkpoint of this version ({reason})") from None
        return model.to(device).eval()


def load_checkpoint(directory, device="cpu"):
    """The dictionary in `directory`/model.pt; never executes a pickle."""
    path = Path(directory) / "model.pt"
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: train one with python train.py, or give --ckpt runs/NAME")
    content = load_tensors(path, device)
    if not {"config", "model"} <= content.keys():
        raise UserError(f"{path} is not a checkpoint of this project (it lacks 'config' and 'model')")
    return content


# ---------------------------------------------------------------------------------------------------------


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=positive, default=4)
    batch_size = parser.parse_args().batch_size
    for name, predictor, sizes in (
        ("pca", "vit", dict(depth=4, heads=4, mlp_dim=512)), ("pca", "rwm", {}), ("dinov2", "vit", {}),
        ("dinov2", "vjepa2_ac", dict(width=384, depth=6, heads=6, mlp_dim=1536)),
    ):  # fmt: skip
        encoder = build_encoder(name, weights="random")
        stats = (torch.zeros(2), torch.ones(2)), (torch.zeros(4), torch.ones(4))
        model = WorldModel(encoder, *stats, predictor=predictor, **sizes).eval()
        size = encoder.img_size
        obs = {
            "visual": torch.zeros(batch_size, 3, size, size, 3, dtype=torch.uint8),
            "proprio": torch.zeros(batch_size, 3, 4),
        }
        actions = torch.zeros(batch_size, 3, model.action_dim)
        million = sum(p.numel() for p in model.predictor.parameters()) / 1e6
        print(f"{name}, {predictor}: {million:.2f} M parameters in the predictor")
        with torch.no_grad():
            z = model.encode(obs)
            after = model.predict(z, model.encode_action(actions))
            for what, tensor in {
                "frames": obs["visual"], "actions": actions, "visual tokens": z["visual"],
                "proprio": z["proprio"], "predicted tokens": after["visual"],
            }.items():  # fmt: skip
                print(f"  {what:18} {tuple(tensor.shape)}")
            rate = 3 * batch_size * per_second(lambda: model.predict(z, model.encode_action(actions)))  # noqa: B023
        print(f"  {rate:.3g} frames predicted per second, batch {batch_size}\n")


if __name__ == "__main__":
    run_script(main)
