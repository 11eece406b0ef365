"""The config of serve: what a good one gives, and the line and the words of every mistake in a bad one."""

import dataclasses
import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kernels.bundle import EMBEDDED
from livemoments import main
from stream.config.lines import KeyPath, line_of, value_lines
from stream.config.schema import (
    Changes,
    ClipsConfig,
    Config,
    ConfigError,
    CurveConfig,
    EngineConfig,
    Limits,
    LogConfig,
    QueryConfig,
    ServerConfig,
    StreamConfig,
    WebhookConfig,
    changes,
    load_config,
)
from stream.moments import MomentOptions
from stream.types import Kind

TOKEN = "correct-horse-battery"
SECRET_KEY = "JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6"  # the keys of ZeroMQ's specification of CURVE
CLIENT = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"
SIGNING = "whsec_c2lnbmVkLXdpdGgtdGhpcw=="
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBljCCATugAwIBAgIUHWNOLdIfWeXPPRAweT+DC2fxoI4wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMTIyMDkzM1oYDzIxMjYxMDI4
MjIwOTMzWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATE2g70ZFhmp38pUFve9GYnvmO5sShj1jGLdQdqi9A+8SQyCG8tUyw+
j6GBdjX6ba6v6yB1LZ++jqLHvmhlcII3o2kwZzAdBgNVHQ4EFgQU2eykIm1tXCXw
NvER7DNtEZ/jf7cwHwYDVR0jBBgwFoAU2eykIm1tXCXwNvER7DNtEZ/jf7cwDwYD
VR0TAQH/BAUwAwEB/zAUBgNVHREEDTALgglsb2NhbGhvc3QwCgYIKoZIzj0EAwID
SQAwRgIhAJr7poS4ZIyGH13cFmkSDhWyBbl2DqtHepm/XlQyBQkuAiEAldzf+szN
Tqj+TeOoLnsQ0Kd+IugVXhDQas3JZhJi5hI=
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgWpJDMd2kjk9I52HV
ltqTYjRQg2iahgD/Uy/GMCDcUYKhRANCAATE2g70ZFhmp38pUFve9GYnvmO5sShj
1jGLdQdqi9A+8SQyCG8tUyw+j6GBdjX6ba6v6yB1LZ++jqLHvmhlcII3
-----END PRIVATE KEY-----
"""
EVERYTHING = f"""\
queries = ["a dog on the sofa", {{text = "a person falls", threshold = 0.7}}]

[engine]
path = "engine/"
zero_shot = true
hop = 0.5

[server]
bind = "0.0.0.0"
ws_port = 0
zmq_port = 6000
token_file = "token"
tls_cert = "cert.pem"
tls_key = "key.pem"

[server.curve]
secret_key = "{SECRET_KEY}"
clients = ["{CLIENT}"]

[log]
path = "log/events.sqlite"
max_mb = 64

[clips]
folder = "clips"
before_s = 2
max_mb = 100

[moments]
threshold = 0.6
min_gap_s = 3

[limits]
streams = 8
messages_per_second = 2.5

[[webhook]]
url = "https://me:{TOKEN}@example.org/{TOKEN}"
secret = "{SIGNING}"
kinds = ["highlight"]
streams = ["door"]
queries = ["a dog on the sofa"]

[[webhook]]
url = "http://127.0.0.1:9000/"
secret_file = "signing"

[streams.door]
source = "rtsp://admin:{TOKEN}@camera/stream"
queries = ["a person enters the room"]

