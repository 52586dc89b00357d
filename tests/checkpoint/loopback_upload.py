"""The loopback hub's other half: who asks, making repositories, and taking files over plain HTTP (LFS) or xet."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loopback_hub import LoopbackHub

Answer = tuple[int, object]  # status and JSON


@dataclass(frozen=True)
class Account:
    """Who a token belongs to.

    Attributes:
        name: The repositories under it, and under the organisations, may be written to.
        role: The token's: "write" or "read".
    """

    name: str
    organisations: tuple[str, ...] = ()
    role: str = "write"

    def may_write(self, repo_id: str) -> bool:
        return self.role == "write" and repo_id.partition("/")[0] in (self.name, *self.organisations)


@dataclass
class Store:
    """What was uploaded and is not yet, or no longer, in a revision.

    Attributes:
        blobs: Contents of large files by SHA-256.
        xorbs: xet's pieces of files, by their address.
        transfers: Names of the ways that large files came in, in order: "lfs" and "xet".
    """

    blobs: dict[str, bytes] = field(default_factory=dict)
    xorbs: dict[str, bytes] = field(default_factory=dict)
    transfers: list[str] = field(default_factory=list)

    def add_blob(self, data: bytes, transfer: str) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        self.transfers.append(transfer)
        return digest

    def add_shard(self, shard: bytes) -> None:
        """Puts files together from xorbs, as a xet shard lists them: 48 bytes an entry, all ones at the end.

        Source: huggingface/xet-core, the MDB shard's format.
        """
        at = 48
        while shard[at : at + 32] != b"\xff" * 32:
            flags, terms = struct.unpack_from("<2I", shard, at + 32)
            data = b""
            for term in range(at + 48, at + 48 * (terms + 1), 48):
                start, stop = struct.unpack_from("<2I", shard, term + 40)
                data += b"".join(_chunks(self.xorbs[_xet_address(shard[term : term + 32])])[start:stop])
            at += 48 * (1 + terms + (terms if flags >> 31 else 0) + (flags >> 30 & 1))
            digest = self.add_blob(data, "xet")
            assert digest == _xet_address(shard[at - 48 : at - 16]), "the shard's own SHA-256 is another one"


def _xet_address(raw: bytes) -> str:
    """A hash as xet spells it: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def _chunks(xorb: bytes) -> list[bytes]:
    """The chunks of a xorb, each behind a header: version, length (3 bytes), compression, length unpacked (3 bytes)."""
    chunks, at = [], 0
    while at < len(xorb):
        length, compression = int.from_bytes(xorb[at + 1 : at + 4], "little"), xorb[at + 4]
        assert compression == 0, "upload random bytes: they are sent as they are"
        chunks.append(xorb[at + 8 : at + 8 + length])
        at += 8 + length
    return chunks


