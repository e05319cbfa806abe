"""Notes about settings that have no effect, or a different one, because of another setting.

Often an override makes a line of the file irrelevant, so the run starts and prints one sentence for each.
"""

from collections.abc import Callable

from pydantic import BaseModel

from finetune.recipe.recipe import Recipe

Note = Callable[[Recipe], str | None]


def notes(recipe: Recipe) -> list[str]:
    """One sentence for every setting without effect, starting with its key."""
    return [sentence for note in NOTES if (sentence := note(recipe)) is not None]


def no_effect(key: str, unless: Callable[[Recipe], bool], why: Callable[[Recipe], str]) -> Note:
    """A note about `key` if it differs from its default while `unless` does not hold, so that it is not used."""

    def note(recipe: Recipe) -> str | None:
        *sections, name = key.split(".")
        inside: BaseModel = recipe
        for section in sections:
            inside = getattr(inside, section)
        changed = getattr(inside, name) != type(inside).model_fields[name].default
        return f"{key}: no effect {why(recipe)}" if changed and not unless(recipe) else None

    return note


def _warmup(recipe: Recipe) -> str | None:
    warmup, steps = recipe.optim.warmup_steps, recipe.train.steps
    if warmup <= steps or not steps:  # without train.steps, the number of steps follows from the data
        return None
    return f"optim.warmup_steps: the warm-up of {warmup} steps is cut to the {steps} of the run"


def _only_text(recipe: Recipe) -> bool:
    return all(source.format == "text" for source in (*recipe.data.train, *recipe.data.eval))


def _seldom(recipe: Recipe) -> str | None:
    if not recipe.train.early_stopping_patience or not recipe.data.eval or recipe.train.eval_every_steps:
        return None
    return "train.early_stopping_patience: no effect while train.eval_every_steps is 0"


NOTES: tuple[Note, ...] = (
    _warmup,
    _seldom,
    no_effect(
        "optim.final_lr_fraction",
        lambda r: not r.optim.schedule.startswith("constant"),
        lambda r: "on a constant schedule",
    ),
    no_effect("optim.momentum", lambda r: r.optim.name == "sgd", lambda r: "unless optim.name is sgd"),
    *(
        no_effect(
            f"optim.{key}",
            lambda r: r.optim.name in ("adamw", "adam", "adamw_8bit"),
            lambda r: f"while optim.name is {r.optim.name}",
        )
        for key in ("beta1", "beta2", "eps")
    ),
    no_effect("optim.decay_ratio", lambda r: r.optim.schedule == "wsd", lambda r: "unless optim.schedule is wsd"),
    no_effect(
        "parallel.offload_path",
        lambda r: r.parallel.offload == "nvme",
        lambda r: f"while parallel.offload is {r.parallel.offload}",
    ),
    no_effect(
        "router.balance.kind",
        lambda r: r.router.balance.coefficient > 0,
        lambda r: "while router.balance.coefficient is 0",
    ),
    no_effect(
        "monitor.drift_every_steps",
        lambda r: r.lora is not None,
        lambda r: "without lora: no frozen base is left to compare with",
    ),
    no_effect(
        "monitor.probe_tokens",
        lambda r: r.drift_every_steps > 0,
        lambda r: "because drift of the routing is not measured",
    ),
    no_effect("monitor.project", lambda r: r.monitor.wandb != "off", lambda r: "while monitor.wandb is off"),
    no_effect("train.eval_every_steps", lambda r: bool(r.data.eval), lambda r: "without data.eval"),
    no_effect("train.early_stopping_patience", lambda r: bool(r.data.eval), lambda r: "without data.eval"),
    no_effect(
        "train.early_stopping_threshold",
        lambda r: r.train.early_stopping_patience > 0,
        lambda r: "while train.early_stopping_patience is 0",
    ),
    no_effect("checkpoint.keep_best", lambda r: bool(r.data.eval), lambda r: "without data.eval"),
    no_effect("data.over_long", lambda r: not _only_text(r), lambda r: "on text, which is split into sequences"),
)