[streams.clip]
source = "clips/a.mp4"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What EVERYTHING names."""
    for name, content in {
        "token": f"  {TOKEN}\n",
        "signing": SIGNING,
        "cert.pem": CERTIFICATE,
        "key.pem": KEY,
        "clips/a.mp4": "not looked into",
        "log/old": "",
        "empty": "\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "serve.toml"
    path.write_bytes(text.encode())
    return path


def mistakes(folder: Path, text: str) -> list[str]:
    """What load_config says, each mistake without the name of the file."""
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = str(caught.value).split("\n")
    assert all(line.startswith(f"{path}:") for line in lines)
    return [line.removeprefix(f"{path}:") for line in lines]


def test_everything_a_file_can_say_arrives(folder: Path) -> None:
    assert load_config(write(folder, EVERYTHING)) == Config.model_construct(
        engine=EngineConfig(path=folder / "engine", zero_shot=True, hop=0.5),
        server=ServerConfig(
            bind="0.0.0.0",
            ws_port=0,
            zmq_port=6000,
            token=TOKEN,
            tls_cert=folder / "cert.pem",
            tls_key=folder / "key.pem",
            curve=CurveConfig(secret_key=SECRET_KEY, clients=(CLIENT,)),
        ),
        log=LogConfig(path=folder / "log/events.sqlite", max_mb=64),
        clips=ClipsConfig(folder=folder / "clips", before_s=2.0, max_mb=100),
        moments=MomentOptions(threshold=0.6, min_gap_s=3.0),
        limits=Limits(streams=8, messages_per_second=2.5),
        webhooks=(
            WebhookConfig(
                url=f"https://me:{TOKEN}@example.org/{TOKEN}",
                secret=SIGNING,
                kinds=(Kind.HIGHLIGHT,),
                streams=("door",),
                queries=("a dog on the sofa",),
            ),
            WebhookConfig(url="http://127.0.0.1:9000/", secret=SIGNING),
        ),
        streams={
            "door": StreamConfig(
                source=f"rtsp://admin:{TOKEN}@camera/stream", queries=(QueryConfig(text="a person enters the room"),)
            ),
            "clip": StreamConfig(source=str(folder / "clips/a.mp4")),
        },
        queries=(QueryConfig(text="a dog on the sofa"), QueryConfig(text="a person falls", threshold=0.7)),
    )


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, ""))
    assert config == Config(log=LogConfig(path=tmp_path / "livemoments.sqlite"))
    assert (config.engine.path, config.engine.hop_ns) == (EMBEDDED, 1_000_000_000)
    assert config.moments == MomentOptions() and type(config.moments) is MomentOptions
    assert (config.server.ws_port, config.server.zmq_port, config.server.is_loopback) == (8765, 5555, True)
    assert config.limits == Limits() and config.limits.message_bytes == 65536


def test_every_moment_option_can_be_set(tmp_path: Path) -> None:
    options = {field.name: 0.25 for field in dataclasses.fields(MomentOptions)}
    text = "[moments]\n" + "".join(f"{name} = {value}\n" for name, value in options.items())
    assert load_config(write(tmp_path, text)).moments == MomentOptions(**options)


def test_a_file_from_windows_reads_the_same(folder: Path) -> None:
    plain = load_config(write(folder, EVERYTHING))
    assert load_config(write(folder, "\ufeff" + EVERYTHING.replace("\n", "\r\n"))) == plain
    assert mistakes(folder, "\r\n\r\nquery = []\r\n") == ["3: unknown key query: did you mean queries?"]


@pytest.mark.parametrize("text", ["zmq_port = false", f'token = "{TOKEN}"\nzmq_port = false\nbind = "0.0.0.0"'])
def test_zeromq_can_be_switched_off(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, f"[server]\n{text}\n")).server.zmq_port is None


@pytest.mark.parametrize("bind", ["localhost", "127.0.0.1", "127.3.2.1", "::1"])
def test_on_loopback_nothing_must_be_locked(tmp_path: Path, bind: str) -> None:
    assert load_config(write(tmp_path, f'[server]\nbind = "{bind}"\n')).server.is_loopback


STREAM = '[streams.a]\nsource = "test:ball"\n'
# HERE is a comment on the line that the mistake must name.
MISTAKES = {
    "no TOML": ("[log]\n[server\n#HERE-1", "this is not TOML: expected ']' at the end of a table declaration"),
    "end of file": ('[log]\n\npath = "a #HERE', "this is not TOML: unterminated string"),
    "key twice": ("[log]\nmax_mb = 1\nmax_mb = 2 #HERE", "this is not TOML: cannot overwrite a value"),
    "endless number": ("#HERE\n[log]\nmax_mb = 1" + "0" * 9999, "an array is nested too deeply, or a number has"),
    "unknown section": ("#\n[limit] #HERE", "unknown section limit: did you mean limits?"),
    "unknown section far from all": (
        "[x.y] #HERE",
        "unknown section x: known are engine, server, log, clips, moments, limits, webhook, streams, queries",
    ),
    "field's name in place of the key": ("webhooks = 1 #HERE", "unknown key webhooks: did you mean webhook?"),
    "unknown key": ("[server]\nws-port = 1 #HERE", "unknown key server.ws-port: did you mean ws_port?"),
    "unknown key of secrets": (
        "[server]\ntoken_fil = '' #HERE",
        "unknown key server.token_fil: did you mean token_file?",
    ),
    "unknown key of a query": (
        'queries = [\n  "a",\n  {text = "b", treshold = 1}, #HERE\n]',
        "unknown key queries.treshold: did you mean threshold?",
    ),
    "unknown key of a stream": (
        f"[log]\n{STREAM}query = 'x' #HERE",
        "unknown key streams.a.query: did you mean queries?",
    ),
    "number in place of a table": ("server = 1 #HERE", "server must be a table"),
    "tables in place of a table": ("#\n[[log]] #HERE", "log must be a table"),
    "text in place of a number": ("[server]\nws_port = '1' #HERE", "server.ws_port must be a whole number"),
    "port out of range": ("[server]\nzmq_port = 65536 #HERE", "server.zmq_port must be at most 65535"),
    "port true": ("[server]\nzmq_port = true #HERE", "server.zmq_port must be a number, or false"),
    "ws_port off": ("[server]\nws_port = false #HERE", "server.ws_port must be a whole number"),
    "ports equal": (
        "[server]\nws_port = 7000\nzmq_port = 7000 #HERE",
        "server.zmq_port and server.ws_port are both 7000: change one",
    ),
    "number in place of a switch": ("engine.zero_shot = 1 #HERE", "engine.zero_shot must be true or false"),
    "hop": (
        "[engine]\nhop = 0.3 #HERE",
        "engine.hop: a hop of 0.3 s does not divide the 2 s window: use 2, 1, 0.5, 0.25 or 0.2",
    ),
    "not a number": ("[moments]\nupdate_s = nan #HERE", "moments.update_s must be a finite number"),
    "threshold": ("[moments]\nthreshold = 0 #HERE", "moments.threshold must be above 0"),
    "negative": ("[moments]\nmin_gap_s = -1 #HERE", "moments.min_gap_s must be at least 0"),
    "limit": ("[limits]\nclients = 0 #HERE", "limits.clients must be at least 1"),
    "bind": (
        "[server]\nbind = '127.0.0.1:80' #HERE",
        "server.bind is no IP address or host name: write it without port and brackets",
    ),
    "open to anybody": (
        "[server]\nzmq_port = false\nbind = '0.0.0.0' #HERE",
        "binding to 0.0.0.0 without a token lets anybody in: set server.token_file or bind to 127.0.0.1",
    ),
    "open ZeroMQ": (
        f"[server]\ntoken = '{TOKEN}'\nbind = 'host.example' #HERE",
        "binding to host.example without [server.curve] lets anybody read ZeroMQ: "
        "add it, set server.zmq_port = false or bind to 127.0.0.1",
    ),
    "short token": (
        "[server]\ntoken = 'hunter2' #HERE",
        "server.token must have at least 16 letters, digits and signs of ASCII, and no spaces",
    ),
    "no token file": (
        "[server]\ntoken_file = 'nowhere' #HERE",
        "the file of server.token_file cannot be read (no such file or directory): names are relative to FOLDER",
    ),
    "empty token file": (
        "[server]\ntoken_file = 'empty' #HERE",
        "the file of server.token_file is empty: put the secret into it",
    ),
    "token twice": (
        f"[server]\ntoken = '{TOKEN}'\ntoken_file = 'token' #HERE",
        "server.token_file and token are both given: keep one",
    ),
    "half of TLS": (
        "[server]\ntls_key = 'key.pem' #HERE",
        "server.tls_key is given without server.tls_cert: TLS needs both",
    ),
    "no certificate there": (
        "[server]\ntls_key = 'key.pem'\ntls_cert = 'cart.pem' #HERE",
        "server.tls_cert: there is no file FOLDER/cart.pem: names are relative to the config",
    ),
    "no key": (
        "[server]\ntls_cert = 'cert.pem'\ntls_key = 'token' #HERE",
        "server.tls_key is no key of server.tls_cert: both must be PEM, the key without passphrase",
    ),
    "CURVE without key": (
        f"[server.curve] #HERE\nclients = ['{CLIENT}']",
        "server.curve.secret_key is missing: add it",
    ),
    "no CURVE key file": (
        f"[server.curve]\nclients = ['{CLIENT}']\nsecret_key_file = 'empty' #HERE",
        "the file of server.curve.secret_key_file is empty: put the secret into it",
    ),
    "CURVE key in a file": (
        f"[server]\ncurve = {{ secret_key_file = 'token', clients = ['{CLIENT}'] }} #HERE",
        "server.curve.secret_key is no CURVE key: it has 40 characters, ZeroMQ's Z85",
    ),
    "CURVE without clients": (
        f"[server.curve]\nsecret_key = '{SECRET_KEY}'\nclients = [] #HERE",
        "server.curve.clients is empty: name at least one",
    ),
    "CURVE client": (
        f"[server.curve]\nsecret_key = '{SECRET_KEY}'\nclients = [\n'{CLIENT}',\n'{'#' * 40}'] #HERE",
        "server.curve.clients is no CURVE key: it has 40 characters, ZeroMQ's Z85",
    ),
    "CURVE without ZeroMQ": (
        f"[server]\nzmq_port = false\n[server.curve] #HERE\nsecret_key = '{SECRET_KEY}'\nclients = ['{CLIENT}']",
        "[server.curve] is for ZeroMQ, which server.zmq_port = false switches off: keep one",
    ),
    "log in no folder": (
        "[log]\npath = 'nowhere/a' #HERE",
        "log.path: there is no folder FOLDER/nowhere: make it, or name a file elsewhere",
    ),
    "log is a folder": ("log.path = 'clips' #HERE", "log.path: FOLDER/clips is a folder: name a file"),
    "clips without a folder": (
        "[clips] #HERE\nmax_mb = 100",
        "clips.folder is missing: name the folder that clips go to, or take [clips] away",
    ),
    "clips in no folder": (
        "[clips]\nfolder = 'nowhere/clips' #HERE",
        "clips.folder: there is no folder FOLDER/nowhere: make it, or name a folder elsewhere",
    ),
    "clips in a file": ("clips.folder = 'token' #HERE", "clips.folder: FOLDER/token is a file: name a folder"),
    "clips of no length": ("[clips]\nfolder = 'clips'\nlongest_s = 0 #HERE", "clips.longest_s must be above 0"),
    "clips that end before": ("[clips]\nafter_s = -1 #HERE\nfolder = 'clips'", "clips.after_s must be at least 0"),
    "clips that take nothing": ("[clips]\nmax_mb = 0 #HERE\nfolder = 'clips'", "clips.max_mb must be at least 1"),
    "unknown key of clips": ("[clips]\npath = 'clips' #HERE\nfolder = 'a'", "unknown key clips.path: known are"),
    "stream's name": (
        "#\n['streams'.'two words'] #HERE\nsource = 'test:'",
        "streams.'two words' cannot be the name of a stream: use 1 to 64 letters, digits, dots, - or _",
    ),
    "no source": (f"{STREAM}[streams.b] #HERE\nqueries = ['x']", "streams.b.source is missing: add it"),
    "source not there": (
        "[streams.b]\nsource = 'clips/b.mp4' #HERE",
        "streams.b.source: no such file: FOLDER/clips/b.mp4 (",
    ),
    "source unknown": ("streams.b.source = 'gopher://x' #HERE", "streams.b.source: cannot read gopher://x: "),
    "source is no text": ("[streams]\nb = {source = 1} #HERE", "streams.b.source must be text in quotes"),
    "empty query": (
        f"{STREAM}queries = [\n'x', # {{\n' \t', #HERE\n]",
        "streams.a.queries.text is empty: write what to wait for",
    ),
    "query is a number": (
        "queries = [\n'''\nx''', [1,\n2], #HERE-1\n]",
        "queries must be text in quotes, or {text = ..., threshold = ...}",
    ),
    "query's threshold": (
        "queries = [{text = 'x'},\n{text = 'y', threshold = 2}] #HERE",
        "queries.threshold must be at most 1",
    ),
    "queries is text": ("queries = 'x' #HERE", "queries must be an array: [...]"),
    "query twice": (
        f"{STREAM}queries = ['A dog', {{text = 'a dog', threshold = 0.3}},\n'a  DOG'] #HERE",
        "the query 'a dog' is given twice: take one away",
    ),
    "query on every stream twice": (
        "queries = ['x',\n'y',\n{text = 'x'}] #HERE",
        "the query 'x' is given twice: take one away",
    ),
    "query here and on every stream": (
        f"queries = ['x']\n{STREAM}queries = ['y',\n'X'] #HERE",
        "the query 'x' runs on every stream already: take it away here or at the top",
    ),
    "no url": ("[[webhook]] #HERE\nkinds = ['highlight']", "webhook.url is missing: add it"),
    "url": (
        "[[webhook]]\nurl = 'https://h/'\n[[webhook]]\nurl = 'ftp://h/' #HERE",
        "webhook.url must be http://HOST/PATH or https://HOST/PATH, other characters %-encoded",
    ),
    "url twice": (
        "[[webhook]]\nurl = 'https://h/'\n[[webhook]]\nurl = 'https://h/' #HERE",
        "this webhook's url is given twice: put all it is to get into one [[webhook]]",
    ),
    "kind": (
        "[[webhook]]\nurl = 'https://h/'\nkinds = ['moment.opened',\n'moment.shut'] #HERE",
        "webhook.kinds must be one of 'moment.opened', 'moment.updated', 'moment.closed', "
        "'highlight', 'clip.ready' or 'stream.status'",
    ),
    "secret": (
        "[[webhook]]\nurl = 'https://h/'\nsecret = 'whsec_this is not base64' #HERE",
        "webhook.secret begins with whsec_ and does not go on in base64: copy it again",
    ),
    "secret file of the second webhook": (
        "[[webhook]]\nurl = 'https://g/'\n[[webhook]]\nurl = 'https://h/'\nsecret_file = 'empty' #HERE",
        "the file of webhook.secret_file is empty: put the secret into it",
    ),
    "webhook's stream": (
        f"{STREAM}[[webhook]]\nurl = 'https://h/'\nstreams = [\n'a',\n'b', #HERE\n]",
        "there is no stream 'b': known are a",
    ),
    "more than the limit": (
        f"queries = ['x', 'y']\n[limits]\nqueries = 1 #HERE\n{STREAM}",
        "this file has 2 queries, and limits.queries is 1: raise it",
    ),
    "nested beyond all sense": (
        "#HERE\nx = " + "[" * 5000 + "]" * 5000,
        "an array is nested too deeply, or a number has",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_has_its_line(folder: Path, name: str) -> None:
    text, problem = MISTAKES[name]
    before, _, after = text.partition("#HERE")
    line = before.count("\n") + 1 + int((re.match(r"-\d", after) or ["0"])[0])
    (told,) = mistakes(folder, text)
    assert told.startswith(f"{line}: {problem.replace('FOLDER', str(folder))}")


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(folder: Path) -> None:
    text = """\
