"""How a class's options become its signature and its config, in Diffusers' words, and come back from any other class's config."""

import difflib
import inspect
import math
from typing import Any, ClassVar

from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin

from .process import is_flow

# Every option that describes a model or a grid, by Diffusers' names and with its defaults. A class adds its twin's own.
COMMON: dict[str, Any] = dict(
    num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", trained_betas=None,
    prediction_type="epsilon", rescale_betas_zero_snr=False,
    timestep_spacing="linspace", steps_offset=0, timestep_type="discrete", interpolation_type="linear", final_sigmas_type="zero",
    use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False, use_lu_lambdas=False,
    sigma_min=None, sigma_max=None, lambda_min_clipped=-math.inf,
    use_flow_sigmas=False, shift=1.0, flow_shift=1.0, shift_terminal=None, invert_sigmas=False, stochastic_sampling=False,
    use_dynamic_shifting=False, time_shift_type="exponential",
    base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
)  # fmt: skip
# Options only diffx has. They enter a config only where given, so that stock classes read our configs without a warning.
OWN: dict[str, Any] = dict(
    seed=None, check_finite=False, track_error=False, spacing=None, spacing_rho=None, spacing_alpha=None, spacing_beta=None
)


class Configured(SchedulerMixin, ConfigMixin):
    """A Diffusers scheduler whose keyword-only options are given with the class line: ``options=`` (Diffusers' words), ``own=``."""

    config_name = "scheduler_config.json"
    # All of Diffusers' interchangeable classes but the one that cannot be imported without torchsde.
    _compatibles: ClassVar[list[str]] = [e.name for e in KarrasDiffusionSchedulers if e.name != "DPMSolverSDEScheduler"]
    config: Any  # ConfigMixin's frozen dict, whose keys are known only to the options below
    options: ClassVar[dict[str, Any]] = COMMON
    own_options: ClassVar[dict[str, Any]] = OWN

    def __init_subclass__(cls, options: dict[str, Any] | None = None, own: dict[str, Any] | None = None) -> None:
        """Collect the options and show them as the signature of ``__init__``, which Diffusers' config loading inspects."""
        super().__init_subclass__()
        cls.options = cls.options | (options or {})
        cls.own_options = cls.own_options | (own or {})

        def init(self, **given: Any) -> None:
            self._configure(given)
            self._set_up()

        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        keywords = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v) for k, v in (cls.options | cls.own_options).items()]
        init.__signature__ = inspect.Signature([first, *keywords])  # type: ignore[attr-defined]  # functions accept the attribute
        cls.__init__ = init  # type: ignore[method-assign]  # one body, a signature per class

    def _configure(self, given: dict[str, Any]) -> None:
        private = {k: v for k, v in given.items() if k.startswith("_")}  # they ride along unread, as in Diffusers
        public = {k: v for k, v in given.items() if k not in private}
        _refuse_unknown(type(self).__name__, public, self.options | self.own_options)
        if public.get("beta_schedule") == "quadratic":
            public["beta_schedule"] = "scaled_linear"  # Diffusers' name of the same thing is what is saved
        own = {k: v for k, v in public.items() if k in self.own_options and v != self.own_options[k]}
        stock = {k: v for k, v in public.items() if k in self.options}
        # Whether x0 is bounded belongs to the model: it is written even where it is the default, so that it comes back from
        # classes that know no clipping. Diffusers leaves the list out of a config that gives every option, and so do we.
        defaulted = [k for k in self.options if k not in stock and k != "clip_sample"]
        marked = {"_use_default_values": defaulted} if defaulted else {}
        self.register_to_config(**{**private, **self.options, **stock, **own, **marked})

    def _set_up(self) -> None:
        """What is left to do at construction, once ``config`` is there."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler for the model that a Diffusers scheduler config describes; ``kwargs`` override single options.

        A flow config stays one, whichever class it came from. The config of a scheduler that knows no clipping brings none.

        Raises:
            ValueError: an option that this class does not have (with the nearest name), or a config for networks with
                EDM preconditioning (``sigma_data``), which none of our classes serves.
        """
        if config is None or isinstance(config, str):
            raise ValueError(f"from_config takes the config of a scheduler, e.g. {cls.__name__}.from_config(pipe.scheduler.config)")
        if "sigma_data" in config:
            raise ValueError("this config is for networks with EDM preconditioning (sigma_data), which diffx does not sample")
        _refuse_unknown(cls.__name__, {k: v for k, v in kwargs.items() if not k.startswith("_")}, cls.options | cls.own_options)
        if "clip_sample" in cls.options and "clip_sample" not in config:  # its x0 may be unbounded latents
            kwargs.setdefault("clip_sample", False)
        if kwargs.get("spacing") is not None and "timestep_spacing" not in kwargs:
            config = {k: v for k, v in config.items() if k != "timestep_spacing"}  # replaced, not contradicted
        inferred = is_flow({**config, **kwargs}) and "prediction_type" not in kwargs
        if inferred:
            kwargs["prediction_type"] = "flow_prediction"
        made: Any = super().from_config(config, return_unused_kwargs=True, **kwargs)
        scheduler, unused = made
        if inferred and ("beta_schedule" not in config or "prediction_type" in config.get("_use_default_values", ())):
            # Stock flow schedulers have no such key: mark it as one they need not see when the config goes back to them.
            scheduler.register_to_config(_use_default_values=[*scheduler.config.get("_use_default_values", ()), "prediction_type"])
        return (scheduler, unused) if return_unused_kwargs else scheduler


def _refuse_unknown(name: str, given: dict[str, Any], known: dict[str, Any]) -> None:
    for option in given:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its options are {', '.join(sorted(known))}"
            raise ValueError(f"{name} has no option {option!r}; {hint}")
