"""Publishes a trained model: on the Hugging Face hub, with a card that tells how it was made, or in a small folder.

    python -m extras.share runs/pointmaze_pca USER/NAME             # then anyone: python plan.py --ckpt USER/NAME
    python -m extras.share runs/worldmodels_takecover USER/NAME     # V, M and C of vae_mdnrnn.py
    python -m extras.share runs/pointmaze_pca --dry-run             # shows the card and the files, and sends nothing
    python -m extras.share runs/worldmodels_takecover --folder assets/models/takecover --half

A model is shared as safetensors and JSON, which hold nothing that could be executed, with the flags of its run. Dreams
begin at the first latents of episodes, in starts.npy, so that nobody needs the data. The hub gets everything in one
commit, with README.md, the card, in which the results of plan.py or of `vae_mdnrnn.py test` stand if there are any. It
takes the token of `hf auth login`. What is shared is a run again: plan.py and extras.play take its folder.
"""

import io
from pathlib import Path

import huggingface_hub as hub
import numpy as np
import safetensors.torch

import train
import vae_mdnrnn as wm
from encoders import ENCODERS
from lib import common
from lib.common import UserError
from lib.recipes import load_starts, open_run, parse_args
from lib.weights import model_folder
from lib.worlds import can_be_set
from predictor import WorldModel

PICTURES = "curves.png", "imagined.gif", "reconstructions.png", "dream.gif"


def command(script, flags, default):
    """The command that made a run, with the flags that differ from their defaults."""
    own = {name: value for name, value in flags.items() if value != default.get(name) and value is not None}
    return " ".join([f"python {script}", *(common.flag_text(name, value) for name, value in own.items())])


def share_model(run, plans):
    """What is shared of a run of train.py: the card's text, the files {name: bytes}, the paths of safetensors, and the
    fields of the card's head."""
    folder, flags = model_folder(run), common.read_json(run / "args.json")
    WorldModel.from_pretrained(run)  # it is whole
    config, table = common.read_json(folder / "config.json"), plans / "table.md"
    env, system = config["world"]["env"], config.get("system")
    what = system or f"the encoder `{config['encoder']}` and the transition model `{config['predictor']}`"
    text = f"A world model of `{env}`, with {what}. It imagines what actions lead to in a latent space.\n\n"
    made = command("train.py", flags, vars(train.get_args(["--system", system] if system else [])) | {"system": None})
    if "released" in flags:
        made = f"python -m lib.released {flags['released']} --convert {run}"
    use = "python plan.py --ckpt" if can_be_set(env) else "python -m extras.horizon --ckpt"
    text += f"```bash\n{made}\n{use} REPOSITORY\n```\n"
    if table.exists():
        results = next(plans.rglob("results.json"), None)
        of = results and Path(common.read_json(results)["args"]["ckpt"]).resolve()
        if of != run.resolve() or table.stat().st_mtime < (folder / "model.safetensors").stat().st_mtime:
            raise UserError(f"{plans} has the results of another model: give --plans, or plan with --ckpt {run}")
        text += f"\nSuccess in reaching goal images, with 95 % intervals:\n\n{table.read_text()}"
    encoder = config.get("encoder", "pca").partition("-")[0]  # whose weights are shared, too
    licence = ENCODERS[encoder].licence or "MIT"
    terms = {"license": "other", "license_name": licence} if " " in licence else {"license": licence.lower()}
    files = {"config.json": (folder / "config.json").read_bytes(), "args.json": (run / "args.json").read_bytes()}
    return text, files, [folder / "model.safetensors"], terms | {"pipeline_tag": "robotics"}


