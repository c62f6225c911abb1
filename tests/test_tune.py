# SPDX-License-Identifier: MIT
"""``tune``: which plans it keeps, where, and that layers launch them. All of it runs but the clock, in Triton's
interpreter; with ``--device cuda``, the clock too."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

triton = pytest.importorskip("triton", reason="no Triton is installed here")

from shuffled_tensor import ShuffledMXFP4Tensor, fused_moe  # noqa: E402
from shuffled_tensor.backends.triton import Triton, layer, measure, tune  # noqa: E402
from shuffled_tensor.backends.triton.tune import Plan, Shape, Tile  # noqa: E402
from shuffled_tensor.cli import main  # noqa: E402

from .support.gfx950 import as_on_gfx950  # noqa: E402
from .support.judges import dense_moe, relative_error  # noqa: E402

SIZES = ["--experts", "2", "--hidden", "256", "--intermediate", "256", "--topk", "1"]
SHAPE = Shape(2, 256, (256, 256), True)
TABLE = Plan(16, 0, Tile(64, 256, 4, 3), Tile(64, 256, 4, 3))
"""The table's for one token of that layer."""
ROWS = TABLE._replace(rows=32)
STAGES = TABLE._replace(second=TABLE.second._replace(stages=2))

Launched = list[Plan]


class Stage:
    """The kernel, and how it was launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.tiles, self.plans = kernel, [], []
        self.afterwards: Callable[[Plan, Tensor], object] = lambda plan, result: None

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, **names: Any) -> None:
            self.kernel[grid](*args, **names)
            tile = (names[name] for name in ("BN", "BK", "num_warps", "num_stages", "PARTS", "RUN"))
            assert names["STAGES"] == names["num_stages"]
            self.tiles.append(Tile(*tile))
            if len(self.tiles) == 2:
                self.plans.append(Plan(names["BM1"], names["BM2"], *self.tiles))
                self.tiles = []
                self.afterwards(self.plans[-1], args[5])

        return launch


@pytest.fixture(autouse=True)
def stage(monkeypatch: pytest.MonkeyPatch, device: str, tmp_path: Path) -> Iterator[Stage]:
    if device == "cpu":
        monkeypatch.setattr(Triton, "available", lambda self, device: None)
    monkeypatch.setenv("SHUFFLED_TENSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "_ROUTINGS", (1, 1))
    monkeypatch.setattr(layer, "stage", Stage(layer.stage))
    forget()
    yield layer.stage
    forget()


def forget() -> None:
    """As in a new process."""
    for read in (tune.plan, tune.measured, tune._of_file):
        read.cache_clear()


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch, stage: Stage) -> dict[Plan, float]:
    """What the clock shows for plans that are launched: 100 for those that are not here."""
    known: dict[Plan, float] = {}

    def stopwatch(contestants: Sequence[Callable[[], object]]) -> list[float]:
        found = []
        for contestant in contestants:
            contestant()
            found.append(known.setdefault(stage.plans[-1], 100.0))
        return found

    monkeypatch.setattr(measure, "microseconds", stopwatch)
    return known


def weights(device: str, experts: int, hidden: int, intermediate: int) -> list[ShuffledMXFP4Tensor]:
    generator = torch.Generator().manual_seed(hidden + intermediate)
    w13 = torch.randn(experts, 2 * intermediate, hidden, generator=generator) / math.sqrt(hidden)
    w2 = torch.randn(experts, hidden, intermediate, generator=generator) / math.sqrt(intermediate)
    return [
        ShuffledMXFP4Tensor.from_hp(w13.to(device), gate_up=True, row_order="contiguous"),
        ShuffledMXFP4Tensor.from_hp(w2.to(device), gate_up=False),
    ]


def launched(device: str, stage: Stage, tokens: int, sizes: tuple[int, int, int] = (2, 256, 256)) -> Plan:
    """By which plan a layer is computed, whose result is that of float64."""
    w13, w2 = weights(device, *sizes)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, sizes[1], generator=generator).bfloat16()
    ids = torch.randint(sizes[0], (tokens, 1), generator=generator)
    weight = torch.rand(tokens, 1, generator=generator) + 0.5
    expected = dense_moe(x, *(w.dequantize(torch.float64).cpu() for w in (w13, w2)), weight, ids)
    found = fused_moe(*(each.to(device) for each in (x, w13, w2, weight, ids)), backend="triton")
    # the interpreter cuts bfloat16 off where GPUs round; of every token, since a wrong row is not to be lost in others
    for own, other in zip(found.cpu(), expected, strict=True):
        assert relative_error(own, other) < (1.3e-2 if device == "cpu" else 6e-3)
    return stage.plans[-1]


def the_file(folder: Path) -> Path:
    (path,) = (folder / "cache").iterdir()
    return path


# --- what is kept is what is launched


def test_the_fastest_plan_is_what_later_processes_launch(
    device: str, stage: Stage, times: dict[Plan, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times |= {ROWS: 80.0, STAGES: 90.0}
    assert main(["tune", *SIZES, "--tokens", "1"]) == 0
    assert {TABLE, ROWS, STAGES} < set(times)
    printed, path = capsys.readouterr().out, the_file(tmp_path)
    assert_expected_inline(
        printed.replace(str(path), "FILE"),
        """\
