"""The router's gRPC contract, over a real server on loopback."""

import threading
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.router_rig import TOKEN, channel_to, running_router, view_of, wait_for
from support.router_traffic import encoded, paired_tokens

from remora.actors.router_state import HomesLearned
from remora.comm import coordinator_pb2, router_pb2
from remora.comm.errors import ClusterError
from remora.comm.grpc_base import MESSAGE_BYTES_MAX, Method, stream_call, unary_call
from remora.comm.router_grpc import (
    GET_VIEW,
    METHODS,
    PLAN,
    PROMPT_TOKENS_MAX,
    PROMPTS_MAX,
    REPORT,
    ROUTE,
    WATCH_VIEW,
    bearer_of,
    credentials_of,
    placement_from_message,
)
from remora.comm.view import View

SOON_S = 20.0
ASKED = router_pb2.RouteRequest(prompts=[router_pb2.RoutePrompt(token_ids=range(40))])


def call(channel: Any, method: Method, request: Any, token: bytes = TOKEN) -> Any:
    return unary_call(channel, method)(request, timeout=SOON_S, metadata=credentials_of(token))


def refused(channel: Any, method: Method, request: Any, **options: Any) -> grpc.RpcError:
    make = stream_call if method.is_stream else unary_call
    with pytest.raises(grpc.RpcError) as caught:
        answer = make(channel, method)(request, **{"timeout": SOON_S, **options})
        if method.is_stream:
            next(answer)
    return caught.value


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", f"Bearer {bearer_of(b'another token, also 32 bytes....')}"),),
        (("authorization", TOKEN.hex()),),
        (("authorization", "Bearer "),),
    ],
    ids=["none", "another", "the token itself", "empty"],
)
def test_no_call_without_the_clusters_token(method: Method, metadata: Any) -> None:
    with running_router(view_of()) as server, channel_to(server) as channel:
        error = refused(channel, method, method.request(), metadata=metadata)
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert TOKEN.hex() not in str(error) and bearer_of(TOKEN) not in str(error)
        assert server.status()["calls"][method.name] == 0


def test_reflection_needs_the_token_and_describes_both_services() -> None:
    asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
    symbol = [reflection_pb2.ServerReflectionRequest(file_containing_symbol="remora.v1.Router")]
    with running_router() as server, channel_to(server) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.ServerReflectionInfo(iter(asked), timeout=SOON_S))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        known = {"timeout": SOON_S, "metadata": credentials_of(TOKEN)}
        [answer] = stub.ServerReflectionInfo(iter(asked), **known)
        names = {service.name for service in answer.list_services_response.service}
        assert {"remora.v1.Router", "remora.v1.Views", "grpc.health.v1.Health"} <= names
        [answer] = stub.ServerReflectionInfo(iter(symbol), **known)
        assert answer.file_descriptor_response.file_descriptor_proto


def test_health_is_open_and_true() -> None:
    with running_router() as server, channel_to(server) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "remora.v1.Router", "remora.v1.Views"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=SOON_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=SOON_S)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_route_answers_every_prompt_and_needs_a_group() -> None:
    with running_router() as server, channel_to(server) as channel:
        error = refused(channel, ROUTE, ASKED, metadata=credentials_of(TOKEN))
        assert error.code() is grpc.StatusCode.UNAVAILABLE and "no dense group" in error.details()
        server.adopt_view(view_of(epoch=3))
        answer = call(channel, ROUTE, ASKED)
        assert answer.epoch == 3 and [c.group for c in answer.choices] == ["dense-0"]
        assert answer.choices[0].expected_remote_copies < 0, "nothing is known yet"
        again = call(channel, ROUTE, ASKED)
        assert (again.choices[0].group, again.choices[0].prefix_tokens) in {
            ("dense-0", 32),
            ("dense-1", 0),
        }
        both = router_pb2.RouteRequest(prompts=ASKED.prompts, unreachable=["dense-0", "dense-1"])
        error = refused(channel, ROUTE, both, metadata=credentials_of(TOKEN))
        assert error.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (router_pb2.RouteRequest(), "0 prompts"),
        (
            router_pb2.RouteRequest(prompts=[router_pb2.RoutePrompt()] * (PROMPTS_MAX + 1)),
            f"{PROMPTS_MAX + 1} prompts",
        ),
        (
            router_pb2.RouteRequest(
                prompts=[router_pb2.RoutePrompt(token_ids=[1] * (PROMPT_TOKENS_MAX + 1))]
            ),
            f"{PROMPT_TOKENS_MAX + 1} token ids",
        ),
        (
            router_pb2.RouteRequest(prompts=[router_pb2.RoutePrompt(num_sequences=65_537)]),
            "65537 sequences",
        ),
    ],
)
def test_what_is_beyond_the_bounds_is_refused(request_: Any, complaint: str) -> None:
    with running_router(view_of()) as server, channel_to(server) as channel:
        error = refused(channel, ROUTE, request_, metadata=credentials_of(TOKEN))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and complaint in error.details()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_bytes_that_are_no_message_are_refused_in_words(method: Method) -> None:
    with running_router(view_of()) as server, channel_to(server) as channel:
        make = channel.unary_stream if method.is_stream else channel.unary_unary
        with pytest.raises(grpc.RpcError) as caught:
            answer = make(method.path)(b"\xff" * 20, timeout=SOON_S, metadata=credentials_of(TOKEN))
            if method.is_stream:
                next(answer)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == f"these bytes are no {method.request.DESCRIPTOR.full_name}"


