from . import batches as batches
from . import black_box as black_box
from . import callbacks as callbacks
from . import datamodules as datamodules
from . import diffusion as diffusion
from . import games as games
from . import llm as llm
from . import metrics as metrics
from . import nets as nets
from . import online as online
from . import optim as optim
from . import recipes as recipes
from . import rl as rl
from . import sensing as sensing
from . import supervised as supervised
from . import transport as transport
from . import vi as vi

__version__: str
