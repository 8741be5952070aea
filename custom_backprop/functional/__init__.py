"""Functions with the names and signatures of ``torch.nn.functional``, each with a backward written
by hand. One file an op family."""

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
from .normalize import *
from .normalize import __all__ as _normalize
from .prelu import *
from .prelu import __all__ as _prelu
from .rotary import *
from .rotary import __all__ as _rotary
from .softmax import *
from .softmax import __all__ as _softmax

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
    *_normalize,
    *_prelu,
    *_rotary,
    *_softmax,
]
