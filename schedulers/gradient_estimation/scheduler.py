"""Gradient estimation: DDIM on an average of the last two noise predictions that leans past the newest one."""

try:
    from diffx import Row, Table, TableScheduler
except ImportError as error:
    raise ImportError("this scheduler needs diffx, which is installed from a clone of its repository: `pip install .` there") from error


def gradient_estimation(alpha, sigma, gamma):
    """One row per interval of DDIM on gamma * eps_new + (1 - gamma) * eps_old; ``gamma=1`` is DDIM.

    eps_old was seen from an older point. With r = alpha / sigma, and m the x0 that each DDIM step really used,
    eps_old - eps_new = r_new x0_new - r_old x0_old - (r_new - r_old) m_old, so that m is a sum of x0 predictions alone.

    Source: Permenter and Yuan 2023 (arXiv:2306.04848), the gradient-estimation sampler; gamma = 2 is its authors' value.
    """
    if not 1 <= gamma <= 3:
        raise ValueError(f"gamma={gamma} must lie between 1 (DDIM) and 3; 2 is its authors' value")
    rows, used = [], []  # used: the weights of the last m, newest prediction first
    for k, (a0, s0, a1, s1) in enumerate(zip(alpha, sigma, alpha[1:], sigma[1:])):
        share = alpha[k - 1] * s0 / (sigma[k - 1] * a0) if k else 0.0  # r_old / r_new
        used = [gamma, *((1 - gamma) * (1 - share) * w for w in used)] if k else [1.0]
        if k:
            used[1] += (1 - gamma) * share
        keep = s1 / s0
        rows.append(Row((keep, *((a1 - keep * a0) * w for w in used))))
    return rows


class GradientEstimation(TableScheduler, options=dict(timestep_spacing="trailing"), own=dict(gamma=2.0)):
    """Gradient estimation, one network call per step; for any model that ``diffx.DDIM`` samples."""

    def make_table(self, alpha, sigma, begin):
        rows = gradient_estimation(alpha[begin:], sigma[begin:], self.config.get("gamma", 2.0))
        return Table(alpha[begin:], sigma[begin:], tuple(rows))
