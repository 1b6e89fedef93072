"""The chart of a batch and its Prometheus metrics."""

import re
import socket
import urllib.request

import pytest

from qwen_dist.batch.metrics import metrics_server
from qwen_dist.batch.run import BatchSummary
from qwen_dist.batch.series import MAX_SAMPLES, TimeSeries, write_chart
from qwen_dist.engine.engine import EngineStats
from qwen_dist.errors import UserError


def moment(seconds: float, written: int, running: int = 4) -> tuple[BatchSummary, EngineStats]:
    summary = BatchSummary(num_answered=1, num_prompt_tokens=2 * written, num_generated_tokens=written, seconds=seconds)
    return summary, EngineStats(running, 2, 3, cache_positions=1000, held_positions=500, live_positions=250)


def test_number_of_samples_is_bounded_and_means_are_kept():
    series = TimeSeries()
    count = 10 * MAX_SAMPLES
    for number in range(1, count + 1):
        series.add(*moment(number / 10, 7 * number, running=2 if number <= count / 2 else 4))
    assert MAX_SAMPLES / 2 <= len(series.samples) <= MAX_SAMPLES
    assert series.mean("num_running") == pytest.approx(3, abs=0.01)
    assert all(speed == pytest.approx(70) for _, speed in series.rates("num_generated_tokens"))
    assert series.samples[-1].seconds == pytest.approx(count / 10, rel=0.01)


def test_chart(tmp_path):
    series = TimeSeries()
    for seconds, written in ((1, 10), (2, 40), (4, 60)):
        series.add(*moment(seconds, written))
    path = tmp_path / "chart.html"
    write_chart(str(path), series)
    page = path.read_text()
    assert "http" not in page and page.count("<svg") == 3
    first = re.search(r'polyline points="([^"]*)"', page)[1]
    # 10, 30 and 10 generated tokens per second; the maximum of the axis is twice the highest, from the prompt tokens.
    assert first == "310.0,157.0 556.0,99.0 1048.0,157.0"


def test_metrics_are_served_while_a_batch_runs():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    with metrics_server(port, "127.0.0.1") as update:
        update(*moment(2.5, 30))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            lines = response.read().decode().splitlines()
        values = dict(line.split() for line in lines if not line.startswith("#"))
        assert values["qwen_dist_batch_num_generated_tokens"] == "30.0"
        assert values["qwen_dist_batch_num_cached_tokens"] == "0.0"
        assert values["qwen_dist_batch_num_running"] == "4.0" and values["qwen_dist_batch_seconds"] == "2.5"
        with pytest.raises(UserError, match=f"port {port}: Address already in use"), metrics_server(port, "127.0.0.1"):
            pass
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")


def test_metrics_are_served_to_this_machine_unless_another_address_is_given():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with metrics_server(port, "127.0.0.1"), socket.socket() as other:
        other.bind(("127.0.0.2", port))  # in use if the server listened on all addresses
        with pytest.raises(UserError, match=rf"cannot serve metrics on 127.0.0.1 port {port}: Address already in use"):
            metrics_server(port, "127.0.0.1").__enter__()
    with pytest.raises(UserError, match=r"cannot serve metrics on nowhere\.invalid port"):
        metrics_server(port, "nowhere.invalid").__enter__()
