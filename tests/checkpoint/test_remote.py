"""Checkpoints over a network: whatever the server does, every byte is correct or there is a clear error."""

import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import web_server as faults
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from web_server import serve, sometimes

from qwen_dist.checkpoint.load import load, make_load_plan
from qwen_dist.checkpoint.source import open_checkpoint
from qwen_dist.errors import CheckpointError
from qwen_dist.storage import http
from qwen_dist.storage.files import ReadOptions
from qwen_dist.storage.model_files import ModelFiles
from qwen_dist.storage.object_store import ObjectFolder


@pytest.fixture
def folder(write_checkpoint):
    rng = np.random.default_rng(0)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(6)]
    tensors = {name: rng.standard_normal((200, 64)).astype("bfloat16") for name in names}
    tensors["model.norm.weight"] = rng.standard_normal(64).astype("bfloat16")
    return write_checkpoint(
        {
            "1.safetensors": {k: tensors[k] for k in names[:3]},
            "2.safetensors": {k: tensors[k] for k in [*names[3:], "model.norm.weight"]},
        }
    )


@pytest.fixture
def server(folder, monkeypatch):
    """A server for `folder`. Chunks are small, for many requests; delays are short."""
    monkeypatch.setattr(http.HttpFolder, "read_options", ReadOptions(num_threads=4, max_gap=1000, chunk_bytes=8000))
    monkeypatch.setattr(http, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(http, "STALL_TIMEOUT_S", 0.3)
    monkeypatch.setattr(http, "MIN_BYTES_PER_S", 40_000)
    with serve(folder) as running:
        yield running


COLUMNS = PartitionSpec(None, "x")


def load_from(location, spec=COLUMNS):
    checkpoint = open_checkpoint(location)
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,), devices=jax.devices()[:4])
    target = {
        name.removeprefix("model."): jax.ShapeDtypeStruct(
            info.shape, info.dtype.numpy, sharding=NamedSharding(mesh, spec if len(info.shape) > 1 else PartitionSpec())
        )
        for name, info in checkpoint.tensors.items()
    }
    return load(checkpoint, target), make_load_plan(checkpoint, target)


def check(folder, arrays):
    expected = {}
    for path in folder.glob("*.safetensors"):
        expected |= safetensors.numpy.load_file(path)
    assert arrays.keys() == {name.removeprefix("model.") for name in expected}
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(arrays[name.removeprefix("model.")]), value, strict=True)


@pytest.mark.parametrize("spec", [PartitionSpec("x"), COLUMNS, PartitionSpec()])
def test_streamed_by_byte_range(folder, server, spec):
    arrays, plan = load_from(server.url, spec)
    check(folder, arrays)
    ranges = [headers["Range"][6:].split("-") for _, path, headers in server.requests if path.endswith(".safetensors")]
    requested = sum(int(stop) + 1 - int(start) for start, stop in ranges)
    # Opening a file reads one byte and then the header; that read covers the whole of these small files.
    headers = sum(1 + path.stat().st_size for path in folder.glob("*.safetensors"))
    assert plan.bytes_read <= requested <= plan.bytes_read + headers
    assert plan.over_read <= 1.05


TRANSIENT = {
    "503": faults.status(503),
    "503 with Retry-After": faults.status(503, {"Retry-After": "0"}),
    "429": faults.status(429),
    "500": faults.status(500),
    "cut in the middle": faults.cut,
    "reset": faults.reset,
    "stalled": faults.stall(1.0),
}


@pytest.mark.fault
@pytest.mark.parametrize("case", TRANSIENT)
def test_transient_errors_are_retried(folder, server, case):
    server.faults = [sometimes(9, TRANSIENT[case])]
    arrays, plan = load_from(server.url)
    check(folder, arrays)
    assert len(plan.requests) > 9


@pytest.mark.fault
def test_all_faults_together(folder, server):
    """Several kinds of faults, each occasionally: no byte is wrong."""
    failed: collections.Counter[tuple[str, int]] = collections.Counter()
    occasional = [sometimes(11 + i, fault) for i, fault in enumerate(TRANSIENT.values())]

    def transient(request):
        """Inject one fault, but fewer per range than the client's attempts (the rest of a range has the same end)."""
        range_ = request.path, request.stop
        if failed[range_] == http.MAX_ATTEMPTS - 1:
            return False
        failed[range_] += 1  # before the call: a fault can raise when the client has disconnected
        has_failed = any(fault(request) for fault in occasional)
        failed[range_] -= not has_failed
        return has_failed

    server.faults = [transient]
    for _ in range(3):
        failed.clear()
        check(folder, load_from(server.url)[0])
        assert failed.total() > 0


