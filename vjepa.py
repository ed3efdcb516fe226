"""V-JEPA 2's pretraining (Assran et al., 2025, arXiv:2506.09985, section 2.1): what is hidden of a clip is predicted
from what is seen of it, not in pixels, but in the tokens of a slow copy of the encoder itself.

    L = mean |P(E(x_seen), m) - sg(LN(E'(x)))|         over the hidden places; m: a mask token with their positions
    E' <- momentum E' + (1 - momentum) E               E, E': video ViTs; P: a smaller transformer

`vjepa_tiny` of encoders.py is trained with it; V-JEPA 2-AC, in predictor.py, has its blocks.

    python vjepa.py            # what the masks hide
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from vae_mdnrnn import fit

MASKS = (8, 0.15, 0.5), (2, 0.7, 0.5)  # short and long range: blocks, their share of a frame, of the clip


def rotary_angles(position, head_dim, released=False):
    """cos and sin (..., L, head_dim) of the angles of positions (..., L, 3) in time, row and column.

    A head's width is cut into three even sections, one for each, and an unrotated rest. With `released` the two numbers
    of a pair turn by different angles: a slip that V-JEPA 2's weights were trained with.
    """
    section = 2 * (head_dim // 3 // 2)
    omega = 10000.0 ** (-torch.arange(section // 2, device=position.device) / (section / 2))
    angle = position[..., None] * omega  # (..., L, 3, section / 2)
    angle = torch.cat([angle, angle], -1) if released else angle.repeat_interleave(2, -1)
    angle = F.pad(angle.flatten(-2), (0, head_dim - 3 * section))  # (..., L, head_dim)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turns the pairs (0, 1), (2, 3), ... of x (..., L, head_dim)."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


class RotaryBlock(nn.Module):
    """A pre-norm transformer block with rotary positions; its parameters are named as in V-JEPA 2's release."""

    def __init__(self, width, heads, mlp_dim):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp_dim), "fc2": nn.Linear(mlp_dim, width)})

    def forward(self, x, cos, sin, mask=None):
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, head_dim)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=mask)
        x = x + self.attn["proj"](y.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class RotaryTransformer(nn.Module):
    """Tokens (B, L, dim) at the places `index` (B, L) of a grid (T, side, side) -> (B, L, dim)."""

    def __init__(self, grid, dim, depth, heads):
        super().__init__()
        self.blocks = nn.ModuleList(RotaryBlock(dim, heads, 4 * dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        place = torch.cartesian_prod(*(torch.arange(n) for n in grid))  # (T * side^2, 3)
        for name, table in zip(("cos", "sin"), rotary_angles(place, dim // heads), strict=True):
            self.register_buffer(name, table, persistent=False)

    def forward(self, x, index):
        cos, sin = self.cos[index][:, None], self.sin[index][:, None]  # (B, 1, L, head_dim)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)


class VideoViT(nn.Module):
    """Clips (B, T, 3, s, s) -> the tokens (B, L, dim) of their tubelets of 2 x patch x patch pixels, or of those at the
    places `keep` (B, L') alone, which then know nothing of the others."""

    def __init__(self, grid, patch, dim, depth, heads):
        super().__init__()
        self.embed = nn.Conv3d(3, dim, (2, patch, patch), (2, patch, patch))
        self.transformer = RotaryTransformer(grid, dim, depth, heads)

    def forward(self, clips, keep=None):
        x = self.embed(clips.transpose(1, 2)).flatten(2).mT  # (B, L, dim)
        if keep is None:
            return self.transformer(x, torch.arange(x.shape[1], device=x.device)[None])
        return self.transformer(x.take_along_dim(keep[..., None], 1), keep)


class MaskedPredictor(nn.Module):
    """Tokens (B, L', dim) of the places `context` (B, L') -> those of the places `target` (B, M), (B, M, dim)."""

    def __init__(self, grid, dim, width, depth, heads):
        super().__init__()
        self.embed, self.proj = nn.Linear(dim, width), nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.transformer = RotaryTransformer(grid, width, depth, heads)

    def forward(self, tokens, context, target):
        masked = self.mask_token.expand(*target.shape, -1)  # a place's position comes in with the attention
        x = torch.cat([self.embed(tokens), masked], 1)
        return self.proj(self.transformer(x, torch.cat([context, target], 1))[:, -target.shape[1] :])


def block_masks(count, grid, blocks, area, duration):
    """The places that the encoder sees and those to be predicted, (count, L') and (count, M), in clips of a grid of
    (T, side, side) tokens: hidden is what `blocks` blocks cover, each over `area` of a frame, `duration` of the clip.

    As in the release a batch shares the blocks' shape, and all clips keep as many of either as the one that has least.
    """
    T, side, _ = grid
    place = torch.cartesian_prod(*(torch.arange(n) for n in grid))  # (T * side^2, 3)
    aspect = torch.empty(()).uniform_(0.75, 1.5)
    size = torch.stack([torch.tensor(duration * T), side * (area * aspect).sqrt(), side * (area / aspect).sqrt()])
    size = size.round().clamp(torch.ones(3), torch.tensor(grid))
    start = (torch.rand(count, blocks, 1, 3) * (torch.tensor(grid) - size + 1)).floor()
    hidden = ((place >= start) & (place < start + size)).all(-1).any(1)  # (count, T * side^2)
    seen = (~hidden).sum(1).min()
    order = (hidden + torch.rand(hidden.shape)).argsort(1)  # what is seen comes first; both in random order
    return order[:, :seen], order[:, len(place) - hidden.sum(1).min() :]


@torch.no_grad()
def follow(average, model, momentum):
    """The exponential moving average: average <- momentum * average + (1 - momentum) * model."""
    for a, b in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(b, 1 - momentum)


def pretrain(average, draw, grid, steps, momentum, seed=0, lr=1e-3):
    """Fits the video ViT `average`, E', in place: `draw()` gives clips (B, T, 3, s, s), whose tokens lie in `grid`."""
    encoder, dim = copy.deepcopy(average).requires_grad_(True), average.embed.out_channels
    predictor = MaskedPredictor(grid, dim, dim, depth=2, heads=2).to(average.embed.weight.device)

    def loss():
        follow(average, encoder, momentum)
        clips = draw()
        with torch.no_grad():
            h = F.layer_norm(average(clips), (dim,))  # (B, L, d)
        error = 0.0
        for mask in MASKS:
            context, target = (index.to(clips.device) for index in block_masks(len(clips), grid, *mask))
            z = predictor(encoder(clips, context), context, target)  # (B, M, d)
            error = error + F.l1_loss(z, h.take_along_dim(target[..., None], 1)) / len(MASKS)
        return {"loss": error, "std": (h - h.mean(0)).std()}

    fit(nn.ModuleList([encoder, predictor]), loss, steps, lr, seed, "train V-JEPA")


def main(grid=(4, 4, 4)):
    """Prints what each kind of mask leaves of a clip: a frame's tokens in a square, time to the right."""
    for blocks, area, duration in MASKS:
        context, _ = block_masks(1, grid, blocks, area, duration)
        seen = torch.zeros(math.prod(grid), dtype=torch.bool).index_fill(0, context[0], True)
        share = f"{seen.sum()} of {len(seen)} places are seen"
        print(f"{blocks} blocks, each of {area:.0%} of a frame and {duration:.0%} of the clip: {share}")
        for row in seen.view(grid).movedim(1, 0).tolist():
            print("   ".join(" ".join(".#"[not place] for place in frame) for frame in row))


if __name__ == "__main__":
    main()
