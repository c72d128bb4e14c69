"""llmvis: distributed image retrieval and synthesis with a language model in the middle."""

__version__ = "0.1.0"
