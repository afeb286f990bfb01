"""The one mistake a user of the demo can make."""


class UsageError(Exception):
    """The demo cannot start as asked; the message is one line that says what to do."""
