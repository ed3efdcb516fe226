"""DreamerV3's world model: a recurrent state-space model with discrete latents, trained to reconstruct what it sees.

DreamerV3 (Hafner et al., 2023, arXiv:2301.04104), section "World model learning", and github.com/NM512/dreamerv3-torch,
with whose steps and KL loss this agrees. There is no reward, continuation, value or actor, because nobody gives a
reward here:

    h_t = GRU(h_{t-1}, [z_{t-1}, a_{t-1}])                deterministic
    z_t ~ q(z_t | h_t, enc(o_t))                          posterior: groups of one-hot variables
    z^_t ~ p(z_t | h_t)                                   prior, by which imagination goes on
    o^_t = dec(h_t, z_t)

    L = mean_t ||o^_t - o_t||^2 + 0.5 max(1, KL(sg(q) || p)) + 0.1 max(1, KL(q || sg(p)))

All probabilities are mixed with 1 % of uniform ones. The factors of the KL terms, 0.5 and 0.1, are the reference's. A
sample is straight-through: forward it is one-hot, backward it has the gradient of its probabilities. (Vectors would be
reconstructed as symlog(x); the systems here see images alone.)

A plan is imagined with the prior's most likely z, from the posterior of the last frames, and it costs

    J = ||enc(dec(h_T, z_T)) - enc(o_g)||^2

The cost was chosen on 40 development goals:

    the squared distance of                                    success within 1, 3, 10 plans
    embeddings of decoded frames (this one)                      .62    .95   1.00
    the same, with the goal decoded from its own posterior       .60    .95   1.00
    decoded frames                                               .35    .70    .80
    decoded frames, averaged over squares of 32 pixels           .55    .98   1.00
    z                                                            .52    .82    .88
    [h, z]                                                       .40    .80    .93
    this one, with z drawn from the prior: a random cost         .70   1.00   1.00

Deviations: the mean frame of the first batch is subtracted from every image, where the reference subtracts 1/2, and the
decoder's first output is zero. Otherwise the first 500 steps learn only how to paint the maze, which never changes. A
window has 8 frames, because an episode has 20, and the gradient is not clipped.

    python train.py --system dreamer && python plan.py
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

from lib.common import UserError
from lib.systems import Background, System, each


def conv_widths(img_size, channels):
    """The channels of the feature maps, from img_size / 2 down to 4 pixels a side. They double at each stage."""
    stages = max(1, img_size.bit_length() - 3)
    if 4 * 2**stages != img_size:
        raise UserError(f"this system wants frames of 8, 16, 32, 64, ... pixels a side, not {img_size}")
    return [channels * 2**i for i in range(stages)]


def conv_encoder(img_size, channels):
    """A network from images (B, 3, s, s) around 0 to embeddings (B, E), and E."""
    widths = conv_widths(img_size, channels)
    layers = []
    for i, o in zip([3, *widths], widths, strict=False):
        layers += [nn.Conv2d(i, o, 4, 2, 1, bias=False), LayerNorm2d(o, eps=1e-3), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten()), 16 * widths[-1]


def conv_decoder(dim, img_size, channels):
    """A network from vectors (B, dim) to images (B, 3, s, s) around 0: the encoder, reversed."""
    widths = conv_widths(img_size, channels)[::-1]
    layers = [nn.Linear(dim, 16 * widths[0]), nn.Unflatten(1, (widths[0], 4, 4))]
    for i, o in zip(widths, widths[1:], strict=False):
        layers += [nn.ConvTranspose2d(i, o, 4, 2, 1, bias=False), LayerNorm2d(o, eps=1e-3), nn.SiLU()]
    last = nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def dense(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.LayerNorm(outputs, eps=1e-3), nn.SiLU())


def kl(q, p):
    """KL(q || p) of log-probabilities (..., groups, classes), summed over the groups: (...)."""
    return (q.exp() * (q - p)).sum((-2, -1))


def kl_loss(posterior, prior):
    """The last two terms of L for each pair of log-probabilities, (...), and the KL divergence itself."""
    dynamics, representation = kl(posterior.detach(), prior), kl(posterior, prior.detach())
    return 0.5 * dynamics.clamp(min=1) + 0.1 * representation.clamp(min=1), dynamics.detach()


class RSSM(nn.Module):
    """The recurrent state-space model. A state is h (B, deter) and z (B, groups * classes); distributions of z are
    log-probabilities (B, groups, classes)."""

    def __init__(self, embed, action_dim, deter, mlp_dim, groups, classes):
        super().__init__()
        self.shape, n = (groups, classes), groups * classes
        self.inputs = dense(n + action_dim, mlp_dim)
        self.gates = nn.Sequential(nn.Linear(mlp_dim + deter, 3 * deter, bias=False), nn.LayerNorm(3 * deter, eps=1e-3))
        self.prior = nn.Sequential(dense(deter, mlp_dim), nn.Linear(mlp_dim, n))
        self.posterior = nn.Sequential(dense(deter + embed, mlp_dim), nn.Linear(mlp_dim, n))
        self.start = nn.Parameter(torch.zeros(deter))

    def distribution(self, logits):
        p = logits.unflatten(-1, self.shape).softmax(-1)
        return (0.99 * p + 0.01 / self.shape[1]).log()

    def draw(self, log_p, sample):
        """One-hot variables (B, groups * classes): a `sample`, or else the most likely ones."""
        p = log_p.exp()
        index = torch.distributions.Categorical(p).sample() if sample else p.argmax(-1)
        return (F.one_hot(index, self.shape[1]) + p - p.detach()).flatten(-2)  # straight-through

    def initial(self, B):
        """h and z before the first frame: learned, and the most likely."""
        h = torch.tanh(self.start).expand(B, -1)
        return h, self.draw(self.distribution(self.prior(h)), sample=False)

    def imagine(self, h, z, a):
        """The state and the action a (B, A) taken there -> the next h, and the prior of the next z."""
        x = self.gates(torch.cat([self.inputs(torch.cat([z, a], -1)), h], -1))
        reset, candidate, update = x.chunk(3, -1)
        update = torch.sigmoid(update - 1)
        h = update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * h
        return h, self.distribution(self.prior(h))

    def observe(self, h, e):
        """h and the embedding e (B, E) of the frame that is seen -> the posterior of z."""
        return self.distribution(self.posterior(torch.cat([h, e], -1)))


class Dreamer(System):
    """`channels` are the first convolution's, `deter` is the width of h, `mlp_dim` that of the layers between, and z
    has `groups` variables of `classes` classes. The sizes suit a laptop; the reference has channels=32,deter=512,
    mlp_dim=512,groups=32,classes=32, batches of 16 x 64 frames and lr 1e-4.

    The latent of a frame is [h, z, e]. `encode` treats every frame as the first of an episode: its h and z are the
    posterior from the initial state. `rollout` goes through all known frames and actions; what it imagines has zeros
    in the place of e.
    """

    name, alone = "dreamer", False
    num_frames, batch_size, steps, lr = 8, 16, 2000, 8e-4
    sizes = dict(channels=8, deter=256, mlp_dim=256, groups=8, classes=8)

    def build(self, img_size, channels, deter, mlp_dim, groups, classes):
        self.encoder, embed = conv_encoder(img_size, channels)
        self.rssm = RSSM(embed, self.action_dim, deter, mlp_dim, groups, classes)
        self.decoder = conv_decoder(deter + groups * classes, img_size, channels)
        self.background = Background(img_size)
        self.state_dim = deter + groups * classes

    def images(self, frames):
        """Frames (B, T, H, W, 3) of 0 to 255 -> what the encoder sees of them, (B, T, 3, H, W)."""
        return self.background(frames.movedim(-1, -3).float() / 255)

    def filter(self, e, actions):
        """Goes through embeddings e (B, T, E) of frames and the actions between them, (B, T - 1, A), from the initial
        state on. Returns h, z and the log-probabilities of prior and posterior, each (B, T, ...)."""
        h, z = self.rssm.initial(len(e))
        a, steps = F.pad(self.encode_action(actions), (0, 0, 1, 0)), []
        for t in range(e.shape[1]):
            h, prior = self.rssm.imagine(h, z, a[:, t])
            posterior = self.rssm.observe(h, e[:, t])
            z = self.rssm.draw(posterior, sample=self.training)
            steps.append((h, z, prior, posterior))
        return [torch.stack(x, 1) for x in zip(*steps, strict=True)]

    def encode(self, obs):
        e = each(self.encoder, self.images(obs["visual"]))
        h, z, *_ = self.filter(e.flatten(0, 1)[:, None], e.new_zeros(e.shape[0] * e.shape[1], 0, self.action_dim))
        return self.latents(h.view(*e.shape[:2], -1), z.view(*e.shape[:2], -1), e)

    def latents(self, *parts):
        x = torch.cat(parts, -1)
        return {"visual": x[:, :, None], "proprio": x[:, :, :0]}

    def rollout(self, z0, actions):
        e = z0["visual"][:, :, 0, self.state_dim :]
        known = e.shape[1]
        h, z, *_ = (list(x.unbind(1)) for x in self.filter(e, actions[:, : known - 1]))
        for a in self.encode_action(actions[:, known - 1 :]).unbind(1):
            after, prior = self.rssm.imagine(h[-1], z[-1], a)
            h.append(after)
            z.append(self.rssm.draw(prior, sample=False))  # the most likely, so that a plan always costs the same
        return self.latents(torch.stack(h, 1), torch.stack(z, 1), F.pad(e, (0, 0, 0, len(h) - known)))

    def paint(self, latents):
        return self.decoder(latents[:, 0, : self.state_dim]) + self.background.image

    def criterion(self, z, target, reduction="mean"):
        """The squared error of embeddings: of what z (B, T, 1, ...) is decoded to, and of the frame of `target`."""
        imagined = each(self.encoder, each(self.decoder, z[:, :, 0, : self.state_dim]))
        return F.mse_loss(imagined, target[:, :, 0, self.state_dim :], reduction=reduction)

    def loss(self, batch, *_):
        images = self.images(batch["visual"])
        e = each(self.encoder, images)
        h, z, prior, posterior = self.filter(e, batch["action"][:, :-1])
        recon = (each(self.decoder, torch.cat([h, z], -1)) - images).square().sum((-3, -2, -1))  # (B, T)
        regulariser, divergence = kl_loss(posterior, prior)
        parts = {"recon": recon.mean().detach(), "kl": divergence.mean()}
        if not self.training:  # one step ahead, as a plan costs it
            drawn = self.rssm.draw(prior[:, 1:], sample=False)
            ahead = self.latents(h[:, 1:], drawn, e[:, 1:])["visual"]
            parts["visual"] = self.criterion(ahead, ahead)  # of the decoded state and the true frame
        return (recon + regulariser).mean(), parts
