import json

import pytest

from tests.benchmarks import harness


def test_contenders_alternate_and_warm_up() -> None:
    calls: list[str] = []
    seconds = harness.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_compare_within_rounds() -> None:
    rows = harness.ratios({"ours": [1.0, 10.0, 2.0, 4.0], "peer": [2.0, 20.0, 4.0, 8.0]}, baseline="ours")
    assert [row["ratio"] for row in rows] == [1.0, 2.0]
    assert rows[1]["ratio_quartiles"] == [2.0, 2.0]
    assert rows[1]["median_ms"] == pytest.approx(6000)


def test_results_are_stored_by_section_without_the_host_name(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.save("demo", "speed", [{"name": "a", "ratio": 1.0}])
    harness.save("demo", "quality", [{"name": "a", "loss": 0.5}])
    stored = json.loads((tmp_path / "demo.json").read_text())
    assert stored["speed"]["rows"] == [{"name": "a", "ratio": 1.0}]
    assert set(stored) == {"speed", "quality"}
    assert set(stored["speed"]["environment"]) == {"cpu", "gpu", "torch_threads", "python", "versions", "date"}
    assert "| a | 0.5 |" in capsys.readouterr().out


def test_absent_peers_are_none() -> None:
    assert harness.peer("surely_not_installed") is None
    assert harness.peer("json") is json


def test_bandwidths_are_positive() -> None:
    assert harness.copy_bandwidth(8) > 0
    assert harness.read_bandwidth(8) > 0
