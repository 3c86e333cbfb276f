"""Gradient estimation: DDIM on an average of the last two noise predictions that leans past the newest one."""

try:
    from diffx import Table, TableScheduler
    from diffx.schedulers import gradient_estimation
except ImportError as error:
    raise ImportError("this scheduler needs diffx, which is installed from a clone of its repository: `pip install .` there") from error


class GradientEstimation(TableScheduler, options=dict(timestep_spacing="trailing"), own=dict(gamma=2.0)):
    """Gradient estimation, one network call per step; for any model that ``diffx.DDIM`` samples."""

    def make_table(self, alpha, sigma, begin):
        rows = gradient_estimation(alpha[begin:], sigma[begin:], self.config.get("gamma", 2.0))
        return Table(alpha[begin:], sigma[begin:], tuple(rows))
