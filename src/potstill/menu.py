"""Every command: where it stands, what it does, and what to type after it. Imports nothing: `--help` must be quick."""

from typing import NamedTuple


class Command(NamedTuple):
    room: str  # of potstill.commands, with a function of the command's name
    does: str
    example: str = ""
    without: tuple[str, ...] = ()  # options of its configs that it has not


EXPERT = "data/experts/pong/seed-0"
COMMANDS = {
    "train": Command("learning", "an expert, from scratch, with PPO", "--env cartpole"),
    "distill": Command("learning", "a student from a teacher", f"{EXPERT} --width 1/8"),
    "compare": Command("studying", "several distillations and a table", "--widths 1/4 1/8", ("width", "lead", "seed")),
    "study run": Command("studying", "the runs of a plan that are not done", "plans/quick.toml"),
    "study status": Command("studying", "how far a plan's runs are", "plans/quick.toml"),
    "study tune": Command("studying", "settings for a plan, by trials", "plans/pong.toml"),
    "study table": Command("studying", "a study's runs as .csv or .parquet", "data/results/first/pong --out runs.csv"),
    "report": Command("looking", "a study's answers and figures as one HTML page", "data/results/first/pong"),
    "compress": Command(
        "learning", "the smallest student that keeps enough score", f"{EXPERT} --keep 0.95", ("width",)
    ),
    "evaluate": Command("looking", "a policy's score, with its interval and latency", EXPERT),
    "watch": Command("looking", "film a game, or teacher and student side by side", EXPERT),
    "export": Command("exchange", "a policy as ONNX or C, checked against PyTorch", f"{EXPERT} --out policy.c"),
    "import-sb3": Command("exchange", "a Stable-Baselines3 zip, running none of it", "model.zip --env pong --out mine"),
    "import-weights": Command("exchange", "a state dict, running none of it", "model.pt --env pong --out mine"),
    "push": Command("exchange", "a policy to the Hugging Face Hub, with a card", f"{EXPERT} USER/NAME"),
    "pull": Command("exchange", "a policy from the Hugging Face Hub, never a pickle", "USER/NAME --out policy"),
    "info": Command("looking", "versions, devices, cores: what a bug report needs"),
}
