"""How the commands that need a trained head come to their model."""

from __future__ import annotations

import argparse
from typing import TypeVar

from ..checkpoint.hub import resolve_folder
from ..checkpoint.loading import load_model
from ..checkpoint.names import named_class
from ..checkpoint.tokenizer import Tokenizer, read_tokenizer
from ..errors import InputError
from ..model.config import read_config
from ..model.heads import ArceeForQuestionAnswering, ArceeForSequenceClassification, ArceeForTokenClassification

M = TypeVar("M", ArceeForSequenceClassification, ArceeForTokenClassification, ArceeForQuestionAnswering)


def open_classifier(args: argparse.Namespace, model_class: type[M]) -> tuple[M, Tokenizer]:
    """Loads the model that the arguments name, whose head the checkpoint has, or the adapter brings.

    Raises:
        ArceeError: no model is named, it was trained for something else, or cannot be used.
    """
    if args.model is None:
        raise InputError(
            f"no --model was given; expected a checkpoint trained as {model_class.__name__}, a folder or a hub id; the "
            f"bundled demo is none"
        )
    adapter = None if args.adapter_path is None else resolve_folder(args.adapter_path, adapter=True)
    folder = resolve_folder(args.model, revision=args.revision)
    tokenizer = read_tokenizer(folder)
    named = named_class(read_config(folder)) or "no class"
    if adapter is None and named != model_class.__name__:
        raise InputError(
            f"--model {args.model}: config.json names {named}; expected {model_class.__name__}, whose head is trained; "
            f"take such a checkpoint, or an --adapter-path that brings its head"
        )
    return load_model(folder, model_class, args.dtype, adapter_path=adapter), tokenizer
