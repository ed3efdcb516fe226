"""IRIS (Micheli et al., 2023, arXiv:2209.00588; github.com/eloialonso/iris): a world model of discrete tokens.

A discrete autoencoder turns a frame x into K = 4 x 4 tokens z (section 2.1):

    e = E(x)                                            (K, d)   what the convolutions make of the frame
    z_k = argmin_i ||e_k - c_i||                        (K,)     the nearest of the learned codes c_i
    L = |x - D(c_z)| + ||sg[e] - c_z||^2 + ||e - sg[c_z]||^2     straight-through: D reads e + sg[c_z - e]

A GPT reads the tokens and actions of all frames as one sequence and learns to write the next token (section 2.2):

    z_1^1 ... z_1^K, a_1, z_2^1 ... z_2^K, a_2, ...              causal, token by token
    L = - mean log p(z_t^k | z_<t, a_<t, z_t^<k)

The autoencoder learns for `first` steps, and then the GPT. Imagination writes one token after another, with a cache of
keys and values. The cost is the mean squared distance of codes.

Deviations:
- The ball is 0.5 % of the pixels, and an autoencoder that is trained for minutes leaves it out. So E sees and D paints
  how a frame differs from the background b, the mean of the first batch; an error weighs 1 + |x - b| / mean |x - b|.
- There is no LPIPS, because VGG-16's weights are not at hand. E begins with a pixel unshuffle of 4 x 4, which saves the
  two most expensive of five levels. A level has one residual block instead of two, and twice the channels of the one
  before instead of as many. E learns from the first and the last frame of each window.
- Imagination writes the most likely token, where the release samples, so that a plan always costs the same.
- The release trains the autoencoder alone for 20 epochs, and then both. Here the autoencoder no longer learns once the
  GPT does, so a step takes half the time.
- Actions are continuous here, and are embedded by a linear layer. No dropout, since no training is long enough to
  overfit.

    python train.py --system iris && python plan.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from lib.common import UserError, to_tensor
from lib.systems import Background, System

# ---- The autoencoder -----------------------------------------------------------------------------


def layer(i, o):
    return nn.GroupNorm(min(32, i), i, eps=1e-6), nn.SiLU(), nn.Conv2d(i, o, 3, padding=1)


class ResBlock(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.net = nn.Sequential(*layer(i, o), *layer(o, o))
        self.skip = nn.Identity() if i == o else nn.Conv2d(i, o, 1)

    def forward(self, x):
        return self.skip(x) + self.net(x)


class PixelAttention(nn.Module):
    """Attention with one head among the pixels of a feature map (B, C, h, w)."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(min(32, channels), channels, eps=1e-6)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT[:, None].contiguous().chunk(3, -1)  # each (B, 1, h * w, C)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.out(y.mT.reshape(x.shape))


def level(side, i, o, blocks):
    """The layers for maps of one size: residual blocks, each followed by attention if the map is 8 or 16 wide."""
    attend = [PixelAttention] * (side in (8, 16))
    return [part for n in range(blocks) for part in (ResBlock(o if n else i, o), *(make(o) for make in attend))]


