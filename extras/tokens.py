"""What an encoder sees: the first three principal components of its tokens, as red, green and blue.

    python -m extras.tokens --encoders dinov2,dinov3                                      # the pretrained weights
    python -m extras.tokens --encoders dinov2 --weights random --data datasets/pointmaze --out pictures

Writes tokens.png to the folder of --out: a row of frames, and below it a row for each encoder. An encoder whose
weights are not there is left out. One that learns from frames is first fitted to 50 clips.
"""

import numpy as np

from data import Windows, open_dataset
from encoders import ENCODERS, build_encoder, in_batches
from lib.common import Parser, UserError, run_script
from lib.pictures import principal_colours, write_rows
from lib.worlds import EpisodePool

LISTED = [name for name in ENCODERS if name != "state"]  # which sees no frames
CLIPS, LENGTH, SHOWN = 50, 8, 4  # clips, frames of each, and how many clips are shown by their first frame


def sample_frames(path):
    """Clips (CLIPS * LENGTH, H, W, 3) uint8 out of a data set's folder, or else of PointMaze, pushed at random."""
    if path:
        dataset = open_dataset(path)
        windows = Windows(dataset, np.arange(len(dataset)), LENGTH, dataset.meta["frameskip"])
        first = windows.starts[np.linspace(0, len(windows) - 1, CLIPS).astype(int)]
        return dataset.frames[(first[:, None] + np.arange(LENGTH)).ravel()]
    jobs = [dict(who="uniform", seed=[0, i], steps=LENGTH, frameskip=5) for i in range(CLIPS)]
    with EpisodePool(1, "pointmaze", 224) as pool:
        return np.concatenate([episode["frames"] for episode in pool.map(jobs)])


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--encoders", default=",".join(LISTED), help="the rows, as NAME,NAME-SIZE")
    parser.add_argument("--weights", help="weights of all encoders that take any: what train.py --weights takes")
    parser.add_argument("--data", help="data set whose frames are looked at (default: frames of PointMaze, 224 px)")
    parser.add_argument("--out", default="plan_outputs", help="folder in which tokens.png is written")
    args = parser.parse_args()
    if unknown := {name.partition("-")[0] for name in args.encoders.split(",")}.difference(LISTED):
        raise UserError(f"unknown {', '.join(unknown)}; known: {', '.join(LISTED)}")
    frames = sample_frames(args.data)
    rows = {"frame": frames[::LENGTH][:SHOWN]}  # {label: pictures}
    for name in args.encoders.split(","):
        weights = args.weights if ENCODERS[name.partition("-")[0]].licence else None  # the others take none
        try:
            encoder = build_encoder(name, weights=weights)
        except UserError as error:
            print(f"left out: {error}")
        else:
            if hasattr(encoder, "fit"):
                encoder.fit(frames)
            label = f"{name}\n" + "random weights\n" * (weights == "random") + f"{encoder.num_patches} x {encoder.dim}"
            rows[label] = principal_colours(in_batches(encoder, frames[::LENGTH], "cpu", 10))[:SHOWN].numpy()
    write_rows(f"{args.out}/tokens.png", rows)
    print(f"wrote {args.out}/tokens.png")


if __name__ == "__main__":
    run_script(main)
