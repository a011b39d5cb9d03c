"""Hosts on one machine: network namespaces on a bridge, each with sshd and a home of its own.

The bridge is in the namespace of the first host, the laptop, so nothing is left or reachable on the
machine itself. Needs root, iproute2, openssh-server and rsync.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).parent / "host.sh"
ROOT = SCRIPT.parents[2]
NETWORK = "10.77.61"
TOOLS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd")


def why_not() -> str | None:
    """What stands against making hosts here, if anything."""
    if os.geteuid() != 0:
        return "hosts are made by root only"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (iproute2, openssh-server, rsync)"
    probe = f"tf-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode != 0:
        return f"no network namespace can be made: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


class Host:
    """One machine; it is dead until :meth:`boot`."""

    def __init__(self, number: int, folder: Path, names: list[str]):
        self.name, self.folder = names[number], folder / names[number]
        self.address = f"{NETWORK}.{number + 1}"
        self.namespace = f"tinyflux-{os.getpid()}-{self.name}"
        self.home = self.folder / "home"
        self._cable = f"tf{os.getpid() % 100000}-{number}"
        self._process: subprocess.Popen[bytes] | None = None
        self._laptop: Host | None = None
        for part in ("home/.ssh", "home/.ray"):
            (self.folder / part).mkdir(parents=True, mode=0o700)
        users = Path("/etc/passwd").read_text().splitlines()
        users[0] = f"root:x:0:0:root:{self.home}:/bin/bash"
        (self.folder / "passwd").write_text("\n".join(users) + "\n")
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{NETWORK}.{i + 1} {name}\n" for i, name in enumerate(names))
        )
        # Every host has the packages, as after a first `ray up`.
        (self.home / "tinyflux").symlink_to(sys.prefix)
        (self.home / ".bashrc").write_text(
            "export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1\n"
        )
        (self.home / ".cache").mkdir()
        (self.home / ".cache" / "torch_extensions").symlink_to(folder / "extensions")
        key = self.folder / "host_key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        (self.folder / "sshd_config").write_text(
            f"HostKey {key}\nAuthorizedKeysFile {self.home}/.ssh/authorized_keys\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nStrictModes no\n"
            "UsePAM no\nPidFile none\nMaxStartups 100\n"
        )

    def plug(self, laptop: "Host") -> None:
        """Make its network, with a cable to the laptop's bridge."""
        _ip("netns", "add", self.namespace)
        inside = ("-n", self.namespace)
        _ip(*inside, "link", "set", "lo", "up")
        if self is laptop:
            _ip(*inside, "link", "add", "br0", "type", "bridge")
            _ip(*inside, "link", "set", "br0", "up")
            _ip(*inside, "addr", "add", f"{self.address}/24", "dev", "br0")
            return
        _ip("link", "add", self._cable, "netns", laptop.namespace, "type", "veth",
            "peer", "name", "eth0", "netns", self.namespace)  # fmt: skip
        _ip("-n", laptop.namespace, "link", "set", self._cable, "master", "br0", "up")
        _ip(*inside, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip(*inside, "link", "set", "eth0", "up")
        # Ray finds its own address by the way to the world, though there is none here.
        _ip(*inside, "route", "add", "default", "via", laptop.address)
        self._laptop = laptop

    def boot(self) -> None:
        if self._laptop is not None:
            _ip("-n", self._laptop.namespace, "link", "set", self._cable, "up")
        # A machine's temporary files do not live through its death.
        shutil.rmtree(self.folder / "ray", ignore_errors=True)
        (self.folder / "ray").mkdir()
        log = self.folder / "sshd.log"
        words = ["ip", "netns", "exec", self.namespace,
                 "unshare", "--pid", "--fork", "--mount", "--uts", "--mount-proc", "--kill-child",
                 "bash", SCRIPT, self.name, self.folder]  # fmt: skip
        with log.open("w") as output:
            self._process = subprocess.Popen(words, stderr=output, start_new_session=True)
        deadline = time.monotonic() + 20
        while "Server listening" not in log.read_text():
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{self.name} has no sshd after 20 s"
            time.sleep(0.1)

    def die(self) -> None:
        """Power off: the cable goes silent, then every process is gone."""
        if self._laptop is not None:
            _ip("-n", self._laptop.namespace, "link", "set", self._cable, "down")
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        """The ancestor of its processes, as the machine sees them."""
        assert self._process is not None
        return self._process.pid

    def command(self, *words: str) -> list[str]:
        """What runs ``words`` on this host, in the root of the checkout."""
        inner = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()[0]
        path = os.pathsep.join([f"{self.home}/tinyflux/bin", "/usr/sbin:/usr/bin:/sbin:/bin"])
        login = [f"HOME={self.home}", f"PATH={path}", "OMP_NUM_THREADS=1", "RAY_AUTH_MODE=token"]
        return ["nsenter", "--target", inner, "--net", "--mount", "--pid", "--uts", "--",
                "env", "-i", f"--chdir={ROOT}", *login, *words]  # fmt: skip

    def unplug(self) -> None:
        self.die()
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("netns", "del", self.namespace)


@contextlib.contextmanager
def machines(folder: Path, names: list[str]):
    """Running hosts, the first of which may log in to all; they end with the block."""
    # DeepSpeed's extension would take each host minutes to compile.
    made = Path.home() / ".cache" / "torch_extensions"
    if made.exists():
        shutil.copytree(made, folder / "extensions", ignore=shutil.ignore_patterns("lock"))
    (folder / "extensions").mkdir(exist_ok=True)
    hosts = [Host(number, folder, names) for number in range(len(names))]
    laptop = hosts[0]
    key = laptop.home / ".ssh" / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    for host in hosts:
        shutil.copy(f"{key}.pub", host.home / ".ssh" / "authorized_keys")

    def stop(*_):  # a killed test must not leave hosts
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        for host in hosts:
            host.plug(laptop)
            host.boot()
        yield hosts
    finally:
        for host in reversed(hosts):
            host.unplug()
        signal.signal(signal.SIGTERM, before)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
