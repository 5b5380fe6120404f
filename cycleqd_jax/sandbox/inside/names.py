"""The contents of the private system, as tables: what is copied, and what is written anew."""

# The programs of Ubuntu's smallest image and of what AgentBench v0.2 adds to it.
_NAMES = """
    bash sh dash
    arch b2sum base32 base64 basename basenc cat chcon chgrp chmod chown cksum comm cp csplit cut
    date dd df dir dircolors dirname du echo env expand expr factor false fmt fold groups head
    hostid id install join link ln logname ls md5sum mkdir mkfifo mknod mktemp mv nice nl nohup
    nproc numfmt od paste pathchk pinky pr printenv printf ptx pwd readlink realpath rm rmdir
    runcon seq sha1sum sha224sum sha256sum sha384sum sha512sum shred shuf sleep sort split stat
    stdbuf stty sum sync tac tail tee test timeout touch tr true truncate tsort tty uname unexpand
    uniq unlink users vdir wc who whoami yes [ chroot
    find xargs grep egrep fgrep sed gawk mawk awk nawk diff diff3 cmp sdiff
    tar gzip gunzip zcat zgrep zless zmore bzip2 bunzip2 bzcat xz unxz xzcat zip unzip
    which tempfile run-parts hostname getent getconf iconv locale ldd ldconfig
    ps pgrep pkill pidof kill killall free top uptime vmstat w watch pwdx pmap sysctl slabtop skill
    column cal hexdump look rename rev ul more getopt flock ionice logger lsblk lscpu mountpoint
    mount umount namei nsenter prlimit renice script setsid taskset whereis fallocate dmesg
    chrt ipcs lsns mcookie swapon blkid findmnt ipcrm lslogins chmem hwclock last lastb mesg wall
    su runuser login newgrp sg passwd chage chfn chsh expiry gpasswd faillog lastlog
    useradd userdel usermod groupadd groupdel groupmod groupmems chpasswd chgpasswd newusers
    pwck grpck pwconv pwunconv grpconv grpunconv adduser addgroup deluser delgroup vipw nologin
    clear reset tput tset infocmp toe tabs
    perl python3 git vim vi less curl wget tree
"""
PROGRAMS = tuple(_NAMES.split())
NEEDED = frozenset(
    ("bash", "sh", "ls", "cat", "chmod", "find", "grep", "sed", "awk", "ps", "python3", "env")
)

# Patterns of what else the programs read.
SHARED = (
    "/usr/lib/*/perl-base",
    "/usr/share/perl5/Debian/AdduserCommon.pm",
    "/usr/share/git-core/templates",
    "/lib/terminfo/d/dumb",
    "/lib/terminfo/v/vt100",
    "/lib/terminfo/x/xterm*",
    "/usr/share/terminfo/x/xterm*",
    "/lib/*/libnss_files.so*",
    "/lib/*/libnss_compat.so*",
    "/usr/lib64/libnss_files.so*",
    "/etc/alternatives/awk",
    "/etc/alternatives/nawk",
    "/etc/alternatives/vim",
    "/etc/alternatives/vi",
)
STDLIB_LEFT_OUT = (
    "test", "tests", "idlelib", "tkinter", "turtledemo", "turtle.py", "ensurepip", "lib2to3",
    "pydoc_data", "distutils", "site-packages", "dist-packages", "config-*",
    "*.opt-?.pyc", "*.a", "EXTERNALLY-MANAGED", "sitecustomize.*",
)  # fmt: skip

FOLDERS = {
    "/": 0o755,
    **dict.fromkeys(
        ("/boot", "/dev", "/etc", "/home", "/media", "/mnt", "/opt", "/proc", "/run", "/srv",
         "/sys", "/usr", "/usr/bin", "/usr/sbin", "/usr/lib", "/usr/include", "/usr/games",
         "/usr/src",
         "/usr/share", "/usr/local", "/usr/local/bin", "/usr/local/sbin", "/usr/local/lib",
         "/usr/local/etc", "/usr/local/games", "/usr/local/include", "/usr/local/share",
         "/usr/local/src", "/var", "/var/backups", "/var/cache", "/var/lib", "/var/local",
         "/var/log", "/var/mail", "/var/opt", "/var/run", "/var/spool", "/run/lock"),
        0o755,
    ),
    "/root": 0o700,
    **dict.fromkeys(("/tmp", "/var/tmp"), 0o1777),
}  # fmt: skip

_USERS = (
    ("root", 0, 0, "/root", "/bin/bash"),
    ("daemon", 1, 1, "/usr/sbin", "/usr/sbin/nologin"),
    ("bin", 2, 2, "/bin", "/usr/sbin/nologin"),
    ("sys", 3, 3, "/dev", "/usr/sbin/nologin"),
    ("sync", 4, 65534, "/bin", "/bin/sync"),
    ("games", 5, 60, "/usr/games", "/usr/sbin/nologin"),
    ("man", 6, 12, "/var/cache/man", "/usr/sbin/nologin"),
    ("lp", 7, 7, "/var/spool/lpd", "/usr/sbin/nologin"),
    ("mail", 8, 8, "/var/mail", "/usr/sbin/nologin"),
    ("news", 9, 9, "/var/spool/news", "/usr/sbin/nologin"),
    ("uucp", 10, 10, "/var/spool/uucp", "/usr/sbin/nologin"),
    ("proxy", 13, 13, "/bin", "/usr/sbin/nologin"),
    ("www-data", 33, 33, "/var/www", "/usr/sbin/nologin"),
    ("backup", 34, 34, "/var/backups", "/usr/sbin/nologin"),
    ("list", 38, 38, "/var/list", "/usr/sbin/nologin"),
    ("irc", 39, 39, "/run/ircd", "/usr/sbin/nologin"),
    ("nobody", 65534, 65534, "/nonexistent", "/usr/sbin/nologin"),
)
_GROUPS = {
    "root": 0, "daemon": 1, "bin": 2, "sys": 3, "adm": 4, "tty": 5, "disk": 6, "lp": 7, "mail": 8,
    "news": 9, "uucp": 10, "man": 12, "proxy": 13, "kmem": 15, "dialout": 20, "fax": 21,
    "voice": 22, "cdrom": 24, "floppy": 25, "tape": 26, "sudo": 27, "audio": 29, "dip": 30,
    "www-data": 33, "backup": 34, "operator": 37, "list": 38, "irc": 39, "src": 40, "shadow": 42,
    "utmp": 43, "video": 44, "sasl": 45, "plugdev": 46, "staff": 50, "games": 60, "users": 100,
    "nogroup": 65534,
}  # fmt: skip

