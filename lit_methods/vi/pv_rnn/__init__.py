"""PV-RNN: a variational recurrent network whose posterior is fitted to prediction errors."""

from lit_methods.vi.pv_rnn.error_regression import ErrorRegression, WindowLoss
from lit_methods.vi.pv_rnn.module import PVRNNModule, Recognition
from lit_methods.vi.pv_rnn.network import PVRNN, PVRNNOutput
from lit_methods.vi.pv_rnn.softmax_code import SoftmaxCode
from lit_methods.vi.pv_rnn.vrnn import VRNN

__all__ = ["PVRNN", "VRNN", "ErrorRegression", "PVRNNModule", "PVRNNOutput", "Recognition", "SoftmaxCode", "WindowLoss"]
