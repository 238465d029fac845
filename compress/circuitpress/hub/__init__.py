"""Publishing: what is told of a model (`card`), under which terms (`licence`), and how it gets to the Hub (`push`)."""

from .card import Evidence, gather, model_card
from .licence import Terms, terms_of
from .push import Upload, prepare, send

__all__ = ["Evidence", "Terms", "Upload", "gather", "model_card", "prepare", "send", "terms_of"]
