"""``diffx distill METHOD`` and ``diffx train``: few-step students, trained models and adapters, in stock Diffusers' formats."""

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import options
from .fields import flags_of, merged

NAMES = {
    "distill": {
        "progressive": "Progressive", "lcm": "LCM", "pcm": "PCM", "dmd2": "DMD2", "guidance": "Guidance", "ct": "ConsistencyTraining",
    },
    "train": {"base": "Diffusion", "controlnet": "ControlNet", "ip-adapter": "IPAdapter"},
}  # fmt: skip
EXAMPLES = {
    "base": "diffx train base photos/ --model PATH_OR_ID --lora-rank 16 --train-steps 1000",
    "controlnet": "diffx train controlnet photos/ --model PATH_OR_ID --hint canny --train-steps 5000 --evaluate-every 500",
    "ip-adapter": "diffx train ip-adapter photos/ --model PATH_OR_ID --kind plus --image-encoder openai/clip-vit-large-patch14",
    "progressive": "diffx distill progressive --start 32 --end 4 --guidance-scale 3 --train-steps 3000 --output outputs/progressive",
    "lcm": "diffx distill lcm photos/ --teacher PATH_OR_ID --lora-rank 64 --train-steps 1000 --mixed-precision bf16",
    "pcm": "diffx distill pcm photos/ --teacher PATH_OR_ID --calls 4 --lora-rank 64",
    "dmd2": "diffx distill dmd2 prompts.txt --teacher PATH_OR_ID --calls 4 --guidance-scale 3",
    "guidance": "diffx distill guidance prompts.txt --teacher PATH_OR_ID --guidance-scale 5 --lora-rank 32",
    "ct": "diffx distill ct photos/ --teacher PATH_OR_ID --train-steps 20000",
}
# Beside the fields: they say what is trained.
WHAT = ("data", "teacher", "lora_rank", "lora_alpha", "lora_targets", "lora_start", "held_out")
SECTIONS = ("model", "adapter", "method", "lora", "source", "held_out", "train", "data")  # of run.yaml
WORDS = ("source", "held_out")  # of these, those that are no sections
Data = Annotated[
    str | None,
    typer.Argument(help="A folder of pictures, a data set's Hub id or folder, a text file of prompts; else the model makes samples."),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        "--model",
        metavar="PATH_OR_ID",
        show_default=False,
        help="A pipeline folder or Hub id; else the embedded model, emoji.",
    ),
]
Rank = Annotated[int | None, typer.Option("--lora-rank", help="Train adapters of this rank; else the whole network.", show_default=False)]
Alpha = Annotated[float | None, typer.Option("--lora-alpha", help="Their factor times the rank; else the rank.", show_default=False)]
Targets = Annotated[
    str | None, typer.Option("--lora-targets", help="Ends of layer names, comma-separated; else the family's.", show_default=False)
]
Start = Annotated[str | None, typer.Option("--lora-start", metavar="FOLDER", help="A LoRA of that kind to begin with.", show_default=False)]
Prompts = Annotated[
    list[str] | None, typer.Option("--sample-prompt", help="Of the sample sheets; give it again for more.", show_default=False)
]
HeldOut = Annotated[
    str | None,
    typer.Option("--held-out", help="Pictures to measure the adapter on, as DATA; else --num-held-out of the data.", show_default=False),
]
Output = Annotated[Path, typer.Option("--output", file_okay=False, help="Folder of the run; the model will be in its folder model.")]
Report = Annotated[str | None, typer.Option("--report-to", help="tensorboard, wandb, trackio; comma-separated.", show_default=False)]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="YAML as --dump-config prints it, or the run.yaml of a run; flags win over it.", show_default=False),
]
Dump = Annotated[bool, typer.Option("--dump-config", help="Print data, model, adapters and all flags below as YAML, and stop.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Print parameters, memory and network calls of an update, and stop.")]


