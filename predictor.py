"""Latent dynamics: three transition models behind one interface, and the world model that binds them to an encoder.

`vit`, DINO-WM (Zhou et al., 2024, arXiv:2411.04983), section 3.2, as in the released code:

    z_t = enc(o_t)                          (N, d)   visual tokens of a frozen encoder
    x_t = [z_t, phi(p_t), psi(a_t)]         (N, D)   proprio and action embedded, repeated over the N tokens
    x^_{t+1} = ViT(x_{t-H+1}, ..., x_t)              causal by frame, free within a frame
    L = mean ||[z, phi(p)]^_{t+1} - sg[z, phi(p)]_{t+1}||^2      over all H next frames in parallel

The loss ignores the action's part of the output, and a rollout overwrites it with the next action. With `concat_dim`
0, phi and psi are as wide as z and are appended to the N tokens as two more. Where the paper's text and the released
code disagree, `variant` says which is followed, "repository" or "paper":

    psi: one linear layer, or an MLP     proprio: as above, or none     L: over all H next frames, or the last alone

`rwm`, the Robotic World Model (Li, Krause & Hutter, 2025, arXiv:2501.10100), section 3, for one token a frame:

    h = GRU(o_{t-H+1..t}, o^_{t+1..t+k-1}, a_{t-H+1..t+k-1})       reads the history, then its own predictions  (1)
    o^_{t+k} ~ N(mu(h), sigma(h)^2)
    L = 1/K sum_{k=1..K} alpha^k ||o^_{t+k} - o_{t+k}||^2                                                   (2)

`vjepa2_ac`, V-JEPA 2-AC (Assran et al., 2025, arXiv:2506.09985), section 3, its tokens layer-normalised:

    z^_{t+1} = P(a_1, s_1, z_1, ..., a_t, s_t, z_t)      causal by frame; rotary positions in time, height and width
    L = mean |z^_{t+1} - z_{t+1}|  +  mean |z^_k - z_k| over K frames imagined from the first

All are trained by teacher forcing on H frames and, with K = `rollout_steps` > 1, on K frames of their own imagination.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from encoders import build_encoder
from lib import common
from lib.common import UserError, load_state, load_tensors, to_tensor
from lib.decoders import build_decoder
from lib.vjepa import RotaryBlock, attend, rotary_angles
from lib.weights import load_renamed, model_folder, rename

# ---- The transition models -----------------------------------------------------------------------
#
# A frame's latents are one row of numbers, [visual (N * d), proprio (copies * e)]. A model is made of num_patches N,
# num_hist H, dim d, proprio_dim e, action_dim a and its own sizes, and has
#     forward(z, action, memory, newest)
#                                   z (B, T, N*d + copies*e) of T <= num_hist frames and the actions taken there
#                                   (B, T, a) -> the latents of the T next frames, or with `newest` of the last one
#                                   alone, and what it remembers for the next call (or None)
#     criterion                     the error that it is trained on and plans by
#     copies                        how many copies of the proprio a frame has
#     embeds                        whether phi and psi come before it; else it takes normalised proprio and actions
#     normalises                    whether it wants tokens that are layer-normalised
#     needs_history                 whether a training rollout starts from num_hist frames; if not, it starts from one,
#                                   as a plan does
#     rollout_steps                 K, as in its paper


class Attention(nn.Module):
    """Multi-head self-attention with a pre-norm over x (B, L, D), causal by frames of `tokens` tokens each. Returns the
    outputs of the tokens from `first` on, and the keys and values."""

    def __init__(self, dim, heads, dim_head, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def forward(self, x, tokens, past=None, first=0):
        qkv = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, dim_head)
        out, kept = attend(q[:, :, first:], k, v, tokens, past, self.dropout if self.training else 0.0)
        return F.dropout(self.to_out(out.transpose(1, 2).flatten(2)), self.dropout, self.training), kept


class FeedForward(nn.Sequential):
    def __init__(self, dim, mlp_dim, dropout):
        inner = [nn.Linear(dim, mlp_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_dim, dim), nn.Dropout(dropout)]
        super().__init__(nn.LayerNorm(dim), *inner)


class Block(nn.ModuleList):
    """Attention and feed-forward, each added to the residual stream."""

    def forward(self, x, tokens, past=None, first=0):
        attention, feed_forward = self
        y, kept = attention(x, tokens, past, first)
        x = x[:, first:] + y
        return x + feed_forward(x), kept


def run_blocks(blocks, x, tokens, tables=(), newest=False, memory=None):
    """Sends a window x (B, L, D) of frames of `tokens` tokens each through one block after another. A block also gets
    each token's row of the `tables`. Returns what comes out, and a memory for the next call.

    With `newest`, only the tokens of the newest frame come out. While the window grows, no frame changes its position
    and none sees a later one, so the memory keeps the keys and values of the earlier frames, and only the newest frame
    runs through the blocks. When the window slides, all positions change and all frames run, except that the last block
    computes the newest frame alone.
    """
    L = x.shape[1]
    known, pasts = memory if memory and memory[0] + tokens == L else (0, [None] * len(blocks))
    x, tables, kept = x[:, known:], [table[known:L] for table in tables], []
    for block, past in zip(blocks, pasts, strict=True):
        first = x.shape[1] - tokens if newest and block is blocks[-1] else 0  # the first token whose output is needed
        x, keys_and_values = block(x, *tables, tokens, past, first)
        kept.append(keys_and_values)
    return x, (L, kept) if newest else None


class ViTPredictor(nn.Module):
    """DINO-WM's transition: a pre-norm transformer over the tokens of up to `num_hist` frames.

    The default sizes are the paper's. With `concat_dim` 1 every token gets `num_proprio_repeat` copies of the
    proprio and `num_action_repeat` of the action. With 0 they are two tokens more, and D = d.
    """

    criterion = staticmethod(F.mse_loss)
    embeds, normalises, needs_history, rollout_steps = True, False, False, 1

    def __init__(
        self, num_patches, num_hist, dim, proprio_dim=0, action_dim=0,
        depth=6, heads=16, dim_head=64, mlp_dim=2048, dropout=0.1,
        concat_dim=1, num_proprio_repeat=1, num_action_repeat=1,
    ):  # fmt: skip
        super().__init__()
        if concat_dim == 0 and not dim == proprio_dim == action_dim:
            raise UserError(f"concat_dim=0 wants proprio ({proprio_dim}) and action ({action_dim}) to be {dim} wide")
        self.num_patches, self.dim = num_patches, dim
        self.concat_dim, self.action_repeat = concat_dim, num_action_repeat
        self.copies, self.tokens, width = 1, num_patches + 2, dim
        if concat_dim == 1:
            self.copies, self.tokens = num_patches * num_proprio_repeat, num_patches
            width = dim + num_proprio_repeat * proprio_dim + num_action_repeat * action_dim
        self.pos_embedding = nn.Parameter(torch.randn(1, num_hist * self.tokens, width))
        sizes = (width, heads, dim_head, dropout), (width, mlp_dim, dropout)
        self.blocks = nn.ModuleList(Block([Attention(*sizes[0]), FeedForward(*sizes[1])]) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def transformer(self, x, newest=False, memory=None):
        """(B, L, D) -> (B, L, D), the tokens of whole frames; frame t of the output predicts frame t + 1. `newest` and
        the memory are those of `run_blocks`."""
        x = x + self.pos_embedding[:, : x.shape[1]]
        x, memory = run_blocks(self.blocks, x, self.tokens, newest=newest, memory=memory)
        return self.norm(x), memory

    def forward(self, z, action, memory=None, newest=False):
        N = self.num_patches
        visual, proprio = z.tensor_split([N * self.dim], -1)
        visual = visual.unflatten(-1, (N, -1))  # (B, T, N, d)
        if self.concat_dim == 1:  # onto every token; it predicts a copy of the proprio with each of them
            action = action.repeat(1, 1, self.action_repeat)[:, :, None].expand(-1, -1, N, -1)
            parts, axis = (visual, proprio.unflatten(-1, (N, -1)), action), -1
        else:
            parts, axis = (visual, proprio[:, :, None], action[:, :, None]), 2
        x = torch.cat(parts, axis)  # (B, T, N, D) or (B, T, N + 2, d)
        x, memory = self.transformer(x.flatten(1, 2), newest, memory)
        visual, proprio, _ = x.unflatten(1, (-1, self.tokens)).split([part.shape[axis] for part in parts], axis)
        return torch.cat([visual.flatten(2), proprio.flatten(2)], -1), memory


class RWMPredictor(nn.Module):
    """The Robotic World Model's transition: a GRU over history and predictions, with heads for mean and sigma.

    In training the loss and the next step read a sample, in evaluation the mean. As in the release the GRU's state is
    carried on (the paper's window slides), the mean is a change of the last state, and the loss is the sample's squared
    error, which teaches sigma to shrink to its bound. The bounds are those from which the release's learned ones start.
    Deviations: no privileged heads, because the worlds here have no such signals; and `WorldModel.loss` adds teacher
    forcing to equation (2), because a plan starts from one frame and not from a history.
    `width` and `depth` are the GRU's, `mlp_dim` is that of the heads; the defaults are the paper's (table S7).
    """

    criterion = staticmethod(F.mse_loss)
    copies, embeds, normalises, needs_history, rollout_steps = 1, False, False, True, 8
    LOG_STD = -5.0, -4.0

    def __init__(self, num_patches, num_hist, dim, proprio_dim=0, action_dim=0, width=256, depth=2, mlp_dim=128):
        super().__init__()
        if num_patches != 1:
            raise UserError(f"--predictor rwm takes one token a frame, not {num_patches}: try --encoder pca or state")
        state_dim = dim + proprio_dim
        self.gru = nn.GRU(state_dim + action_dim, width, depth, batch_first=True)
        self.mean, self.log_std = (
            nn.Sequential(nn.Linear(width, mlp_dim), nn.ReLU(), nn.Linear(mlp_dim, state_dim)) for _ in range(2)
        )

    def distribution(self, state, action, memory=None):
        """States (B, T, d + e), actions (B, T, a) and the GRU's state (depth, B, width) before them -> the mean and
        sigma of the T next states, and the GRU's state after them."""
        h, memory = self.gru(torch.cat([state, action], dim=-1), memory)  # (B, T, width): inner autoregression
        low, high = self.LOG_STD
        log_std = low + (high - low) * torch.sigmoid(self.log_std(h))
        return state + self.mean(h), log_std.exp(), memory

    def forward(self, z, action, memory=None, newest=False):
        if memory is not None:  # only the last frame is new
            z, action = z[:, -1:], action[:, -1:]
        mean, std, memory = self.distribution(z, action, memory)
        return mean + std * torch.randn_like(std) if self.training else mean, memory  # reparameterised


class ACPredictor(nn.Module):
    """V-JEPA 2-AC's transition: a transformer over frames of one action, one state and N patch tokens.

    Deviations: a head reads the change of the state from the state's token, because only in the release's world is the
    action itself that change; and the error of the states is part of L. In training, imagination goes on from the
    states that it has predicted, as planning does; the release reads the true ones. The default sizes are the
    release's, which has 300 M parameters, d 1408, P 7 and A 7.
    """

    criterion = staticmethod(F.l1_loss)
    copies, embeds, normalises, needs_history, rollout_steps = 1, False, True, False, 2

    def __init__(
        self, num_patches, num_hist, dim, proprio_dim=7, action_dim=7, width=1024, depth=24, heads=16, mlp_dim=4096
    ):
        super().__init__()
        side = math.isqrt(num_patches)
        if side**2 != num_patches:
            raise UserError(f"--predictor vjepa2_ac takes a square grid of tokens a frame, not {num_patches}")
        if width % (2 * heads):
            raise UserError(f"--sizes width={width} is not a multiple of twice heads={heads}")
        self.num_patches, self.dim = num_patches, dim
        self.predictor_embed = nn.Linear(dim, width)
        self.action_encoder = nn.Linear(action_dim, width)
        self.state_encoder = nn.Linear(proprio_dim, width)
        self.predictor_blocks = nn.ModuleList(RotaryBlock(width, heads, mlp_dim) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, dim)
        self.state_head = nn.Linear(width, proprio_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for i, block in enumerate(self.predictor_blocks, 1):  # the deeper a block is, the less it adds at first
            for linear in (block.attn["proj"], block.mlp["fc2"]):
                linear.weight.data /= math.sqrt(2 * i)
        # the action and the state of a frame turn with its time alone, a patch also with its row and column
        patch = torch.cat([torch.zeros(2, dtype=torch.long), torch.arange(num_patches)]).repeat(num_hist)
        frame = torch.arange(num_hist).repeat_interleave(2 + num_patches)
        position = torch.stack([frame, patch // side, patch % side], -1)  # (L, 3)
        for name, table in zip(("cos", "sin"), rotary_angles(position, width // heads, True), strict=True):
            self.register_buffer(name, table, persistent=False)

    def transformer(self, tokens, actions, states, newest=False, memory=None):
        """Tokens (B, T*N, d), actions (B, T, A), states (B, T, P) -> tokens and states of the T next frames, or with
        `newest` of the last one alone, and the memory for the next call."""
        patches = self.predictor_embed(tokens).unflatten(1, (-1, self.num_patches))  # (B, T, N, width)
        a, s = self.action_encoder(actions)[:, :, None], self.state_encoder(states)[:, :, None]
        x = torch.cat([a, s, patches], dim=2).flatten(1, 2)  # (B, L, width), L = T * (2 + N)
        n = 2 + self.num_patches
        x, memory = run_blocks(self.predictor_blocks, x, n, [self.cos, self.sin], newest, memory)
        x = self.predictor_norm(x).unflatten(1, (-1, n))  # (B, T or 1, 2 + N, width)
        states = states[:, -x.shape[1] :] + self.state_head(x[:, :, 1])
        return self.predictor_proj(x[:, :, 2:]).flatten(1, 2), states, memory

    def forward(self, z, action, memory=None, newest=False):
        visual, states = z.tensor_split([self.num_patches * self.dim], -1)
        tokens = visual.unflatten(-1, (-1, self.dim)).flatten(1, 2)  # (B, T * N, d)
        tokens, states, memory = self.transformer(tokens, action, states, newest, memory)
        tokens = F.layer_norm(tokens, tokens.shape[-1:]).unflatten(1, (-1, self.num_patches))
        return torch.cat([tokens.flatten(2), states], -1), memory

    def load_released(self, path):
        """Loads a released checkpoint, or a predictor's own state dict, whole or not at all. The state head, which the
        release lacks, stays as it is."""
        own = {name: tensor for name, tensor in self.state_dict().items() if name.startswith("state_head.")}

        def names(content):
            state = content.get("predictor", content)
            return rename(state, [(r"^module\.", "")], drop=r"(^|\.)extrinsics_encoder\.") | own

        load_renamed(self, load_tensors(path), names, path)


PREDICTORS = {"vit": ViTPredictor, "rwm": RWMPredictor, "vjepa2_ac": ACPredictor}

# vit has the paper's sizes for patch tokens, and sizes that suit a laptop for a single token; rwm has the paper's;
# vjepa2_ac has small ones (the paper's: width=1024,depth=24,heads=16,mlp_dim=4096).
COMPOSITION = dict(concat_dim=1, num_proprio_repeat=1, num_action_repeat=1)  # of vit's tokens
PAPER = dict(depth=6, heads=16, dim_head=64, mlp_dim=2048, dropout=0.1) | COMPOSITION
LAPTOP = dict(depth=4, heads=4, dim_head=32, mlp_dim=256, dropout=0.0) | COMPOSITION
RWM, AC = dict(width=256, depth=2, mlp_dim=128), dict(width=128, depth=4, heads=4, mlp_dim=512)
SIZES = {"vit": PAPER, "rwm": RWM, "vjepa2_ac": AC}


# ---- The world model -----------------------------------------------------------------------------

DECODER_FRAMES = 32  # how many frames a decoder sees in a step of training


class WorldModel(nn.Module):
    """Encoder + proprio + action + transition. B batch, T frames, N tokens, d their width, e the proprio's.

    Args:
        encoder: from `build_encoder`, frozen.
        action_stats, proprio_stats: (mean, std) of one environment action (DoF,) and of the proprio (P,), by which the
            model normalises what comes in the world's units.
        num_hist, frameskip: H frames that the transition sees, environment steps per model step.
        emb_dim, action_emb_dim: widths of phi and psi (default: the same), for the transitions that want them.
        world: where the data came from, {"env": name, "img_size": of its frames, "data": folder}.
        predictor: the transition's name in PREDICTORS; sizes: its keyword arguments.
        variant: "repository" or "paper", see above.
        decoder: `build_decoder`'s keyword arguments, or None for none.
    """

    def __init__(
        self, encoder, action_stats, proprio_stats, num_hist=3, frameskip=5, emb_dim=10, world=None,
        predictor="vit", variant="repository", decoder=None, action_emb_dim=None, **sizes,
    ):  # fmt: skip
        super().__init__()
        self.config = dict(encoder=encoder.name, img_size=encoder.img_size, num_hist=num_hist, frameskip=frameskip)
        self.config |= dict(emb_dim=emb_dim, action_emb_dim=action_emb_dim, world=world, decoder=decoder)
        self.config |= dict(predictor=predictor, variant=variant, sizes=sizes)
        self.encoder, self.world = encoder, world
        self.num_hist, self.frameskip, self.variant = num_hist, frameskip, variant
        self.keep_statistics(action_stats, proprio_stats)
        transition, A, P = PREDICTORS[predictor], self.action_dim, len(self.proprio_mean)
        if encoder.name == "state":
            encoder.dim, P = P, 0  # the proprio is the token
        if variant == "paper":
            P = 0  # its text has images and actions alone
        self.action_encoder, self.proprio_encoder, self.proprio_dim = nn.Identity(), nn.Identity(), P
        if transition.embeds:
            a = action_emb_dim or emb_dim
            if variant == "paper":  # an MLP, of a size that the paper does not say
                self.action_encoder = nn.Sequential(nn.Linear(A, 64), nn.GELU(), nn.Linear(64, a))
            else:
                self.action_encoder = nn.Linear(A, a)  # the release's Conv1d of kernel size 1
            A = a
            if P:
                self.proprio_encoder, self.proprio_dim = nn.Linear(P, emb_dim), emb_dim
        self.predictor = transition(encoder.num_patches, num_hist, encoder.dim, self.proprio_dim, A, **sizes)
        self.num_patches, self.criterion = encoder.num_patches, transition.criterion
        self.wide = encoder.dim >= 128  # whether a CPU plans faster in bfloat16
        self.history = num_hist if variant == "paper" else 1  # true frames that a plan starts from
        # How many true frames a training rollout starts from. The paper's loss leaves shorter windows untrained.
        self.context = num_hist if transition.needs_history or variant == "paper" else 1
        self.decoder = build_decoder(encoder.num_patches, encoder.dim, **decoder) if decoder else None

    def keep_statistics(self, action_stats, proprio_stats):
        for name, (mean, std), repeat in (("action", action_stats, self.frameskip), ("proprio", proprio_stats, 1)):
            self.register_buffer(f"{name}_mean", torch.as_tensor(mean, dtype=torch.float32).repeat(repeat))
            self.register_buffer(f"{name}_std", torch.as_tensor(std, dtype=torch.float32).repeat(repeat))
        self.action_dim = len(self.action_mean)  # of a model step: frameskip * DoF

    def encode(self, obs):
        """obs {"visual": frames (B, T, H, W, 3) uint8 or their tokens (B, T, N, d), "proprio": (B, T, P)} ->
        latents {"visual": (B, T, N, d), "proprio": (B, T, e)}."""
        visual, proprio = obs["visual"], (obs["proprio"] - self.proprio_mean) / self.proprio_std
        if self.encoder.name == "state":
            visual = self.encoder(proprio)
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

    def pack(self, z):
        """Latents as `encode` returns them -> one row of numbers a frame, (B, T, N*d + copies*e)."""
        return torch.cat([z["visual"].flatten(2), z["proprio"].repeat(1, 1, self.predictor.copies)], -1)

    def unpack(self, z):
        """The inverse of `pack`. Of several copies of the proprio it takes the first."""
        N, d = self.encoder.num_patches, self.encoder.dim
        return {"visual": z[..., : N * d].unflatten(-1, (N, d)), "proprio": z[..., N * d : N * d + self.proprio_dim]}

    def error(self, predicted, target):
        """The mean error over all numbers of packed latents, and that of the visual and of the proprio ones alone."""
        n = self.encoder.num_patches * self.encoder.dim
        m, criterion = target.shape[-1] - n, self.predictor.criterion
        visual = criterion(predicted[..., :n], target[..., :n])
        proprio = criterion(predicted[..., n:], target[..., n:]) if m else visual.new_zeros(())
        return (n * visual + m * proprio) / (n + m), visual, proprio

    def loss(self, batch, rollout_steps=1):
        """Teacher forcing, one step ahead of H frames in parallel. K = `rollout_steps` > 1 adds the mean error of K
        imagined frames (the Robotic World Model's alpha is 1).

        batch: {"visual": tokens (B, H + K, N, d), "proprio": (B, H + K, P), "action": (B, H + K, A)}.
        Returns the loss and its parts, {"visual", "proprio"} of the first term, and "rollout"."""
        z, H = self.pack(self.encode(batch)), self.num_hist
        target = z.detach()
        predicted, _ = self.predictor(z[:, :H], self.encode_action(batch["action"][:, :H]))
        after = target[:, 1 : H + 1]
        if self.variant == "paper":  # the loss on the next frame alone
            predicted, after = predicted[:, -1:], after[:, -1:]
        loss, visual, proprio = self.error(predicted, after)
        parts = {"visual": visual.detach(), "proprio": proprio.detach()}
        if rollout_steps > 1:
            start, end = self.context, self.context + rollout_steps
            imagined = self.imagine(z[:, :start], batch["action"][:, : end - 1])
            rollout, *_ = self.error(imagined[:, start:], target[:, start:end])
            loss, parts["rollout"] = loss + rollout, rollout.detach()
        return loss, parts

    def forward(self, batch, rollout_steps=1):
        """The training objective, and the part of it that is `loss`. A decoder learns with the rest, from the last
        frame of some windows, since windows overlap; `batch` then has their "frames" (B, 1, H, W, 3)."""
        loss, _ = self.loss(batch, rollout_steps)
        if self.decoder is None:
            return loss, loss.detach()
        last = {name: batch[name][:DECODER_FRAMES, -1:] for name in ("visual", "proprio")}
        decoder_loss, *_ = self.decoder_loss(self.encode(last)["visual"], batch["frames"][:DECODER_FRAMES])
        return loss + decoder_loss, loss.detach()

    def rollout(self, z0, actions):
        """Imagines what follows under actions (B, T, A), which are in the world's units, one per frame from the first
        known one on. z0 are the latents of the known frames (B, T0, ...), as `encode` returns them. Returns the latents
        of T + 1 frames."""
        return self.unpack(self.imagine(self.pack(z0), actions))

    def imagine(self, z, actions):
        """`rollout` in packed latents: z (B, T0, Z), actions (B, T, A) -> (B, T + 1, Z). The window grows to num_hist
        frames and then slides; a recurrent transition remembers all frames. The gradient goes through all of them."""
        a, H, memory = self.encode_action(actions), self.num_hist, None
        for t in range(z.shape[1], actions.shape[1] + 1):  # t frames are known
            after, memory = self.predictor(z[:, -H:], a[:, max(t - H, 0) : t], memory, newest=not self.training)
            z = torch.cat([z, after[:, -1:]], dim=1)
        return z

    def decode(self, visual):
        """Visual latents (B, T, N, d) -> frames (B, T, H, W, 3) uint8."""
        images = self.decoder(visual)[0].clamp(-1, 1)  # (B, T, 3, H, W)
        return ((images + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()

    def decoder_loss(self, visual, frames):
        """What the decoder learns by, given visual latents (B, T, N, d) and their frames (B, T, H, W, 3) of 0 to 255:
        the error of the reconstruction, with pixels in [-1, 1], plus 0.25 times that of the codes. Nothing else learns
        from it. Returns the two parts, too."""
        images, codes = self.decoder(visual.detach())
        reconstruction = F.mse_loss(images, frames.movedim(-1, -3) / 127.5 - 1)
        return reconstruction + 0.25 * codes, reconstruction, codes

    def save_pretrained(self, directory):
        """Writes config.json and model.safetensors, the Hugging Face hub's form of a model, to a folder."""
        common.write_json(Path(directory) / "config.json", self.config)
        common.save_safetensors(Path(directory) / "model.safetensors", self.state_dict())

    @classmethod
    def from_pretrained(cls, run, device="cpu"):
        """The model in a run's folder, or in a repository USER/NAME of the Hugging Face hub, in eval mode. If
        its config.json names a `system`, the class is from lib/systems.py. UserError if it is missing or not ours."""
        path = model_folder(run) / "model.safetensors"
        config, state = common.read_json(path.with_name("config.json")), common.load_safetensors(path, device)
        try:
            stats = [(state[f"{name}_mean"], state[f"{name}_std"]) for name in ("action", "proprio")]
            stats[0] = tuple(s[: len(s) // config["frameskip"]] for s in stats[0])  # of one environment action
            system, sizes = config.pop("system", None), config.pop("sizes")
            encoder = None if system else build_encoder(config.pop("encoder"), config.pop("img_size"), weights="random")
            world, numbers = config["world"], (config["num_hist"], config["frameskip"], config["world"]["img_size"])
            if min(numbers) < 1 or not all(isinstance(world[name], str) for name in ("env", "data")):
                raise ValueError("num_hist, frameskip or world is not what it should be")
            if system:
                from lib.systems import system_class

                model = system_class(system)(*stats, **config, **sizes)
            else:
                model = cls(encoder, *stats, **config, **sizes)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())[:150]
            raise UserError(f"{path} is not a model of this version ({reason}): train it again") from None
        load_state(model, state, path)
        return model.to(device).eval()


def load_model(run, device="cpu", data=None, weights=None):
    """The world model in a run's folder, in eval mode: one of ours, or one that DINO-WM released. The latter lacks its
    statistics, which come from the data set `data`, and its encoder, for which `build_encoder` takes `weights`."""
    if (Path(run) / "hydra.yaml").exists() or (Path(run) / "checkpoints").exists():
        from lib.released import load_released_model

        return load_released_model(run, device, data, weights)
    return WorldModel.from_pretrained(run, device)
