"""Lightning callbacks."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.callbacks.cbo_cooling import CBOCooling
    from lit_methods.callbacks.checkpoints import AtomicCheckpointIO, LastCheckpoint
    from lit_methods.callbacks.convergence_curves import ConvergenceCurves
    from lit_methods.callbacks.convergence_rates import ConvergenceRates
    from lit_methods.callbacks.empirical_fisher_monitor import EmpiricalFisherMonitor
    from lit_methods.callbacks.exact_resume import ExactResume
    from lit_methods.callbacks.export_hf import ExportHF
    from lit_methods.callbacks.factor_rebalancing import FactorRebalancing
    from lit_methods.callbacks.landscape_paths import LandscapePaths
    from lit_methods.callbacks.learning_curves import LearningCurves
    from lit_methods.callbacks.mfac_pruning import MFACPruning
    from lit_methods.callbacks.policy_evaluation import PolicyEvaluation
    from lit_methods.callbacks.policy_frames import PolicyFrames
    from lit_methods.callbacks.pruning_curve import PruningCurve
    from lit_methods.callbacks.result_table import ResultTable
    from lit_methods.callbacks.sample_table import SampleTable
    from lit_methods.callbacks.sft_warmup import SFTWarmup
    from lit_methods.callbacks.surrogate_monitor import SurrogateMonitor
    from lit_methods.callbacks.target_capture import TargetCapture
    from lit_methods.callbacks.transport_table import TransportTable
    from lit_methods.callbacks.win_rate import WinRate

__all__ = [
    "AtomicCheckpointIO",
    "CBOCooling",
    "ConvergenceCurves",
    "ConvergenceRates",
    "EmpiricalFisherMonitor",
    "ExactResume",
    "ExportHF",
    "FactorRebalancing",
    "LandscapePaths",
    "LastCheckpoint",
    "LearningCurves",
    "MFACPruning",
    "PolicyEvaluation",
    "PolicyFrames",
    "PruningCurve",
    "ResultTable",
    "SFTWarmup",
    "SampleTable",
    "SurrogateMonitor",
    "TargetCapture",
    "TransportTable",
    "WinRate",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "AtomicCheckpointIO": "checkpoints",
        "CBOCooling": "cbo_cooling",
        "ConvergenceCurves": "convergence_curves",
        "ConvergenceRates": "convergence_rates",
        "EmpiricalFisherMonitor": "empirical_fisher_monitor",
        "ExactResume": "exact_resume",
        "ExportHF": "export_hf",
        "FactorRebalancing": "factor_rebalancing",
        "LandscapePaths": "landscape_paths",
        "LastCheckpoint": "checkpoints",
        "LearningCurves": "learning_curves",
        "MFACPruning": "mfac_pruning",
        "PolicyEvaluation": "policy_evaluation",
        "PolicyFrames": "policy_frames",
        "PruningCurve": "pruning_curve",
        "ResultTable": "result_table",
        "SFTWarmup": "sft_warmup",
        "SampleTable": "sample_table",
        "SurrogateMonitor": "surrogate_monitor",
        "TargetCapture": "target_capture",
        "TransportTable": "transport_table",
        "WinRate": "win_rate",
    },
)