def share_dream(run):
    """The same for a run of vae_mdnrnn.py. The history of C's search is left out."""
    args, flags = open_run(run), common.read_json(run / "args.json")
    wm.load_models(args)  # they are whole
    step = "all" if args.run == run else "iterate"
    default = vars(parse_args([step, "--env", args.env], [step], ""))
    if step == "iterate":
        flags["iterations"] = int(args.run.name.removeprefix("iteration"))
    made = command(f"vae_mdnrnn.py {step}", {"env": args.env, **flags}, {**default, "env": None})
    text = f"V, M and C of World Models (Ha & Schmidhuber, 2018, arXiv:1803.10122) for `{args.env}`. The first command "
    text += "made them; flags of C's search (--tau, --popsize, --c-steps and so on) are not recorded.\n\n"
    text += f"```bash\n{made}\nhf download REPOSITORY --local-dir {run}\npython -m extras.play --run {run}\n```\n"
    if (args.run / "test.json").exists():
        rows = [["player", "where", "return, mean ± standard deviation", "episodes"]]
        for player, by_place in common.read_json(args.run / "test.json")["returns"].items():
            for where, returns in by_place.items():
                rows.append([player, where, f"{np.mean(returns):.0f} ± {np.std(returns):.0f}", str(len(returns))])
        text += f"\n{common.markdown_table(rows)}"
    starts = io.BytesIO()
    np.save(starts, np.float32(load_starts(args)))
    models = [args.run / "vae.safetensors", args.run / "rnn.safetensors", *sorted(args.run.glob("c_*.safetensors"))]
    files = {"starts.npy": starts.getvalue(), "args.json": (args.run / "args.json").read_bytes()}
    return text, files, models, {"license": "mit", "pipeline_tag": "reinforcement-learning"}


def as_bytes(path, half):
    """The safetensors file at `path`, with float16 in place of float32 numbers if `half`."""
    tensors = common.load_safetensors(path)
    if half:
        tensors = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    return safetensors.torch.save(tensors, {"format": "pt"})


def send(repository, files, private, message):
    parts = [hub.CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        hub.create_repo(repository, private=private or None, exist_ok=True)
        hub.create_commit(repository, parts, commit_message=message)
    except Exception as error:  # its type depends on the version of huggingface_hub
        reason = " ".join(str(error).split())[:120]
        cure = "log in with hf auth login, or try again"
        raise UserError(f"{repository} has not taken the files ({reason}): {cure}") from None
    print(f"{repository} has {len(parts)} files: https://huggingface.co/{repository}")


def main():
    parser = common.Parser(description=__doc__.split(":")[0])
    add = parser.add_argument
    add("run", type=Path, help="folder of the run")
    add("repository", nargs="?", help="where it goes on the hub, USER/NAME; it is made if it is not there")
    add("--folder", type=Path, help="write the model to this folder, and send nothing")
    add("--half", action="store_true", help="share float16 numbers, which need half the space")
    add("--plans", type=Path, help="folder with plan.py's results (default: the run's name under plan_outputs/)")
    add("--private", action="store_true", help="make the repository a private one")
    add("--dry-run", action="store_true", help="show the card and the files, and send nothing")
    args = parser.parse_args()
    name = args.run.resolve().name
    if not (args.repository or args.folder or args.dry_run):
        raise UserError("give a repository USER/NAME, --folder or --dry-run")
    if args.folder and args.folder.exists():
        raise UserError(f"{args.folder} is there: remove it, or choose another folder")
    dreams = (args.run / "vae.safetensors").exists() or list(args.run.glob("iteration*"))
    plans = args.plans or Path("plan_outputs") / name
    text, files, models, head = share_dream(args.run) if dreams else share_model(args.run, plans)
    files |= {path.name: as_bytes(path, args.half) for path in models}
    if args.folder:
        with common.whole(args.folder, folder=True) as folder:
            for file, content in files.items():
                (folder / file).write_bytes(content)
        return print(f"{args.folder}: {sum(map(len, files.values())) / 1e6:.1f} MB")
    repository, pictures = args.repository or "USER/NAME", [models[0].parent / picture for picture in PICTURES]
    data = hub.ModelCardData(**head, tags=["world-model"])
    card = f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{text.replace('REPOSITORY', repository)}"
    files = {"README.md": card.encode()} | files | {path.name: path.read_bytes() for path in pictures if path.exists()}
    if args.dry_run:
        return print(f"{card}\n{repository} would get {', '.join(files)}")
    send(repository, files, args.private, f"Add {name}")


if __name__ == "__main__":
    common.run_script(main)
