"""One set of storage options for corpus and table: Lance's names, translated for each fsspec store.

Lance knows the options of S3, Google Cloud Storage and Azure under the names of the Rust library
object_store. s3fs, gcsfs and adlfs have names of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kalm_encoder.errors import InputError

S3 = {  # names that s3fs uses, each with the names under which Lance knows the option
    "key": ("aws_access_key_id", "access_key_id"),
    "secret": ("aws_secret_access_key", "secret_access_key"),
    "token": ("aws_session_token", "session_token", "aws_token", "token"),
    "endpoint_url": ("aws_endpoint", "aws_endpoint_url", "endpoint", "endpoint_url"),
    "region": ("aws_region", "region", "aws_default_region", "default_region"),
    "anon": ("aws_skip_signature", "skip_signature"),
}
GOOGLE = {  # the same for gcsfs
    "path": (
        *("google_service_account", "service_account"),
        *("google_service_account_path", "service_account_path"),
        *("google_application_credentials", "application_credentials"),
    ),
    "key": ("google_service_account_key", "service_account_key"),
    "anon": ("google_skip_signature", "skip_signature"),
}
AZURE = {  # the same for adlfs
    "account_name": ("azure_storage_account_name", "account_name"),
    "account_key": (
        *("azure_storage_account_key", "azure_storage_access_key", "azure_storage_master_key"),
        *("account_key", "access_key", "master_key"),
    ),
    "sas_token": (*("azure_storage_sas_key", "azure_storage_sas_token", "sas_key", "sas_token"),),
    "tenant_id": (
        *("azure_storage_tenant_id", "azure_storage_authority_id", "azure_tenant_id"),
        *("azure_authority_id", "tenant_id", "authority_id"),
    ),
    "client_id": ("azure_storage_client_id", "azure_client_id", "client_id"),
    "client_secret": ("azure_storage_client_secret", "azure_client_secret", "client_secret"),
    "endpoint": ("azure_storage_endpoint", "azure_endpoint", "endpoint"),
    "anon": ("azure_skip_signature", "skip_signature"),
}


def fsspec_options(url: str, storage_options: dict[str, str] | None) -> dict[str, Any]:
    """Translate Lance's storage options into those of fsspec, by protocol of a URL or chain.

    Raises:
        InputError: If a service account's key is no JSON, or an endpoint of Azure has no key.
    """
    given = {name.lower(): value for name, value in (storage_options or {}).items()}
    protocols = {part.split("://")[0] for part in url.split("::") if "://" in part}
    options: dict[str, Any] = {}
    for names, translate in (
        (("s3", "s3a"), _s3),
        (("gs", "gcs"), _google),
        (("az", "abfs", "abfss"), _azure),
    ):
        if found := protocols & set(names):
            options |= dict.fromkeys(found, translate(given))
    return options


def _s3(given: Mapping[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = _renamed(given, S3)
    if "region" in options:
        options["client_kwargs"] = {"region_name": options.pop("region")}
    if "anon" in options:
        options["anon"] = _is_true(options["anon"])
    return options


def _google(given: Mapping[str, str]) -> dict[str, Any]:
    found = _renamed(given, GOOGLE)
    if _is_true(found.get("anon", "false")):
        return {"token": "anon"}
    if "key" in found:
        try:
            return {"token": json.loads(found["key"])}
        except ValueError as error:
            raise InputError(
                f"google_service_account_key holds no JSON ({error}): give the content of the "
                "key file, or its path as google_service_account"
            ) from error
    return {"token": found["path"]} if "path" in found else {}


def _azure(given: Mapping[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = _renamed(given, AZURE)
    if "anon" in options:
        options["anon"] = _is_true(options["anon"])
    if endpoint := options.pop("endpoint", None):
        if not {"account_name", "account_key"} <= options.keys():
            raise InputError(
                f"azure_storage_endpoint={endpoint} needs azure_storage_account_name and "
                "azure_storage_account_key beside it to read files there"
            )
        options["connection_string"] = (
            f"DefaultEndpointsProtocol={endpoint.partition('://')[0]};"
            f"AccountName={options['account_name']};AccountKey={options['account_key']};"
            f"BlobEndpoint={endpoint};"
        )
    return options


def _renamed(given: Mapping[str, str], names: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return the options that are given, under the names of an fsspec store."""
    found = {}
    for name, aliases in names.items():
        if values := [given[alias] for alias in aliases if alias in given]:
            found[name] = values[0]
    return found


def _is_true(value: str) -> bool:
    return value.lower() in ("true", "1", "yes", "on", "y", "t")