queries = ["x", "X", 3]
[engine]
hop = 3
[server]
bind = "0.0.0.0"
ws_port = -1
token_file = "nowhere"
[[webhook]]
url = "nothing"
streams = ["none"]
[streams.a]
source = "nothing"
"""
    told = [told.partition(": ") for told in mistakes(folder, text)]
    assert [line for line, _, _ in told] == ["1", "1", "3", "5", "6", "7", "9", "10", "12"]
    assert "without [server.curve]" in told[3][2]  # and nothing of a missing token: its file is the mistake


def test_a_message_stays_on_its_line(folder: Path) -> None:
    told = mistakes(folder, '"a\\nb" = 1\n[streams."c\\u001b\\nd"]\nsource = "e\\nf"\n')
    assert [line.partition(": ")[0] for line in told] == ["1", "2", "3"]
    assert all(line.isprintable() for line in told)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for path, problem in (
        (tmp_path / "none", f"cannot read the config {tmp_path}/none: no such file or directory"),
        (tmp_path, f"cannot read the config {tmp_path}: is a directory"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert str(caught.value) == problem
    (tmp_path / "latin").write_bytes(b"#\n# caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin:2: this is not text in UTF-8"):
        load_config(tmp_path / "latin")


def test_secrets_are_neither_in_messages_nor_in_repr(folder: Path) -> None:
    config = load_config(write(folder, EVERYTHING))
    assert not found_secrets(repr(config) + str(config) + repr(config.server) + str(config.webhooks))
    # Each in a place where it is a mistake.
    text = f"""\
