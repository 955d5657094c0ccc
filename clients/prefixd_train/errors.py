"""What a user of the trainer can set right. The ``prefixd`` command shows the message alone."""

from __future__ import annotations

from prefixd import InvalidArgumentError

__all__ = ["DataError", "TooLongError", "TrainError"]


class TrainError(InvalidArgumentError):
    """Settings, a folder or a model with which there is no training.

    ::

        TrainError
        └── DataError           a file of examples: names it, the line and the value
            └── TooLongError    a row that does not fit the LM beside its prefix
    """


class DataError(TrainError):
    pass


class TooLongError(DataError):
    pass
