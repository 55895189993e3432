"""Exponentiated gradients: optimizers that keep the sign of every weight (Dale's law), and how to start them."""

from lit_methods.optim.exponentiated_gradient.adamw import AdamWExponentiated
from lit_methods.optim.exponentiated_gradient.gradient import ExponentiatedGradient
from lit_methods.optim.exponentiated_gradient.sign_constrained import SignConstrainedSGD
from lit_methods.optim.exponentiated_gradient.weights import SplitBias, dale_init_, eg_param_groups, lognormal_

__all__ = [
    "AdamWExponentiated",
    "ExponentiatedGradient",
    "SignConstrainedSGD",
    "SplitBias",
    "dale_init_",
    "eg_param_groups",
    "lognormal_",
]
