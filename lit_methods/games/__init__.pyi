from .matrix_game import MatrixGame as MatrixGame
from .preference import exploitability as exploitability
from .preference import nash_md as nash_md
from .preference import prox_step as prox_step
from .preference import regularized_nash as regularized_nash
from .preference import solve_preference_game as solve_preference_game
from .preference_module import PreferenceGame as PreferenceGame
from .ring_gan import RingGAN as RingGAN
