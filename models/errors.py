"""The exception of the models. The command line turns it into its one clear line."""


class ModelError(ValueError):
    """Weights, a configuration or an input do not fit. Its text is one line that says what to do."""
