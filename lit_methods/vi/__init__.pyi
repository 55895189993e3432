from .ease import EASE as EASE
from .mult_vae import MultDAE as MultDAE
from .mult_vae import MultVAE as MultVAE
from .programmable import ProgrammableVI as ProgrammableVI
