"""The pages and the API of a labeling project."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
from starlette.testclient import TestClient  # noqa: E402

from fastrlhf.data.records import read_records  # noqa: E402
from fastrlhf.labeling.exchange import read_items  # noqa: E402
from fastrlhf.labeling.project import Project  # noqa: E402
from fastrlhf.labeling.store import Store  # noqa: E402
from fastrlhf.labeling.web import LabelingSite  # noqa: E402

XSS = "<script>alert(1)</script>'\"><img src=x onerror=alert(2)>"
KILLS = int(os.environ.get("FASTRLHF_TEST_KILLS", "3"))


class Site:
    """A project of one task with a store and clients."""

    def __init__(self, folder, task, rows, **settings):
        path = folder / "items.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.project = Project(task=task, files=[str(path)], **settings)
        self.store = Store(folder / "labels.sqlite3", 60)
        self.store.add_items(read_items(path, self.project))

    def client(self, name, admin=False):
        client = TestClient(LabelingSite(self.project, self.store).application())
        assert client.get(f"/link/{self.store.add_labeler(name, admin)}").status_code == 200
        return client


def item_of(page):
    """Return (item, revision, headers of a change) of a task page, or None if none is left."""
    if found := re.search(r'data-item="(\w+)" data-revision="(\d+)" data-csrf="(\w+)"', page):
        return found[1], int(found[2]), {"x-csrf-token": found[3]}
    return None


def send(client, path, **content):
    item, revision, headers = item_of(client.get("/").text)
    return client.post(path, json={"item": item, "revision": revision, **content}, headers=headers)


@pytest.fixture
def make_site(tmp_path):
    sites = []

    def make(*arguments, **settings):
        sites.append(Site(tmp_path, *arguments, **settings))
        return sites[-1]

    yield make
    for site in sites:
        site.store.close()


def ranking(k):
    return {
        "ranks": [1, 1, *range(2, k)],
        "ratings": [7] * k,
        "flags": [["opinion"]] + [[]] * (k - 1),
    }


def test_markup_in_prompts_responses_and_drafts_is_text(make_site):
    site = make_site("rank", [{"prompt": XSS, "responses": [XSS, "b", "", "d"]}])
    client = site.client(XSS, admin=True)
    client.get("/")
    assert send(client, "/draft", answer={"note": XSS}).status_code == 200
    page = client.get("/")
    assert "<script>alert" not in page.text and "<img" not in page.text
    assert "&lt;script&gt;alert(1)" in page.text
    assert "(empty response)" in page.text
    assert "<img" not in client.get("/admin").text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_ranking_is_checked_and_read_by_the_trainers(make_site, tmp_path):
    rows = [{"prompt": "p", "responses": list("abcd"), "model": list("wxyz"), "source": "s"}]
    site = make_site("rank", rows)
    client = site.client("ann", admin=True)
    assert send(client, "/answer", answer={"ranks": [1, 2]}).status_code == 422
    assert send(client, "/answer", answer=ranking(4)).status_code == 200
    assert item_of(client.get("/").text) is None
    path = tmp_path / "training.jsonl"
    path.write_text(client.get("/admin/export/training").text)
    (record,) = read_records(path, "rankings")
    assert record.ranks == (1, 1, 2, 3) and record.labeler_id == "ann"
    assert record.columns["source"] == "s" and record.columns["model"] == list("wxyz")


def test_admin_page_shows_the_agreement_of_two_labelers(make_site):
    rows = [{"prompt": "p", "responses": list("abcd")}]
    site = make_site("rank", rows, labelers_per_item=2)
    ann, ben = site.client("ann", admin=True), site.client("ben")
    assert send(ann, "/answer", answer={**ranking(4), "ranks": [1, 2, 3, 4]}).status_code == 200
    assert send(ben, "/answer", answer={**ranking(4), "ranks": [2, 1, 3, 4]}).status_code == 200
    assert "order 83.3 % of pairs alike" in ann.get("/admin").text  # five of six


def test_draft_survives_a_reload_and_stale_tab_is_refused(make_site):
    client = make_site("demonstrate", [{"prompt": "p"}]).client("ann")
    item, revision, headers = item_of(client.get("/").text)
    assert send(client, "/draft", answer={"response": "half"}).json() == {"revision": 1}
    assert '"response": "half"' in client.get("/").text
    stale = {"item": item, "revision": revision, "answer": {"response": "other tab"}}
    assert client.post("/answer", json=stale, headers=headers).status_code == 409


def test_changes_need_a_link_and_the_token_of_the_page(make_site):
    site = make_site("demonstrate", [{"prompt": "p"}])
    stranger = TestClient(LabelingSite(site.project, site.store).application())
    assert stranger.get("/").status_code == 403
    assert stranger.get("/link/guess").status_code == 403
    client = site.client("ann")
    item, revision, _ = item_of(client.get("/").text)
    sent = {"item": item, "revision": revision, "answer": {"response": "r"}}
    assert client.post("/answer", json=sent).status_code == 403
    assert client.get("/admin").status_code == 403
    assert list(site.store.answers()) == []


def test_rate_limit(make_site):
    client = make_site("demonstrate", [{"prompt": "p"}], requests_per_minute=4).client("ann")
    # The link and the redirect to the task took two.
    assert [client.get("/").status_code for _ in range(3)] == [200, 200, 429]


def test_pairs_of_a_win_rate_are_compared_blind(make_site):
    rows = [{"prompt": f"p{i}", "policy": "P", "baseline": "B"} for i in range(20)]
    site = make_site("compare", rows)
    client = site.client("ann")
    first = set()
    for _ in rows:
        page = client.get("/").text
        assert "baseline" not in page
        first.add(re.search(r'<article data-index="(\d)"', page)[1])
        assert send(client, "/answer", answer={"ranks": [1, 2]}).status_code == 200
    assert first == {"0", "1"}


def _serve(project, port):
    command = [sys.executable, "-m", "fastrlhf", "label", str(project), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return process
        except OSError:
            time.sleep(0.05)
    process.kill()
    raise AssertionError("the server did not start")


def _send_without_reply(port, token, headers, sent):
    body = json.dumps(sent)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(
            f"POST /answer HTTP/1.1\r\nHost: x\r\nCookie: fastrlhf_label={token}\r\n"
            f"X-CSRF-Token: {headers['x-csrf-token']}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )


def test_killed_server_loses_and_doubles_no_answer(tmp_path):
    count = 40 * KILLS
    (tmp_path / "items.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(count))
    )
    project = tmp_path / "project.yaml"
    project.write_text("task: demonstrate\nfiles: [items.jsonl]\nrequests_per_minute: 100000\n")
    store = Store(tmp_path / "labels.sqlite3", 3600)
    token = store.add_labeler("ann")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    confirmed = {}
    for kill in range(KILLS + 1):
        process = _serve(project, port)
        try:
            with httpx.Client(
                base_url=f"http://127.0.0.1:{port}", cookies={"fastrlhf_label": token}
            ) as client:
                step = 0
                while (found := item_of(client.get("/").text)) is not None:
                    item, revision, headers = found
                    sent = {"item": item, "revision": revision, "answer": {"response": item}}
                    if kill < KILLS and step == 10 + kill % 7:
                        _send_without_reply(port, token, headers, sent)
                        time.sleep(kill % 5 * 5e-4)  # before, during or after the transaction
                        process.send_signal(signal.SIGKILL)
                        break
                    assert client.post("/answer", json=sent, headers=headers).status_code == 200
                    confirmed[item] = True
                    step += 1
        finally:
            process.kill()
            process.wait()
    answers = list(store.answers())
    store.close()
    assert len(answers) == count == len({row["item_id"] for row in answers})
    assert confirmed.keys() <= {row["item_id"] for row in answers}
    assert all(row["answer"] == {"response": row["item_id"]} for row in answers)