class Methods(TyperGroup):
    """Commands made of the classes of ``diffx.objectives`` and of adapters, which are imported when one is asked for."""

    def list_commands(self, ctx):
        return list(NAMES[self.name or ""])

    def get_command(self, ctx, cmd_name):
        import diffx

        name = NAMES[self.name or ""].get(cmd_name)
        if name is None:
            return None
        app = typer.Typer(add_completion=False, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]})
        is_adapter = name not in dir(diffx.objectives)  # diffx.LCM is a sampler
        kinds = (getattr(diffx, name), diffx.objectives.Diffusion) if is_adapter else (getattr(diffx.objectives, name),)
        app.command(cmd_name)(_command(kinds, EXAMPLES[cmd_name]))
        return typer.main.get_command(app)


def _command(kinds: tuple[Any, ...], example: str) -> Callable:
    """The command that trains the first of those classes, an objective, or an adapter with the objective that follows it."""
    from ..training.config import TrainConfig
    from ..training.data import DataConfig

    method, is_adapter = kinds[-1], len(kinds) == 2
    teaches = method.has_teacher
    foreign = {"lora_rank", "lora_alpha", "lora_targets", "lora_start", "sample_prompt"} if is_adapter else {"held_out"}

    def command(
        data: Data = None,
        teacher: Teacher = None,
        lora_rank: Rank = None,
        lora_alpha: Alpha = None,
        lora_targets: Targets = None,
        lora_start: Start = None,
        sample_prompt: Prompts = None,
        held_out: HeldOut = None,
        output: Output = Path("outputs/distilled" if teaches else "outputs/trained"),
        report_to: Report = None,
        device: options.Device = None,
        config: Config = None,
        dump_config: Dump = False,
        dry_run: Dry = False,
        as_json: options.Json = False,
        **flags: Any,
    ) -> None:
        import yaml
        from accelerate import PartialState

        from ..conditioning import hints
        from ..training import api

        of_method = {field.name: field for kind in kinds for field in dataclasses.fields(kind)}
        targets = lora_targets.split(",") if lora_targets else None
        what = dict(zip(WHAT, (data, teacher, lora_rank, lora_alpha, targets, lora_start, held_out), strict=True))
        mine = [name for name in WHAT if name not in foreign]
        chosen = merged(config, what | flags, [*mine, *flags], lambda values: _of_run(values, kinds))
        what = {name: chosen.pop(name, "emoji" if name == "teacher" else None) for name in WHAT}
        if dump_config:
            fields = {f.name: f.default for cls in (*kinds, TrainConfig, DataConfig) for f in dataclasses.fields(cls)}
            values = {name: what[name] for name in mine} | fields | chosen
            plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not dataclasses.MISSING}
            typer.echo(yaml.safe_dump(plain, sort_keys=False), nl=False)
            return
        missing = [name for name, field in of_method.items() if field.default is dataclasses.MISSING and name not in chosen]
        if missing:
            raise ValueError(f"{' and '.join('--' + name.replace('_', '-') for name in missing)} must be given; see --help")
        if isinstance(hint := chosen.get("hint"), dict):  # as run.yaml has it: name and options
            chosen["hint"] = hints.get(**hint)
        *adapter, objective = (kind(**{f.name: chosen[f.name] for f in dataclasses.fields(kind) if f.name in chosen}) for kind in kinds)
        rest = {name: value for name, value in chosen.items() if name not in of_method}
        data, teacher, rank, alpha, ends, start, held_out = what.values()
        if dry_run:
            lora = api.make_lora(rank, alpha, ends, start)
            found = api.cost(teacher, objective, lora=lora, adapter=adapter[0] if adapter else None, **rest)
            typer.echo(json.dumps(dataclasses.asdict(found), indent=2) if as_json else str(found))
            return
        rest |= dict(output=output, device=device, report_to=report_to.split(",") if report_to else (), progress=not as_json)
        if adapter:
            trained = api.train(teacher, adapter[0], data, objective=objective, held_out=held_out, **rest)
        else:
            rest |= dict(lora_rank=rank, lora_alpha=alpha, lora_targets=ends, lora_start=start, sample_prompts=sample_prompt)
            trained = (api.distill if teaches else api.train)(teacher, objective, data, **rest)
        if not PartialState().is_main_process:
            return  # one of several says it
        if as_json:
            typer.echo(json.dumps({"model": str(output / "model"), "call_kwargs": trained.call_kwargs, **trained.report}, indent=2))
            return
        typer.echo(f"model:   {output / 'model'}  (stock Diffusers loads it)")
        if adapter:
            typer.echo(f"load it: {output / 'model' / 'adapter.json'} says how")
        typer.echo(f"call it: pipe(..., {', '.join(f'{k}={v!r}' for k, v in trained.call_kwargs.items())})")
        typer.echo(f"samples: {output / 'samples'}" + (f", curve: {output / 'curve.png'}" if adapter else ""))

    first = (kinds[0].__doc__ or "").split("\n\n")[0]
    command.__doc__ = (
        f"{first}\n\n[bold]Example:[/bold] {example}\n\nAn interrupted run goes on with the same command; on several GPUs: "
        "accelerate launch -m diffx ... with the same words."
    )
    fixed = [p for p in inspect.signature(command).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    flags = [p for p in flags_of([*kinds, TrainConfig, DataConfig]) if p.name not in {f.name for f in fixed}]
    fixed = [p for p in fixed if p.name not in foreign]
    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in fixed]
    command.__signature__ = inspect.Signature([*keyword, *flags])  # type: ignore[attr-defined]  # typer reads it
    command.__annotations__ = {p.name: p.annotation for p in [*keyword, *flags]}
    return command


