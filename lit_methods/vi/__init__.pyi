from .ease import EASE as EASE
from .mult_vae import MultDAE as MultDAE
from .mult_vae import MultVAE as MultVAE
from .programmable import ProgrammableVI as ProgrammableVI
from .pv_rnn import PVRNN as PVRNN
from .pv_rnn import ErrorRegression as ErrorRegression
from .pv_rnn import PVRNNModule as PVRNNModule
