"""What goes wrong with a model, said in one line. In: nothing. Out: ModelError. Next: `layers.py`."""


class ModelError(Exception):
    """A model, or a file of one, that the user can mend: what is wrong, where, and what would be right."""

    exit_status = 2
