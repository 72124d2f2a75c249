"""Whose addresses are asked: those that the user typed always, those that a file brought only where he allows it."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from conftest import Cafe, complaint, draw_faces
from upath import UPath

from cafe import files
from cafe.addresses import Permission, find_addresses, is_private, own, permission
from cafe.data import images
from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.files import copy_here, locate
from cafe.inference.frames import find_files, read_frames
from cafe.pipeline.features.worker import Decoders
from cafe.pipeline.release.library import load_manifest

PUBLIC = "93.184.215.14"


class CountingServer(ThreadingHTTPServer):
    """A server of files on loopback that notes what it is asked; `/away` leads to itself under its private name.

    What it `/says` is a status and no file.
    """

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), partial(Answer, directory=str(folder)))
        Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(SimpleHTTPRequestHandler):
    server: CountingServer

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path.startswith("/says/"):
            self.send_response(int(self.path.removeprefix("/says/")))
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path.startswith("/away/"):
            self.send_response(302)
            self.send_header("Location", f"{self.server.address}/{self.path.removeprefix('/away/')}")
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[CountingServer]:
    with CountingServer(draw_faces(tmp_path / "faces", per_class=2)) as running:
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def new_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home in which nobody typed anything, and a command that allowed nothing."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Permission().install()
    yield
    Permission().install()


def bring_manifest(folder: Path, address: str) -> Manifest:
    """Make the manifest of some faces and let it say that they lie elsewhere."""
    manifest = index_files("brought", DATASETS["folder"](UPath(folder))).manifest
    return replace(manifest, root=address)


def test_pictures_of_a_manifest_are_fetched_from_the_web_only_where_that_is_allowed(
    server: CountingServer, tmp_path: Path
) -> None:
    cafe = Cafe(tmp_path / "work", address="")
    bring_manifest(tmp_path / "faces", server.address).save(UPath(cafe.workspace / "manifests" / "brought.parquet"))
    assert cafe.fail("data", "check", "brought").endswith(
        f"{server.address!r} came with a file: where you trust that file, give --allow-urls to fetch from it."
    )
    assert "leads to this machine or its own network" in cafe.fail("data", "check", "brought", "--allow-urls")
    assert "give both" in cafe.fail("data", "check", "brought", "--allow-private-urls")
    assert server.asked == []
    assert "0 unreadable files" in cafe("--allow-private-urls", "data", "check", "brought", "--allow-urls").output
    assert len(set(server.asked)) == 6


def test_an_address_that_the_user_typed_is_his_own_from_then_on(server: CountingServer, tmp_path: Path) -> None:
    cafe = Cafe(tmp_path / "work", address="")
    cafe("data", "index", "folder", server.address, "--name", "typed")
    assert "0 unreadable files" in cafe("data", "check", "typed").output
    asked = len(server.asked)
    (tmp_path / "home" / ".config" / "cafe" / "addresses.txt").unlink()  # as where the workspace is somebody else's
    assert "came with a file" in cafe.fail("data", "check", "typed")
    assert len(server.asked) == asked


def test_addresses_in_a_table_are_read_where_that_is_allowed_in_every_command(
    server: CountingServer, tmp_path: Path
) -> None:
    cafe = Cafe(tmp_path / "work", address="")
    with CountingServer(draw_faces(tmp_path / "others", per_class=1, seed=1)) as other:
        places = [f"{server.address}/anger/000.jpg", f"{other.address}/anger/000.jpg", f"{other.address}/says/403"]
        places += [f"{server.address}/no/such.jpg", f"{server.address}/says/500"]
        (tmp_path / "t.csv").write_text("path,label\n" + "".join(f"{place},anger\n" for place in places))
        index = ("data", "index", "table", str(tmp_path / "t.csv"), "--name", "web")
        assert "--allow-urls to fetch from it" in cafe.fail(*index)
        assert "leads to this machine or its own network" in cafe.fail("--allow-urls", *index)
        assert server.asked == other.asked == []
        allowed = ("--allow-urls", "--allow-private-urls")
        said = cafe.fail(*allowed, *index, code=1)
        assert "such.jpg: file not found" in said
        assert "says/403 cannot be read (the server answers 403 Forbidden): look at the address" in said
        assert (
            "says/500 cannot be read (the server answers 500 Internal Server Error), though it was tried 4 times"
            in said
        )
        assert other.asked.count("/says/403") == 1
        assert "came with a file" in cafe.fail("data", "check", "web")
        assert "0 unreadable files" in cafe.succeed(*allowed, "data", "check", "web")
        assert [name.partition("/")[2] for name in load_manifest("web", str(cafe.workspace)).sample_ids] == [
            "anger/000.jpg"
        ] * 2
        other.shutdown()


def test_pictures_of_several_servers_have_no_folder_in_common_in_whatever_order_they_are_listed(tmp_path: Path) -> None:
    Permission(urls=True).install()
    for places in (("a", "b"), ("a", "b", "b"), ("b", "a", "a", "b")):
        (tmp_path / "t.csv").write_text("path,label\n" + "".join(
            f"https://{place}.example/faces/{number}.jpg,anger\n" for number, place in enumerate(places)
        ))  # fmt: skip
        listing = DATASETS["table"](UPath(tmp_path / "t.csv"))
        assert [file.path for file in listing.files] == [
            f"{place}.example/faces/{number}.jpg" for number, place in enumerate(places)
        ]


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (("https://a/1.jpg", "2.jpg"), "has https://a/1.jpg and, in row 2, 2.jpg: give every kind of place a table"),
        (("foo://a/1.jpg",), "The place 'foo://a/1.jpg' cannot be used (Unsupported filesystem: 'foo')"),
        (("sftp://a/1.jpg",), "came with a file: give a folder, an object store or https:// there."),
        (("gs://a/1.jpg",), "The place 'gs://a/1.jpg' cannot be used (Please install gcsfs"),
        (("s3:///1.jpg",), "The place 's3:///1.jpg' cannot be used (its bucket is missing): give"),
    ],
)
def test_places_of_a_table_that_cannot_be_read_are_one_sentence(
    tmp_path: Path, paths: tuple[str, ...], said: str
) -> None:
    (tmp_path / "t.csv").write_text("path,label\n" + "".join(f"{path},anger\n" for path in paths))
    assert said in complaint(DATASETS["table"], UPath(tmp_path / "t.csv"))


def test_pictures_of_the_web_that_cannot_be_read_are_rows_with_a_reason(
    server: CountingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [f"{server.address}/{name}" for name in ("anger/000.jpg", "says/403", "says/410")]
    own(*places)
    monkeypatch.setattr(images, "MOST_FETCHED", 100)
    monkeypatch.setattr(files, "PAUSES", ())
    with socket.socket() as closed:  # nobody listens there
        closed.bind(("127.0.0.1", 0))
        own(nobody := f"http://127.0.0.1:{closed.getsockname()[1]}/x.jpg")
        errors = [frame.error for frame in read_frames(find_files([*places, nobody]).files, 1)]
    parts = (
        "more than the 100 bytes",
        "answers 403 Forbidden",
        "file not found",
        "cannot be read (Connect call failed",
    )
    assert [part in error for part, error in zip(parts, errors, strict=True)] == [True] * 4, errors


def test_a_name_or_a_redirect_that_leads_into_the_own_network_is_not_followed(
    server: CountingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def resolve(host: str, *others: Any, **options: Any) -> Any:
        return look_up({"pictures.example": PUBLIC, "inner.example": "127.0.0.1"}.get(host, host), *others, **options)

    def route(own: socket.socket, place: tuple[str, int]) -> None:
        connect(own, ("127.0.0.1", place[1]) if place[0] == PUBLIC else place)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", route)
    Permission(urls=True).install()
    read = partial(bring_manifest, tmp_path / "faces")
    pictures, inner = (f"http://{name}.example:{server.server_port}" for name in ("pictures", "inner"))
    assert read(pictures).read_face(0).shape == (24, 24, 3)
    assert server.asked == ["/anger/000.jpg"]
    for private in (inner, f"{pictures}/away", server.address):
        assert "leads to this machine or its own network" in complaint(read(private).read_face, 0)
    assert server.asked == ["/anger/000.jpg", "/away/anger/000.jpg"]
    Permission(urls=True, private=True).install()
    assert read(f"{pictures}/away").read_face(0).shape == (24, 24, 3)


def test_copies_of_weights_follow_the_same_rule(server: CountingServer) -> None:
    weights = f"{server.address}/anger/000.jpg"
    assert "came with a file" in complaint(copy_here, weights)
    own(f"imagenet-lite0@{weights}#stage1")
    copy = Path(copy_here(weights))
    assert copy.name == "000.jpg"
    assert server.asked == ["/anger/000.jpg"]
    Permission().install()  # a copy fetched before needs no request, and is not used either
    assert "came with a file" in complaint(copy_here, weights)


def test_other_protocols_are_for_what_the_user_types(tmp_path: Path) -> None:
    assert "came with a file" in complaint(locate, "http::x")
    for place in ("simplecache::http://127.0.0.1/x", "ftp://127.0.0.1/x", "zip://x::http://127.0.0.1/x"):
        for flags in ({}, {"urls": True, "private": True}):
            Permission(**flags).install()
            said = complaint(locate, place)
            assert "came with a file: give a folder, an object store or https:// there" in said
    Permission().install()
    for place in (str(tmp_path), f"file://{tmp_path}", "memory://x", "s3://bucket/x", "a::b"):
        assert complaint(locate, place) == ""


def test_processes_that_decode_know_what_their_command_may_ask() -> None:
    Permission(urls=True, own=("http://here",)).install()
    decoders = Decoders(1)
    decoders.renew(None)
    assert decoders.pool
    assert decoders.pool.submit(permission).result() == permission()
    decoders.close()


def test_addresses_are_found_in_what_was_typed() -> None:
    typed = (
        "open_clip:http://a/x.json@https://me:secret@b/w.pt#stage3 file:https://c/d zip://e.csv::http://f/g.zip s3://h"
    )
    found = ("http://a/x.json", "https://me:secret@b/w.pt", "https://c/d", "zip://e.csv::http://f/g.zip")
    assert find_addresses(typed.split()) == found
    below = Permission(own=("http://a/b",))
    for place in ("http://a/b", "http://a/b/", "http://a/b/c"):
        assert below.options(place, "http").keys() == {"client_kwargs"}  # how long it waits
    for place in ("http://a/bc", "http://a/b/../c", "http://a/b/%2E%2e/c", "http://a", "http://a.b/b"):
        assert "came with a file" in complaint(below.options, place, "http")


@pytest.mark.parametrize(
    "address",
    re.findall(
        r"\S+",
        "127.0.0.1 10.1.2.3 192.168.0.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 ::1 :: fe80::1%eth0 fd00::1 "
        "::ffff:127.0.0.1 64:ff9b::a01:203 2002:7f00:1:: 240.0.0.1 255.255.255.255",
    ),
)
def test_private_addresses_are_told_apart(address: str) -> None:
    assert is_private(address)
    assert not is_private(PUBLIC)
    assert not is_private("2606:4700::1111")


def test_a_place_whose_library_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert complaint(locate, "s3a://bucket/work").endswith(
        "Install s3fs to access S3): run `pip install 'cafe-fer[s3]'`."
    )
