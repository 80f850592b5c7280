"""The OpenAI API, for its unmodified clients."""

from gorgon_gateway.openai.errors import error_body
from gorgon_gateway.openai.router import PREFIX, REQUEST_MODELS, make_router

__all__ = ["PREFIX", "REQUEST_MODELS", "error_body", "make_router"]
