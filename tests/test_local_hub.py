"""LocalHub as huggingface_hub meets it: commits, revisions, private repositories, broken uploads, and what it refuses."""

import http.client
import json
import re

import pytest

from diffx.testing import LocalHub

CARD = "---\nlicense: apache-2.0\n---\n"
USED = r"""
import json
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

api, seen = HfApi(), {}
api.create_repo("tester/model", private=True)
first = api.upload_folder(repo_id="tester/model", folder_path="folder")
assert api.upload_folder(repo_id="tester/model", folder_path="folder").oid == first.oid  # nothing new: no commit
api.create_branch("tester/model", branch="next/one")
api.create_tag("tester/model", tag="v1")
api.upload_file(repo_id="tester/model", path_or_fileobj=b"abc", path_in_repo="sub/c.txt", revision="next/one")
api.delete_file("README.md", "tester/model")
refs = api.list_repo_refs("tester/model")
seen["branches"], seen["tags"] = [each.name for each in refs.branches], [each.name for each in refs.tags]
for revision in ("main", "next/one", "v1", first.oid):
    seen[revision if revision != first.oid else "commit"] = sorted(api.list_repo_files("tester/model", revision=revision))
seen["tree"] = sorted(entry.path for entry in api.list_repo_tree("tester/model", revision="next/one"))
seen["large"] = [bool(entry.lfs) for entry in api.get_paths_info("tester/model", ["w.safetensors", ".gitattributes"])]
seen["text"] = open(hf_hub_download("tester/model", "sub/c.txt", revision="next/one")).read()
seen["weights"] = len(open(snapshot_download("tester/model", revision="v1") + "/w.safetensors", "rb").read())
seen["history"] = [commit.title for commit in api.list_repo_commits("tester/model")]


def error(call, *arguments, **options):
    try:
        return repr(call(*arguments, **options))
    except Exception as error:
        return type(error).__name__ + " " + str(error)


seen["stranger"] = error(api.model_info, "tester/model", token=False)
seen["absent"] = error(api.model_info, "tester/other")
seen["file"] = error(hf_hub_download, "tester/model", "absent.json")
seen["revision"] = error(hf_hub_download, "tester/model", "w.safetensors", revision="absent")
seen["foreign"] = error(api.create_repo, "other/model")
seen["token"] = error(api.whoami, token="hf_wrong")
seen["card"] = error(api.upload_file, repo_id="tester/model", path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md")
seen["stale"] = error(api.upload_file, repo_id="tester/model", path_or_fileobj=b"x", path_in_repo="x", parent_commit=first.oid)
api.update_repo_settings("tester/model", private=False)
seen["shown"] = api.model_info("tester/model", token=False).id
seen["outside"] = error(__import__("socket").create_connection, ("192.0.2.1", 80))
print(json.dumps(seen))
"""
PUSH = "from huggingface_hub import HfApi; HfApi().upload_folder(repo_id='tester/large', folder_path='large')"


def test_huggingface_hub_finds_all_it_asks_for(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text(CARD)
    (tmp_path / "folder" / "w.safetensors").write_bytes(bytes(1000))
    with LocalHub(tmp_path / "hub") as hub:
        done = hub.run(USED, cwd=tmp_path)
        asked = list(hub.requests)
    seen = json.loads(done.stdout)
    assert seen["branches"] == ["main", "next/one"] and seen["tags"] == ["v1"]
    whole = [".gitattributes", "README.md", "w.safetensors"]
    assert seen["v1"] == seen["commit"] == whole
    assert seen["main"] == [".gitattributes", "w.safetensors"]
    assert seen["next/one"] == sorted([*whole, "sub/c.txt"])
    assert seen["tree"] == sorted([*whole, "sub"])
    assert seen["large"] == [True, False]
    assert seen["text"] == "abc" and seen["weights"] == 1000
    assert seen["history"] == ["Delete README.md with huggingface_hub", "Upload folder using huggingface_hub", "initial commit"]
    for name, error in {
        "stranger": "RepositoryNotFoundError", "absent": "RepositoryNotFoundError", "file": "RemoteEntryNotFoundError",
        "revision": "RevisionNotFoundError", "foreign": "HfHubHTTPError .*may not write to other/model", "token": "HfHubHTTPError",
        "card": "ValueError Invalid metadata", "stale": "HfHubHTTPError .*A commit has happened", "outside": "AssertionError",
    }.items():  # fmt: skip
        assert re.search(error, seen[name], re.DOTALL), seen[name]
    assert seen["shown"] == "tester/model"
    assert hub.token not in done.stdout + done.stderr + "".join(request.path for request in asked)
    assert not [request for request in asked if request.path.startswith("/lfs/") and request.authorized]
    with LocalHub(tmp_path / "hub") as again:  # the folder is the Hub
        assert again.files("tester/model", "next/one")["sub/c.txt"] == b"abc"


def test_a_broken_upload_goes_on_where_it_broke(tmp_path):
    (tmp_path / "large").mkdir()
    for name in "abc":
        (tmp_path / "large" / f"{name}.safetensors").write_bytes(name.encode() * 1000)
    with LocalHub() as hub:
        hub.create("tester/large")
        hub.break_uploads(after=1)
        broken = hub.run(PUSH, cwd=tmp_path, check=False)
        assert broken.returncode == 1 and "507" in broken.stderr
        assert list(hub.files("tester/large")) == [".gitattributes"]
        hub.repair()
        before = len(hub.requests)
        hub.run(PUSH, cwd=tmp_path)
        sent = [request.path for request in hub.requests[before:] if request.path.startswith("/lfs/")]
        assert hub.files("tester/large")["c.safetensors"] == b"c" * 1000
    assert len(sent) == 2  # the first one was there
    assert not hub.folder.exists()


def asked(hub, method, path, body=None, token=None):
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=10)
    connection.request(method, path, body, {"Authorization": f"Bearer {token or hub.token}"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


BAD = ["../outside", "/etc/passwd", "a/../../b", "a//b", "./a", ".git/config", "a\\..\\b", "a\0b", ""]


def test_names_that_lead_out_of_a_repository_are_refused():
    with LocalHub() as hub:
        hub.commit("tester/model", {"config.json": "{}"})
        for name in BAD:
            value = {"path": name, "content": "", "encoding": "base64"}
            lines = [{"key": "header", "value": {"summary": "bad"}}, {"key": "file", "value": value}]
            status, text = asked(hub, "POST", "/api/models/tester/model/commit/main", "\n".join(map(json.dumps, lines)))
            assert status == 400 and "is not the name of a file inside a repository" in text, name
            with pytest.raises(ValueError, match="is not the name of a file"):
                hub.commit("tester/model", {name: b""})
        for repo_id in ("tester/..", "../tester", "tester/a--b", "tester"):
            with pytest.raises(ValueError, match="does not have the form owner/name"):
                hub.create(repo_id)
        for path in ("/tester/model/resolve/main/../../../etc/passwd", "/tester/model/resolve/main/%2e%2e/x", "/tester/../resolve/main/x"):
            assert asked(hub, "GET", path)[0] == 404
        assert asked(hub, "PUT", f"/lfs/{'0' * 64}", b"another content")[0] == 400
        assert asked(hub, "POST", "/api/models/tester/model/commit/main", b"no json")[0] == 400
        assert asked(hub, "GET", "/api/models/tester/model", token="hf_wrong")[0] == 401
        assert sorted(hub.files("tester/model")) == [".gitattributes", "config.json"]
    with pytest.raises(ConnectionError):
        asked(hub, "GET", "/api/models/tester/model")