class Autoencoder(nn.Module):
    """Frames to tokens and back. patch x patch pixels are folded into one. Then there is a level for each of `widths`,
    its channels, with `blocks` residual blocks in E and one more in D. Between two levels the side is halved."""

    def __init__(self, img_size, patch, widths, blocks, codes, dim):
        super().__init__()
        side, pixels, last, wide = img_size // patch, 3 * patch**2, len(widths) - 1, widths[-1]
        down, up = [nn.Conv2d(pixels, widths[0], 3, padding=1)], []
        for n, o in enumerate(widths):
            down += level(side >> n, widths[max(n - 1, 0)], o, blocks)
            down += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(o, o, 3, stride=2)] if n < last else []
            double = [nn.Upsample(scale_factor=2), nn.Conv2d(o, o, 3, padding=1)] if n else []
            up = level(side >> n, widths[min(n + 1, last)], o, blocks + 1) + double + up
        middle = lambda: [ResBlock(wide, wide), PixelAttention(wide), ResBlock(wide, wide)]  # noqa: E731
        down += [*middle(), *layer(wide, dim), nn.Conv2d(dim, dim, 1)]
        up = [nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, wide, 3, padding=1), *middle(), *up, *layer(widths[0], pixels)]
        self.encoder = nn.Sequential(nn.PixelUnshuffle(patch), *down)
        self.codes = nn.Embedding(codes, dim)
        nn.init.uniform_(self.codes.weight, -1 / codes, 1 / codes)
        self.decoder = nn.Sequential(*up, nn.PixelShuffle(patch))
        self.background = Background(img_size)

    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> e (B, K, d), and the tokens (B, K) of the nearest codes."""
        e = self.encoder(self.background(images)).flatten(2).mT
        return e, torch.cdist(e.flatten(0, 1), self.codes.weight).argmin(-1).view(e.shape[:2])

    def decode(self, codes):
        """Codes (B, K, d) -> images (B, 3, H, W)."""
        return self.background.image + self.decoder(codes.mT.unflatten(2, (int(codes.shape[1] ** 0.5), -1)))

    def forward(self, images):
        """Images (B, 3, H, W) -> the images that are painted from their codes, and the error of the codes."""
        e, tokens = self.encode(images)
        c = self.codes(tokens)
        return self.decode(e + (c - e).detach()), F.mse_loss(c, e.detach()) + F.mse_loss(e, c.detach())


# ---- The transformer -----------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm block of attention and an MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, mask, cache=None):
        """The last L tokens x (B, L, D) of a sequence; mask (L, length). A `cache` (2, B, heads, at least length,
        D / heads) has the keys and values of those before, and gets theirs."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            L, length = mask.shape
            cache[0, :, :, length - L : length], cache[1, :, :, length - L : length] = k, v
            k, v = cache[:, :, :, :length]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Predicts the next token from all earlier ones. A frame is K tokens, and the action that was taken there."""

    def __init__(self, length, codes, action_dim, width, depth, heads):
        super().__init__()
        self.length, self.width, self.position = length, width, nn.Embedding(length, width)
        self.action, self.token = nn.Linear(action_dim, width), nn.Embedding(codes, width)
        self.blocks, self.norm = nn.ModuleList(Block(width, heads) for _ in range(depth)), nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, codes))
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.02 if parameter.ndim > 1 else 0.0)  # biases start at zero
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).tril(), persistent=False)

    def embed(self, tokens, actions):
        """Tokens (B, T, K) and actions (B, T, A) -> the sequence (B, T * (K + 1), D)."""
        return torch.cat([self.token(tokens), self.action(actions)[:, :, None]], 2).flatten(1, 2)

    def forward(self, x, cache=None, known=0):
        """Embedded tokens x (B, L, D), which come after the `known` ones in the cache -> logits (B, L, codes)."""
        end = known + x.shape[1]
        x = x + self.position.weight[known:end]
        for n, block in enumerate(self.blocks):
            x = block(x, self.mask[known:end, :end], None if cache is None else cache[n])
        return self.head(self.norm(x))


# ---- The system ----------------------------------------------------------------------------------


class IRIS(System):
    """`codes` of `dim` numbers, and `channels` on the autoencoder's first level; the other sizes are the GPT's. Paper:
    codes=512,dim=512,channels=64,width=256,depth=10, windows of 20 frames, lr 1e-4, 64 windows or 256 frames a step."""

    name, num_frames, batch_size, steps, lr = "iris", 7, 8, 9000, 2e-3
    history, context = 2, 2  # two frames show a speed
    used = 1.0  # the share of the codes that the last batch has used
    sizes = dict(codes=128, dim=32, channels=16, width=64, depth=3, heads=4, first=1000)

    def build(self, img_size, codes, dim, channels, width, depth, heads, first):
        if img_size % 16:
            raise UserError(f"iris makes a token of 16 x 16 pixels, and {img_size} is not a multiple of 16")
        if width % heads:
            raise UserError(f"--sizes width={width} is not a multiple of heads={heads}")
        self.num_patches = (img_size // 16) ** 2  # K
        self.autoencoder = Autoencoder(img_size, 4, (channels, 2 * channels, 4 * channels), 1, codes, dim)
        self.gpt = GPT(self.num_frames * (self.num_patches + 1), codes, self.action_dim, width, depth, heads)
        self.decoder, self.first = self.autoencoder.decode, first
        self.register_buffer("trained", torch.zeros((), dtype=torch.int64))  # steps so far

    def latents(self, tokens):
        """Tokens (B, T, K) -> the latents of T frames: the codes (B, T, K, d), and the tokens."""
        codes = self.autoencoder.codes(tokens)
        return {"visual": codes, "proprio": codes[:, :, 0, :0], "tokens": tokens}

    @torch.no_grad()
    def encode(self, obs):
        images = to_tensor(obs["visual"].flatten(0, 1), self.action_mean.device) * 2 - 1
        return self.latents(self.autoencoder.encode(images)[1].unflatten(0, obs["visual"].shape[:2]))

    def loss(self, batch, *_):
        """The loss and its parts: "visual" is the error of the codes one step ahead (each token given the true ones
        before it, those of its own frame, too), "used" the share of all codes. In training it is the loss of the
        autoencoder or that of the GPT, and in validation it is their sum."""
        self.trained += self.training
        early, K, loss, parts = self.trained <= self.first, self.num_patches, 0.0, {}
        if early or not self.training:
            frames = batch["visual"][:, :: self.num_frames - 1]
            images = to_tensor(frames.flatten(0, 1), frames.device) * 2 - 1  # (2 * B, 3, H, W) in [-1, 1]
            painted, codes = self.autoencoder(images)
            moving = self.autoencoder.background(images).abs()
            reconstruction = ((1 + moving / moving.mean().clamp(min=1e-6)) * (painted - images).abs()).mean()
            loss, parts = reconstruction + codes, {"recon": reconstruction, "codes": codes}
        if not (early and self.training):
            tokens = self.encode(batch)["tokens"]
            x = self.gpt.embed(tokens, self.encode_action(batch["action"]))  # (B, T * (K + 1), D)
            after = F.pad(self.gpt(x[:, :-1]), (0, 0, 1, 0))  # nothing predicts the very first token
            logits = after.unflatten(1, (-1, K + 1))[:, :, :-1]  # (B, T, K, codes), each at its token
            entropy = F.cross_entropy(logits.flatten(1, 2)[:, 1:].flatten(0, 1), tokens.flatten(1)[:, 1:].flatten())
            ahead = self.criterion(*(self.latents(z[:, 1:])["visual"] for z in (logits.argmax(-1), tokens)))
            self.used = len(tokens.unique()) / self.autoencoder.codes.num_embeddings
            parts |= {"visual": ahead, "entropy": entropy, "used": entropy.new_tensor(self.used)}
            loss = loss + entropy
        return loss, {name: part.detach() for name, part in parts.items()}

    @torch.no_grad()
    def rollout(self, z0, actions):
        """Imagines what actions (B, T, A) lead to after the frames z0: the latents of T + 1 frames. When the next frame
        does not fit into the GPT's window, it begins anew with the last `history` frames (the release: with one)."""
        if actions.requires_grad:
            raise UserError("--planner gd needs a gradient, and the tokens of iris have none: try cem, icem or mppi")
        tokens, gpt, K, known = z0["tokens"], self.gpt, self.num_patches, self.gpt.length
        actions, heads = self.encode_action(actions), gpt.blocks[0].heads
        cache = actions.new_empty(len(gpt.blocks), 2, len(actions), heads, gpt.length, gpt.width // heads)
        for t in range(tokens.shape[1], actions.shape[1] + 1):  # t frames are known
            fits = known + K + 1 <= gpt.length
            n = 1 if fits else min(t, self.history)
            x = gpt.embed(tokens[:, -n:], actions[:, t - n : t])
            x, known = (x[:, -2:], known) if fits else (x, 0)  # the cache has all but the last token and the action
            written = []
            for _ in range(K):
                written.append(gpt(x, cache, known)[:, -1:].argmax(-1))  # (B, 1)
                known, x = known + x.shape[1], gpt.token(written[-1])
            tokens = torch.cat([tokens, torch.stack(written, 2)], 1)
        return self.latents(tokens)

    def save_pretrained(self, directory):
        if self.trained <= self.first:
            print(f"{directory}: the GPT has not begun to learn, the first {self.first} steps are the autoencoder's")
        if self.used < 0.05:
            print(f"{directory}: {self.used:.0%} of the codes are in use, the codebook has died: try another --seed")
        super().save_pretrained(directory)

    def paint(self, codes):
        return (self.autoencoder.decode(codes) + 1) / 2
