"""Gradient estimation: DDIM on an average of the last two noise predictions that leans past the newest one."""

try:
    # Not "from diffx ...", and no bare "import" line: those Diffusers reads, and tells to install from PyPI, where another diffx is.
    import diffx.schedulers  # hence this comment
except ImportError as error:
    raise ImportError("this scheduler needs diffx, which is installed from a clone of its repository: `pip install .` there") from error

gradient_estimation = diffx.schedulers.gradient_estimation


class GradientEstimation(diffx.TableScheduler, options=dict(timestep_spacing="trailing"), own=dict(gamma=2.0)):
    """Gradient estimation, one network call per step; for any model that ``diffx.DDIM`` samples."""

    def make_table(self, alpha, sigma, begin):
        rows = gradient_estimation(alpha[begin:], sigma[begin:], self.config.get("gamma", 2.0))
        return diffx.Table(alpha[begin:], sigma[begin:], tuple(rows))
