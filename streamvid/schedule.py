"""Flow-matching schedule and the few-step "predict x0, re-noise" scheduler of the Self-Forcing family.

    x_t = (1 - sigma) x0 + sigma noise,     flow v = noise - x0,     x0 = x_t - sigma v

Tables are those of the releases: float32, shifted, looked up by nearest timestep, so "timestep 0" is the last row, whose
sigma is 0.00498 at shift 5 and not 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from streamvid.errors import UserError

PREDICTION_TYPES = ("flow_prediction", "sample")


def flow_table(
    rows: int = 1000,
    shift: float = 5.0,
    sigma_max: float = 1.0,
    sigma_min: float = 0.0,
    extra_one_step: bool = True,
    num_train_timesteps: int = 1000,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigmas and timesteps `[rows]`, float32: `s u / (1 + (s - 1) u)` over a linear u (SD3, eq. 23).

    `extra_one_step` divides [sigma_max, sigma_min] into one step more and leaves out its end.
    """
    u = torch.linspace(sigma_max, sigma_min, rows + extra_one_step)[:rows]
    sigmas = shift * u / (1 + (shift - 1) * u)
    return sigmas, sigmas * num_train_timesteps


def training_weights(timesteps: torch.Tensor) -> torch.Tensor:
    """Regression weight per table row: a Gaussian around the middle, minus its minimum, summing to the row count."""
    rows = len(timesteps)
    weights = torch.exp(-2 * ((timesteps - rows / 2) / rows) ** 2)
    weights = weights - weights.min()
    return weights * (rows / weights.sum())


class FewStepFlowScheduler(SchedulerMixin, ConfigMixin):
    """Schedule of a few-step student.

    Args:
        shift: timestep shift of the table.
        denoising_steps: levels of the sampler, descending, before warping (each in 1..num_train_timesteps).
        warp: map the levels through the shifted table (1000, 750, 500, 250 become 1000, 937.5, 833.3, 625 at shift 5).
        sigma_min, extra_one_step: end of the table (`flow_table`).
        prediction_type: what the network predicts, `flow_prediction` (v = noise - x0) or `sample` (x0).
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 5.0,
        denoising_steps: Sequence[float] = (1000, 750, 500, 250),
        warp: bool = True,
        prediction_type: str = "flow_prediction",
        sigma_min: float = 0.0,
        extra_one_step: bool = True,
    ):
        if prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"prediction_type = {prediction_type!r} is not known: choose one of {', '.join(PREDICTION_TYPES)}"
            )
        self.sigmas, self.timesteps = flow_table(
            num_train_timesteps,
            shift,
            sigma_min=sigma_min,
            extra_one_step=extra_one_step,
            num_train_timesteps=num_train_timesteps,
        )
        self.set_steps(denoising_steps)

    def set_steps(self, denoising_steps: Sequence[float]) -> None:
        """Choose the sampler's levels."""
        self.steps = self.warped(denoising_steps)
        self.step_sigmas = tuple(float(self.sigma(torch.tensor(t))) for t in self.steps)

    def warped(self, denoising_steps: Sequence[float]) -> tuple[float, ...]:
        """Timesteps the network sees: entry v is row `num_train_timesteps - v` of the table with a 0 appended."""
        total = self.config.num_train_timesteps
        levels = list(denoising_steps)
        if (
            not levels
            or any(not 0 <= v <= total for v in levels)
            or sorted(set(levels), reverse=True) != levels
        ):
            raise UserError(
                f"denoising_steps = {levels} must be descending numbers between 0 and {total}, e.g. 1000, 750, 500, 250"
            )
        if not self.config.warp:
            return tuple(float(v) for v in levels)
        table = torch.cat([self.timesteps, torch.zeros(1)])
        return tuple(table[[round(total - v) for v in levels]].tolist())

    def unsnapped(self, denoising_steps: Sequence[float]) -> tuple[tuple[float, float], ...]:
        """Timestep and sigma of levels between the table's rows: `s u / (1 + (s - 1) u)` of u = level / 1000.

        Timesteps are cut to whole numbers, as the multistep solvers of the releases do.
        """
        shift, total = self.config.shift, self.config.num_train_timesteps
        shares = (level / total for level in denoising_steps)
        sigmas = (shift * u / (1 + (shift - 1) * u) for u in shares)
        return tuple((float(int(total * sigma)), sigma) for sigma in sigmas)

    def nearest_index(self, timestep: torch.Tensor) -> torch.Tensor:
        """Table row of the nearest timestep (the first on ties), same shape as `timestep`."""
        return (self.timesteps.to(timestep.device) - timestep[..., None]).abs().argmin(-1)

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """Noise level of each timestep, float32."""
        return self.sigmas.to(timestep.device)[self.nearest_index(timestep)]

    def x0_from_output(
        self, output: torch.Tensor, x_t: torch.Tensor, sigma: float | torch.Tensor
    ) -> torch.Tensor:
        """The network's x0, from whatever it predicts. `sigma` is a number or broadcasts to `x_t`.

        Computed in float64 where the device has it, returned in the dtype of the output, as the releases do.
        """
        if self.config.prediction_type == "sample":
            return output
        return _wide(x_t).sub(_wide(sigma) * _wide(output)).to(output.dtype)

    def flow_from_x0(self, x0: torch.Tensor, x_t: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """`(x_t - x0) / sigma`."""
        return ((_wide(x_t) - _wide(x0)) / _wide(sigma)).to(x0.dtype)

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """`(1 - sigma) x0 + sigma noise`, computed in float32, returned in the dtype of the noise."""
        return ((1 - sigma) * x0.float() + sigma * noise.float()).to(noise.dtype)

    def next_sigma(self, timestep: torch.Tensor, to_final: bool = False) -> torch.Tensor:
        """Noise level of the next table row, per timestep; 0 for `to_final`.

        As in the releases: 0 for the whole batch if any of it is at the last row.
        """
        row = self.nearest_index(timestep)
        last = len(self.sigmas) - 1
        if to_final or bool((row == last).any()):
            return torch.zeros_like(row, dtype=self.sigmas.dtype)
        return self.sigmas.to(row.device)[row + 1]

    def euler_step(self, flow: torch.Tensor, x_t: torch.Tensor, sigma, next_sigma) -> torch.Tensor:
        """One Euler step of the flow from `sigma` to `next_sigma`."""
        return x_t + flow * (next_sigma - sigma)


def _wide(x):
    """To float64; MPS has none and stays in float32."""
    if isinstance(x, torch.Tensor):
        return x.float() if x.device.type == "mps" else x.double()
    return x
