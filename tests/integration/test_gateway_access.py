"""Keys at the gateway: nothing but health without one, whichever way the path is written."""

import asyncio
import itertools
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc

from gateway.service import SERVICE
from protos.tandem.v1 import common_pb2, inference_pb2, inference_pb2_grpc, registry_pb2, registry_pb2_grpc
from runtime import rpc
from runtime.errors import Unauthenticated
from tandem.client import Client
from tests.fakes.cluster import Cluster, cluster, http
from tests.fakes.worker import FakeWorker, tokens_of

PAIR = (("decode", "d1"), ("prefill", "p1"))
PROMPT = [5, 6, 7]
KEYS = {"api_keys": "key-one, key-two", "internal_secret": "among us", "admin_key": "root"}
KEY = {"authorization": "Bearer key-two"}

PATHS = [
    "/v1/models", "//v1/models", "/v1//models", "/v1/./models", "/v1/../v1/models", "/health/../v1/models",
    "/ready/..//v1/models", "/health%2f..%2fv1/models", "/health/%2e%2e/v1/models", "/%76%31/models",
    "/v1/models/", "/v1/models/demo", "/v1/models?/health", "/v1/models?path=/health", "/v1/models;/health",
    "/health;/v1/models", "/v1/models%00/health", "/v1/models%23/health", "/HEALTH", "/health/", "/health%20",
    "/health%00", "/", "/nowhere", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize",
    "/version", "/docs", "/openapi.json", "http://127.0.0.1/v1/models", "http://127.0.0.1/health/../v1/models",
]  # fmt: skip
METHODS = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE"]
BAD_HOSTS = ["a/b", "a/health?", "x?y", "x#y", "a@b", "", "a b", "a\\b", "a:b", "x/..", "[::1", "é"]


