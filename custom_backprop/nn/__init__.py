"""Drop-in modules: subclasses of the ``torch.nn`` class that override only ``forward``. One file
per family of ops."""

from . import utils as utils
from .activation import *
from .activation import __all__ as _activation
from .attention import *
from .attention import __all__ as _attention
from .channel_norm import *
from .channel_norm import __all__ as _channel_norm
from .contrastive import *
from .contrastive import __all__ as _contrastive
from .cross_entropy import *
from .cross_entropy import __all__ as _cross_entropy
from .dropout import *
from .dropout import __all__ as _dropout
from .embedding import *
from .embedding import __all__ as _embedding
from .embedding_bag import *
from .embedding_bag import __all__ as _embedding_bag
from .gating import *
from .gating import __all__ as _gating
from .linear import *
from .linear import __all__ as _linear
from .linear_cross_entropy import *
from .linear_cross_entropy import __all__ as _linear_cross_entropy
from .loss import *
from .loss import __all__ as _loss
from .mlp import *
from .mlp import __all__ as _mlp
from .nll import *
from .nll import __all__ as _nll
from .norm import *
from .norm import __all__ as _norm
from .prelu import *
from .prelu import __all__ as _prelu
from .refuse import refuse as _refuse
from .rotary import *
from .rotary import __all__ as _rotary
from .softmax import *
from .softmax import __all__ as _softmax
from .transformer import *
from .transformer import __all__ as _transformer

__all__ = [
    *_activation,
    *_attention,
    *_channel_norm,
    *_contrastive,
    *_cross_entropy,
    *_dropout,
    *_embedding,
    *_embedding_bag,
    *_gating,
    *_linear,
    *_linear_cross_entropy,
    *_loss,
    *_mlp,
    *_nll,
    *_norm,
    *_prelu,
    *_rotary,
    *_softmax,
    *_transformer,
]

for _name in __all__:
    _refuse(globals()[_name])
