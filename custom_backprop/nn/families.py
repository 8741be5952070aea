"""Every module of ours: one line a family. Each family states its ``__all__``."""

from .activation import *
from .attention import *
from .channel_norm import *
from .contrastive import *
from .cross_entropy import *
from .dropout import *
from .embedding import *
from .embedding_bag import *
from .gating import *
from .linear import *
from .linear_cross_entropy import *
from .loss import *
from .mlp import *
from .nll import *
from .norm import *
from .prelu import *
from .rotary import *
from .softmax import *
from .transformer import *
