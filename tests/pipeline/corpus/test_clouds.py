"""Storage options of each cloud, translated; and a job on an emulator of Azure."""

import json
import socket
import subprocess
import sys
import time

import fsspec
import pytest

from kalm_encoder.errors import InputError
from pipeline.corpus.clouds import fsspec_options
from tests.conftest import make_texts, write_corpus
from tests.support.programs import require

KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The key of the emulator's account, which its manual gives."""


@pytest.mark.parametrize(
    ("url", "given", "expected"),
    [
        ("az://c/x", {"account_name": "a", "ACCESS_KEY": "k"},
         {"account_name": "a", "account_key": "k"}),
        ("abfss://c/x", {"azure_storage_account_name": "a", "azure_storage_sas_token": "s"},
         {"account_name": "a", "sas_token": "s"}),
        ("az://c/x", {"azure_storage_account_name": "a", "azure_client_id": "i",
                      "azure_client_secret": "s", "azure_tenant_id": "t"},
         {"account_name": "a", "client_id": "i", "client_secret": "s", "tenant_id": "t"}),
        ("az://c/x", {"account_name": "a", "azure_skip_signature": "TRUE"},
         {"account_name": "a", "anon": True}),
        ("gs://b/x", {"google_service_account": "k.json"}, {"token": "k.json"}),
        ("gs://b/x", {"google_application_credentials": "k.json"}, {"token": "k.json"}),
        ("gcs://b/x", {"google_service_account_key": json.dumps({"type": "service_account"})},
         {"token": {"type": "service_account"}}),
        ("gs://b/x", {"google_skip_signature": "true"}, {"token": "anon"}),
        ("gs://b/x", {"aws_region": "eu"}, {}),
        ("s3://b/x", {"aws_region": "eu", "aws_skip_signature": "true"},
         {"client_kwargs": {"region_name": "eu"}, "anon": True}),
    ],
)  # fmt: skip
def test_options_have_the_names_of_each_library(url, given, expected):
    assert fsspec_options(url, given) == {url.partition("://")[0]: expected}


def test_a_chain_gives_each_store_its_own_options():
    given = {"account_name": "a", "aws_access_key_id": "k"}
    found = fsspec_options("zip://c.jsonl::az://c/x.zip", given)
    assert found == {"az": {"account_name": "a"}}


@pytest.mark.parametrize(
    ("url", "given", "says"),
    [
        ("gs://b/x", {"google_service_account_key": "k.json"}, "its path as google_service"),
        ("az://c/x", {"azure_storage_endpoint": "http://h"}, "needs azure_storage_account_name"),
    ],
)
def test_options_that_cannot_be_translated_are_named(url, given, says):
    with pytest.raises(InputError, match=says):
        fsspec_options(url, given)


@pytest.fixture
def azure(tmp_path):
    require("azurite-blob")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["azurite-blob", "--silent", "--inMemoryPersistence", "--skipApiVersionCheck"]
    server = subprocess.Popen([*command, "--blobPort", str(port)], cwd=tmp_path)
    while True:
        assert server.poll() is None
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.1)
    endpoint = f"http://127.0.0.1:{port}/devstoreaccount1"
    options = {
        "azure_storage_account_name": "devstoreaccount1",
        "azure_storage_account_key": KEY,
        "azure_storage_endpoint": endpoint,
        "azure_allow_http": "true",
    }
    store = fsspec.filesystem("az", **fsspec_options("az://x", options)["az"])
    store.mkdir("bucket")
    yield store, [f"--storage-option={name}={value}" for name, value in options.items()]
    server.kill()
    server.wait()


def test_a_job_runs_on_azure(azure, model_dir, tmp_path):
    store, options = azure
    corpus = write_corpus(tmp_path / "c.jsonl", make_texts(12))
    store.put_file(str(corpus), "bucket/c.jsonl")

    def kalm(*arguments):
        command = [sys.executable, "-m", "jobs", *map(str, arguments), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "fsspec: read a file, and find it" in kalm("doctor", "az://bucket/t.lance")
    encode = ["encode", "az://bucket/*.jsonl", "--to", "az://bucket/t.lance"]
    encode += ["--model", model_dir, "--workers", 0, "--shard-size", 4]
    assert "12 passages" in kalm(*encode)
    assert "already complete" in kalm(*encode)
    assert "0 problems" in kalm("verify", "az://bucket/t.lance")