PERMANENT = {
    "503 forever": (faults.status(503), r"HTTP status 503; given up after 3 attempts"),
    "cut forever": (lambda r: r.answer(206, r.body, r.range_headers(), sent=0), "given up after 3 attempts"),
    "stalled forever": (faults.stall(1.0), "given up after 3 attempts"),
    "range ignored": (faults.ignores_range, "ignores byte ranges"),
    "wrong range": (faults.wrong_range, "requested bytes .* the server answered with 'bytes"),
    "no Content-Range": (faults.no_range_header, "the server answered with ''"),
    "changed entity tag": (faults.changed, "was changed while it was being read"),
    "changed size": (faults.grown, "was changed while it was being read"),
    "412": (faults.status(412), "was changed while it was being read"),
    "416": (faults.status(416), "was changed while it was being read"),
    "compressed": (faults.compressed, "compresses byte ranges"),
    "403": (faults.status(403), "access is refused"),
    "removed": (faults.status(404), "was removed while"),
    "odd Retry-After": (faults.status(503, {"Retry-After": "²".encode().decode("latin-1")}), "HTTP status 503; given up"),
    "other odd Retry-After": (faults.status(503, {"Retry-After": "\u00b2"}), "HTTP status 503; given up"),
    "long Content-Range": (
        lambda r: r.answer(206, r.body, r.range_headers() | {"Content-Range": f"bytes 1-{'9' * 5000}/7"}),
        "the server answered with 'bytes 1-999",
    ),
    "redirect to no address": (
        faults.redirect("http://[::1"),
        r"refused to follow the redirect to http://\[::1: Invalid IPv6 URL",
    ),
    "redirect to a wrong port": (faults.redirect("http://host:99999/"), "is not a usable address: Port out of range"),
    "redirect to another scheme": (faults.redirect("file:///etc/passwd"), "refused to follow the redirect to file:"),
    "redirect to itself": (lambda r: faults.redirect(r.path)(r), "more than 5 redirects"),
    "slow": (faults.slow, "(not complete after|ProtocolError).*; given up after 3 attempts"),
    "slow chunks": (faults.slow_chunks, "given up after 3 attempts"),
    "slow headers": (faults.slow_headers, "given up after 3 attempts"),
    "teapot": (faults.status(418), "HTTP status 418 where 206 was expected"),
}


@pytest.mark.fault
@pytest.mark.parametrize("case", PERMANENT)
def test_permanent_errors_are_reported(server, monkeypatch, case):
    monkeypatch.setattr(http, "MAX_ATTEMPTS", 3)
    fault, message = PERMANENT[case]
    checkpoint = open_checkpoint(server.url)
    server.faults = [fault]
    file = checkpoint.files["1.safetensors"]
    with pytest.raises(CheckpointError, match=message) as error:
        file.read_into(1000, memoryview(bytearray(5000)))
    assert server.url in str(error.value) and len(str(error.value)) < 700


@pytest.mark.fault
def test_a_body_without_an_end_is_not_read_further(server, folder):
    checkpoint = open_checkpoint(server.url)
    server.faults = [faults.endless]
    buffer = bytearray(5000)
    checkpoint.files["1.safetensors"].read_into(1000, memoryview(buffer))
    assert buffer == (folder / "1.safetensors").read_bytes()[1000:6000]


@pytest.mark.fault
@pytest.mark.parametrize(
    "address",
    ["http://[::1/m", "http://host:99999/m", "https:///m", "s3://", "gs://", "http://" + "x" * 5000, "http://\0/"],
)
def test_malformed_addresses(address):
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(address)
    assert len(str(error.value)) < 500 and len(str(error.value).splitlines()) == 1


@pytest.mark.fault
@pytest.mark.parametrize(
    ("url", "location", "target"),
    [
        ("https://a/x", "/y", "https://a/y"),
        ("https://a/x", "https://b:1/y", "https://b:1/y"),
        ("http://a/x", "https://a/x", "https://a/x"),
        ("https://a/x", "http://a/x", None),
        ("https://a/x", "ftp://a/x", None),
    ],
)
def test_a_redirect_does_not_lead_to_less_protection(url, location, target):
    if target is not None:
        assert http._redirect(url, location) == target
    else:
        with pytest.raises(CheckpointError, match="refused to follow the redirect"):
            http._redirect(url, location)