queries = 1
[server]
token = "{TOKEN} {TOKEN}"
[server.curve]
secret_key = "{SECRET_KEY}{CLIENT}"
clients = "{SECRET_KEY}"
[[webhook]]
url = "htps://{TOKEN}"
secret = "{SIGNING}!"
[[webhook]]
url = "htps://{TOKEN}"
secret_file = "{TOKEN}"
[streams.a]
source = "rtsp:/admin:{TOKEN}@camera"
[streams.b]
source = "rstp://admin:a b/{TOKEN}@camera"
[streams.c]
source = "rtsp://admin:a/{TOKEN}@camera"
"""
    told = "\n".join(mistakes(folder, text))
    assert len(told.split("\n")) == 12
    assert not found_secrets(told)


def found_secrets(text: str) -> list[str]:
    return [secret for secret in (TOKEN, SECRET_KEY, SIGNING, SIGNING.removeprefix("whsec_")) if secret in text]


def test_paths_are_relative_to_the_file_wherever_one_stands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = load_config(write(folder, EVERYTHING))
    monkeypatch.chdir(folder / "clips")
    there = load_config(Path("../serve.toml"))
    assert there.log.path.parent.samefile(folder / "log")
    assert there.server == here.server.model_copy(
        update={"tls_cert": folder / "clips/../cert.pem", "tls_key": folder / "clips/../key.pem"}
    )
    assert Path(there.streams["clip"].source).samefile(folder / "clips/a.mp4")


def test_changes_names_what_a_reload_brings(tmp_path: Path) -> None:
    def load(text: str) -> Config:
        return load_config(write(tmp_path, text))

    base = '[streams]\na.source = "test:ball"\nb.source = "test:snow"\n'
    old = load(base)
    assert changes(old, load(base + "# the same")) == Changes((), (), (), (), ())
    new = load(
        "queries = ['x']\nengine.hop = 2\nserver.ws_port = 1\nlog.max_mb = 1\nclips.folder = 'c'\n"
        "moments.threshold = 0.4\nlimits.clients = 1\n[[webhook]]\nurl = 'https://h/'\n"
        "[streams]\nc.source = 'test:ball'\nb = {source = 'test:snow', queries = ['y']}"
    )
    assert changes(old, new) == Changes(
        added=("c",),
        removed=("a",),
        changed=("b",),
        sections=("queries", "moments", "limits", "webhooks"),
        restart=("engine", "server", "log", "clips"),
    )


# Where @@@ stands for three quotes.
AWKWARD = r"""
# [no.table] key = 1
plain = 1979-05-27 07:32:00 # a date with a space
"quoted # ] \" = key" = "a \\" # [x]
'it\' = 'c:\'
a . b."c.d" = [ # ]
  1, [2,
  3], { x = "}", y.z = [4,
  5] }, @@@
[no.table]
no = "element"
@@@, # ,
]
empty = []
none = {}
[tables.one]
text = '''
[no.table]''''
five = @@@"two quotes""\""@@@
[[list]]
k = 1
[list.sub]
k = 2
[[list.inner]]
k = 3
[[list]]
[[list.inner]]
[[list.inner]]
k = 4
""".replace("@@@", '"""')


def paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    if path:
        yield path
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(each, (*path, key))


def test_the_lines_are_those_of_what_tomllib_reads() -> None:
    lines = value_lines(AWKWARD)
    assert set(lines) == set(paths(tomllib.loads(AWKWARD)))
    text = AWKWARD.split("\n")
    for path, content in {
        ("plain",): "plain",
        ("a", "b", "c.d"): "a . b",
        ("a", "b", "c.d", 0): "  1, [2",
        ("a", "b", "c.d", 1, 1): "  3]",
        ("a", "b", "c.d", 2, "y", "z", 0): "  3]",
        ("a", "b", "c.d", 2, "y", "z", 1): "  5]",
        ("a", "b", "c.d", 3): "  5]",
        ("empty",): "empty",
        ("tables", "one"): "[tables.one]",
        ("tables", "one", "five"): "five",
        ("list", 0, "sub", "k"): "k = 2",
        ("list", 0, "inner", 0, "k"): "k = 3",
        ("list", 1, "inner", 1, "k"): "k = 4",
    }.items():
        assert text[lines[path] - 1].startswith(content), path
    assert line_of(lines, ("list", 1, "inner", 1, "not there", 7)) == lines["list", 1, "inner", 1]
    assert line_of(lines, ("not there",)) == 1


