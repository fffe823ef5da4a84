"""Inverse roots of bad factors against float64, who made them, and what the session says about them."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from preset_names import ALL

from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.health import RootHealth
from kfac_onnx.runtime.step.monitor import RootMonitor, eigen_power

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

GRAPH, TABLE, D = "ortart_legcore__twotower", "user_emb.weight", 16
EPS = float(np.finfo(np.float32).eps)


def rotated(eigenvalues: np.ndarray) -> np.ndarray:
    Q, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(D, D)))
    M = (Q * eigenvalues) @ Q.T
    return ((M + M.T) / 2).astype(np.float32)


FACTORS = {
    "spread": rotated(np.geomspace(1e-12, 1e12, D)),
    "rank one": rotated(np.r_[np.zeros(D - 1), 1.0]),
    "rank one, tiny": rotated(np.r_[np.zeros(D - 1), 1e-20]),
    "rank one, huge": rotated(np.r_[np.zeros(D - 1), 1e30]),
    "identity": np.eye(D, dtype=np.float32),
    "tiny": np.eye(D, dtype=np.float32) * np.float32(1e-30),
    "well conditioned": rotated(np.geomspace(0.1, 10.0, D)),
    "indefinite by rounding": rotated(np.r_[np.full(D // 2, -3e-8), np.full(D - D // 2, 1.0)]),
}


def quiet(case: Any) -> TrainingSession:
    """A session whose gradients are zero: all parameters are, and the targets with them."""
    session = case.open()
    session.assign({key: np.zeros_like(array) for key, array in session.parameters.items()})
    return session


def step_with(session: TrainingSession, case: Any, factor: np.ndarray) -> dict[str, Any]:
    """Make the session's first step, at which roots are refreshed, with a given factor as the state."""
    holders = session._holders
    holders[f"kfac/{TABLE}/G"].live.write(factor)
    holders[f"kfac/{TABLE}/G.count"].live.write(np.asarray(10**6))
    batch = {**case.batches[0], "target": np.zeros_like(case.batches[0]["target"])}
    return dict(session.step(batch))


def exact(factor: np.ndarray, damping: float, exponent: float) -> np.ndarray:
    """The root of the factor that the step takes (0.95 of the state), in float64; eigenvalues are at least 0."""
    w, Q = np.linalg.eigh(factor.astype(np.float64))
    return (Q * (np.maximum(w, 0.0) + damping) ** exponent) @ Q.T


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("rho", [0.01, 1e-6, 1e-12])
def test_inverse_roots_of_bad_factors(graph_case: Callable[..., Any], kind: str, rho: float) -> None:
    case = graph_case(GRAPH, preset="half", damping=rho)
    session = quiet(case)
    taken = np.float32(0.95) * FACTORS[kind]
    assert step_with(session, case, FACTORS[kind])["skipped"] is False
    damping = rho * max(float(np.trace(taken.astype(np.float64))) / D, 1e-30)
    want = exact(taken, damping, -0.5)
    root = session.states[f"kfac/{TABLE}/root"]
    record = session._stepper.roots.records[TABLE]
    # A root that was accepted misses by half of its residual, one of the host by float32's rounding of its
    # entries and of the damping: eps/2 of it, enlarged by no more than the exponent.
    allowed = 4 * EPS if record.fallbacks else record.residual
    assert np.abs(root - want).max() <= allowed * np.abs(want).max()
    assert np.array_equal(root, root.T)
    # A twin of the test that a scaled root is seen: what was accepted is better than one percent.
    assert np.abs(root * 1.01 - want).max() > allowed * np.abs(want).max() or allowed > 0.009


@pytest.mark.parametrize("kind", FACTORS)
def test_inverses_of_bad_factors(graph_case: Callable[..., Any], kind: str) -> None:
    case = graph_case(GRAPH, preset="r1.7")
    session = quiet(case)
    taken = np.float32(0.95) * FACTORS[kind]
    made = step_with(session, case, FACTORS[kind])
    assert made["skipped"] is False
    trace = float(np.trace(taken.astype(np.float64)))
    counts = session.states[f"kfac/{TABLE}/A.total"] / 120
    damping = math.sqrt(1e-3) / math.sqrt(counts / (trace / D))
    want = exact(taken, damping, -1.0)
    root = session.states[f"kfac/{TABLE}/root"]
    record = session._stepper.roots.records[TABLE]
    # Eigenvalues that rounding made negative are taken as they are by the graph's inverse, as 0 by the host.
    negative = max(0.0, -float(np.linalg.eigvalsh(taken.astype(np.float64))[0])) / damping
    assert negative < 1 / 16 or record.fallbacks == 1
    allowed = 8 * EPS + (0.0 if record.fallbacks else negative)
    assert np.abs(root - want).max() <= allowed * np.abs(want).max()


