"""The error class of this package."""


class ModelError(Exception):
    """A mistake of the user in a model or a file of one: what is wrong, where, and what would be right."""

    exit_status = 2
