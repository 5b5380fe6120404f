"""Bash programs that mean harm, beside those of test_attacks: each fails, within its limits."""

import pytest

from cycleqd_jax.sandbox import Job, Outcome

# (name, source, how it may end): more than its share of something that is counted
GREEDY = [
    ("memory of other programs", "perl -e '$x = q(x) x (1 << 31)' || exit 1", "error"),
    ("disk by dd", "dd if=/dev/zero of=f bs=1M count=1000", "error"),
    ("disk by a hole", "truncate -s 1T f", "error"),
    ("disk by allocation", "fallocate -l 1G f", "error"),
    ("disk by many", "for i in {1..9}; do head -c 2M /dev/zero > /tmp/$i || exit 1; done", "error"),
    ("unpacked", "head -c 30M /dev/zero | gzip -1 > z && gunzip -c z > f", "error"),
    ("files", "for ((i = 0; ; i++)); do : > $i || exit 1; done", "error"),
    ("folders", "for ((i = 0; i < 5000; i++)); do f+=\" $i\"; done; mkdir $f", "error"),
    ("nested folders", "mkdir -p $(printf 'd/%.0s' {1..5000})", "error"),
    ("names", "for ((i = 0; ; i++)); do : > $'\\e[2J\\n'$i || exit 1; done", "error"),
    ("arguments", "/bin/true $(head -c 9M /dev/zero | tr '\\0' x)", "error"),
    ("environment", "for i in {1..99}; do export v$i=\"$(printf %99999s)\"; done; /bin/true",
     "error"),
    ("line of 1 GB", "head -c 1G /dev/zero | tr '\\0' x", "killed"),
    ("line of 1 GB in errors", "head -c 1G /dev/zero | tr '\\0' x >&2", "killed"),
    ("trace", "set -x; while :; do echo x > /dev/null; done", "killed"),
    ("a child killed", "(kill -9 $BASHPID); exit $?", "error"),
]  # fmt: skip

# The same with what takes seconds.
SLOW_GREEDY = [
    ("array", "a=(xxxxxxxxxxxxxxxx); while :; do a=(\"${a[@]}\" \"${a[@]}\"); done", "error"),
    ("format", "printf -v x %1000000000s", "error"),
    ("zeros as text", "mapfile < /dev/zero", "error"),
    ("output as text", "x=$(yes)", "error"),
    ("lines of input", "mapfile < <(yes)", "error"),
    ("memory of many",
     "for i in {1..6}; do perl -e '$x = q(x) x (70 << 20); sleep 60' & done; wait", "killed"),
    ("recursion", "f() { f; }; f", "killed"),
    ("jobs", "for i in {1..40}; do sleep 60 & done 2> /dev/null; exit 1", "error|timeout|killed"),
    ("subshells", "f() { (f); }; f", "error|timeout|killed"),
    ("itself", "echo 'bash s & bash s' > s; bash s; exit 1", "error|timeout|killed"),
    ("list of everything", "ls -lR /usr", "killed"),
]  # fmt: skip

# Programs that do not want to end.
ENDLESS = [
    ("deaf", "trap '' $(seq 1 64); sleep 60; sleep 60"),
    ("at exit", "trap 'sleep 60' EXIT; exit 0"),
    ("at an error", "trap 'sleep 60' ERR; false"),
    ("closed descriptors", "exec <&- >&- 2>&-; sleep 60"),
    ("other descriptors", "exec > /dev/null 2>&1; sleep 60"),
    ("pipe without a writer", "mkfifo p; cat p"),
    ("pipe to itself", "mkfifo p; exec 3<> p; cat <&3"),
    ("reads its own output", "echo x; cat /proc/self/fd/1"),
    ("stopped", "sleep 60 & kill -STOP $!; wait"),
    ("daemon that is waited for", "setsid sleep 60 < /dev/null > /dev/null 2>&1 & wait"),
    ("follows", "touch f; tail -f f"),
]