def test_a_zero_factor_keeps_the_root(graph_case: Callable[..., Any]) -> None:
    for preset in ("half", "r1.7"):
        case = graph_case(GRAPH, preset=preset)
        session = quiet(case)
        before = np.array(session.states[f"kfac/{TABLE}/root"])
        assert step_with(session, case, np.zeros((D, D), np.float32))["skipped"] is False
        assert session.states[f"kfac/{TABLE}/root"].tobytes() == before.tobytes()
        assert session.root_fallbacks == 0


def test_a_tiny_damping_is_not_trusted_to_the_iteration(graph_case: Callable[..., Any]) -> None:
    """With ρ = 1e-12 the rounding bound is 4e6: without a cap anything would pass for a root."""
    case = graph_case(GRAPH, preset="half", damping=1e-12)
    session = quiet(case)
    step_with(session, case, FACTORS["spread"])
    assert session._stepper.roots.records[TABLE].fallbacks == 1
    assert session.root_fallbacks == session.host_roots >= 1


def test_a_resumed_run_goes_on_counting(graph_case: Callable[..., Any], tmp_path: Path) -> None:
    case = graph_case(GRAPH, preset="half", damping=1e-12, lr=1e-12)
    session = case.open()
    for _ in range(4):
        session.step(case.batches[0])
    assert session.root_fallbacks == 6  # steps 1, 2 and 4, two tables
    session.save(tmp_path / "run.ckpt")
    resumed = TrainingSession.resume(tmp_path / "run.ckpt", threads=1)
    assert resumed.root_fallbacks == 6
    for _ in range(4):
        session.step(case.batches[1])
        resumed.step(case.batches[1])
    assert resumed.root_fallbacks == session.root_fallbacks == 8
    assert [item.fallbacks for item in resumed.health()] == [1, 1]


class FakeEngine:
    """Values by name; what is written to a buffer is read back."""

    def __init__(self, **values: Any) -> None:
        self.values = {key: np.asarray(value) for key, value in values.items()}

    def read(self, name: str) -> np.ndarray:
        return self.values[name]

    def buffer(self, name: str) -> Any:
        engine = self

        class Written:
            def write(self, array: np.ndarray) -> None:
                engine.values[name] = array

        return Written()


def watched(**values: Any) -> tuple[RootMonitor, FakeEngine]:
    from kfac_onnx.metadata import RootCheck

    check = RootCheck("W", "root", "factor", "damping", "residual", -0.5, 1e-2)
    given = {"factor": np.eye(3) * 4, "damping": 0.0, "residual": 0.0, "root": np.full((3, 3), 7.0)}
    monitor, engine = RootMonitor([check]), FakeEngine(**{**given, **values})
    monitor.after_refresh(engine, ["residual", "root"])  # type: ignore[arg-type]
    return monitor, engine


def test_a_good_root_is_left_alone() -> None:
    monitor, engine = watched(residual=5e-3, damping=0.1)
    assert engine.values["root"].tobytes() == np.full((3, 3), 7.0).tobytes()
    record = monitor.records["W"]
    assert (record.refreshes, record.fallbacks, record.residual, record.worst) == (1, 0, 5e-3, 5e-3)
    monitor.after_refresh(engine, ["another"])  # type: ignore[arg-type]
    assert record.refreshes == 1


@pytest.mark.parametrize("residual", [0.011, 1e30, math.inf, math.nan])
def test_a_root_that_did_not_converge_is_replaced(residual: float, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="kfac_onnx"):
        monitor, engine = watched(residual=residual, damping=5.0)
    np.testing.assert_allclose(engine.values["root"], np.eye(3) / 3, rtol=1e-7)  # float32 of 9^(−1/2)
    assert (monitor.fallbacks, monitor.records["W"].failures) == (1, 0)
    assert caplog.messages[0].startswith("the root of 'W' was computed on the host: residual ")


def test_a_damping_within_the_rounding_is_replaced() -> None:
    """The residual of an inverse of an indefinite matrix may be 0: nothing but the damping tells."""
    factor = np.diag([1.0, 1.0, -1e-7]).astype(np.float32)
    monitor, engine = watched(factor=factor, damping=1e-8)
    assert monitor.fallbacks == 1
    assert np.linalg.eigvalsh(engine.values["root"].astype(np.float64))[0] > 0
    assert engine.values["root"][2, 2] == pytest.approx(1e4, rel=1e-6)  # clipped at 0, then (1e-8)^(−1/2)


@pytest.mark.parametrize(
    "values", [{"factor": np.full((3, 3), np.nan), "residual": np.nan}, {"residual": 1.0, "damping": np.inf}]
)
def test_without_any_root_the_step_is_skipped(values: dict[str, Any]) -> None:
    """What missed its tolerance is never taken: NaN makes the step's own check fail."""
    monitor, engine = watched(**values)
    assert np.isnan(engine.values["root"]).all()
    assert (monitor.fallbacks, monitor.records["W"].failures) == (0, 1)


