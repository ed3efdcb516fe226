"""Locates the ball of a maze in a world model's latents and in pictures, by ridge regression:

(x, y) = W z + b,    W, b = argmin sum_i ||(x_i, y_i) - W z_i - b||^2 + lambda ||W||^2    over random states i
"""

import numpy as np
import torch

COUNT = 1000  # states that a probe is fitted to


def ridge_regression(x, y, ridge=1e-4):
    """The affine map from rows of x (n, p) to those of y (n, q), as a function. lambda is `ridge` times the sum of all
    variances. There may be more numbers than rows, so it is solved in its dual form, X^T (X X^T + lambda I)^-1 Y."""
    mean, center = x.mean(0), y.mean(0)
    x = x - mean
    gram = x @ x.T
    W = x.T @ np.linalg.solve(gram + ridge * np.trace(gram) * np.eye(len(x)), y - center)
    return lambda x: (x - mean) @ W + center


def flat(latents):
    """Latents (..., N, d) -> numbers (..., N * d)."""
    return latents.detach().flatten(-2).cpu().double().numpy()


class Probe:
    """Fitted to a `model` and its maze `env`. `to_pixels` maps positions (..., 2) in metres to pixels of a picture,
    which count to the right and down, and `to_xy` maps them back. In a picture the ball is what differs from the median
    of all pictures."""

    def __init__(self, model, env):
        device, rng = model.action_mean.device, np.random.default_rng(0)
        self.states, seen = np.array([env.sample_state(rng) for _ in range(4 * COUNT)]), []
        for state in self.states[:COUNT]:
            env.set_state(state)
            seen.append(env.observe())
        xy, obs = self.states[:COUNT, :2], {name: np.stack([o[name] for o in seen])[:, None] for name in seen[0]}
        with torch.no_grad():
            parts = ({name: torch.from_numpy(o[i : i + 100]) for name, o in obs.items()} for i in range(0, COUNT, 100))
            z = [model.encode({name: o.to(device) for name, o in part.items()})["visual"][:, 0] for part in parts]
        self.position = ridge_regression(flat(torch.cat(z)), xy)
        frames = obs["visual"][:200, 0].astype(np.int16)
        differs = np.abs(frames - np.median(frames, 0)).sum(-1)[:, None]  # (n, 1, H, W)
        pixels = np.stack(np.indices(frames.shape[1:3])[::-1]) + 0.5  # (2, H, W)
        pixels = (differs * pixels).sum((2, 3)) / differs.sum((2, 3))  # of the ball: (n, 2)
        self.to_xy, self.to_pixels = ridge_regression(pixels, xy[:200], 1e-9), ridge_regression(xy[:200], pixels, 1e-9)

    def read(self, latents):
        """Latents (..., N, d) -> positions (..., 2) in metres."""
        return self.position(flat(latents))

    def rest_at(self, pixels):
        """The state in which the ball rests at a pixel of the picture, or as close to it as it fits."""
        xy = self.states[:, :2]
        nearest = np.linalg.norm(xy - self.to_xy(np.array(pixels)), axis=1).argmin()
        return np.append(xy[nearest], (0.0, 0.0))