A plan: rows, small; then rows, columns, warps, stages, parts, run of the first GEMM and of the second

tokens  plan of the table                                  us  best plan                                     faster
     1  16,0 64,256,4,3,1,1 64,256,4,3,1,1              100.0  32,0 64,256,4,3,1,1 64,256,4,3,1,1             1.25x

written: FILE
""",
    )
    assert json.loads(path.read_text(encoding="utf-8"))["versions"] == tune.versions()
    assert launched(device, stage, 1) == ROWS
    forget()
    assert launched(device, stage, 1) == ROWS
    assert launched(device, stage, 2) == TABLE  # nothing was measured there
    assert launched(device, stage, 1, (3, 256, 256)) == TABLE


def test_a_plan_is_for_numbers_down_to_half_of_what_was_measured(
    device: str, stage: Stage, times: dict[Plan, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "candidates", lambda *question: [STAGES])
    times[STAGES] = 50.0
    assert main(["tune", *SIZES, "--tokens", "8"]) == 0
    forget()
    assert [launched(device, stage, tokens) == STAGES for tokens in (4, 5, 8, 9)] == [False, True, True, False]


def test_what_may_be_noise_is_not_kept_and_what_is_slower_now_is_dropped(
    device: str, stage: Stage, times: dict[Plan, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "candidates", lambda *question: [STAGES])
    kept = []
    for sizes, time in ((SIZES, 50.0), (["--experts", "3", *SIZES[2:]], 50.0), (SIZES, 99.0)):
        times[STAGES] = time
        forget()
        assert main(["tune", *sizes, "--tokens", "1"]) == 0
        kept.append([row["shape"]["experts"] for row in json.loads(the_file(tmp_path).read_text())["plans"]])
    assert kept == [[2], [2, 3], [3]]
    assert launched(device, stage, 1) == TABLE


# --- what is not kept


@pytest.mark.parametrize("wrong", ["one number", "NaN"])
def test_a_plan_that_computes_something_else_is_left_out(
    device: str, stage: Stage, times: dict[Plan, float], wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(plan: Plan, result: Tensor) -> None:
        if plan == ROWS:  # one number of one token
            result[1, 7] = math.nan if wrong == "NaN" else result.float().norm() / 20

    stage.afterwards = spoil
    times |= {ROWS: 1.0, STAGES: 90.0}
    assert main(["tune", *SIZES, "--tokens", "2"]) == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"{ROWS} is left out: it computes something else than the table's plan"
    ]
    forget()
    stage.afterwards = lambda plan, result: None
    assert launched(device, stage, 2) == STAGES


def test_a_plan_that_does_not_run_here_is_left_out(
    device: str, stage: Stage, times: dict[Plan, float], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(plan: Plan, result: Tensor) -> None:
        if plan == ROWS:
            raise triton.OutOfResources(300, 200, "shared memory")

    stage.afterwards = fail
    times |= {ROWS: 1.0, STAGES: 90.0}
    with caplog.at_level(logging.INFO, "shuffled_tensor"):
        assert main(["tune", *SIZES, "--tokens", "1"]) == 0
    assert f"{ROWS} does not run: out of resource: shared memory" in caplog.text
    assert launched(device, stage, 1) == STAGES


def row(plan: Plan, **changed: Any) -> dict[str, Any]:
    tiles = {which: getattr(plan, which)._asdict() for which in ("first", "second")}
    return {"shape": SHAPE._asdict(), "slots": 1, "plan": plan._asdict() | tiles} | changed


def content(*rows: object, **versions: str) -> bytes:
    return json.dumps({"versions": tune.versions() | versions, "plans": rows}).encode()


def with_first(**changed: Any) -> bytes:
    return content(row(STAGES._replace(first=STAGES.first._replace(**changed))))


def with_second(**changed: Any) -> bytes:
    return content(row(STAGES._replace(second=STAGES.second._replace(**changed))))


FOREIGN = {
    "empty": (b"", "Expecting value"),
    "cut": (content(row(STAGES))[:-9], "line 1 column"),
    "no text": (b"\xff" * 9, "'utf-8' codec can't decode"),
    "a list": (b"[]", "it is not as `tune` writes it"),
    "deep": (b"[" * 200_000, "it is not as `tune` writes it"),
    "no plans": (json.dumps({"versions": tune.versions()}).encode(), "it is not as `tune` writes it"),
    "another Triton": (content(row(STAGES), triton="2.0"), "'triton': '2.0'"),
    "another version": (content(row(STAGES), shuffled_tensor="7"), "'shuffled_tensor': '7'"),
    "no slots": (content({"shape": SHAPE._asdict(), "plan": row(STAGES)["plan"]}), "it is not as `tune` writes it"),
    "a half": (content(row(STAGES, slots=1.5)), "it is not as `tune` writes it"),
    "another field": (content(row(STAGES, shape=SHAPE._asdict() | {"more": 1})), "it is not as `tune` writes it"),
    "rows": (content(row(STAGES._replace(rows=48))), "does not fit"),
    "small": (content(row(STAGES._replace(small=16))), "does not fit"),
    "a tile's rows": (with_first(rows=96), "does not fit"),
    "columns": (with_second(columns=512), "does not fit"),
    "warps": (with_first(warps=3), "does not fit"),
    "stages": (with_second(stages=0), "does not fit"),
    "true": (with_first(parts=True), "does not fit"),
    "float": (with_first(rows=64.0), "does not fit"),
    "words": (with_first(stages="3"), "does not fit"),
    "parts": (with_first(parts=2), "does not fit"),
    "run of the first": (with_first(run=2), "does not fit"),
    "run of 256 columns": (with_second(run=2), "does not fit"),
    "run of 3": (with_second(columns=128, rows=128, run=3), "does not fit"),
    "run of parts": (with_second(columns=128, rows=128, parts=2, run=2), "does not fit"),
    "one of two": (content(row(STAGES), row(STAGES._replace(rows=1))), "does not fit"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_that_is_no_such_file_is_ignored_and_said_once(
    device: str, stage: Stage, what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, message = FOREIGN[what]
    path = tune.path(torch.device(device))
    path.parent.mkdir()
    path.write_bytes(data)
    assert launched(device, stage, 1) == TABLE
    for slots in range(1, 9):
        tune.plan(torch.device(device), slots, SHAPE, False)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path} is ignored: ")
    assert message in record.getMessage()
    assert record.getMessage().endswith("; `python -m shuffled_tensor tune` writes it anew")


def test_the_files_that_are_refused_are_those_that_are_written_but_for_one_thing(device: str, stage: Stage) -> None:
    path = tune.path(torch.device(device))
    path.parent.mkdir()
    path.write_bytes(content(row(STAGES)))
    assert launched(device, stage, 1) == STAGES


def test_a_file_that_cannot_be_read_is_ignored_and_none_is_no_reason_to_speak(
    device: str, stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    assert launched(device, stage, 1) == TABLE
    assert caplog.records == []
    forget()
    path = tune.path(torch.device(device))
    path.mkdir(parents=True)
    assert launched(device, stage, 1) == TABLE
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [f"{path} is ignored"]


def test_a_foreign_file_is_written_anew(device: str, stage: Stage, times: dict[Plan, float], tmp_path: Path) -> None:
    path = tune.path(torch.device(device))
    path.parent.mkdir()
    path.write_bytes(content(row(ROWS), triton="2.0"))
    times[STAGES] = 50.0
    assert main(["tune", *SIZES, "--tokens", "1"]) == 0
    forget()
    assert launched(device, stage, 1) == STAGES
    assert the_file(tmp_path) == path  # and nothing beside it


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def folder() -> Path:
        return tune.path(torch.device("cpu")).parent

    monkeypatch.setenv("SHUFFLED_TENSOR_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    found = [folder()]
    for name in ("SHUFFLED_TENSOR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
        found.append(folder())
    assert found == [Path("/a"), Path("/b/shuffled_tensor"), Path("/c/.cache/shuffled_tensor")]
    monkeypatch.setattr(tune, "real_arch", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 / MIG 1g.18gb")
    assert tune.path(torch.device("cuda", 0)).name == "triton-sm_90-NVIDIA-H200-MIG-1g.18gb.json"


# --- the command where it measures nothing


def test_without_a_gpu(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SHUFFLED_TENSOR_CACHE", str(tmp_path / "cache"))
    assert main(["tune", *SIZES]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert_expected_inline(
        printed.err,
        """\
