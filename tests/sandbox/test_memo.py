"""The same job is run once."""

from concurrent.futures import Future

import pytest

from cycleqd_jax.sandbox import Job, MemoSandbox, Outcome


class Counting:
    """Stands in for a real sandbox: answers with the source and counts."""

    def __init__(self):
        self.batches = []
        self.closed = False

    def run(self, jobs):
        self.batches.append([job.source for job in jobs])
        files = {"a": "1"}
        return [Outcome("ok", 0, job.source, "", files if job.snapshot else None) for job in jobs]

    def close(self):
        self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def bash(source, **fields):
    return Job("bash", source, **fields)


def test_inside_a_batch_and_across_batches():
    inner = Counting()
    with MemoSandbox(inner) as memo:
        first = memo.run([bash("a"), bash("b"), bash("a")])
        second = memo.run([bash("b"), bash("c")])
    assert inner.batches == [["a", "b"], ["c"]]
    assert [outcome.stdout for outcome in first + second] == ["a", "b", "a", "b", "c"]
    assert (memo.hits, memo.misses) == (2, 3)
    assert inner.closed


def test_what_is_forgotten_is_run_anew():
    inner = Counting()
    with MemoSandbox(inner) as memo:
        memo.run([bash("a")])
        memo.forget()
        memo.run([bash("a")])
        memo.run([bash("a")])
    assert inner.batches == [["a"], ["a"]]


def test_what_was_known_then_is_not_forgotten():
    inner = Counting()
    with MemoSandbox(inner) as memo:
        memo.run([bash("a")])
        then = memo.known()
        memo.run([bash("b")])
        memo.forget(but=then)
        memo.run([bash("a"), bash("b")])
        memo.forget(but=then)
        memo.run([bash("b")])
    assert inner.batches == [["a"], ["b"], ["b"], ["b"]]


def test_every_field_counts():
    inner = Counting()
    jobs = [
        bash("a"),
        Job("python", "a"),
        bash("a", stdin="x"),
        bash("a", files={"f": "1"}),
        bash("a", files={"f": "2"}),
        bash("a", snapshot=True),
    ]
    MemoSandbox(inner).run(jobs)
    assert len(inner.batches[0]) == len(jobs)


def test_order_of_files_does_not_count():
    inner = Counting()
    files = {"f": "1", "g": "2"}
    backwards = dict(reversed(files.items()))
    MemoSandbox(inner).run([bash("a", files=files), bash("a", files=backwards)])
    assert inner.batches == [["a"]]


def test_the_least_recently_used_is_forgotten():
    inner = Counting()
    memo = MemoSandbox(inner, capacity=2)
    memo.run([bash("a"), bash("b")])
    memo.run([bash("a")])
    memo.run([bash("c")])
    memo.run([bash("a")])
    memo.run([bash("b")])
    assert inner.batches == [["a", "b"], ["c"], ["b"]]


def test_a_batch_larger_than_the_memory_is_still_answered():
    memo = MemoSandbox(Counting(), capacity=1)
    outcomes = memo.run([bash(c) for c in "abcab"])
    assert [outcome.stdout for outcome in outcomes] == list("abcab")


def test_a_changed_snapshot_does_not_reach_the_next_caller():
    memo = MemoSandbox(Counting())
    job = bash("a", snapshot=True)
    files = memo.run([job])[0].files
    assert files == {"a": "1"}
    files.clear()
    assert memo.run([job])[0].files == {"a": "1"}


def test_equal_jobs_under_way_are_run_once_and_errors_are_not_remembered():
    class Manual(Counting):
        def __init__(self):
            super().__init__()
            self.futures = []

        def submit(self, jobs):
            self.batches.append([job.source for job in jobs])
            self.futures += [Future() for _ in jobs]
            return self.futures[-len(jobs) :]

    inner = Manual()
    memo = MemoSandbox(inner)
    (first,), (second, other) = memo.submit([bash("a")]), memo.submit([bash("a"), bash("b")])
    assert inner.batches == [["a"], ["b"]]
    inner.futures[0].set_result(Outcome("ok", 0, "A", ""))
    assert first.result().stdout == second.result().stdout == "A"
    assert not other.done()
    inner.futures[1].set_exception(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        other.result()
    memo.submit([bash("a"), bash("b")])
    assert inner.batches == [["a"], ["b"], ["b"]]
    assert (memo.hits, memo.misses) == (2, 3)


def test_capacity_is_positive():
    with pytest.raises(ValueError, match="capacity: expected at least 1"):
        MemoSandbox(Counting(), capacity=0)