@pytest.mark.fault
def test_credentials_stay_with_scheme_host_and_port(server, folder):
    headers = {"Authorization": "Bearer secret"}
    assert http.HttpFolder(server.url, headers).read("config.json")
    assert "Authorization" in server.requests[-1][2]
    for other in (server.url.replace("http:", "https:"), server.url.replace("127.0.0.1", "localhost")):
        sent, _ = http.HttpFolder(other, headers).request(f"{server.url}/config.json")
        sent.close()
        assert "Authorization" not in server.requests[-1][2]
    with serve(folder) as first:
        first.text_faults = [faults.redirect(f"{server.url}/config.json")]
        assert http.HttpFolder(first.url + "/", headers).read("config.json") == (folder / "config.json").read_bytes()
        assert "Authorization" in first.requests[-1][2] and "Authorization" not in server.requests[-1][2]


def cut_text(request):
    return request.answer(200, request.body, sent=5)


@pytest.mark.fault
@pytest.mark.parametrize("fault", [faults.status(503), cut_text, faults.reset], ids=["503", "cut", "reset"])
def test_small_files_are_retried_too(folder, server, fault):
    server.text_faults = [sometimes(2, fault)]
    check(folder, load_from(server.url)[0])


@pytest.mark.fault
@pytest.mark.parametrize(
    ("status", "message"), [(403, "access is refused"), (418, "418 where 200"), (500, "given up after 6")]
)
def test_small_files_that_cannot_be_read(server, status, message):
    server.text_faults = [faults.status(status)]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(server.url)


@pytest.mark.fault
def test_stalls_time_out(server, monkeypatch):
    monkeypatch.setattr(http, "MAX_ATTEMPTS", 2)
    checkpoint = open_checkpoint(server.url)
    server.faults = [faults.stall(5.0)]
    start = time.monotonic()
    with pytest.raises(CheckpointError):
        checkpoint.files["1.safetensors"].read_into(1000, memoryview(bytearray(5000)))
    assert time.monotonic() - start < 3


@pytest.mark.fault
def test_missing_files(server, folder):
    (folder / "2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2\.safetensors does not exist \(HTTP status 404\)"):
        open_checkpoint(server.url)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(server.url)


@pytest.mark.fault
def test_no_server(monkeypatch):
    monkeypatch.setattr(http, "FIRST_DELAY_S", 0.01)
    with pytest.raises(CheckpointError, match="given up after 6 attempts"):
        open_checkpoint("http://127.0.0.1:9/model")