def test_messages_are_bounded_and_sketches_checked() -> None:
    with running_router(view_of()) as server, channel_to(server) as channel:
        bad = router_pb2.ReportRequest(group="dense-0", sketch=b"no sketch")
        error = refused(channel, REPORT, bad, metadata=credentials_of(TOKEN))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "routing sketch" in error.details()
        large = router_pb2.ReportRequest(group="dense-0", sketch=b"x" * MESSAGE_BYTES_MAX)
        with grpc.insecure_channel(server.address) as unbounded:
            error = refused(unbounded, REPORT, large, metadata=credentials_of(TOKEN))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        long = router_pb2.ReportRequest(group="g" * 257)
        error = refused(channel, REPORT, long, metadata=credentials_of(TOKEN))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "257" in error.details()
        assert call(channel, REPORT, router_pb2.ReportRequest(group="dense-0")).report_after_s > 0


def report_of(group: int, sketch: bytes = b"") -> Any:
    return router_pb2.ReportRequest(
        group=f"dense-{group}",
        incarnation=1,
        sketch=sketch,
        epoch=1,
        sent=[router_pb2.ShardPairs(pairs=[10 * group + 1, 2]) for _ in range(2)],
    )


def test_a_bad_sketch_costs_no_group_what_the_others_sent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running_router(view_of()) as server, channel_to(server) as channel:
        call(channel, REPORT, report_of(0))
        for _ in range(2):
            call(channel, REPORT, report_of(1, b"no sketch"))
            answer = call(channel, REPORT, report_of(0, b"no sketch"))
            assert [list(layer.pairs) for layer in answer.others_sent] == [[11, 2], [11, 2]]
        assert caplog.text.count("a sketch of dense-0 is not counted") == 1


def test_who_reports_another_model_first_does_not_decide_what_is_counted() -> None:
    other = encoded(paired_tokens(3, 300), "b", (1, 2, 3))
    with running_router(view_of()) as server, channel_to(server) as channel:
        stranger = router_pb2.ReportRequest(group="elsewhere", sketch=other)
        error = refused(channel, REPORT, stranger, metadata=credentials_of(TOKEN))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "another model than serves" in error.details()
        call(channel, REPORT, report_of(0, encoded(paired_tokens(2, 300), "a", (1, 2))))
        assert server.status()["statistics"]["tokens"] == 300


def test_pairs_that_are_none_are_refused_in_words() -> None:
    for sent in ([], [1 << 41, 0], [1]):
        report = router_pb2.ReportRequest(group="dense-0", incarnation=1, epoch=1)
        report.sent.extend([router_pb2.ShardPairs(pairs=sent)] * 2)
        with running_router(view_of()) as server, channel_to(server) as channel:
            error = refused(channel, REPORT, report, metadata=credentials_of(TOKEN))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert error.details().startswith("pairs of ")


