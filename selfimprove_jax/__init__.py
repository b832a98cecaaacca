"""Language models that improve themselves: see WORKSPACE.md for the tour."""

__version__ = "0.1.0"
