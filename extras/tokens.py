"""What an encoder sees: the first three principal components of its tokens, as red, green and blue.

    python -m extras.tokens --encoders dinov2,dinov3                                      # the pretrained weights
    python -m extras.tokens --encoders dinov2 --weights random --data datasets/pointmaze --out pictures

Writes tokens.png to the folder of --out: a row of frames, and below it a row for each encoder. An encoder whose
weights are not there is left out. One that learns from frames is fitted first, to the frames that are looked at.
"""

import numpy as np

import data
from encoders import ENCODERS, build_encoder, see_all
from lib.common import Parser, UserError, run_script
from lib.pictures import principal_colours, write_rows
from lib.worlds import RandomPolicy, make_env, rollout

LISTED = {name: entry for name, entry in ENCODERS.items() if name != "state"}  # which sees no frames
CLIPS, LENGTH, SHOWN = 50, 8, 4  # clips, frames of each, and how many clips are shown by their first frame


def sample_frames(path):
    """Clips (CLIPS * LENGTH, H, W, 3) uint8 out of a data set's folder, or else of PointMaze, pushed at random."""
    if path is not None:
        dataset = data.open_dataset(path)
        starts = data.Windows(dataset, np.arange(len(dataset)), LENGTH, dataset.meta["frameskip"]).starts
        first = starts[np.linspace(0, len(starts) - 1, CLIPS).astype(int)]
        return dataset.frames[(first[:, None] + np.arange(LENGTH)).ravel()]
    env, rng, clips = make_env("pointmaze", 224), np.random.default_rng(0), []
    policy = RandomPolicy("uniform", env.action_space, rng)
    for _ in range(CLIPS):
        env.set_state(env.sample_state(rng))
        clips.append(rollout(env, env.observe(), policy, LENGTH, frameskip=5)["frames"])
    return np.concatenate(clips)


def draw(encoders, weights, frames, path):
    seen = frames[::LENGTH]
    rows = {"frame": seen[:SHOWN]}
    for name in encoders:
        pretrained = LISTED[name.partition("-")[0]].licence is not None
        try:
            encoder = build_encoder(name, weights=weights if pretrained else None)
        except UserError as error:
            print(f"left out: {error}")
            continue
        if hasattr(encoder, "fit"):
            encoder.fit(frames)
        tokens = see_all(encoder, seen, "cpu", 10)  # (CLIPS, N, d)
        label = f"{name}\nrandom weights" if pretrained and weights == "random" else name
        rows[f"{label}\n{tokens.shape[1]} x {tokens.shape[2]}"] = principal_colours(tokens)[:SHOWN].numpy()
    write_rows(path, rows)
    print(f"wrote {path}")


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--encoders", default=",".join(LISTED), help="the rows, as NAME,NAME or NAME-SIZE,NAME")
    parser.add_argument("--weights", help="weights of all encoders that take any: what train.py --weights takes")
    parser.add_argument("--data", help="data set whose frames are looked at (default: frames of PointMaze, 224 px)")
    parser.add_argument("--out", default="plan_outputs", help="folder in which tokens.png is written")
    args = parser.parse_args()
    encoders = args.encoders.split(",")
    if unknown := [name for name in encoders if name.partition("-")[0] not in LISTED]:
        raise UserError(f"unknown encoder '{unknown[0]}'; known: {', '.join(LISTED)}")
    draw(encoders, args.weights, sample_frames(args.data), f"{args.out}/tokens.png")


if __name__ == "__main__":
    run_script(main)
