"""Shares a trained model on the Hugging Face hub, with a card that says how it was made and what it can do.

    python -m extras.share runs/pointmaze_pca USER/NAME             # then anyone: python plan.py --ckpt USER/NAME
    python -m extras.share runs/worldmodels_takecover USER/NAME     # V, M and C of vae_mdnrnn.py
    python -m extras.share runs/pointmaze_pca USER/NAME --dry-run   # shows the card and the files, and sends nothing

Everything goes into one commit: the model (safetensors and JSON, nothing that could be executed), the flags of the run,
and README.md, the card, with the results of plan.py or of `vae_mdnrnn.py test` if there are any. It takes the token of
`hf auth login`.
"""

from pathlib import Path

import huggingface_hub as hub
import numpy as np

import train
from lib import common
from lib.common import UserError
from lib.recipes import parse_args
from lib.weights import model_folder

MODEL = "config.json", "model.safetensors", "args.json", "curves.png", "imagined.gif"
WORLD_MODELS = "vae.safetensors", "rnn.safetensors", "args.json", "dream.gif", "reconstructions.png"


def command(script, flags, default):
    """The command that made a run: the flags that are not as by default."""
    text = f"python {script}"
    for name, value in flags.items():
        if value != default.get(name) and value is not None:
            value = ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
            text += f" --{name.replace('_', '-')} {value}"
    return text


def describe_model(run, plans):
    """What the card says of a world model that plan.py plans with: title, text, and files."""
    folder, flags = model_folder(run), common.read_json(Path(run) / "args.json")
    config, table = common.read_json(folder / "config.json"), Path(plans) / "table.md"
    made = command("train.py", flags, vars(train.get_args([])))
    text = (
        f"A world model of `{config['world']['env']}` with the encoder `{config['encoder']}` and the transition model "
    )
    text += f"`{config['predictor']}`. It imagines what actions lead to in the encoder's latent space.\n\n"
    text += f"```bash\n{made}\npython plan.py --ckpt REPOSITORY\n```\n"
    if table.exists():
        if Path(common.read_json(next(Path(plans).rglob("results.json")))["args"]["ckpt"]) != Path(run):
            raise UserError(f"{plans} has the results of another run: give --plans, or plan with --ckpt {run}")
        text += f"\nSuccess in reaching goal images, with 95 % intervals:\n\n{table.read_text()}"
    return text, [folder / name for name in MODEL]


def describe_world_models(run):
    """The same for V, M and C."""
    flags, found = common.read_json(run / "args.json"), sorted(run.glob("c_*.safetensors"))
    default = vars(parse_args(["all", "--env", flags["env"]], ["all"], ""))
    made = command("vae_mdnrnn.py all", {"env": flags["env"], **flags}, {**default, "env": None})
    text = f"V, M and C of World Models (Ha & Schmidhuber, 2018, arXiv:1803.10122) for `{flags['env']}`.\n\n"
    text += f"```bash\n{made}\nhf download REPOSITORY --local-dir {run}\npython -m extras.play --run {run}\n```\n"
    if (run / "test.json").exists():
        rows = [["player", "where", "return, mean ± standard deviation", "episodes"]]
        for player, by_place in common.read_json(run / "test.json")["returns"].items():
            for where, returns in by_place.items():
                rows.append([player, where, f"{np.mean(returns):.0f} ± {np.std(returns):.0f}", str(len(returns))])
        text += f"\n{common.markdown_table(rows)}"
    return text, [*(run / name for name in WORLD_MODELS), *found]


def main():
    parser = common.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("repository", help="where it goes on the hub, USER/NAME; it is made if it is not there")
    parser.add_argument("--plans", help="results of plan.py for the card (default: plan_outputs/ and the run's name)")
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    parser.add_argument("--dry-run", action="store_true", help="show the card and the files, and send nothing")
    args = parser.parse_args()
    if (args.run / "vae.safetensors").exists():
        text, files = describe_world_models(args.run)
    else:
        text, files = describe_model(args.run, args.plans or Path("plan_outputs") / args.run.resolve().name)
    text = f"# {args.run.resolve().name}\n\n{text.replace('REPOSITORY', args.repository)}"
    data = hub.ModelCardData(license="mit", tags=["world-model"], pipeline_tag="robotics")
    card, files = f"---\n{data.to_yaml()}\n---\n\n{text}", [path for path in files if path.exists()]
    if args.dry_run:
        return print(f"{card}\n{args.repository} would get README.md, {', '.join(path.name for path in files)}")
    parts = [hub.CommitOperationAdd("README.md", card.encode())]
    parts += [hub.CommitOperationAdd(path.name, str(path)) for path in files]
    try:
        hub.create_repo(args.repository, private=args.private or None, exist_ok=True)
        hub.create_commit(args.repository, parts, commit_message=f"Add {args.run.resolve().name}")
    except Exception as error:  # its type depends on the version of huggingface_hub
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{args.repository} takes nothing ({reason}): log in with hf auth login, or try again"
        ) from None
    print(f"{args.repository} has {len(parts)} files: https://huggingface.co/{args.repository}")


if __name__ == "__main__":
    common.run_script(main)