@pytest.mark.fault
def test_index_cannot_name_another_host(server, folder):
    """A malicious index causes no request, and so none with credentials."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "http://evil/x.safetensors"}}))
    with pytest.raises(CheckpointError, match="weight_map may only name"):
        open_checkpoint(server.url)
    assert not any("evil" in path or path.endswith(".safetensors") for _, path, _ in server.requests)


@pytest.mark.fault
def test_expired_address_is_renewed_once_and_credentials_stay_on_their_host(folder, server):
    """The hub redirects to signed addresses on another host, which expire: the original one is requested again, once."""
    issued = []

    class Redirect(faults.Handler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            if "Authorization" not in self.headers:
                return self.answer(401)
            issued.append(name)
            return self.answer(302, headers={"Location": f"{server.url}/{name}?signature={len(issued)}"})

    def expired(request):
        return request.path.endswith(f"={expires}") and request.answer(403)

    with serve(folder) as hub:
        hub.RequestHandlerClass = Redirect

        # Another name for this machine stands for another host.
        url = hub.url.replace("127.0.0.1", "localhost")
        repository = http.HttpFolder(f"{url}/org/name/", {"Authorization": "Bearer secret"})
        checkpoint = open_checkpoint(ModelFiles("org/name", repository))
        expires = next(i for i, name in enumerate(issued, 1) if name == "1.safetensors")
        server.faults = [expired]
        before = len(issued)
        buffer = bytearray(5000)
        checkpoint.files["1.safetensors"].read_into(1000, memoryview(buffer))
        assert buffer == (folder / "1.safetensors").read_bytes()[1000:6000]
        assert issued[before:] == ["1.safetensors"]
    assert not any("Authorization" in headers for _, _, headers in server.requests)


HUB_SCRIPT = """
import json, sys
from qwen_dist.checkpoint.source import open_checkpoint
checkpoint = open_checkpoint(sys.argv[1])
tensor = checkpoint.tensors["model.norm.weight"]
buffer = bytearray(tensor.nbytes)
checkpoint.files[tensor.file].read_into(tensor.begin, memoryview(buffer))
print(json.dumps({"folder": str(checkpoint.folder), "bytes": buffer.hex()}))
"""


def open_in_a_process(hub_id, **environment):
    """Run in a separate process: the hub's library reads its environment when it is imported."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | environment
    variables["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", HUB_SCRIPT, hub_id]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def test_hub_id(folder, tmp_path):
    """Streamed at the commit that the id resolved to, with the token; from the cache if that is complete."""
    commit = "c" * 40

    class Hub(faults.Handler):
        def do_GET(self):
            if self.path.startswith("/api/models/org/name"):
                content = json.dumps({"id": "org/name", "modelId": "org/name", "sha": commit, "siblings": []}).encode()
                with self.server.lock:
                    self.server.requests.append((self.command, self.path, dict(self.headers)))
                return self.answer(200, content, {"Content-Type": "application/json"})
            self.path = self.path.replace(f"/org/name/resolve/{commit}/", "/")
            return super().do_GET()

    value = safetensors.numpy.load_file(folder / "2.safetensors")["model.norm.weight"].tobytes().hex()
    cache = tmp_path / "cache"
    with serve(folder) as hub:
        hub.RequestHandlerClass = Hub
        for hub_id in ("org/name", "org/name@some-branch"):
            done = open_in_a_process(hub_id, HF_ENDPOINT=hub.url, HF_HOME=str(cache), HF_TOKEN="hf_secret")
            assert done.returncode == 0, done.stderr
            found = json.loads(done.stdout)
            assert found == {"folder": f"{hub.url}/org/name/resolve/{commit}/", "bytes": value}
        assert any(path.endswith("/revision/some-branch") for _, path, _ in hub.requests)
        files = [headers for _, path, headers in hub.requests if path.endswith((".json", ".safetensors"))]
        assert files and all("authorization" in map(str.lower, headers) for headers in files)
        missing = open_in_a_process("org/unknown", HF_ENDPOINT=hub.url, HF_HOME=str(cache))
        assert "org/unknown is not a local directory and cannot be opened on the hub" in missing.stderr
    repository = cache / "hub" / "models--org--name"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    folder.rename(repository / "snapshots" / commit)
    done = open_in_a_process("org/name", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(cache), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes"] == value and found["folder"].endswith(commit)
    (repository / "snapshots" / commit / "2.safetensors").unlink()
    done = open_in_a_process("org/name", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(cache), HF_HUB_OFFLINE="1")
    assert "2.safetensors cannot be read: No such file or directory" in done.stderr


@pytest.fixture
def bucket(folder, monkeypatch):
    """An object store that implements the part of S3 that reading needs."""
    with serve(folder.parent) as store:
        store.serves_text_ranges = True
        for name, value in {
            "AWS_ENDPOINT_URL": store.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_SKIP_SIGNATURE": "true",
            "AWS_REGION": "us-east-1",
            "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false",
        }.items():
            monkeypatch.setenv(name, value)
        yield store


def test_object_store(folder, bucket):
    arrays, _ = load_from(f"s3://{folder.name}")
    check(folder, arrays)


@pytest.mark.fault
@pytest.mark.parametrize("case", ["503", "429", "500", "reset"])
def test_object_store_retries(folder, bucket, case):
    bucket.faults = [sometimes(3, TRANSIENT[case])]
    check(folder, load_from(f"s3://{folder.name}")[0])


@pytest.mark.fault
@pytest.mark.parametrize("case", ["wrong range", "range ignored", "412", "403"])
def test_object_store_errors_are_reported(folder, bucket, case):
    checkpoint = open_checkpoint(f"s3://{folder.name}")
    bucket.faults = [PERMANENT[case][0]]
    with pytest.raises(CheckpointError, match=r"1\.safetensors: bytes from 1000 cannot be read"):
        checkpoint.files["1.safetensors"].read_into(1000, memoryview(bytearray(5000)))


@pytest.mark.fault
def test_object_store_errors_are_one_line(folder, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    from obstore.store import S3Store

    location = ObjectFolder(f"s3://{folder.name}")
    location.store = S3Store(folder.name, retry_config={"max_retries": 0})
    for use in (lambda: location.read("config.json"), location.weight_files, lambda: location.open("x.safetensors")):
        with pytest.raises(CheckpointError) as error:
            use()
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 600


@pytest.mark.fault
def test_unknown_addresses():
    with pytest.raises(CheckpointError, match="addresses begin with"):
        open_checkpoint("ftp://host/model")
