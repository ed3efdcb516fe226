"""AVDC (Ko et al., 2023, arXiv:2310.08576; flow-diffusion/AVDC): generate a video to the goal, and act it out.

A diffusion model generates the next FRAMES frames x, given the last ones and the goal, which is the last of them
(section 3.1):

    x_t = alpha_t x + sigma_t n,    n ~ N(0, 1),    alpha_t^2 = 1 - sigma_t^2 = prod_{s <= t} (1 - beta_s)
    L = mean ||x^(x_t, t) - x||^2

with the cosine schedule of Nichol & Dhariwal (2021). A video comes from noise in a few steps t -> t' of DDIM (Song
et al., 2021), without new noise:

    n^ = (x_t - alpha_t x^) / sigma_t,    x_t' = alpha_t' x^ + sigma_t' n^

An inverse model g, which learns from the same frames and actions, reads the actions from the video and what was before:

    L = mean_k ||g(x)_k - a_k||^2

Deviations:
- The network predicts the video, and the release's predicts v = alpha_t n - sigma_t x, because a small network need not
  reproduce the noise. All networks see how a frame differs from the background, CONTRAST times as strongly: the ball is
  small.
- The loss weighs x^ alike at all times. The release weighs the error of v by min(SNR_t, 5) / (SNR_t + 1), with SNR_t =
  alpha_t^2 / sigma_t^2, which does so only where the signal is strong, and with it our network hardly learned to begin
  a video. A one-hot vector in more channels tells the network which frame of the video it sees.
- The release samples by DDPM in 100 steps; here DDIM has 10.
- AVDC reads actions from dense optical flow, and knows the goal as a text. Here it is an image: the video's last frame.
- The U-Net has frames of 32 x 32 pixels, to which it applies a pixel unshuffle of 4 x 4. As released, a convolution in
  space is followed by one in time; but there is no attention, there is one block where the release has two or three,
  and no moving average of the weights, since the learning rate falls to zero.

    python train.py --system avdc && python plan.py
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lib.common import UserError
from lib.systems import Background, System, each

FRAMES, PAST = 5, 2  # frames that are generated, and that are known: two show a velocity (the paper: 7 and 1)
SIDE, PATCH = 32, 4  # pixels of a frame's side, and of a pixel unshuffle (the paper: 128 and 1)
CONTRAST = 4  # by which a frame's difference to the background is multiplied

# ---- The diffusion -------------------------------------------------------------------------------


def cosine_schedule(timesteps, s=0.008):
    """alpha and sigma (timesteps,): alpha_t^2 goes as cos^2(pi / 2 (t / T + s) / (1 + s)), and beta_t <= 0.999."""
    t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    alpha2 = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
    beta = (1 - alpha2[1:] / alpha2[:-1]).clamp(max=0.999)
    alpha2 = (1 - beta).cumprod(0)
    return alpha2.sqrt().float(), (1 - alpha2).sqrt().float()


class Diffusion(nn.Module):
    """Loss and sampling, for any network(x_t, t, *condition) -> x^."""

    def __init__(self, timesteps=100):
        super().__init__()
        for name, table in zip(("alpha", "sigma"), cosine_schedule(timesteps), strict=True):
            self.register_buffer(name, table, persistent=False)

    def loss(self, network, x, *condition):
        """The error of videos x (B, ...) that are denoised in one step, from a random time each."""
        t, noise = torch.randint(len(self.alpha), x.shape[:1], device=x.device), torch.randn_like(x)
        alpha, sigma = (table[t].view(-1, *[1] * (x.dim() - 1)) for table in (self.alpha, self.sigma))
        return F.mse_loss(network(alpha * x + sigma * noise, t, *condition), x)

    def sample(self, network, x, steps, *condition):
        """Videos out of the noise x, in `steps` steps of DDIM."""
        times = torch.linspace(-1, len(self.alpha) - 1, steps + 1).int().flip(0).tolist()
        for t, after in zip(times, times[1:], strict=False):
            clean = network(x, x.new_full(x.shape[:1], t).long(), *condition)
            noise = (x - self.alpha[t] * clean) / self.sigma[t]
            x = clean if after < 0 else self.alpha[after] * clean + self.sigma[after] * noise
        return x


# ---- The networks, for videos (B, T, C, h, w) ----------------------------------------------------


class VideoConv(nn.Module):
    """A convolution in space, and then one in time, which begins as the identity."""

    def __init__(self, i, o, stride=1):
        super().__init__()
        self.space, self.time = nn.Conv2d(i, o, 3, stride, padding=1), nn.Conv1d(o, o, 3, padding=1)
        nn.init.dirac_(self.time.weight)
        nn.init.zeros_(self.time.bias)

    def forward(self, x):
        x = each(self.space, x)
        y = x.permute(0, 3, 4, 2, 1)  # (B, h, w, C, T)
        return self.time(y.flatten(0, 2)).view(y.shape).permute(0, 4, 3, 1, 2)


class VideoBlock(nn.Module):
    """A residual block, to which an embedding (B, E) says the time of the diffusion."""

    def __init__(self, i, o, embedding):
        super().__init__()
        self.before = nn.Sequential(nn.GroupNorm(8, i), nn.SiLU())
        self.conv1, self.embedded = VideoConv(i, o), nn.Sequential(nn.SiLU(), nn.Linear(embedding, o))
        self.between, self.conv2 = nn.Sequential(nn.GroupNorm(8, o), nn.SiLU()), VideoConv(o, o)
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x, embedding):
        h = self.conv1(each(self.before, x)) + self.embedded(embedding)[:, None, :, None, None]
        return each(self.skip, x) + self.conv2(each(self.between, h))


class VideoUNet(nn.Module):
    """A U-Net from a noised video x, the times t (B,) of the diffusion and a `condition` (B, C', h, w) to a video of
    x's shape. The condition is laid beside each frame, and so is a one-hot vector of which of the FRAMES it is."""

    def __init__(self, channels, condition, width):
        super().__init__()
        self.width, E = width, 4 * width
        self.embed = nn.Sequential(nn.Linear(width, E), nn.SiLU(), nn.Linear(E, E))
        self.begin = VideoConv(channels + condition + FRAMES, width)
        self.down, self.shrink = VideoBlock(width, width, E), VideoConv(width, width, stride=2)
        self.low, self.middle = VideoBlock(width, 2 * width, E), VideoBlock(2 * width, 2 * width, E)
        self.high, self.grow = VideoBlock(4 * width, 2 * width, E), VideoConv(2 * width, width)
        self.up = VideoBlock(2 * width, width, E)
        self.end = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x, t, condition):
        angle = t[:, None] * 10000 ** -torch.linspace(0, 1, self.width // 2 + 1, device=x.device)[:-1]
        e = self.embed(torch.cat([angle.cos(), angle.sin()], 1))  # (B, E)
        which = torch.eye(FRAMES, device=x.device)[None, :, :, None, None].expand(len(x), -1, -1, *x.shape[3:])
        x = torch.cat([x, condition[:, None].expand(-1, FRAMES, -1, -1, -1), which], 2)
        fine = self.down(self.begin(x), e)  # (B, T, width, h, w)
        coarse = self.low(self.shrink(fine), e)  # (B, T, 2 width, h / 2, w / 2)
        x = self.high(torch.cat([self.middle(coarse, e), coarse], 2), e)
        x = self.grow(each(nn.Upsample(scale_factor=2), x))  # (B, T, width, h, w)
        return each(self.end, self.up(torch.cat([x, fine], 2), e))


class InverseModel(nn.Module):
    """The actions, in standard deviations, that lead from each frame of a video to the next one."""

    def __init__(self, width, action_dim):
        super().__init__()
        half = lambda i, o: [nn.Conv2d(i, o, 5, stride=2, padding=2), nn.SiLU()]  # noqa: E731
        self.see = nn.Sequential(*half(3, 16), *half(16, 32), nn.Flatten(), nn.Linear(32 * (SIDE // 4) ** 2, width))
        layers = [nn.Conv1d(width, 2 * width, 3, padding=1), nn.SiLU(), nn.Conv1d(2 * width, 2 * width, 3, padding=1)]
        self.read = nn.Sequential(*layers, nn.SiLU(), nn.Conv1d(2 * width, action_dim, 3, padding=1))

    def forward(self, video):
        """Videos (B, T, 3, SIDE, SIDE) -> actions (B, T - 1, A)."""
        return self.read(each(self.see, video).mT).mT[:, :-1]


# ---- The system ----------------------------------------------------------------------------------


class AVDC(System):
    """`width` is the U-Net's and the inverse model's. As released for Meta-World it is 128, on five levels with two
    blocks each; training has 60,000 steps of 16 videos, with Adam and a learning rate of 1e-4."""

    name, num_frames, batch_size, steps, lr = "avdc", PAST + FRAMES, 16, 1000, 1e-3
    history = context = PAST
    sizes, ddim_steps = dict(width=64), 10

    def build(self, img_size, width):
        if width % 8:
            raise UserError(f"--sizes width={width} is not a multiple of the 8 groups that avdc normalises")
        pixels = 3 * PATCH**2
        self.diffusion, self.unet = Diffusion(), VideoUNet(pixels, (PAST + 1) * pixels, width)
        self.inverse, self.img_size = InverseModel(width, self.action_dim), img_size
        self.background = Background(SIDE)

    def small(self, frames):
        """Frames (B, T, H, W, 3) of 0 to 255 -> small ones, as the networks see them, (B, T, 3, SIDE, SIDE)."""
        images = F.interpolate(frames.flatten(0, 1).movedim(-1, 1).float() / 127.5 - 1, (SIDE, SIDE), mode="area")
        return CONTRAST * self.background(images).unflatten(0, frames.shape[:2])

    def encode(self, obs):
        """The small frames, each one token of all its pixels."""
        visual = self.small(obs["visual"]).flatten(2)[:, :, None]  # (B, T, 1, 3 * SIDE * SIDE)
        return {"visual": visual, "proprio": visual[:, :, 0, :0]}

    def paint(self, latents):
        """The images show no more than the small ones that `encode` returns."""
        small = latents.unflatten(-1, (3, SIDE, SIDE)).flatten(0, 1) / CONTRAST + self.background.image
        return F.interpolate((small + 1) / 2, (self.img_size, self.img_size))

    def network(self, x, t, known):
        """x^ of videos x (B, FRAMES, 3, SIDE, SIDE), given the last frames and the goal, `known` (B, PAST + 1, ...)."""
        condition = F.pixel_unshuffle(known, PATCH).flatten(1, 2)
        return F.pixel_shuffle(self.unet(F.pixel_unshuffle(x, PATCH), t, condition), PATCH)

    def loss(self, batch, *_):
        """Frames (B, T, H, W, 3) and actions (B, T, A) -> the loss and its parts: of videos, and of actions."""
        frames, now = self.small(batch["visual"]), PAST - 1
        video, known = frames[:, PAST:], torch.cat([frames[:, :PAST], frames[:, -1:]], 1)
        visual = self.diffusion.loss(self.network, video, known)
        actions = self.encode_action(batch["action"][:, now:-1])
        inverse = F.mse_loss(self.inverse(frames)[:, now:], actions)
        return visual + inverse, {"visual": visual.detach(), "inverse": inverse.detach()}

    @torch.no_grad()
    def generate(self, past, goal):
        """The last frames (B, PAST, H, W, 3) and the goals (B, H, W, 3), uint8 -> videos (B, FRAMES, 3, SIDE, SIDE) of
        what comes next. Their noise follows from what is seen, so that a run can be repeated."""
        generator = torch.Generator().manual_seed(past.long().sum().item())
        noise = torch.randn(len(past), FRAMES, 3, SIDE, SIDE, generator=generator).to(past.device)
        known = torch.cat([self.small(past), self.small(goal[:, None])], 1)
        return self.diffusion.sample(self.network, noise, self.ddim_steps, known)

    @torch.no_grad()
    def plan(self, worlds, problems, steps):
        """The actions (B, steps, A), in standard deviations, that the problems (B,) of plan.Worlds should take now."""
        if steps > FRAMES:
            raise UserError(f"--goal-H {steps} is more than the {FRAMES} frames that avdc generates")
        past, goal = (
            torch.from_numpy(obs["visual"][problems]).to(self.action_mean.device)
            for obs in (worlds.past, worlds.goal_obs)
        )
        past = torch.cat([past[:, :1], past], 1)[:, -PAST:]  # at rest before the first frame
        video = torch.cat([self.small(past), self.generate(past, goal)], 1)
        return self.inverse(video)[:, PAST - 1 :][:, :steps]