error: tune measures the triton backend, which does not run on cpu: it compiles for GPUs, found cpu. It needs an NVIDIA GPU of compute capability 8.0 or later, or an AMD GPU, that PyTorch sees, and an installed triton
""",
    )
    assert not (tmp_path / "cache").exists()


def test_sizes_of_no_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *SIZES[:-1], "3", "--tokens", "1"]) == 1
    assert capsys.readouterr().err == "error: topk must be in 1..2, the number of experts, found 3\n"
    with pytest.raises(SystemExit):
        main(["tune", *SIZES, "--tokens", "0"])
    assert "argument --tokens: must be a number from 1 on, found '0'" in capsys.readouterr().err


# --- plans compute the layer


CASES = {  # experts, hidden, intermediate, and tokens: with parts, with a run, with small blocks
    "parts": ((1, 512, 512), 1),
    "run": ((2, 448, 256), 3),
    "small": ((1, 256, 320), 24),
}


def check(device: str, stage: Stage, case: str, cdna4: bool, choose: Callable[[Plan, Shape], list[Plan]]) -> None:
    sizes, tokens = CASES[case]
    columns = sizes[1] + -sizes[1] % 256, sizes[2] + -sizes[2] % 256
    shape, on = Shape(sizes[0], sizes[1], columns, columns[1] == 256), weights(device, 1, 256, 256)[0].device
    plans = choose(tune.table(tokens, shape, cdna4), shape)
    assert len(plans) > 4
    for plan in plans:
        measure._use(on, tune.key(tokens, shape), plan)
        assert launched(device, stage, tokens, sizes) == plan


@pytest.mark.parametrize("cdna4", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_candidate_is_what_float64_says(
    device: str, stage: Stage, case: str, cdna4: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cdna4 and device == "cuda":
        pytest.skip("waits for --device cpu: another GPU does not run this form")
    if cdna4:
        as_on_gfx950(monkeypatch)
    if case == "run":
        monkeypatch.setattr(tune, "TILES", 1)  # as if the GPU were full
    check(device, stage, case, cdna4, lambda table, shape: measure.candidates(table, CASES[case][1], shape, cdna4))


@pytest.mark.parametrize("case", CASES)
def test_whatever_a_file_may_hold_is_what_float64_says(device: str, stage: Stage, case: str) -> None:
    """Plans of other shapes, drawn from all that fit: a file is read by nobody else."""
    draw = random.Random(case)

    def any_plan() -> Plan:
        tiles = [
            Tile(*(draw.choice(each) for each in ((64, 128), (128, 256), (4,), (1, 3), (1, 2, 3, 4), (1, 2))))
            for _ in "12"
        ]
        return Plan(draw.choice((16, 32, 64, 128)), draw.choice((0, 16, 32, 64)), *tiles)

    def some(table: Plan, shape: Shape) -> list[Plan]:
        return [plan for plan in (any_plan() for _ in range(150)) if tune.fits(plan, shape, False)][:8]

    check(device, stage, case, False, some)


def test_the_plans_of_the_table_fit_and_candidates_differ_from_them_in_one_thing() -> None:
    for experts, hidden, columns, tokens in (
        (experts, hidden, columns, tokens)
        for experts in (1, 8, 128, 256)
        for hidden, columns in ((256, 256), (2880, 2880 + 192), (7168, 256), (7168, 2048), (3072, 3072), (448, 1280))
        for tokens in (1, 4, 16, 64, 256, 1024, 8192)
    ):
        shape = Shape(experts, hidden, (hidden + -hidden % 256, columns), columns == 256)
        for cdna4 in (False, True):
            table = tune.table(4 * tokens, shape, cdna4)
            assert tune.fits(table, shape, cdna4)
            found = measure.candidates(table, 4 * tokens, shape, cdna4)
            assert 4 < len(found) < 24
            assert len({table, *found}) == len(found) + 1
            for plan in found:
                assert tune.fits(plan, shape, cdna4)
                parts = zip((plan[:2], plan.first, plan.second), (table[:2], table.first, table.second), strict=True)
                assert sum(one != other for one, other in parts) == 1


def test_on_a_gpu(device: str, tmp_path: Path, stage: Stage) -> None:
    if device == "cpu":
        pytest.skip("waits for --device cuda: the interpreter has no clock")
    assert main(["tune", *SIZES, "--tokens", "1", "64"]) == 0
    for tokens in (1, 64):
        before = launched(device, stage, tokens)
        forget()
        assert launched(device, stage, tokens) == before
    assert json.loads(the_file(tmp_path).read_text())["versions"] == tune.versions()
