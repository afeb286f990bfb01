"""Captured graphs as text that does not depend on the machine."""

from __future__ import annotations

import re

from torch.fx import GraphModule


def text_of(graph: GraphModule) -> str:
    """Return the code of ``graph`` and its subgraphs without comments, colours and deletions."""
    lines = graph.print_readable(print_output=False).splitlines()
    kept = [re.sub(r";  \w+ = .*None$", "", line.rstrip()) for line in lines]
    return "\n".join(line for line in kept if line and not line.lstrip().startswith("#")) + "\n"