# Prompts and line editing would only write into what a command prints.
_BASHRC = """\
[ -z "$BASH_VERSION" ] && return
set +o emacs +o vi 2> /dev/null
shopt -s checkwinsize
HISTCONTROL=ignoreboth
PS1='\\[\\]' PS2=
"""
_PROFILE = """\
if [ "$(id -u)" -eq 0 ]; then
  PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
else
  PATH=/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games
fi
export PATH
if [ -n "$BASH_VERSION" ] && [ -n "$PS1" ] && [ -f /etc/bash.bashrc ]; then
  . /etc/bash.bashrc
fi
"""
_OWN_PROFILE = """\
if [ -n "$BASH_VERSION" ] && [ -f "$HOME/.bashrc" ]; then
  . "$HOME/.bashrc"
fi
"""
_PAM = """\
auth sufficient pam_rootok.so
auth required pam_unix.so
account sufficient pam_rootok.so
account required pam_unix.so
password required pam_unix.so
session required pam_permit.so
"""
_LOGIN_DEFS = """\
MAIL_DIR /var/mail
ENV_SUPATH PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ENV_PATH PATH=/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games
TTYPERM 0600
UMASK 022
HOME_MODE 0750
PASS_MAX_DAYS 99999
PASS_MIN_DAYS 0
PASS_WARN_AGE 7
UID_MIN 1000
UID_MAX 60000
SYS_UID_MIN 100
SYS_UID_MAX 999
GID_MIN 1000
GID_MAX 60000
SYS_GID_MIN 100
SYS_GID_MAX 999
USERGROUPS_ENAB yes
ENCRYPT_METHOD SHA512
"""

# Path: mode and text.
ETC = {
    "/etc/passwd": (
        0o644,
        "".join(f"{n}:x:{u}:{g}:{n}:{h}:{s}\n" for n, u, g, h, s in _USERS),
    ),
    "/etc/shadow": (0o640, "".join(f"{user[0]}:*:19700:0:99999:7:::\n" for user in _USERS)),
    "/etc/group": (0o644, "".join(f"{name}:x:{number}:\n" for name, number in _GROUPS.items())),
    "/etc/gshadow": (0o640, "".join(f"{name}:*::\n" for name in _GROUPS)),
    "/etc/subuid": (0o644, ""),
    "/etc/subgid": (0o644, ""),
    "/etc/login.defs": (0o644, _LOGIN_DEFS),
    "/etc/default/useradd": (0o644, "SHELL=/bin/sh\n"),
    "/etc/shells": (0o644, "/bin/sh\n/bin/bash\n/usr/bin/bash\n"),
    "/etc/nsswitch.conf": (0o644, "passwd: files\ngroup: files\nshadow: files\nhosts: files\n"),
    "/etc/hosts": (0o644, "127.0.0.1 localhost machine\n::1 localhost\n"),
    "/etc/hostname": (0o644, "machine\n"),
    "/etc/resolv.conf": (0o644, ""),
    "/etc/host.conf": (0o644, "multi on\n"),
    "/etc/environment": (
        0o644,
        'PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"\n',
    ),
    "/etc/fstab": (0o644, ""),
    "/etc/issue": (0o644, "Linux\n"),
    "/etc/profile": (0o644, _PROFILE),
    "/etc/bash.bashrc": (0o644, _BASHRC),
    "/etc/skel/.bashrc": (0o644, _BASHRC),
    "/etc/skel/.profile": (0o644, _OWN_PROFILE),
    "/etc/skel/.bash_logout": (0o644, ""),
    "/root/.bashrc": (0o644, _BASHRC),
    "/root/.profile": (0o644, _OWN_PROFILE),
    **{
        f"/etc/pam.d/{service}": (0o644, _PAM)
        for service in (
            "su", "su-l", "runuser", "runuser-l", "login", "passwd", "chpasswd", "newusers",
            "chsh", "chfn", "chage", "useradd", "usermod", "userdel", "groupadd", "groupmod",
            "groupdel", "other",
        )
    },
    "/etc/security/pam_env.conf": (0o644, ""),
    "/var/log/dpkg.log": (0o644, ""),
    "/var/log/apt/history.log": (0o644, ""),
    "/var/log/wtmp": (0o664, ""),
    "/var/log/lastlog": (0o664, ""),
    "/var/lib/misc/.keep": (0o644, ""),
    "/run/utmp": (0o664, ""),
}  # fmt: skip
