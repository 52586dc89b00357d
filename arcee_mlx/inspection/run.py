"""inspect_checkpoint: everything that can be said of a checkpoint from its small files and the headers of its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any, get_args

from ..checkpoint.hub import Listing, list_files
from ..checkpoint.names import choose_class
from ..checkpoint.shards import INDEX_FILE
from ..model.config import ArceeConfig
from ..model.decoder import ArceeForCausalLM
from .results import FileFacts, Finding, Inspection, Level
from .settings import describe_context, estimate_memory, read_settings
from .text import read_text_side
from .weights import Headers, compare, measure_weights, read_headers

_USES: dict[str, Any] = {
    "config.json": "config",
    "generation_config.json": "config",
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "special_tokens_map.json": "tokenizer",
    "added_tokens.json": "tokenizer",
    "chat_template.jinja": "template",
    "additional_chat_templates/*.jinja": "template",
    "README.md": "document",
    "LICENSE*": "document",
    "NOTICE*": "document",
}


def inspect_checkpoint(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Inspection:
    """Says what a checkpoint is and what is odd about it or missing, whether or not it can be loaded.

    No tensor is read (but head and embedding where config.json ties them and a folder has both). Of a checkpoint on the
    hub the small files are downloaded, and the headers of the weights by range request.

    Args:
        path_or_id: a checkpoint folder, or a Hugging Face Hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        InputError: neither a folder nor an id, or a revision that cannot be one.
        CheckpointError: no such folder.
        HubError: the hub refused, or could not be reached and there is no whole cached copy.
    """
    listing = list_files(path_or_id, revision=revision)
    values, config, findings = read_settings(listing.folder)
    headers, problems = read_headers(listing)
    findings += problems
    table = values.get("quantization") or values.get("quantization_config")
    weights = measure_weights(headers, table if isinstance(table, Mapping) else {})
    context = memory = None
    if config is not None:
        context, problems = describe_context(config)
        findings += problems
        if weights is not None or headers.is_whole:
            findings += compare(config, headers, listing)
        if weights is not None and context is not None:
            memory = estimate_memory(config, weights.total.size_bytes, context)
    tokenizer, sampling, problems = read_text_side(listing, config, is_needed=config is None or _is_causal(config))
    findings += problems
    files = _describe_files(listing, headers)
    findings += _explain_files(files)
    levels = get_args(Level)
    return Inspection(
        name=os.fspath(path_or_id),
        folder=str(listing.folder),
        commit=listing.commit,
        findings=tuple(
            replace(
                finding, text=finding.text.replace(f"{listing.folder}{os.sep}", "").replace(f"{listing.folder}: ", "")
            )
            for finding in sorted(findings, key=lambda finding: levels.index(finding.level))
        ),
        config=values,
        weights=weights,
        context=context,
        memory=memory,
        tokenizer=tokenizer,
        sampling=sampling,
        files=files,
    )


def _is_causal(config: ArceeConfig) -> bool:
    try:
        return choose_class(config) is ArceeForCausalLM
    except Exception:  # reported by `compare`
        return False


def _describe_files(listing: Listing, headers: Headers) -> dict[str, FileFacts]:
    uses = _USES | dict.fromkeys((*headers.files, INDEX_FILE), "weights")
    return {
        name: FileFacts(
            size_bytes=size_bytes, use=next((use for pattern, use in uses.items() if fnmatch(name, pattern)), None)
        )
        for name, size_bytes in listing.size_bytes.items()
    }


def _explain_files(files: Mapping[str, FileFacts]) -> list[Finding]:
    findings: list[Finding] = []
    passed_over = [name for name, file in files.items() if file.use is None]
    kinds = {
        "weights that are not part of this checkpoint": (".safetensors",),
        "never read, only safetensors are": (
            ".bin",
            ".pt",
            ".pth",
            ".gguf",
            ".npz",
            ".h5",
            ".msgpack",
            ".onnx",
            ".pkl",
        ),
        "code that is never run": (".py",),
    }
    for reason, suffixes in kinds.items():
        if names := [name for name in passed_over if name.endswith(suffixes)]:
            findings.append(Finding("note", "files", f"{', '.join(names)}: {reason}"))
    return findings
