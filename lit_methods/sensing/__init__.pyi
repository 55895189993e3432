from .matrix_sensing import AsymmetricSensing as AsymmetricSensing
from .matrix_sensing import SymmetricSensing as SymmetricSensing
from .rebalancing import rebalance_factors_ as rebalance_factors_