def _of_run(values: Any, kinds: tuple[Any, ...]) -> Any:
    """The flags of a run.yaml, which has them in sections; what has no section "method" is left as it is.

    Args:
        kinds: of the command, an adapter's class if it trains one, and an objective's.

    Raises:
        ValueError: the run is of another method or adapter, or has a section that none has.
    """
    if not isinstance(values, dict) or not isinstance(values.get("method"), dict):
        return values
    if unknown := [name for name in values if name not in SECTIONS]:
        raise ValueError(f"the config has {', '.join(map(str, unknown))} beside method; the run.yaml of a run has {', '.join(SECTIONS)}")
    for name in SECTIONS:
        if name not in WORDS and not isinstance(values.get(name) or {}, dict):
            raise ValueError(f"the config has {values[name]!r} for {name}, which is a section")
    model, adapter, of_method, lora, train, data = (
        dict(values.get(name) or {}) for name in ("model", "adapter", "method", "lora", "train", "data")
    )
    *mine, method = (kind.__name__ for kind in kinds)
    if (name := of_method.pop("name", None)) != method:
        raise ValueError(f"the config is of the method {name}, and this command is {method}'s")
    if (name := adapter.pop("name", None)) != (mine[0] if mine else None):
        theirs, ours = f"the adapter {name}" if name else "no adapter", f"{mine[0]}'s" if mine else "for none"
        raise ValueError(f"the config is of {theirs}, and this command is {ours}")
    if train.get("seed") != data.get("seed"):
        raise ValueError(f"the config has seed={train.get('seed')} in train and {data.get('seed')} in data; --seed is of both")
    what = {"data": values.get("source"), "teacher": model.get("from"), "held_out": values.get("held_out")}
    what |= {f"lora_{name}": value for name, value in lora.items()}
    return {**{name: value for name, value in what.items() if value is not None}, **adapter, **of_method, **train, **data}


distill = typer.Typer(cls=Methods, no_args_is_help=True, help="Make a student that needs fewer network calls; one command per method.")
train = typer.Typer(cls=Methods, no_args_is_help=True, help="Train a model on pictures.")
for group in (distill, train):
    group.callback()(lambda: None)  # typer wants one of a group without commands of its own
