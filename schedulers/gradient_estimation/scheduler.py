"""Gradient estimation: DDIM on an average of the last two noise predictions that leans past the newest one."""

try:
    from diffx import Row, Table, TableScheduler
except ImportError as error:
    raise ImportError("this scheduler needs diffx, which is installed from a clone of its repository: `pip install .` there") from error


def gradient_estimation(alpha, sigma, gamma):
    """One row per interval of DDIM on gamma * eps_new + (1 - gamma) * eps_old; ``gamma=1`` is DDIM.

    Calls keep eps = (x - alpha x0) / sigma for the next one; the first keeps x0, since pure noise (alpha = 0) says nothing of it.

    Source: Permenter and Yuan 2023 (arXiv:2306.04848), the gradient-estimation sampler; gamma = 2 is its authors' value.
    """
    if not 1 <= gamma <= 3:
        raise ValueError(f"gamma={gamma} must lie between 1 (DDIM) and 3; 2 is its authors' value")
    rows = [Row((sigma[1] / sigma[0], alpha[1] - sigma[1] / sigma[0] * alpha[0]))]
    for k, (a0, s0, a1, s1) in enumerate(zip(alpha[1:], sigma[1:], alpha[2:], sigma[2:])):
        scale, gain = a1 / a0, s1 - a1 / a0 * s0  # DDIM is scale * x + gain * eps
        old = gain * (1 - gamma)
        # The first step was DDIM's own, so that its eps is (x - a0 * x0_old) / s0 here, too.
        weights = (scale, gain * gamma, old) if k else (scale + old / s0, gain * gamma, -old * a0 / s0)
        rows.append(Row(weights, kept=(1 / s0, -a0 / s0)))
    return rows


class GradientEstimation(TableScheduler, options=dict(timestep_spacing="trailing"), own=dict(gamma=2.0)):
    """Gradient estimation, one network call per step; for any model that ``diffx.DDIM`` samples."""

    def make_table(self, alpha, sigma, begin):
        rows = gradient_estimation(alpha[begin:], sigma[begin:], self.config.get("gamma", 2.0))
        return Table(alpha[begin:], sigma[begin:], tuple(rows))
