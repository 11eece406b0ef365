"""What systemd wants to hear of a service of Type=notify: sd_notify(3), over the socket that it names."""

import os
import socket
import time
from collections.abc import Mapping


class Supervisor:
    """Who started this, if it is one that listens; otherwise nothing is said."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        mine = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watches = mine and environment.get("WATCHDOG_USEC", "").isdigit()
        """It kills what does not say `alive` often enough."""

    def ready(self) -> None:
        """It serves; or a reload is over."""
        self._say("READY=1")

    def reloading(self) -> None:
        self._say(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._say("STOPPING=1")

    def alive(self) -> None:
        if self.watches:
            self._say("WATCHDOG=1")

    def _say(self, text: str) -> None:
        """Never blocks, and whoever does not listen is no reason to end."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as talking:
            talking.setblocking(False)
            try:
                talking.sendto(text.encode(), self._address)
            except OSError:
                return
