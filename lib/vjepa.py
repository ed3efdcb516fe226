"""V-JEPA 2's pretraining (Assran et al., 2025, arXiv:2506.09985, section 2.1). A part of each clip is hidden and then
predicted from the rest. The target is not the hidden pixels, but the tokens that a slow copy of the encoder gives them.

    L = mean |P(E(x_seen), m) - sg(LN(E'(x)))|         over the hidden places
    E' <- momentum E' + (1 - momentum) E

E and E' are video ViTs, P is a smaller transformer, and m is a mask token with the positions of the hidden places.
The encoder `vjepa_tiny` is trained in this way (its docstring in encoders.py names the deviations; here all masks share
one mask token, where the release has one for each), and the predictor V-JEPA 2-AC is made of the same blocks.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from lib.common import fit

MASKS = (8, 0.15, 0.5), (2, 0.7, 0.5)  # the arguments blocks, area and duration of `block_masks`


def rotary_angles(position, head_dim, released=False):
    """cos and sin (..., L, head_dim) of the angles that belong to positions (..., L, 3) in time, row and column. Each
    of the three turns its own third of a head, rounded down to pairs; the rest is not rotated. With `released`, the
    two numbers of a pair turn by different angles, a slip with which V-JEPA 2's weights were trained."""
    section = 2 * (head_dim // 3 // 2)
    omega = 10000.0 ** (-torch.arange(section // 2, device=position.device) / (section / 2))
    angle = position[..., None] * omega  # (..., L, 3, section / 2)
    angle = torch.cat([angle, angle], -1) if released else angle.repeat_interleave(2, -1)
    angle = F.pad(angle.flatten(-2), (0, head_dim - 3 * section))  # (..., L, head_dim)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotates the pairs (0, 1), (2, 3), ... of x (..., L, head_dim)."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


def attend(q, k, v, tokens=None, past=None, dropout=0.0):
    """Attention of the queries q to the keys k and the values v, each (B, heads, L, head_dim), after those of earlier
    tokens, `past`. Given the number of `tokens` in a frame, it is causal by frame: a token sees its own frame and those
    before it, and none later. Returns all keys and values, too, which are the `past` of the next call."""
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    attention = partial(F.scaled_dot_product_attention, dropout_p=dropout)
    if tokens is None:
        out = attention(q, k, v)
    elif tokens == 1:
        out = attention(q, k, v, is_causal=q.shape[2] > 1)
    else:  # frame by frame: a mask would compute scores only to discard them
        frames = q.split(tokens, 2)
        ends = range(k.shape[2] - (len(frames) - 1) * tokens, k.shape[2] + 1, tokens)  # of what each frame sees
        seen = [(k[:, :, :end], v[:, :, :end]) for end in ends]
        out = torch.cat([attention(frame, *kv) for frame, kv in zip(frames, seen, strict=True)], 2)
    return out, (k, v)


class RotaryBlock(nn.Module):
    """A pre-norm transformer block with rotary positions. Its parameters have the names of V-JEPA 2's release."""

    def __init__(self, width, heads, mlp_dim):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp_dim), "fc2": nn.Linear(mlp_dim, width)})

    def forward(self, x, cos, sin, tokens=None, past=None, first=0):
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, head_dim)
        y, kept = attend(rotate(q, cos, sin)[:, :, first:], rotate(k, cos, sin), v, tokens, past)
        x = x[:, first:] + self.attn["proj"](y.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))), kept


