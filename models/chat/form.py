"""The two ways in which conversations are written in harmony; models/chat/render.py says where they differ."""

from enum import StrEnum


class Form(StrEnum):
    hub = "hub"  # as the chat template of the hub's checkpoints does
    library = "library"  # as openai-harmony does
