"""Complete repositories for the Hub: weights, code, processor, box detector and model card."""

from .export import export_repository
from .upload import upload_repository
from .verify import verify_loading

__all__ = ["export_repository", "upload_repository", "verify_loading"]
