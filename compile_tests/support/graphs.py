"""Captured graphs as text that does not depend on the machine."""

from __future__ import annotations

import re

from torch.fx import GraphModule, Node


def text_of(graph: GraphModule) -> str:
    """Return the code of ``graph`` and its subgraphs without comments, colours and deletions."""
    lines = graph.print_readable(print_output=False).splitlines()
    kept = [re.sub(r";  \w+ = .*None$", "", line.rstrip()) for line in lines]
    return "\n".join(line for line in kept if line and not line.lstrip().startswith("#")) + "\n"


def fcall_nodes(graph: GraphModule) -> list[Node]:
    """Return the calls of the operator in ``graph``."""
    return [node for node in graph.graph.nodes if str(node.target) == "fcall"]


def body_of(graph: GraphModule) -> GraphModule:
    """Return the body of the only call of the operator in ``graph``."""
    (node,) = fcall_nodes(graph)
    return getattr(graph, node.args[0].target)  # type: ignore[no-any-return]
