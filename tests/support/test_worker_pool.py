"""Workers answer, fail, hang and die; the test process hears of it, and the next call works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist
from measure import peak_rss_bytes, reset_peak_rss, rss_bytes, run_fresh
from paths import PYTHON_PATH
from worker_pool import MAX_WORKERS, NO_ANSWER, WORKER_DIED, RankError, RunOnRanks, WorkerError

pytestmark = pytest.mark.slow

MIB = 2**20


def rank_and_arguments(left: int, right: int = 0) -> tuple[int, int, int, int]:
    return dist.get_rank(), dist.get_world_size(), left, right


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    total = value * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return total


def raise_on(ranks: list[int]) -> str:
    if dist.get_rank() in ranks:
        print("about to fail", flush=True)
        raise ValueError(f"no luck on rank {dist.get_rank()}")
    return "fine"


def raise_on_rank_0_and_wait_on_the_others() -> None:
    if dist.get_rank() == 0:
        raise ValueError("rank 0 gives up")
    dist.barrier()


def leave_ranks_out_of_step() -> None:
    """Rank 1 starts a reduction in which rank 0 never takes part."""
    if dist.get_rank() == 0:
        raise ValueError("rank 0 gives up")
    dist.all_reduce(torch.ones(1), async_op=True)


def hang_in_a_function_with_this_name(ranks: list[int]) -> None:
    while dist.get_rank() in ranks:
        time.sleep(0.01)


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def exit_with_code_3() -> None:
    os._exit(3)


def raise_system_exit() -> None:
    sys.exit("enough")


def return_a_lambda() -> object:
    return lambda: None


def process_id() -> int:
    return os.getpid()


def random_number_and_threads() -> tuple[float, int, str]:
    return torch.rand(()).item(), torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def write_process_id_and_sleep(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def peak_of_a_temporary(numel: int) -> tuple[int, int, int]:
    torch.ones(numel).sum()
    reset_peak_rss()
    before = peak_rss_bytes()
    torch.ones(numel).sum()
    peak = peak_rss_bytes() - before
    reset_peak_rss()
    return peak, rss_bytes() - before, peak_rss_bytes() - before


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def eventually(condition: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def assert_works(run_on_ranks: RunOnRanks, world_size: int) -> None:
    expected = torch.full((3,), world_size * (world_size + 1) / 2)
    for total in run_on_ranks(world_size, sum_over_ranks, torch.ones(3)):
        torch.testing.assert_close(total, expected, rtol=0, atol=0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_values_come_back_by_rank(run_on_ranks: RunOnRanks, world_size: int) -> None:
    results = run_on_ranks(world_size, rank_and_arguments, 5, right=7)
    assert results == [(rank, world_size, 5, 7) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_reduce(run_on_ranks: RunOnRanks, world_size: int) -> None:
    assert_works(run_on_ranks, world_size)


def test_workers_are_reused(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, process_id) == run_on_ranks(2, process_id)


def test_every_call_starts_from_one_seed_with_one_thread(run_on_ranks: RunOnRanks) -> None:
    first = run_on_ranks(2, random_number_and_threads)
    assert first[0] == first[1] == run_on_ranks(2, random_number_and_threads)[0]
    assert first[0][1:] == (1, "1")


@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_error_shows_rank_traceback_output_and_test(run_on_ranks: RunOnRanks, ranks: list[int]) -> None:
    workers = run_on_ranks(2, process_id)
    with pytest.raises(WorkerError) as caught:
        run_on_ranks(2, raise_on, ranks)
    assert caught.value.errors == {rank: RankError("ValueError", f"no luck on rank {rank}") for rank in ranks}
    message = str(caught.value)
    assert "test_error_shows_rank_traceback_output_and_test[ranks" in message
    assert message.count("Traceback (most recent call last)") == len(ranks)
    assert message.count("wrote:\nabout to fail") == len(ranks)
    assert_works(run_on_ranks, 2)
    assert run_on_ranks(2, process_id) == workers


def test_outcomes_give_values_and_errors_without_raising(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks.outcomes(2, raise_on, [1]) == ["fine", ("ValueError", "no luck on rank 1")]
    assert run_on_ranks.outcomes(2, raise_on, []) == ["fine", "fine"]


def test_system_exit_is_an_error_and_the_worker_lives_on(run_on_ranks: RunOnRanks) -> None:
    workers = run_on_ranks(2, process_id)
    assert run_on_ranks.outcomes(2, raise_system_exit) == [("SystemExit", "enough")] * 2
    assert run_on_ranks(2, process_id) == workers


def test_value_that_cannot_be_pickled_is_an_error(run_on_ranks: RunOnRanks) -> None:
    with pytest.raises(WorkerError, match="lambda"):
        run_on_ranks(2, return_a_lambda)
    assert_works(run_on_ranks, 2)


def test_rank_left_waiting_by_a_failing_one_is_shown(run_on_ranks: RunOnRanks) -> None:
    with pytest.raises(WorkerError) as caught:
        run_on_ranks(2, raise_on_rank_0_and_wait_on_the_others, grace=0.5)
    assert caught.value.errors[0] == ("ValueError", "rank 0 gives up")
    assert caught.value.errors[1].type_name == NO_ANSWER
    assert "in raise_on_rank_0_and_wait_on_the_others" in str(caught.value).partition("--- rank 1")[2]
    assert_works(run_on_ranks, 2)


def test_outcomes_raise_when_a_rank_does_not_answer(run_on_ranks: RunOnRanks) -> None:
    with pytest.raises(WorkerError, match=NO_ANSWER):
        run_on_ranks.outcomes(2, raise_on_rank_0_and_wait_on_the_others, grace=0.2)


def test_ranks_out_of_step_are_put_in_step(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks.outcomes(2, leave_ranks_out_of_step) == [("ValueError", "rank 0 gives up"), None]
    assert_works(run_on_ranks, 2)


@pytest.mark.parametrize("ranks", [[1], [0, 1]])
def test_timeout_shows_stacks_and_test_and_kills_the_workers(run_on_ranks: RunOnRanks, ranks: list[int]) -> None:
    workers = run_on_ranks(2, process_id)
    with pytest.raises(WorkerError) as caught:
        run_on_ranks(2, hang_in_a_function_with_this_name, ranks, timeout=4.0)
    assert {rank: error.type_name for rank, error in caught.value.errors.items()} == dict.fromkeys(ranks, NO_ANSWER)
    message = str(caught.value)
    assert "test_timeout_shows_stacks_and_test_and_kills_the_workers[ranks" in message
    assert message.count("in hang_in_a_function_with_this_name\n") == len(ranks)
    assert not any(map(is_running, workers))
    assert_works(run_on_ranks, 2)


def test_killed_worker_is_noticed_at_once(run_on_ranks: RunOnRanks) -> None:
    outcomes = run_on_ranks.outcomes(2, die_on_rank_1)
    assert outcomes[1] == (WORKER_DIED, "killed by SIGKILL")
    assert isinstance(outcomes[0], RankError)
    assert outcomes[0].type_name not in (NO_ANSWER, WORKER_DIED)
    assert_works(run_on_ranks, 2)


def test_worker_that_exits_is_reported(run_on_ranks: RunOnRanks) -> None:
    with pytest.raises(WorkerError) as caught:
        run_on_ranks(1, exit_with_code_3)
    assert caught.value.errors == {0: (WORKER_DIED, "exited with code 3")}
    assert_works(run_on_ranks, 1)


def test_worker_killed_between_tests_is_replaced(run_on_ranks: RunOnRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    (worker,) = run_on_ranks(1, process_id)
    os.kill(worker, signal.SIGKILL)
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "another test (call)")
    assert_works(run_on_ranks, 1)


def test_least_recently_used_workers_make_room() -> None:
    run = RunOnRanks()
    try:
        oldest, kept = run(1, process_id), run(2, process_id)
        run(MAX_WORKERS - 2, process_id)
        assert not any(map(is_running, oldest))
        assert run(2, process_id) == kept
    finally:
        run.close()
    assert not any(map(is_running, kept))


@pytest.fixture
def short_path() -> Iterator[str]:
    """Of a new directory: the name of a socket has 107 characters at most."""
    with TemporaryDirectory() as path:
        yield path


def test_busy_workers_die_with_the_test_process(tmp_path: Path, short_path: str) -> None:
    folder = tmp_path / "process_ids"
    folder.mkdir()
    script = (
        "import sys; from pathlib import Path; from worker_pool import RunOnRanks; import tests.support.test_worker_pool as test\n"
        "RunOnRanks()(2, test.write_process_id_and_sleep, Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH, "TMPDIR": short_path}
    parent = subprocess.Popen([sys.executable, "-c", script, folder], env=environment)
    try:
        assert eventually(lambda: len(list(folder.iterdir())) == 2, timeout=180)
    finally:
        parent.kill()
        parent.wait()
    workers = [int(file.name) for file in folder.iterdir()]
    assert eventually(lambda: not any(map(is_running, workers)), timeout=60)


def test_fresh_workers_are_new_and_thrown_away(run_on_ranks: RunOnRanks) -> None:
    fresh = run_fresh(2, process_id)
    assert not set(fresh) & set(run_on_ranks(2, process_id))
    assert not any(map(is_running, fresh))


def test_peak_memory_sees_a_temporary_and_can_be_reset() -> None:
    size = 64 * MIB
    for peak, left, peak_after_reset in run_fresh(2, peak_of_a_temporary, size // 4):
        assert 0.95 * size < peak < 1.1 * size
        assert left < 0.1 * size
        assert peak_after_reset < 0.1 * size
