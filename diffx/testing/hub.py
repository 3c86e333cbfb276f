"""LocalHub: a Hub on this machine, with which pushing and pulling are tested without a network."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import loopback
from .hub_server import LARGE, Request, Server

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
BRANCH = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
SITECUSTOMIZE = """
only_loopback()
import os
for _name in os.environ.get("LOCAL_HUB_WITHOUT", "").split():
    sys.modules[_name] = None  # how Python marks a module that cannot be imported
"""


@dataclass
class Repository:
    """Commits (hash -> parent, message, files by content hash) and the branches and tags that point to them."""

    private: bool = False
    commits: dict[str, dict] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a hash means, None where there is none."""
        return self.branches.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)


class LocalHub:
    """A Hub of models on the loopback interface: repositories, revisions, private ones, and what Diffusers and huggingface_hub ask of it.

    What is there lies in a folder and is there again when the folder is opened again. Large files go up on their own before the
    commit, as on the real Hub; its deduplicating storage (Xet) is not spoken. The libraries read HF_ENDPOINT when they are imported:
    run the code under test in a process of its own with ``run``, where nothing beyond this machine can be reached.

    Args:
        folder: where it keeps everything; None is a folder that is removed in the end.
        user: whose ``token`` may write to ``user/...`` and read its private repositories.

    Example:
        >>> with LocalHub() as hub:
        ...     hub.commit("someone/model", "my-folder")
        ...     hub.run("from diffusers import DiffusionPipeline; DiffusionPipeline.from_pretrained('someone/model')")
    """

    def __init__(self, folder: str | Path | None = None, *, user: str = "tester") -> None:
        self._temporary = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="local-hub-") if folder is None else folder).resolve()
        for name in ("objects", "repositories", "home", "guard"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "guard" / "sitecustomize.py").write_text(Path(loopback.__file__).read_text() + SITECUSTOMIZE)
        self.user, self.token = user, f"hf_{secrets.token_hex(17)}"
        self.requests: list[Request] = []
        self.lock = threading.RLock()  # each request has its thread
        self._writes_left: int | None = None
        self._server = Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- the code under test ----------------------------------------------------------------------------------------

    def environment(self, *, token: str | None = "", home: str | Path | None = None, without: Sequence[str] = ()) -> dict[str, str]:
        """Environment variables of a process that knows this Hub only.

        Args:
            token: the one it finds; "" is the user's own, None is none.
            home: its cache, by default one that all processes of this Hub share.
            without: modules that cannot be imported there, such as ("diffx",).
        """
        ours = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and not k.lower().endswith("_proxy")}
        paths = [str(self.folder / "guard"), kept.get("PYTHONPATH", ""), str(Path(__file__).parents[2])]
        given = self.token if token == "" else token
        return kept | ({"HF_TOKEN": given} if given else {}) | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home or self.folder / "home"),
            "HF_HUB_DISABLE_XET": "1",  # compiled code, whose sockets no guard in Python sees
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "LOCAL_HUB_WITHOUT": " ".join(without),
        }  # fmt: skip

    def run(
        self,
        what: str | Sequence[str | Path],
        *,
        token: str | None = "",
        home: str | Path | None = None,
        without: Sequence[str] = (),
        cwd: str | Path | None = None,
        timeout: float = 600,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """What came of Python code, or of arguments to Python such as ["-m", "diffx", "sample"], in a process that knows this Hub only.

        Args:
            token, home, without: as of ``environment``.
            check: raise where it fails.

        Raises:
            RuntimeError: it failed and ``check`` is set; the message is all that it wrote.
        """
        arguments = ["-c", what] if isinstance(what, str) else [str(each) for each in what]
        environment = self.environment(token=token, home=home, without=without)
        done = subprocess.run([sys.executable, *arguments], env=environment, cwd=cwd, timeout=timeout, capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"Python ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    # --- repositories -----------------------------------------------------------------------------------------------

    def create(self, repo_id: str, *, private: bool = False) -> None:
        """Make an empty repository; one that exists stays as it is.

        Raises:
            ValueError: the id does not have the form owner/name.
        """
        if not REPO_ID.fullmatch(repo_id) or any(part in repo_id for part in ("--", "..")):
            raise ValueError(f"repo_id={repo_id!r} does not have the form owner/name")
        with self.lock:
            if self.repository(repo_id) is None:
                self._save(repo_id, Repository(private))
                attributes = "".join(f"{pattern} filter=lfs\n" for pattern in LARGE)
                self.commit(repo_id, {".gitattributes": attributes}, message="initial commit")

    def commit(
        self,
        repo_id: str,
        files: str | Path | Mapping[str, bytes | str | None],
        *,
        branch: str = "main",
        message: str = "a commit",
        private: bool = False,
    ) -> str:
        """The hash of a new commit, made without a request: files by name (None deletes one), or all of a folder.

        Raises:
            ValueError: a file name that leads out of the repository, or no such branch.
        """
        if not isinstance(files, Mapping):
            root = Path(files)
            files = {each.relative_to(root).as_posix(): each.read_bytes() for each in sorted(root.rglob("*")) if each.is_file()}
        with self.lock:
            if self.repository(repo_id) is None:
                self.create(repo_id, private=private)
            encoded = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
            contents = {path: None if data is None else self.keep(data) for path, data in encoded.items()}
            return self.record(repo_id, contents, branch=branch, message=message)

    def record(self, repo_id: str, contents: Mapping[str, str | None], *, branch: str = "main", message: str) -> str:
        """``commit`` of contents that are kept already, by their hashes."""
        for path in contents:
            check_path(path)
        with self.lock:
            repository = self.repository(repo_id)
            if repository is None or (repository.commits and branch not in repository.branches):
                raise ValueError(f"{repo_id} has no branch {branch!r}")
            parent = repository.branches.get(branch)
            before = repository.commits[parent]["files"] if parent else {}
            after = {path: content for path, content in {**before, **contents}.items() if content is not None}
            made = {"parent": parent, "message": message, "files": after}
            sha = hashlib.sha1(json.dumps([len(repository.commits), made]).encode()).hexdigest()
            repository.commits[sha], repository.branches[branch] = made, sha
            self._save(repo_id, repository)
            return sha

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision of a repository holds, by name.

        Raises:
            ValueError: there is no such repository or revision.
        """
        repository = self.repository(repo_id)
        sha = repository and repository.resolve(revision)
        if not repository or not sha:
            raise ValueError(f"there is no {repo_id} at {revision!r}")
        return {path: self.object(content).read_bytes() for path, content in repository.commits[sha]["files"].items()}

    def repository(self, repo_id: str) -> Repository | None:
        """A copy of what is known of a repository, None where there is none."""
        file = self._file(repo_id)
        return Repository(**json.loads(file.read_text())) if REPO_ID.fullmatch(repo_id) and file.is_file() else None

    def point(self, repo_id: str, kind: str, name: str, sha: str | None) -> None:
        """Set, or with None remove, one of ``branches`` or ``tags``."""
        with self.lock:
            repository = self.repository(repo_id)
            assert repository is not None
            if not BRANCH.fullmatch(name):
                raise ValueError(f"{name!r} cannot be a branch or tag")
            marks: dict[str, str] = getattr(repository, kind)
            if sha is None:
                marks.pop(name, None)
            else:
                marks[name] = sha
            self._save(repo_id, repository)

    def set_private(self, repo_id: str, private: bool) -> None:
        """Hide a repository from all but its user, or show it."""
        with self.lock:
            repository = self.repository(repo_id)
            assert repository is not None
            repository.private = private
            self._save(repo_id, repository)

    def delete(self, repo_id: str) -> None:
        """Forget a repository; its contents are kept, as others may have them too."""
        with self.lock:
            self._file(repo_id).unlink(missing_ok=True)

    def keep(self, data: bytes) -> str:
        """The hash (SHA-256) of a content, which is kept from now on."""
        content = hashlib.sha256(data).hexdigest()
        if not self.object(content).is_file():
            _write(self.object(content), data)
        return content

    def object(self, content: str) -> Path:
        """Where a content lies; hashes are made or checked here, so that no request names a file."""
        assert re.fullmatch(r"[0-9a-f]{64}", content)
        return self.folder / "objects" / content

    def _file(self, repo_id: str) -> Path:
        return self.folder / "repositories" / f"{repo_id.replace('/', '--')}.json"

    def _save(self, repo_id: str, repository: Repository) -> None:
        _write(self._file(repo_id), json.dumps(asdict(repository)).encode())

    # --- broken uploads ---------------------------------------------------------------------------------------------

    def break_uploads(self, after: int = 0) -> None:
        """Cut the connection of the upload that follows the next ``after`` ones, in its middle, and refuse all later ones until ``repair``.

        An upload is a large file or a commit.
        """
        self._writes_left = after

    def repair(self) -> None:
        """Take uploads again."""
        self._writes_left = None

    def upload_fate(self) -> str:
        """ "accept", "cut" or "refuse": what becomes of the upload that is coming in; asked once for each."""
        with self.lock:
            if self._writes_left is None:
                return "accept"
            self._writes_left -= 1
            return "accept" if self._writes_left >= 0 else "cut" if self._writes_left == -1 else "refuse"


def check_path(path: str) -> None:
    """Raise ValueError unless ``path`` is a file's name inside a repository, as the real Hub takes it."""
    parts = path.split("/")
    if any(part in ("", ".", "..", ".git") for part in parts) or "\\" in path or "\0" in path:
        raise ValueError(f"{path!r} is not the name of a file inside a repository")


def _write(file: Path, data: bytes) -> None:
    scratch = file.with_name(f".{secrets.token_hex(4)}")
    scratch.write_bytes(data)
    os.replace(scratch, file)
