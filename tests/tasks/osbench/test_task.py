"""Episodes on real machines."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from cycleqd_jax.sandbox import Sandbox
from cycleqd_jax.sandbox.machines import MachineLimits, Machines
from cycleqd_jax.tasks.base import Request
from cycleqd_jax.tasks.osbench import prompt
from cycleqd_jax.tasks.osbench.prompt import write_bash, write_commit
from cycleqd_jax.tasks.osbench.records import Record, Script, _shipped_scripts, read_records
from cycleqd_jax.tasks.osbench.task import OSBenchTask
from cycleqd_jax.tasks.registry import make_tasks
from cycleqd_jax.tasks.rollout import rollout

from .conftest import Play


def bash(code: str) -> Script:
    return Script("bash", code)


def shipped(name: str) -> Script:
    return Script("python" if name.endswith(".py") else "bash", _shipped_scripts()[name])


MATCH = Record("t/0", 0, "1", "Who?", match="root")
COUNT = Record(
    "t/1", 1, "1", "How many?", (bash("mkdir d; touch d/{1..5}"),),
    checks=(None, shipped("check/integer-match.py")), example=bash("ls d | wc -l"),
)  # fmt: skip


def test_a_match_is_compared_without_spaces_around(play: Play) -> None:
    for answer, score in (("root", 1.0), (" root\t", 1.0), ("Root", 0.0), ("", 0.0)):
        assert play(MATCH, [write_commit(answer)])[0] == score
    assert play(MATCH, ["Act: finish"])[0] == 0.0
    assert play(MATCH, ["no action"])[0] == 0.0


def test_the_example_runs_after_the_agent_and_its_output_is_passed_on(play: Play) -> None:
    assert play(COUNT, [write_commit("5")])[0] == 1.0
    assert play(COUNT, [write_commit("6")])[0] == 0.0
    assert play(COUNT, ["Act: finish"])[0] == 0.0
    assert play(COUNT, [write_bash("touch d/6"), write_commit("6")])[0] == 1.0
    assert play(COUNT, [write_commit("5\0")])[0] == 0.0


def test_checks_get_the_answer_and_all_outputs_before_them(play: Play) -> None:
    record = Record(
        "t/2", 0, "1", "?",
        checks=(
            bash("echo one; echo lost >&2"),
            Script("python", "import sys; print(*sys.argv[1:])"),
            bash('[ "$0,$1,$2,$3" = "--,None,one\n,None one\n\n" ]'),
        ),
    )  # fmt: skip
    assert play(record, ["Act: finish"])[0] == 1.0
    assert play(record, [write_commit("x")])[0] == 0.0


def test_the_shell_remembers_and_start_is_typed_in_it(play: Play) -> None:
    record = Record("t/3", 0, "1", "?", start=bash("cd /usr; n=3; f() { echo f$n; }"), match="x")
    score, heard = play(
        record, [write_bash("pwd; f; n=4"), write_bash("f\npwd"), write_commit("x")]
    )
    assert score == 1.0
    assert heard[1:] == ["The output of the OS:\n\n/usr\nf3", "The output of the OS:\n\nf4\n/usr"]


def test_a_shell_of_another_user_goes_on(play: Play, machines: Machines) -> None:
    if not machines.users:
        pytest.skip("only root can be mapped here")
    start = "useradd -s /bin/bash -m jack && su - jack"
    record = Record("t/4", 0, "1", "?", start=bash(start), match="jack")
    score, heard = play(
        record,
        [write_bash("whoami; pwd"), write_bash("if ; fi"), write_bash("whoami"),
         write_bash("cat /etc/shadow"), write_commit("jack")],
    )  # fmt: skip
    assert score == 1.0
    assert heard[1] == "The output of the OS:\n\njack\n/home/jack"
    assert "syntax error" in heard[2]
    assert heard[3] == "The output of the OS:\n\njack"
    assert "Permission denied" in heard[4]


def test_after_the_last_round_the_problem_is_failed(play: Play) -> None:
    look = write_bash("true")
    assert play(MATCH, [look, write_commit("root")], rounds=2)[0] == 1.0
    score, heard = play(MATCH, [look, look, write_commit("root")], rounds=2)
    assert (score, len(heard)) == (0.0, 2)


def test_a_slow_command_is_not_waited_for_but_goes_on(play: Play) -> None:
    score, heard = play(
        MATCH,
        [write_bash("echo a; sleep 0.6; echo b"), write_bash("echo c"), write_commit("root")],
        turn_seconds=0.5,
    )
    assert score == 1.0
    assert heard[1:] == ["The output of the OS:\n\na", "The output of the OS:\n\nb\nc"]


def test_a_shell_that_has_ended_can_be_judged_but_not_used(play: Play) -> None:
    leave = write_bash("exit")
    assert play(MATCH, [leave, write_commit("root")])[0] == 1.0
    score, heard = play(MATCH, [leave, write_bash("whoami"), write_commit("root")])
    assert (score, len(heard)) == (0.0, 2)


def test_a_slow_check_fails(play: Play) -> None:
    record = Record("t/5", 0, "1", "?", checks=(bash("sleep 60"),))
    assert play(record, ["Act: finish"], script_seconds=0.3)[0] == 0.0


def verdicts(machines: Machines, script: str, *calls: tuple[str, ...]) -> list[bool]:
    machine = machines.boot()
    try:
        commands = [shipped(script).command(*call) for call in calls]
        return [machine.run(command, 30.0).code == 0 for command in commands]
    finally:
        machine.close()


def test_the_matching_checkers(machines: Machines) -> None:
    assert verdicts(
        machines, "check/integer-match.py",
        ("3", "3\n"), (" +3 ", "3"), ("3", "4"), ("3.0", "3"), ("None", "3"),
    ) == [True, True, False, False, False]  # fmt: skip
    assert verdicts(
        machines, "check/string-match.py", ("a\r\nb ", "a\nb\n"), ("a", "b"), ("A", "a")
    ) == [True, False, False]
    assert verdicts(
        machines, "check/size-match.py",
        ("1K", "1024"), ("2M", "2048K"), ("1P", "1024T"), ("7B", "7Byte"), ("1K", "2K"),
        ("1KB", "1KB"), ("1.2G", "1.2G"),
    ) == [True, True, True, True, False, False, False]  # fmt: skip


def test_the_reference_commands_pass_their_checks_and_nothing_does_not(
    machines: Machines,
) -> None:
    pairs = (("0", "check/0.sh"), ("0", "checking/0.sh"), ("1", "checking/1.sh"),
             ("2", "checking/2.sh"))  # fmt: skip
    for example, check in pairs:
        machine = machines.boot()
        judge = shipped(check).command("None")
        assert machine.run(judge, 30.0).code != 0
        assert machine.run(shipped(f"example/{example}.sh").command(), 30.0).code == 0
        assert machine.run(judge, 30.0).code == 0
        machine.run(bash("sed -i 's/awk/echo 7; exit #/' /usr/local/bin/*").command(), 30.0)
        assert (machine.run(judge, 30.0).code == 0) == (example != "0")
        machine.close()


def test_the_set_ups(machines: Machines) -> None:
    machine = machines.boot()
    machine.run(shipped("init/stock-log.sh").command(), 30.0)
    lines = "^(Alice|Bob) \\| (Purchase|Sell) \\| [0-9]{1,2} \\| [0-9]{1,3}$"
    shown = machine.run(["grep", "-cE", lines, "/usr/stock.log"], 30.0)
    assert shown.output == "401\n"
    machine.run(shipped("init/nested_folders.sh").command(), 30.0)
    found = machine.run(["find", "/folder1", "-name", "echo-love"], 30.0).output.split()
    assert len(found) == 10
    assert max(found, key=len).count("folder") == 10
    executable = machine.run(["find", "/folder1", "-name", "echo-love", "-perm", "/u=x"], 30.0)
    fifth = "/folder1/folder2/folder3/folder4/folder5/echo-love"
    assert executable.output == f"{fifth}\n"
    assert machine.run([fifth], 30.0).output == "I love myself.\n"
    machine.close()


def test_many_candidates_play_together(machines: Machines, sandbox: Sandbox) -> None:
    task = OSBenchTask((MATCH, COUNT), machines)
    heard: list[str] = []

    def policy(requests: Sequence[Request]) -> list[str]:
        said = []
        for request in requests:
            assert request.messages[:7] == prompt.opening(
                request.messages[6].content.split("is:\n\n")[1]
            )
            if len(request.messages) == 7:
                said.append(write_bash(f"ls /here*; touch /here{request.candidate}"))
            else:
                heard.append(request.messages[-1].content)
                counts = request.messages[6].content.endswith("many?")
                said.append(write_commit("5" if counts else "root"))
        return said

    played = rollout([task], {task.name: task.every_problem()}, 16, policy, sandbox)
    assert played.scores.tolist() == [[1.0]] * 16
    # Nobody finds what another one made.
    assert heard == ["The output of the OS:\n\nls: cannot access '/here*': "
                     "No such file or directory"] * 32  # fmt: skip


def test_the_right_agent_is_not_harmed_by_a_bomb_beside_it(sandbox: Sandbox) -> None:
    with Machines(MachineLimits(processes=32)) as few:
        task = OSBenchTask((COUNT,), few)

        def policy(requests: Sequence[Request]) -> list[str]:
            bomb = write_bash(":(){ :|:& };:")
            return [
                bomb if r.candidate and len(r.messages) == 7 else write_commit("5")
                for r in requests
            ]

        played = rollout([task], {task.name: task.every_problem()}, 3, policy, sandbox)
    assert played.scores[0, 0] == 1.0


def test_splits_keep_equal_solutions_together(machines: Machines) -> None:
    records = tuple(
        Record(f"t/{i}", i, "1", f"Q{i}", match="x", example=bash(f"echo {i // 2}"))
        for i in range(40)
    )
    task = OSBenchTask(records, machines)
    sizes = {"search": 0, "validation": 0, "test": 0}
    of_solution: dict[str, str] = {}
    for split in ("search", "validation", "test"):
        with pytest.raises(ValueError, match="ask for fewer") as error:
            task.problems(split, 10_000)
        sizes[split] = int(str(error.value).split("found ")[1].split()[0])
        for problem in task.problems(split, sizes[split], seed=3):
            assert of_solution.setdefault(problem.solution, split) == split
    assert sum(sizes.values()) == 40


def test_a_demonstration_opens_as_the_agent_reads_it(machines: Machines) -> None:
    asked, counted = OSBenchTask((MATCH, COUNT), machines).every_problem()
    assert asked.demonstration[:7] == prompt.opening("Who?")
    assert [turn.content for turn in asked.demonstration[7:]] == ["Act: answer(root)"]
    assert prompt.find_action(counted.demonstration[7].content) == prompt.Bash("ls d | wc -l")


def test_users_name_it_and_say_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CYCLEQD_DATA", raising=False)
    with pytest.raises(ValueError, match="task osbench: set CYCLEQD_DATA to a folder that holds"):
        make_tasks(["osbench", "shell"])
    data = tmp_path / "agentbench" / "os_interaction" / "data"
    problem = {"description": "?", "evaluation": {"match": "x"}}
    for kind in "1234567":
        (data / kind).mkdir(parents=True)
        (data / kind / "new.json").write_text(json.dumps([problem] * 9))
    (data / "dev.json").write_text("{}")
    monkeypatch.setenv("CYCLEQD_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"dev.json: problem 0: description: expected str"):
        make_tasks(["osbench/paper", "shell"])
    assert len(read_records(data.parent, irregular="skip")) == 63
    (data / "dev.json").write_text(json.dumps(problem))
    for name, left, rounds in (("osbench/offline", 61, 8), ("osbench/paper", 42, 5)):
        task = make_tasks([name, "shell"])[0]
        assert isinstance(task, OSBenchTask)
        assert (task.name, task.rounds) == (name, rounds)
        assert abs(len(task.records) - left) <= 4
        assert isinstance(task.backend, Machines)
        task.backend.close()
