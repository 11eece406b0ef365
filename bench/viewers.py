"""`python -m bench.viewers URL COUNT`: so many clients of a page, which read what a browser would, and draw nothing.

Each follows every event and every curve, and loads the picture of every stream once a second. Ends with its stdin.
"""

import json
import sys
import threading
import urllib.request
from contextlib import suppress

from stream.deliver.websocket import Client

PICTURE_S = 1.0


def watch(page: str, closing: threading.Event) -> None:
    """One of them, until the page has gone or `closing` is set."""
    with suppress(ConnectionError), Client(f"ws{page.removeprefix('http')}/ws") as client:
        for request in ({"op": "streams"}, {"op": "subscribe", "query": "*"}, {"op": "curves", "on": True}):
            client.send(request)
        names = [stream["stream"] for stream in json.loads(client.receive(10.0) or "{}").get("streams", [])]
        threading.Thread(target=look, args=(page, names, closing), daemon=True).start()
        while not closing.is_set():
            client.receive(0.5)


def look(page: str, names: list[str], closing: threading.Event) -> None:
    while not closing.wait(PICTURE_S):
        for name in names:
            with suppress(OSError), urllib.request.urlopen(f"{page}/streams/{name}/picture.jpg", timeout=5) as answer:
                answer.read()


def main() -> None:
    page, count = sys.argv[1], int(sys.argv[2])
    closing = threading.Event()
    viewers = [threading.Thread(target=watch, args=(page, closing)) for _ in range(count)]
    for viewer in viewers:
        viewer.start()
    print("watching", flush=True)
    sys.stdin.read()
    closing.set()
    for viewer in viewers:
        viewer.join()


if __name__ == "__main__":
    main()
