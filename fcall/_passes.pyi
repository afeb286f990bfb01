"""The functions of fcall.passes, in C. These take positional arguments alone."""

from fcall.passes import (
    are_in_in_python as are_in,
)
from fcall.passes import (
    are_plain_in_python as are_plain,
)
from fcall.passes import (
    having_in_python as having,
)
from fcall.passes import (
    look_in_python as look,
)
from fcall.passes import (
    put_back_in_python as put_back,
)
from fcall.passes import (
    put_in_in_python as put_in,
)

REVISION: int

__all__ = ["REVISION", "are_in", "are_plain", "having", "look", "put_back", "put_in"]
