"""Every optimizer of ours."""

from .adagrad import Adagrad as Adagrad
from .adam import Adam as Adam
from .adam import AdamW as AdamW
from .lion import Lion as Lion
from .rmsprop import RMSprop as RMSprop
from .sgd import SGD as SGD
