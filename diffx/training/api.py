"""``distill`` and ``train``: a model, a method and data in, a stock Diffusers model out."""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState

from ..calibration.problem import sketch
from ..conditioning.adapter import AdaptedFamily, Adapter
from ..families import Family, family_of
from ..loading import EMBEDDED_SAMPLERS, SHOWN, load_pipeline
from ..objectives.diffusion import Diffusion
from ..objectives.objective import Inference, Objective
from .adherence import Adherence, hold_out
from .cache import make_cache
from .config import TrainConfig
from .cost import Cost, cost_of
from .data import DataConfig
from .export import Form, export
from .loop import Training
from .networks import Lora, Networks
from .pictures import picture_size
from .run import Metric, Run

if TYPE_CHECKING:
    from ..hub.publish import Published

SECTIONS = {"train": TrainConfig, "data": DataConfig}
RENDERINGS = 3  # of each glyph of the embedded model
HERE = ("cache",)  # options that say where something lies, not what it is


@dataclass(frozen=True)
class Trained:
    """What training came to.

    ``pipeline`` is a stock pipeline with the trained network, to be called with ``call_kwargs``; ``report`` is what was measured,
    and ``folder`` holds the run: run.yaml, log.jsonl, checkpoints, samples, and the model itself in ``folder / "model"``.
    """

    pipeline: Any
    call_kwargs: dict[str, Any]
    report: dict[str, Any]
    folder: Path
    networks: Networks
    inference: Inference

    def push_to_hub(self, repo_id: str, **options: Any) -> Published:
        """Upload the result with a card; options and errors are those of ``diffx.push_to_hub``."""
        from ..hub.publish import push_to_hub

        return push_to_hub(self.folder, repo_id, **options)

    def save_pretrained(self, folder: str | Path, *, form: Form | None = None, kohya: bool = False) -> Path:
        """Write the result for stock Diffusers: "full", "lora", "merged" or "adapter"; None is the smallest that it loads.

        Raises:
            ValueError: this result has no such form, or ``folder`` holds something else.
        """
        return export(self.networks, self.inference, folder, form, kohya=kohya)


def distill(
    teacher: Any = None,
    method: Objective | None = None,
    data: Any = None,
    *,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_targets: Sequence[str] | None = None,
    lora_start: str | Path | None = None,
    metric: Metric | None = None,
    sample_prompts: Sequence[str] | None = None,
    output: str | Path = "outputs/distilled",
    device: str | None = None,
    report_to: Sequence[str] = (),
    progress: bool = True,
    **options: Any,
) -> Trained:
    """A student of ``teacher`` that needs fewer network calls, or none for guidance, as a stock Diffusers model.

    The same call goes on where an interrupted one stood, bit for bit.

    Args:
        teacher: a pipeline, its folder or its Hub id; None is the embedded model. The weights of a pipeline that is handed in are
            used, not copied: LoRAs that act in it teach, too, and are added to its weights for good, others are unloaded. Nothing is
            put into its network.
        method: of ``diffx.objectives``, such as ``Progressive(start=32, end=4)`` or ``LCM()``.
        data: a folder of pictures, a data set, a list of prompts, or None: the teacher makes the samples, and the embedded model
            has its own pictures; see ``DataConfig``.
        lora_rank: train adapters of this rank; None trains the whole network. ``lora_alpha`` (None: the rank) is their factor times
            the rank, ``lora_targets`` ends of the names of their layers (None: the family's), ``lora_start`` the folder of a LoRA of
            that kind to begin with, such as an earlier run's, or "emoji_progressive_4".
        metric: (stock pipeline, call arguments) -> a figure of which less is better; measured every ``evaluate_every`` steps, and
            the best checkpoint is the result.
        sample_prompts: of the sample sheets.
        report_to: accelerate's trackers, such as "tensorboard", "wandb" or "trackio", beside log.jsonl.
        options: every field of ``TrainConfig`` and ``DataConfig``.

    Raises:
        ValueError: something does not fit; before any work.
        FloatingPointError: a loss that is not finite; the last good checkpoint stays.
        KeyboardInterrupt: after Ctrl-C or SIGTERM; the step it stopped after is saved.
    """
    if not isinstance(method, Objective):
        raise ValueError(f"method={method!r} is no training method; pass one of diffx.objectives, such as Progressive(start=8, end=4)")
    if not method.has_teacher:
        raise ValueError(f"{type(method).__name__} has no teacher; diffx.train(model, {type(method).__name__}(...), data) trains with it")
    lora = make_lora(lora_rank, lora_alpha, lora_targets, lora_start)
    return _run(teacher, method, data, lora, metric, sample_prompts, output, device, report_to, progress, options)


