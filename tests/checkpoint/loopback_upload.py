"""The half of a loopback hub that takes uploads: who asks, new repositories, LFS objects, commits."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopback_hub import LoopbackHub, _Handler

TOKEN = "hf_loopback"


@dataclass
class Uploads:
    """What the hub lets in, and what came.

    Attributes:
        can_write: whether the account may write; else every write is refused with 403.
        break_at: kind of request that gets 500: "create", "preupload", "batch", "object" or "commit".
        objects: LFS objects by SHA-256.
        commits: messages, in order.
    """

    can_write: bool = True
    break_at: str | None = None
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


def answer_upload(handler: _Handler, hub: LoopbackHub, path: str, body: bytes) -> bool:
    """Answers a request if it belongs to an upload."""
    uploads = hub.uploads
    if path == "api/whoami-v2":
        if handler.headers.get("Authorization") != f"Bearer {TOKEN}":
            handler._send(401)
        else:
            handler._send_json({"name": "me", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        return True
    if path == "api/validate-yaml":
        handler._send_json({"warnings": [], "errors": []})
        return True
    kind, repo_id = _read_kind(path)
    if kind is None:
        return False
    if handler.headers.get("Authorization") != f"Bearer {TOKEN}" and kind != "object":
        handler._send(401)
    elif not uploads.can_write:
        handler._send(403)
    elif uploads.break_at == kind:
        handler._send(400)
    else:
        _ACTIONS[kind](handler, hub, repo_id, body)
    return True


def _read_kind(path: str) -> tuple[str | None, str]:
    if path == "api/repos/create":
        return "create", ""
    if path.startswith("lfs-object/"):
        return "object", path.removeprefix("lfs-object/")
    if path.endswith(".git/info/lfs/objects/batch"):
        return "batch", path.removesuffix(".git/info/lfs/objects/batch")
    for kind in ("preupload", "commit"):
        repo_id, found, _ = path.removeprefix("api/models/").partition(f"/{kind}/")
        if found and path.startswith("api/models/"):
            return kind, repo_id
    return None, ""


def _create(handler: _Handler, hub: LoopbackHub, repo_id: str, body: bytes) -> None:
    asked = json.loads(body)
    repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
    if repo_id in hub.repos:
        handler._send(409, json.dumps({"error": "You already created it", "url": f"{hub.url}/{repo_id}"}).encode())
        return
    hub.add(repo_id, {})
    handler._send_json({"url": f"{hub.url}/{repo_id}", "name": repo_id, "id": repo_id})


def _preupload(handler: _Handler, hub: LoopbackHub, repo_id: str, body: bytes) -> None:
    files = [
        {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False}
        for f in json.loads(body)["files"]
    ]  # fmt: skip
    handler._send_json({"files": files})


def _batch(handler: _Handler, hub: LoopbackHub, repo_id: str, body: bytes) -> None:
    objects = [
        {**o, "actions": {"upload": {"href": f"{hub.url}/lfs-object/{o['oid']}"}}} for o in json.loads(body)["objects"]
    ]
    handler._send_json({"transfer": "basic", "objects": objects})


def _object(handler: _Handler, hub: LoopbackHub, oid: str, body: bytes) -> None:
    assert hashlib.sha256(body).hexdigest() == oid
    hub.uploads.objects[oid] = body
    handler._send(200)


def _commit(handler: _Handler, hub: LoopbackHub, repo_id: str, body: bytes) -> None:
    repo = hub.repos[repo_id]
    files = dict(repo.revisions[repo.branches["main"]])
    for line in map(json.loads, body.splitlines()):
        value: dict[str, Any] = line["value"]
        if line["key"] == "header":
            hub.uploads.commits.append(value["summary"])
        elif line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.uploads.objects[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    commit = hashlib.sha1(body).hexdigest()
    hub.add(repo_id, files, commit=commit)
    url = f"{hub.url}/{repo_id}/commit/{commit}"
    handler._send_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": "", "pullRequestUrl": ""})


_ACTIONS = {"create": _create, "preupload": _preupload, "batch": _batch, "object": _object, "commit": _commit}
