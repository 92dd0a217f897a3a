"""`remora bench`: what is printed, and that it says when layers were not compiled."""

from remora.cluster.bench_command import EAGER, Result, results_text


def result(executor: str) -> Result:
    return Result(
        batch=8,
        prefill_tokens_per_s=1234.56,
        decode_tokens_per_s=78.9,
        first_ms=12.34,
        executor=executor,
        phases=None,
    )


def test_a_line_for_each_batch() -> None:
    head, line = results_text([result("compiled")]).splitlines()
    assert head.split()[:3] == ["batch", "decode", "tokens/s"]
    assert line.split() == ["8", "78.9", "1,234.6", "12.3"]


def test_eager_layers_are_said_to_be() -> None:
    assert results_text([result("eager"), result("compiled")]).splitlines()[-1] == EAGER
    assert result("eager").as_json()["executor"] == "eager"