def train(
    model: Any = None,
    trains: Objective | Adapter | None = None,
    data: Any = None,
    *,
    objective: Objective | None = None,
    held_out: Any = None,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_targets: Sequence[str] | None = None,
    lora_start: str | Path | None = None,
    metric: Metric | None = None,
    sample_prompts: Sequence[str] | None = None,
    output: str | Path = "outputs/trained",
    device: str | None = None,
    report_to: Sequence[str] = (),
    progress: bool = True,
    **options: Any,
) -> Trained:
    """``model`` trained on data: its network, a LoRA in it, or a ControlNet or IP-Adapter beside it; other arguments as in ``distill``.

    Adapters are measured on pictures that are kept from training: how much each sample follows what it was shown, less how much it
    follows what others were shown; the best checkpoint by that, or by ``metric``, is the result.

    Args:
        trains: an objective trains the network, and None is ``Diffusion()``; ``ControlNet()`` or ``IPAdapter()`` train one, and the
            network stays as it is.
        objective: of an adapter; None is ``Diffusion()``.
        held_out: pictures to measure an adapter on, as ``data``; None keeps ``num_held_out`` of the data for it.
    """
    adapter = trains if isinstance(trains, Adapter) else None
    if adapter is None:
        if held_out is not None:
            raise ValueError("held_out is for adapters, which are measured on those pictures; networks are measured by a metric")
        if objective is not None:
            raise ValueError(f"objective={objective!r} is for adapters; what trains the network is the second argument")
        if not isinstance(trains, Objective | None):
            raise ValueError(f"trains={trains!r} is nothing to train; pass Diffusion(), ControlNet() or IPAdapter()")
        objective = trains
    elif sample_prompts:
        raise ValueError("sample_prompts are of networks; the sheets of adapters show the held-out pictures, with their own captions")
    elif lora_rank is not None:
        raise ValueError(f"lora_rank={lora_rank} trains a LoRA in the network, which stays as it is beside a {type(adapter).__name__}")
    if data is None and model not in (None, "emoji"):
        raise ValueError("data is missing: a folder of pictures, a data set, or a list of dicts with image and text")
    lora = make_lora(lora_rank, lora_alpha, lora_targets, lora_start)
    objective = objective or Diffusion()
    return _run(model, objective, data, lora, metric, sample_prompts, output, device, report_to, progress, options, adapter, held_out)


def cost(model: Any, objective: Objective, *, lora: Lora | None = None, adapter: Adapter | None = None, **options: Any) -> Cost:
    """What one update of such a training costs: parameters, memory of weights and optimizer, network calls; nothing is trained."""
    sections = split(options)
    family = family_of(load_pipeline(model, device="cpu")) if not _is_pipeline(model) else family_of(model)
    family = adapter.wrap(family) if adapter else family
    return cost_of(family, objective, lora, sections["train"], picture_size(family, sections["data"].resolution))


