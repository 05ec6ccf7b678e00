"""The embedded default: a small pretrained decoder, the text it is judged on, and the run that shows the whole way."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
"""Folder of the embedded model and its tokenizer, as `from_pretrained` reads them."""