def test_a_report_does_not_wait_for_what_is_learned_from_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Costs by host are looked at beside it, one look at a time; one that failed comes again."""
    held, looks = threading.Event(), []

    def homes(view: View) -> HomesLearned:
        looks.append(view.epoch)
        assert held.wait(SOON_S)
        if len(looks) == 1:
            raise RuntimeError("a bug")
        return HomesLearned({"a": 3.0, "b": 0.5})

    with running_router(view_of()) as server, channel_to(server) as channel:
        monkeypatch.setattr(server.statistics, "homes", homes)
        sketch = encoded(paired_tokens(2, 2000), "a", (1, 2))
        for _ in range(3):
            call(channel, REPORT, report_of(0, sketch))
        assert looks == [1]
        held.set()
        wait_for(lambda: "was not learned" in caplog.text, SOON_S)
        call(channel, REPORT, report_of(0, sketch))
        wait_for(lambda: server._learning is not None and server._learning.done(), SOON_S)
        assert looks == [1, 1] and call(channel, ROUTE, ASKED).choices[0].group == "dense-1"


def test_a_server_that_stops_waits_for_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    with running_router(view_of()) as server, channel_to(server) as channel:
        monkeypatch.setattr(server.statistics, "homes", lambda _: held.wait(SOON_S))
        call(channel, REPORT, report_of(0, encoded(paired_tokens(2, 2000), "a", (1, 2))))
        server.stop()
        assert server._learning is not None and server._learning.cancelled()
    held.set()


def test_a_plan_without_statistics_says_so() -> None:
    with running_router(view_of()) as server, channel_to(server) as channel:
        error = refused(channel, PLAN, PLAN.request(), metadata=credentials_of(TOKEN))
        assert error.code() is grpc.StatusCode.UNAVAILABLE and "0 tokens" in error.details()


def test_a_call_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()

    with running_router(view_of()) as server, channel_to(server) as channel:
        monkeypatch.setattr(server.statistics, "plan", lambda *_: held.wait(SOON_S))
        error = refused(channel, PLAN, PLAN.request(), metadata=credentials_of(TOKEN), timeout=0.2)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        error = refused(channel, PLAN, PLAN.request(), metadata=credentials_of(TOKEN))
        assert error.code() is grpc.StatusCode.UNAVAILABLE and "is being made" in error.details()
        assert call(channel, ROUTE, ASKED).choices, "the others go on"
        held.set()


def test_the_servers_own_limit_holds_where_a_caller_sets_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = threading.Event()
    monkeypatch.setattr(
        "remora.actors.router_service.METHODS",
        tuple(
            Method(**{**{f: getattr(m, f) for f in Method.__slots__}, "limit_s": 0.1})
            for m in METHODS
        ),
    )
    with running_router(view_of()) as server, channel_to(server) as channel:
        monkeypatch.setattr(server.statistics, "plan", lambda *_: held.wait(SOON_S))
        error = refused(channel, PLAN, PLAN.request(), metadata=credentials_of(TOKEN), timeout=None)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        held.set()


def test_views_are_told_as_they_come() -> None:
    first, second = view_of(epoch=1), view_of(epoch=2, hosts=("a", "b", "c"), num_experts=9)
    known = {"timeout": SOON_S, "metadata": credentials_of(TOKEN)}
    with running_router() as server, channel_to(server) as channel:
        error = refused(channel, GET_VIEW, GET_VIEW.request(), metadata=credentials_of(TOKEN))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        watch = stream_call(channel, WATCH_VIEW)(coordinator_pb2.WatchViewRequest(), **known)
        server.adopt_view(first)
        seen = next(watch)
        assert (seen.epoch, seen.view_hash) == (1, first.view_hash)
        assert placement_from_message(seen.placement) == first.placement
        assert {m.uid: m.host for m in seen.members} == {
            m.uid: m.endpoint.host for m in first.members
        }
        assert seen.members[0].labels["zone"] == "a"
        server.adopt_view(first)
        server.adopt_view(second)
        assert next(watch).view_hash == second.view_hash
        server.adopt_view(first)
        assert call(channel, GET_VIEW, GET_VIEW.request()).epoch == 2, "an older view is ignored"
        late = stream_call(channel, WATCH_VIEW)(
            coordinator_pb2.WatchViewRequest(after_epoch=2), **known
        )
        third = view_of(epoch=3)
        server.adopt_view(third)
        assert next(late).epoch == next(watch).epoch == 3
        of_before = coordinator_pb2.WatchViewRequest(after_epoch=57)
        assert next(stream_call(channel, WATCH_VIEW)(of_before, **known)).epoch == 3
        late.cancel()
        watch.cancel()


def test_watchers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remora.actors.router_service.WATCHERS_MAX", 1)
    known = {"timeout": SOON_S, "metadata": credentials_of(TOKEN)}
    with running_router(view_of()) as server, channel_to(server) as channel:
        watch = stream_call(channel, WATCH_VIEW)(WATCH_VIEW.request(), **known)
        next(watch)
        error = refused(channel, WATCH_VIEW, WATCH_VIEW.request(), metadata=known["metadata"])
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_port_that_is_taken_is_told() -> None:
    with running_router() as server:
        port = int(server.address.rpartition(":")[2])
        with pytest.raises(ClusterError, match=f"cannot listen on 127.0.0.1:{port}"):
            with running_router(port=port):
                pass