async def raw(made: Cluster, head: str) -> str:
    """The whole answer to these bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", made.gateway.http_port)
    writer.write(head.encode("latin-1"))
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    return answer.decode("latin-1")


def request(path: str, method: str = "GET", host: str = "host: x\r\n") -> str:
    return f"{method} {path} HTTP/1.1\r\n{host}connection: close\r\ncontent-length: 0\r\n\r\n"


async def test_no_way_of_writing_a_path_goes_around_the_key() -> None:
    async with cluster(*PAIR, **KEYS) as made:
        for method, path in itertools.product(METHODS, PATHS):
            answer = await raw(made, request(path, method))
            status, _, body = answer.partition("\r\n\r\n")
            assert status.startswith("HTTP/1.1 401 "), (method, path, status)
            assert "www-authenticate: Bearer" in status
            assert ("an API key is needed" in body) == (method != "HEAD")
        for path in ("/health", "/ready", "/%68ealth"):
            assert (await raw(made, request(path))).startswith("HTTP/1.1 200 ")
        for path in ("/health", "/ready"):  # and they do nothing but answer
            assert " 405 " in (await raw(made, request(path, "POST"))).split("\r\n")[0]


async def test_a_host_that_is_none_is_refused() -> None:
    async with cluster(**KEYS) as made:
        hosts = [f"host: {host}\r\n" for host in BAD_HOSTS] + ["host: x\r\nhost: y\r\n"]
        for host, path in itertools.product(hosts, ("/v1/models", "/health", "/debug/state")):
            answer = await raw(made, request(path, host=host))
            assert answer.startswith("HTTP/1.1 400 "), (host, path, answer)


async def test_state_is_not_for_a_page_that_calls_itself_this_machine() -> None:
    async with cluster(**KEYS) as made:
        for path in ("/metrics", "/debug/state"):
            for host, status in (("127.0.0.1", 200), ("localhost:80", 200), ("evil.org", 401)):
                answer = await raw(made, request(path, host=f"host: {host}\r\n"))
                assert answer.startswith(f"HTTP/1.1 {status} "), (path, host)
            proxied = "host: 127.0.0.1\r\nx-forwarded-for: 127.0.0.1, 10.1.1.1\r\n"
            assert " 401 " in (await raw(made, request(path, host=proxied))).split("\r\n")[0]
            with_key = proxied + "authorization: Bearer root\r\n"
            assert (await raw(made, request(path, host=with_key))).startswith("HTTP/1.1 200 ")


async def test_any_of_the_keys_serves_over_http() -> None:
    async with cluster(*PAIR, **KEYS) as made, http(made) as client:
        body = {"prompt": PROMPT, "max_tokens": 3, "return_token_ids": True}
        for key in ("key-one", "key-two"):
            answer = await client.post(
                "/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}
            )
            assert answer.json()["choices"][0]["token_ids"] == tokens_of(PROMPT, 3)
        for wrong in ("Bearer root", "Bearer among us", "Basic key-one", "key-one", "Bearer key-one,key-two"):
            answer = await client.post("/v1/completions", json=body, headers={"authorization": wrong})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "unauthenticated"
            assert answer.headers["x-request-id"]
        assert len(made.workers["d1"].submits) == 2


def methods_of(service: Any) -> list[str]:
    return [f"/{service.full_name}/{method.name}" for method in service.methods]


async def refusals(channel: grpc.aio.Channel, methods: list[str], metadata: Any = ()) -> None:
    for method in methods:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.stream_stream(method)(metadata=metadata, timeout=3).read()
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED, method


WRONG = [(), (("authorization", "Bearer root"),), (("authorization", "Bearer key-one"),) * 2]


async def test_every_public_method_needs_a_key_but_health() -> None:
    async with cluster(*PAIR, **KEYS) as made, grpc.aio.insecure_channel(made.grpc) as channel:
        names = methods_of(inference_pb2.DESCRIPTOR.services_by_name["InferenceService"])
        assert len(names) == 7
        names += ["/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "/x.Y/Z", "//", "/"]
        names += [f"/{SERVICE}//Generate", f"/{SERVICE}/generate", "/grpc.health.v1.Health/../Check"]
        for metadata in WRONG:
            await refusals(channel, names, metadata)
        assert not made.workers["d1"].submits
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status
        api = inference_pb2_grpc.InferenceServiceStub(channel)
        shown = (("authorization", KEY["authorization"]),)
        assert (await api.ListModels(inference_pb2.ListModelsRequest(), metadata=shown)).models
        assert reflection_pb2_grpc.ServerReflectionStub is not None


async def test_the_client_shows_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(*PAIR, **KEYS) as made:
        async with Client(made.grpc, api_key="key-one") as client:
            assert (await client.complete(PROMPT, max_tokens=2)).token_ids == tuple(tokens_of(PROMPT, 2))
        async with Client(made.grpc) as client:
            with pytest.raises(Unauthenticated, match="API key"):
                await client.models()
        monkeypatch.setenv("TANDEM_API_KEY", "key-two")
        async with Client(made.grpc) as client:
            assert (await client.server_info()).model == "demo"


async def test_workers_need_the_secret_and_so_do_gateways() -> None:
    async with cluster(*PAIR, **KEYS) as made:
        assert made.ready() == {"d1", "p1"}
        async with grpc.aio.insecure_channel(made.internal) as channel:
            names = methods_of(registry_pb2.DESCRIPTOR.services_by_name["RegistryService"])
            for metadata in WRONG:
                await refusals(channel, names, metadata)
        for secret in (None, "guessed"):
            stranger = FakeWorker("decode", "d2", made.internal, made.links, made.facts(), secret=secret)
            made.workers["d2"] = stranger
            await stranger.start()
            async with grpc.aio.insecure_channel(stranger.identity.address) as channel:
                if secret:
                    await refusals(channel, ["/tandem.v1.DecodeService/Attach"])
            await asyncio.sleep(0.2)
            assert made.ready() == {"d1", "p1"}
            await stranger.stop()


async def test_a_refused_worker_is_told_which_setting(caplog: pytest.LogCaptureFixture) -> None:
    from worker.membership import Membership

    async with cluster(**KEYS) as made:
        member = Membership(registry_pb2.WorkerInfo(), [made.internal])
        task = asyncio.ensure_future(member.run())
        await asyncio.sleep(0.8)  # several tries
        task.cancel()
        await asyncio.wait([task])
    said = [record for record in caplog.records if record.name == "worker.membership"]
    (error,) = [record for record in said if record.levelname == "ERROR"]
    assert "--internal-secret" in error.getMessage()
    assert "among us" not in caplog.text


async def test_without_a_secret_all_may_register_on_loopback() -> None:
    async with cluster(*PAIR) as made, rpc.channel(made.internal) as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Register(iter([registry_pb2.RegisterRequest()])).read()
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def shown(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def test_keys_share_neither_request_ids_nor_cached_blocks() -> None:
    async with cluster(*PAIR, **KEYS) as made, grpc.aio.insecure_channel(made.grpc) as channel:
        made.workers["d1"].faults.token_delay_s = 0.02
        api = inference_pb2_grpc.InferenceServiceStub(channel)
        asked = inference_pb2.GenerateRequest(
            request_id="same", token_ids=inference_pb2.TokenIds(ids=PROMPT), cache_salt="s"
        )
        calls = {key: api.Generate(asked, metadata=shown(key)) for key in ("key-one", "key-two")}
        for call in calls.values():
            assert (await call.read()).request_id == "same"
        first, second = (submit.cache_salt for submit in made.workers["d1"].submits)
        assert first != second
        assert first.endswith("s")
        abort = inference_pb2.AbortRequest(request_ids=["same"])
        assert (await api.Abort(abort, metadata=shown("key-one"))).aborted == ["same"]
        while (answer := await calls["key-one"].read()) is not grpc.aio.EOF:
            reason = answer.finish_reason
        assert reason == common_pb2.FINISH_REASON_ABORT
        assert (await calls["key-two"].read()).token_ids, "it goes on"
        calls["key-two"].cancel()
        await made.quiet()


async def test_keys_that_share_the_prefix_cache() -> None:
    async with cluster(*PAIR, **KEYS, share_prefix_cache=True) as made, http(made) as client:
        for key in ("key-one", "key-two"):
            headers = {"authorization": f"Bearer {key}"}
            await client.post(
                "/v1/completions",
                json={"prompt": PROMPT, "max_tokens": 1, "cache_salt": "s"},
                headers=headers,
            )
        assert [submit.cache_salt for submit in made.workers["d1"].submits] == ["s", "s"]
