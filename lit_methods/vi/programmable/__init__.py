"""Programmable variational inference: models, guides and objectives as programs."""

from lit_methods.vi.programmable.checks import GradientCheck, SiteVariance, check_gradient, variance_report
from lit_methods.vi.programmable.diagnostics import effective_sample_size, pareto_k_hat
from lit_methods.vi.programmable.marginal import SIR, Enumeration, marginal
from lit_methods.vi.programmable.module import ProgrammableVI
from lit_methods.vi.programmable.normalization import normalize
from lit_methods.vi.programmable.objectives import (
    Estimate,
    Objective,
    diwhvi,
    elbo,
    forward_kl,
    hvi,
    iwelbo,
    iwhvi,
    log_weights,
    objective,
    renyi,
    reweighted_wake_sleep,
    symmetric,
    vimco,
    wake_p,
    wake_q,
)
from lit_methods.vi.programmable.programs import Prediction, Program, Simulation, Trace, cond, observe, program, sample
from lit_methods.vi.programmable.strategies import ENUM, MVD, REINFORCE, REPARAM, MovingAverage, Strategy
from lit_methods.vi.programmable.tape import batched

__all__ = [
    "ENUM",
    "MVD",
    "REINFORCE",
    "REPARAM",
    "SIR",
    "Enumeration",
    "Estimate",
    "GradientCheck",
    "MovingAverage",
    "Objective",
    "Prediction",
    "Program",
    "ProgrammableVI",
    "Simulation",
    "SiteVariance",
    "Strategy",
    "Trace",
    "batched",
    "check_gradient",
    "cond",
    "diwhvi",
    "effective_sample_size",
    "elbo",
    "forward_kl",
    "hvi",
    "iwelbo",
    "iwhvi",
    "log_weights",
    "marginal",
    "normalize",
    "objective",
    "observe",
    "pareto_k_hat",
    "program",
    "renyi",
    "reweighted_wake_sleep",
    "sample",
    "symmetric",
    "variance_report",
    "vimco",
    "wake_p",
    "wake_q",
]
