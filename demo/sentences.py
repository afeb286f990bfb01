"""The sentences the demo embeds, and which of them are near each other."""

from pathlib import Path

from torch import Tensor

FILE = Path(__file__).with_name("sentences.txt")


def read() -> list[str]:
    """The sentences of `sentences.txt`, one a line; a line `# topic` is a comment."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def nearest(embeddings: Tensor) -> tuple[list[int], list[float]]:
    """For each row of `embeddings` (rows of length 1), the nearest other row and their cosine."""
    cosines = (embeddings @ embeddings.T).fill_diagonal_(-2.0)
    best = cosines.max(dim=1)
    return best.indices.tolist(), best.values.tolist()