class RotaryTransformer(nn.Module):
    """A transformer on tokens (B, L, dim) that lie at the places `index` (B, L) of a grid (T, side, side)."""

    def __init__(self, grid, dim, depth, heads):
        super().__init__()
        self.blocks = nn.ModuleList(RotaryBlock(dim, heads, 4 * dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        place = torch.cartesian_prod(*map(torch.arange, grid))  # (T * side^2, 3)
        self.register_buffer("angles", torch.stack(rotary_angles(place, dim // heads)), persistent=False)

    def forward(self, x, index):
        cos, sin = self.angles[:, index[:, None]]  # each (B, 1, L, head_dim)
        for block in self.blocks:
            x, _ = block(x, cos, sin)
        return self.norm(x)


class VideoViT(nn.Module):
    """Clips (B, T, 3, s, s) -> tokens (B, L, dim), one for each tubelet of 2 x patch x patch pixels. If `keep` (B, L')
    is given, it sees only the tubelets at these places, and gives (B, L', dim)."""

    def __init__(self, grid, patch, dim, depth, heads):
        super().__init__()
        self.embed = nn.Conv3d(3, dim, (2, patch, patch), (2, patch, patch))
        self.transformer = RotaryTransformer(grid, dim, depth, heads)

    def forward(self, clips, keep=None):
        x = self.embed(clips.transpose(1, 2)).flatten(2).mT  # (B, L, dim)
        keep = torch.arange(x.shape[1], device=x.device)[None] if keep is None else keep
        return self.transformer(x.take_along_dim(keep[..., None], 1), keep)


class MaskedPredictor(nn.Module):
    """Predicts tokens (B, M, dim) at the places `target` (B, M) from those (B, L', dim) at `context` (B, L')."""

    def __init__(self, grid, dim, width, depth, heads):
        super().__init__()
        self.embed, self.proj = nn.Linear(dim, width), nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.transformer = RotaryTransformer(grid, width, depth, heads)

    def forward(self, tokens, context, target):
        x = torch.cat([self.embed(tokens), self.mask_token.expand(*target.shape, -1)], 1)
        return self.proj(self.transformer(x, torch.cat([context, target], 1))[:, -target.shape[1] :])


def block_masks(count, grid, blocks, area, duration):
    """Draws the places that the encoder sees, (count, L'), and those that are hidden, (count, M), for `count` clips.

    In a clip's grid of (T, side, side) tokens, `blocks` boxes at random places hide what they cover. Each covers the
    share `area` of a frame and `duration` of the clip. As in the release, all boxes of a batch have the same shape, and
    every clip keeps as many seen and as many hidden places as the clip that has the fewest of them."""
    place, grid = torch.cartesian_prod(*map(torch.arange, grid)), torch.tensor(grid)  # (T * side^2, 3) and (3,)
    aspect = torch.empty(()).uniform_(0.75, 1.5)
    share = torch.stack([torch.tensor(duration), (area * aspect).sqrt(), (area / aspect).sqrt()])
    size = (grid * share).round().clamp(torch.ones(3), grid)
    start = (torch.rand(count, blocks, 1, 3) * (grid - size + 1)).floor()
    hidden = ((place >= start) & (place < start + size)).all(-1).any(1)  # (count, T * side^2)
    order = (hidden + torch.rand(hidden.shape)).argsort(1)  # the seen places come first; both kinds are shuffled
    return order[:, : (~hidden).sum(1).min()], order[:, len(place) - hidden.sum(1).min() :]


def pretrain(average, draw, grid, steps, momentum, seed=0, lr=1e-3):
    """Trains the video ViT `average` (E') in place. `draw()` returns clips (B, T, 3, s, s), each a `grid` of tokens."""
    encoder, dim = copy.deepcopy(average).requires_grad_(True), average.embed.out_channels
    predictor = MaskedPredictor(grid, dim, dim, depth=2, heads=2).to(average.embed.weight.device)

    def loss():
        clips = draw()
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), encoder.parameters(), strict=True):
                slow.lerp_(fast, 1 - momentum)
            h = F.layer_norm(average(clips), (dim,))  # (B, L, d)
        error = 0.0
        for mask in MASKS:
            context, target = (index.to(clips.device) for index in block_masks(len(clips), grid, *mask))
            z = predictor(encoder(clips, context), context, target)  # (B, M, d)
            error = error + F.l1_loss(z, h.take_along_dim(target[..., None], 1)) / len(MASKS)
        return {"loss": error, "std": (h - h.mean(0)).std()}

    fit(nn.ModuleList([encoder, predictor]), loss, steps, lr, seed, "train V-JEPA")
