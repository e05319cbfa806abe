"""Where training rows come from."""


class DataError(ValueError):
    """Data that cannot be trained on: says where it is, what is wrong and what to do."""