class Uploads:
    """Answers the requests of an upload, for the hub whose repositories it adds to."""

    def __init__(self, hub: LoopbackHub) -> None:
        self.hub = hub
        self.accounts: dict[str, Account] = {}  # by token
        self.store = Store()
        self.commits: list[tuple[str, str]] = []  # commit and its message
        self.faults: dict[str, int | None] = {}  # part of a path -> status to answer; None: the connection drops

    def answer(self, method: str, path: str, authorization: str | None, body: bytes) -> Answer | None:
        """None if this is no request of an upload."""
        account = self.accounts.get((authorization or "").removeprefix("Bearer "))
        for way, pattern, respond in _ROUTES:
            if method == way and (found := re.fullmatch(pattern, path)):
                names = found.groupdict()
                repo_id = names.pop("repo_id", None)
                if repo_id is not None:
                    if account is None:
                        return 401, {"error": "Invalid credentials in Authorization header"}
                    if repo_id not in self.hub.repos:
                        return None  # as any other request for it
                    if not account.may_write(repo_id):
                        return 403, {"error": "Forbidden: pass a token with the right permissions"}
                    names["repo_id"] = repo_id
                return respond(self, account=account, body=body, **names)
        return None

    def whoami(self, account: Account | None, body: bytes) -> Answer:
        if account is None:
            return 401, {"error": "Invalid credentials in Authorization header"}
        organisations = [{"type": "org", "name": name, "roleInOrg": "write"} for name in account.organisations]
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}}
        return 200, {"type": "user", "name": account.name, "orgs": organisations, "auth": token}

    def check_right(self, account: Account, body: bytes, repo_id: str) -> Answer:
        return 200, {}

    def create(self, account: Account | None, body: bytes) -> Answer:
        asked = json.loads(body)
        assert account is not None
        repo_id = f"{asked['organization'] or account.name}/{asked['name']}"
        address = {"url": f"{self.hub.url}/{repo_id}"}
        if not account.may_write(repo_id):
            return 403, {"error": "Forbidden"}
        if repo_id in self.hub.repos:
            return 409, address
        self.hub.add(repo_id, {".gitattributes": b""}, commit="0" * 40)
        return 200, address

    def check_card(self, account: Account | None, body: bytes) -> Answer:
        content = json.loads(body)["content"]
        if content.startswith("---\n") and "\n---\n" not in content[3:]:
            return 400, {"errors": [{"message": "the metadata has no end"}]}
        return 200, {"errors": [], "warnings": []}

    def choose_modes(self, account: Account, body: bytes, repo_id: str) -> Answer:
        present = self.files(repo_id)
        files = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            large = path.endswith(".safetensors")
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in present:
                data = present[path]
                git = hashlib.sha1(b"blob %d\0" % len(data) + data)
                answer["oid"] = hashlib.sha256(data).hexdigest() if large else git.hexdigest()
            files.append(answer)
        return 200, {"files": files}

    def give_lfs_addresses(self, account: Account, body: bytes, repo_id: str) -> Answer:
        objects: list[dict[str, object]] = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.store.blobs:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs-verify"},
                }
        return 200, {"transfer": "basic", "objects": objects}

    def take_lfs(self, account: None, body: bytes, oid: str) -> Answer:
        return (200 if self.store.add_blob(body, "lfs") == oid else 400), {}

    def verify_lfs(self, account: None, body: bytes) -> Answer:
        asked = json.loads(body)
        return (200 if len(self.store.blobs.get(asked["oid"], b"")) == asked["size"] else 404), {}

    def give_xet_token(self, account: Account, body: bytes, repo_id: str) -> Answer:
        return 200, {"casUrl": self.hub.url, "accessToken": "xet", "exp": int(time.time()) + 3600}

    def take_xorb(self, account: None, body: bytes, address: str) -> Answer:
        self.store.xorbs[address] = body
        return 200, {"was_inserted": True}

    def take_shard(self, account: None, body: bytes) -> Answer:
        self.store.add_shard(body)
        return 200, {"result": 1}

    def commit(self, account: Account, body: bytes, repo_id: str) -> Answer:
        files, message = dict(self.files(repo_id)), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.store.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise AssertionError(f"a commit's line of an unknown kind, {line['key']}")
        commit = f"{len(self.commits) + 1:040x}"
        self.commits.append((commit, message))
        self.hub.add(repo_id, files, commit=commit)
        address = f"{self.hub.url}/{repo_id}/commit/{commit}"
        return 200, {"success": True, "commitOid": commit, "commitUrl": address, "pullRequestUrl": None}

    def files(self, repo_id: str) -> dict[str, bytes]:
        repo = self.hub.repos[repo_id]
        return repo.revisions[repo.branches["main"]]


_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "api/whoami-v2", Uploads.whoami),
    ("GET", f"api/models/{_REPO}/auth-check/write", Uploads.check_right),
    ("POST", "api/repos/create", Uploads.create),
    ("POST", "api/validate-yaml", Uploads.check_card),
    ("POST", f"api/models/{_REPO}/preupload/main", Uploads.choose_modes),
    ("POST", rf"{_REPO}\.git/info/lfs/objects/batch", Uploads.give_lfs_addresses),
    ("PUT", "lfs/(?P<oid>[0-9a-f]{64})", Uploads.take_lfs),
    ("POST", "lfs-verify", Uploads.verify_lfs),
    ("GET", f"api/models/{_REPO}/xet-write-token/main", Uploads.give_xet_token),
    ("POST", "v1/xorbs/default/(?P<address>[0-9a-f]{64})", Uploads.take_xorb),
    ("POST", "v1/shards", Uploads.take_shard),
    ("POST", f"api/models/{_REPO}/commit/main", Uploads.commit),
]