# --- health -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ALL)
def test_health_equals_numpy(graph_case: Callable[..., Any], preset: str) -> None:
    case = graph_case(GRAPH, preset=preset)
    session = case.open()
    for index in range(10):  # step 10 refreshes: root and factor are of the same step
        session.step(case.batches[index % 2])
    (health,) = [item for item in session.health() if item.parameter == TABLE]
    G = session.states[f"kfac/{TABLE}/G"].astype(np.float64)
    if preset == "r1.7":
        A = session.states[f"kfac/{TABLE}/A"].astype(np.float64) * session.states[f"kfac/{TABLE}/A.scale"]
        damping = math.sqrt(1e-3) / math.sqrt((A.sum() / 120) / (np.trace(G) / D))
    else:
        G = G / (1 - 0.95**10)
        damping = 0.01 * np.trace(G) / D
    w = np.linalg.eigvalsh(G)
    # the decay is float32 in the graph: 0.95 to the tenth is off by 1e-7
    assert health.damping == pytest.approx(damping, rel=1e-5)
    assert health.largest == pytest.approx(w[-1], rel=1e-5)
    assert health.smallest == pytest.approx(w[0], abs=1e-6 * w[-1])
    assert health.condition == pytest.approx((w[-1] + damping) / (w[0] + damping), rel=1e-3)
    assert health.asymmetry == 0.0
    assert health.drift < 1e-3
    assert (health.finite, health.fallbacks, health.failures, health.dim) == (True, 0, 0, D)
    assert health.refreshes == 5  # steps 1, 2, 4, 8, 10
    assert health.residual is not None
    assert health.residual < 1e-3
    assert session.root_fallbacks == 0


def test_health_says_what_is_wrong(graph_case: Callable[..., Any]) -> None:
    case = graph_case(GRAPH, preset="half")
    session = case.open()
    session.step(case.batches[0])
    live = session._holders[f"kfac/{TABLE}/G"].live
    live.view()[0, 1] *= 2
    (health,) = [item for item in session.health() if item.parameter == TABLE]
    assert health.asymmetry > 1e-3
    live.view()[3, 3] = np.nan
    (health,) = [item for item in session.health() if item.parameter == TABLE]
    assert (health.finite, math.isnan(health.condition)) == (False, True)
    data = json.loads(json.dumps(health.to_json(), allow_nan=False))
    assert (data["condition"], data["finite"], data["parameter"]) == (None, False, TABLE)
    live.write(-np.eye(D))
    (health,) = [item for item in session.health() if item.parameter == TABLE]
    assert health.condition == math.inf


def test_plain_presets_have_no_roots(graph_case: Callable[..., Any]) -> None:
    session = graph_case(GRAPH, preset="plain-adam").open()
    assert session.health() == ()
    assert session.root_fallbacks == 0


def test_health_before_the_first_step(graph_case: Callable[..., Any]) -> None:
    for health in graph_case(GRAPH, preset="half").open().health():
        assert isinstance(health, RootHealth)
        assert (health.refreshes, health.finite) == (0, True)


@pytest.mark.parametrize("exponent", [-1.0, -0.5, -0.25, 0.5, 2.0])
def test_powers_of_a_damped_factor(exponent: float) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 6))
    factor, damping = (rows.T @ rows / 20).astype(np.float32), 0.1
    root = eigen_power(factor, damping, exponent)
    assert root is not None
    assert root.dtype == np.float32
    np.testing.assert_array_equal(root, root.T)
    damped = factor.astype(np.float64) + damping * np.eye(6)
    if exponent == 2.0:
        expected = damped @ damped
    else:
        power = np.linalg.matrix_power(root.astype(np.float64), round(abs(1 / exponent)))
        expected, root = (np.linalg.inv(damped) if exponent < 0 else damped), power
    # float32 rounding of entries up to about 10, raised to at most the fourth power
    np.testing.assert_allclose(root, expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_gives_none() -> None:
    assert eigen_power(np.full((2, 2), np.nan, np.float32), 0.1, -0.5) is None
    assert eigen_power(np.eye(2, dtype=np.float32), float("nan"), -0.5) is None
    assert eigen_power(np.zeros((2, 2), np.float32), 0.0, -0.5) is None


def test_the_host_takes_over_above_the_tolerance(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    session = open_toy(model={"tolerance": -1.0})  # no residual is that good
    twin = toy.Twin.start(toy.parameters())
    for batch in toy.batches(12):
        session.step(batch)
        twin.step(batch)
    assert session.host_roots == 6  # steps 1, 2, 3, 6, 9, 12
    np.testing.assert_allclose(
        session.states["root"], twin.root, rtol=1e-4
    )  # float32 sums in G, damped by 1 %
    np.testing.assert_allclose(session.parameters["emb.weight"], twin.emb, atol=5e-5)


def test_a_skipped_step_keeps_the_root(toy: ModuleType, open_toy: Callable[..., TrainingSession]) -> None:
    session = open_toy(model={"tolerance": -1.0})
    batches = toy.batches(2)
    session.step(batches[0])
    before = session.states["root"].tobytes()
    assert session.step({**batches[1], "y": batches[1]["y"] * np.float32(np.nan)})["skipped"]
    assert session.states["root"].tobytes() == before
    assert session.host_roots == 1