def make_lora(
    rank: int | None, alpha: float | None = None, targets: Sequence[str] | None = None, start: str | Path | None = None
) -> Lora | None:
    """The adapters that are asked for.

    Raises:
        ValueError: an option of adapters without a rank, or ``start`` is not there.
    """
    if rank is None:
        for name, value in (("lora_alpha", alpha), ("lora_targets", targets), ("lora_start", start)):
            if value is not None:
                raise ValueError(f"{name}={value!r} without lora_rank, which says that adapters are trained at all")
        return None
    if start is not None and str(start) not in EMBEDDED_SAMPLERS and not Path(start).exists():
        raise ValueError(f"lora_start={str(start)!r} is not there; give the folder of a LoRA, or 'emoji_progressive_4', the package's own")
    return Lora(rank=rank, alpha=alpha, targets=targets, start=None if start is None else str(start))


def split(options: Mapping[str, Any]) -> dict[str, Any]:
    """A ``TrainConfig`` and a ``DataConfig`` of one set of options; ``seed`` is of both.

    Raises:
        ValueError: an option that neither has, with the nearest one that exists.
    """
    names = {section: {field.name for field in fields(cls)} for section, cls in SECTIONS.items()}
    known = sorted(set().union(*names.values()))
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *inspect.signature(distill).parameters], 1)
            raise ValueError(f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"))
    return {section: cls(**{k: v for k, v in options.items() if k in names[section]}) for section, cls in SECTIONS.items()}


def describe(
    model: Any, family: Family, objective: Objective, lora: Lora | None, data: Any, sections: Mapping[str, Any], held_out: Any = None
) -> dict[str, Any]:
    """All that a run's weights depend on, as plain values: what run.yaml holds, and what a resume compares.

    ``model`` is where it came from, for those who begin the run anew; a resume compares its weights.
    """
    settings = {section: {k: v for k, v in asdict(config).items() if k not in HERE} for section, config in sections.items()}
    method = {"name": type(objective).__name__, **asdict(objective)}
    loaded = {"from": _said(model), "pipeline": type(family.pipe).__name__, "weights": sketch(family.denoiser)}
    adapter = {"adapter": family.adapter.describe()} if isinstance(family, AdaptedFamily) else {}
    source = {"source": _said(data)} | ({"held_out": _said(held_out)} if adapter else {})
    return {"model": loaded, **adapter, "method": method, "lora": asdict(lora) if lora else None, **source, **settings}


def _said(given: Any) -> str | None:
    """What a model or data was said to be: its path or id, or what kind of object it is."""
    return None if given is None else str(given) if isinstance(given, str | Path) else type(given).__name__


def _run(
    model: Any, objective: Objective, data: Any, lora: Lora | None, metric: Metric | None, prompts: Sequence[str] | None,
    output: str | Path, device: str | None, report_to: Sequence[str], progress: bool, options: Mapping[str, Any],
    adapter: Adapter | None = None, held_out: Any = None,
) -> Trained:  # fmt: skip
    sections, folder = split(options), Path(output)
    config: TrainConfig = sections["train"]
    with precision(config.mixed_precision):
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision, cpu=device == "cpu", log_with=list(report_to) or None, project_dir=str(folder)
        )
        check_whole(accelerator)
        pipe = model if _is_pipeline(model) else load_pipeline(model, device="cpu")
        fuse_loras(pipe)
        pipe.to(accelerator.device)
        pipe = pipe if pipe is not model else with_own_network(pipe)
        family = adapter.wrap(family_of(pipe)) if adapter else family_of(pipe)
        described = describe(model, family, objective, lora, data, sections, held_out)
        size = picture_size(family, sections["data"].resolution)
        shown = progress and accelerator.is_main_process
        if data is None and model in (None, "emoji"):
            data = embedded_pictures()
        if adapter is None and sections["data"].num_held_out is not None:
            raise ValueError("num_held_out is for adapters, which are measured on those pictures; networks are measured by a metric")
        if isinstance(family, AdaptedFamily) and not _is_examples(data):
            data, held = hold_out(family, data, held_out, sections["data"])
            metric = Adherence(family, held, size, metric, seed=sections["data"].seed)
            prompts = metric.texts
        examples: Any = data if _is_examples(data) else make_cache(data, family, sections["data"], progress=shown)
        nets = Networks(family, objective, lora, size=size)
        training = Training(nets, examples, config, accelerator)
        if report_to:
            accelerator.init_trackers("diffx", config=json.loads(json.dumps(described)))
        with training.kernels:
            report = Run(training, folder, described, metric, prompts, progress, from_start=adapter is not None).go()
        if report_to:
            accelerator.end_training()
        for role, network in nets.modules.items():
            nets.modules[role] = accelerator.unwrap_model(network, keep_fp32_wrapper=False)
        nets.release()
        pipeline, call_kwargs = training.result()
        trained = Trained(pipeline, call_kwargs, report, folder, nets, nets.objective.inference(family))
        if accelerator.is_main_process:
            trained.save_pretrained(folder / "model")
            if isinstance(metric, Adherence):
                metric.shown[0].save(folder / SHOWN)
        accelerator.wait_for_everyone()
        return trained


