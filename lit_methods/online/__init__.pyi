from .imitation import OnlineImitation as OnlineImitation
from .learning import OnlineLearning as OnlineLearning
from .learning import run_online as run_online
