"""The exceptions. They live in the lowest layer that serving installs, so that every layer may raise them.

LivemomentsError        root: one clear line for the user, exit code 2
  SourceError           a video source cannot be read, has no video, or died for good
  BundleError           an engine bundle is missing, damaged or does not fit
  InputError            a value the user gave is wrong: query, threshold, hop, file, address
    LimitError          it is right, and one more than there may be
  LogError              events cannot be stored, or read back: the disk is full, or fails
"""


class LivemomentsError(Exception):
    """Root of what this project raises for a user to read. Its text is one line that says what to do."""


class SourceError(LivemomentsError):
    """A video source cannot be opened, carries no video, or died and did not come back."""


class BundleError(LivemomentsError):
    """An engine bundle is missing, damaged, or made for something else."""


class InputError(LivemomentsError):
    """A value given by the user is out of its range or malformed."""


class LimitError(InputError):
    """There are as many as there may be: streams, queries, subscriptions."""


class LogError(LivemomentsError):
    """The event log cannot store or read: the disk is full or fails. What was to be stored was not, none of it."""