@contextlib.contextmanager
def precision(mixed_precision: str) -> Iterator[None]:
    """Accelerate keeps one precision for a process; inside it is this one, and afterwards what it was."""
    state = AcceleratorState._shared_state
    before = dict(state)
    if before.get("_mixed_precision") == mixed_precision:
        yield
        return
    state.clear()
    try:
        yield
    finally:
        state.clear()
        state.update(before)


def check_whole(accelerator: Accelerator) -> None:
    """Refuse, before any work, processes that each hold a part of the weights: samples and exports need them whole on one."""
    kind = accelerator.distributed_type
    plugin = accelerator.state.deepspeed_plugin if kind == DistributedType.DEEPSPEED else None
    if kind in (DistributedType.FSDP, DistributedType.MEGATRON_LM) or (plugin is not None and plugin.zero_stage == 3):
        raise ValueError(
            f"accelerate is configured for {kind.value}, which leaves each process a part of the weights, and those are not sampled or "
            "exported yet; use plain data parallelism (accelerate launch --multi_gpu), with lora_rank and gradient_checkpointing where "
            "memory is short"
        )


def embedded_pictures() -> list[dict[str, Any]]:
    """What the embedded model was trained on, each glyph in a few renderings: what it is trained further on where no data is given."""
    from .. import glyphs

    return [{"image": made.image(), "text": made.caption()} for made in glyphs.training_renderings(RENDERINGS, seed=0)]


def with_own_network(pipe: Any) -> Any:
    """The pipeline with other modules for a network, on the same weights: what training puts into them stays out of the caller's."""
    made, name = copy.copy(pipe), family_of(pipe).network
    network = getattr(pipe, name)
    weights = {id(weight): weight for weight in (*network.parameters(), *network.buffers())}
    setattr(made, name, copy.deepcopy(network, weights))
    return made


def fuse_loras(pipe: Any) -> None:
    """Add the LoRAs that act in a pipeline to its weights, text encoders' included, and unload all: the same predictions, plain layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = {name: getattr(pipe, name, None) for name in getattr(pipe, "_lora_loadable_modules", ())}
    layers = {
        name: [layer for layer in part.modules() if isinstance(layer, BaseTunerLayer)] for name, part in parts.items() if part is not None
    }
    if acting := [name for name, found in layers.items() if any(not layer.disable_adapters for layer in found)]:
        pipe.fuse_lora(components=acting)  # by name: some pipelines leave out their text encoders
    if any(layers.values()):
        pipe.unload_lora_weights()


def _is_pipeline(model: Any) -> bool:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    return isinstance(model, DiffusionPipeline)


def _is_examples(data: Any) -> bool:
    return callable(getattr(data, "read", None)) and not isinstance(data, str | Path)