# What is not there or not allowed: the program fails, or would say so with exit code 0.
FORBIDDEN = [
    ("network by name", "echo > /dev/tcp/example.com/80"),
    ("network of datagrams", "echo > /dev/udp/1.1.1.1/53"),
    ("network IPv6", "echo > /dev/tcp/2606:4700:4700::1111/80"),
    ("network of this machine", "echo > /dev/tcp/localhost/22"),
    ("names", "getent ahosts example.com"),
    ("home of root", "ls -a /root/.bashrc /root/.ssh"),
    ("root of the first process", "cat /proc/1/root/etc/shadow"),
    ("descriptors of the server",
     "ls /proc/$$/fd > /tmp/l; [ \"$(tr '\\n' ' ' < /tmp/l)\" != '0 1 2 ' ]"),
    ("processes of the server", "cat /proc/[0-9]*/cmdline | tr '\\0' '\\n' | grep '[i]nside'"),
    ("environment of the server", "cat /proc/[0-9]*/environ | grep -z PYTHONPATH"),
    ("parent", "kill -0 $(awk '/^PPid/ {print $2}' /proc/$$/status | grep -v '^0$' || echo 99999)"),
    ("mount", "mount -t tmpfs t /home/user"),
    ("bind", "mount --bind /usr /home/user"),
    ("write again", "mount -o remount,rw /usr"),
    ("unmount", "umount -l /proc"),
    ("mount namespace", "unshare --mount true"),
    ("root by namespace", "unshare --map-root-user true"),
    ("process namespace", "unshare --pid --fork true"),
    ("namespace of the first process", "nsenter --target 1 --mount true"),
    ("chroot", "chroot / true"),
    ("other root", "pivot_root . ."),
    ("become root", "su -c true < /dev/null"),
    ("become root by sudo", "sudo -n true"),
    ("password", "echo root:x | chpasswd"),
    ("owner", "touch f; chown 0 f"),
    ("set-user-id of the outside", "chmod u+s /usr/bin/env"),
    ("set-user-id of its own", "cp /usr/bin/id .; chmod 6755 id; ./id -u | grep -v 1000"),
    ("capabilities", "setcap all+ep /bin/bash"),
    ("hard link to the outside", "ln /etc/passwd x"),
    ("write through a link", "ln -s /etc/passwd x; echo x >> x"),
    ("remove the outside", "rm -rf /usr/bin /etc/passwd 2> /dev/null"),
    ("move the outside", "mv /usr/bin /home/user/bin"),
    ("devices", "mknod d c 1 1 && cat d"),
    ("memory of the machine", "head -c 1 /dev/mem"),
    ("messages of the kernel", "dmesg"),
    ("messages to the kernel", "echo x > /dev/kmsg"),
    ("terminal", "echo x > /dev/tty"),
    ("where crashes go", "echo '|/bin/sh' > /proc/sys/kernel/core_pattern"),
    ("share of the processor", "echo 19 > /proc/self/autogroup"),
    ("out-of-memory score", "echo -1000 > /proc/self/oom_score_adj"),
    ("caches", "echo 3 > /proc/sys/vm/drop_caches"),
    ("module", "insmod x.ko"),
    ("swap", "swapoff -a"),
    ("clock", "date -s 2000-01-01"),
    ("host name", "hostname evil"),
    ("priority", "renice -n -5 $$"),
    ("memory limit", "ulimit -v unlimited"),
    ("process limit", "ulimit -u 9999"),
    ("file limit", "ulimit -f unlimited"),
    ("start-up file", "echo 'exit 0' > /etc/profile"),
    ("library for all", "echo ./x.so > /etc/ld.so.preload"),
    ("command for all", "cp /bin/true /usr/local/bin/ls"),
    ("at a later time", "echo true | at now"),
    ("every minute", "echo '* * * * * true' | crontab -"),
]  # fmt: skip


@pytest.mark.parametrize(
    "greedy", [GREEDY, pytest.param(SLOW_GREEDY, marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_greedy_programs_end_within_their_limits(greedy, tight, roomy, untouched):
    outcomes: dict[str, Outcome] = {}
    with untouched():
        # What must run into another limit than time gets time enough to do so on a busy machine.
        for sandbox, timed in ((tight, True), (roomy, False)):
            attacks = [attack for attack in greedy if ("timeout" in attack[2]) == timed]
            ended = sandbox.run([Job("bash", source) for _, source, _ in attacks])
            outcomes |= {name: o for (name, _, _), o in zip(attacks, ended, strict=True)}
    ends = {name: end for name, _, end in greedy}
    wrong = {n: o for n, o in outcomes.items() if o.status not in ends[n].split("|")}
    assert wrong == {}
    assert all(len(outcome.stdout) <= 64 << 10 for outcome in outcomes.values())
    for sandbox in (tight, roomy):
        assert sandbox.run([Job("bash", "echo $((6 * 7))")])[0].stdout == "42\n"


def test_endless_programs_end_in_time(hasty, untouched):
    with untouched():
        outcomes = hasty.run([Job("bash", source) for _, source in ENDLESS])
    ends = {name: o.status for (name, _), o in zip(ENDLESS, outcomes, strict=True)}
    assert ends == dict.fromkeys(ends, "timeout")
    assert hasty.run([Job("bash", "echo $((6 * 7))")])[0].stdout == "42\n"


def test_forbidden_acts_fail(roomy, untouched):
    with untouched():
        outcomes = roomy.run([Job("bash", source) for _, source in FORBIDDEN])
    allowed = {
        name: outcome
        for (name, _), outcome in zip(FORBIDDEN, outcomes, strict=True)
        if outcome.status != "error"
    }
    assert allowed == {}


def test_escapes_of_a_terminal_arrive_as_text(roomy, capfd):
    source = "printf '\\e]0;title\\a\\e[2J\\e[8mhidden\\r\\b\\x9b31m\\0end'"
    outcome = roomy.run([Job("bash", source), Job("bash", source + " >&2")])
    text = "\x1b]0;title\x07\x1b[2J\x1b[8mhidden\r\b\ufffd31m\0end"
    assert (outcome[0].stdout, outcome[1].stderr) == (text, text)
    assert capfd.readouterr() == ("", "")


def test_a_directory_that_was_shut_is_still_read(roomy):
    outcome = roomy.run([Job("bash", "echo x > f; chmod 0 f .", snapshot=True)])[0]
    assert (outcome.status, outcome.files) == ("ok", {"f": "x\n"})