def test_check_config_shows_what_the_file_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(EMBEDDED, folder / "engine")
    assert main(["check-config", str(write(folder, EVERYTHING))]) == 0
    shown, error = capsys.readouterr()
    assert not error and not found_secrets(shown)
    for words in (
        "zero-shot, hop 0.5 s",
        "rtsp://admin:***@camera/stream",
        "- a person falls (threshold 0.7)",
        "wss://0.0.0.0:(any port), other machines too, encrypted, with a token",
        "tcp://0.0.0.0:6000, other machines too, encrypted, for 1 client",
        f"{folder}/log/events.sqlite, at most 64 MB",
        f"{folder}/clips, at most 100 MB, from 2 s before a moment to 5 s after it, 600 s at the longest",
        "https://example.org/..., signed: highlight of door, a dog on the sofa",
        "threshold 0.6 (default 0.5), min_gap_s 3 (default 2)",
        "streams 8 (default 64), messages_per_second 2.5 (default 20)",
    ):
        assert words in shown


def test_check_config_takes_nothing_for_markup(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", str(write(folder, "queries = ['[red]a :dog:[/red]']"))]) == 0
    assert "- [red]a :dog:[/red]" in capsys.readouterr().out


def test_check_config_ends_with_2_and_the_mistakes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folder, "[limits]\nstream = 1\nclients = 0\n")
    assert main(["check-config", str(path)]) == 2
    assert capsys.readouterr() == (
        "",
        f"livemoments: {path}:2: unknown key limits.stream: did you mean streams?\n"
        f"{path}:3: limits.clients must be at least 1\n",
    )


def test_check_config_looks_at_the_engine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(text: str) -> str:
        assert main(["check-config", str(write(folder, text))]) == 2
        return capsys.readouterr().err.removeprefix(f"livemoments: {folder}/serve.toml:")

    assert (
        says("[engine]\npath = 'none'\n")
        == f"2: engine.path: no engine bundle at {folder}/none: there is no such folder\n"
    )
    assert says("#\n[engine]\nhop = 0.5\n").startswith("3: engine.hop: this engine was trained at a hop of 1 s: set ")
    assert main(["check-config", str(write(folder, "engine = {hop = 0.5, zero_shot = true}"))]) == 0


def test_a_file_that_may_not_be_read_is_a_mistake(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (folder / "key.pem").chmod(0)
    assert mistakes(folder, EVERYTHING) == [f"13: server.tls_key: {folder}/key.pem cannot be read: permission denied"]
