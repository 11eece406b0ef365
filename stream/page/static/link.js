// The connection to the service: one WebSocket that comes back by itself, and an answer for each request.

const FIRST_MS = 500, MOST_MS = 10000;
const ANSWER_MS = 20000; // who does not answer for so long has gone, though nobody said so

export class Link {
  /**
   * opened: called on each connection. message: for what is no answer: events, curves, caught_up.
   * state: called with "connecting", "connected", "lost" (and the ms until the next try) or "token".
   */
  constructor({ opened, message, state }) {
    Object.assign(this, { opened, message, state });
    this.waiting = [];
    this.delay = FIRST_MS;
    addEventListener("online", () => this.hurry());
    document.addEventListener("visibilitychange", () => document.hidden || this.hurry());
  }

  connect() {
    clearTimeout(this.timer);
    this.timer = undefined;
    this.state("connecting");
    const socket = new WebSocket(new URL("/ws", location.href.replace(/^http/, "ws")));
    this.socket = socket;
    socket.onopen = () => {
      this.delay = FIRST_MS;
      this.state("connected");
      this.opened();
    };
    socket.onmessage = ({ data }) => this.take(JSON.parse(data));
    socket.onclose = () => this.closed();
  }

  /** The answer to a request; rejects with what the service says is wrong, or when the connection goes. */
  ask(request) {
    return new Promise((resolve, reject) => {
      if (this.socket?.readyState !== WebSocket.OPEN) return reject(new Lost());
      const timer = setTimeout(() => this.hangUp(), ANSWER_MS);
      this.waiting.push({ resolve, reject, timer });
      this.socket.send(JSON.stringify(request));
    });
  }

  /** Whether the token is right; if so, it connects. */
  async login(token) {
    const body = JSON.stringify({ token });
    const answer = await fetch("/login", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    if (answer.ok) this.connect();
    return answer.ok;
  }

  take(message) {
    // Each request has one answer, in the order in which they were sent; these come unasked.
    if (!("op" in message) || message.op === "curve" || message.op === "caught_up") return this.message(message);
    const { resolve, reject, timer } = this.waiting.shift();
    clearTimeout(timer);
    if (message.op === "error") reject(new Error(message.message));
    else resolve(message);
  }

  async closed() {
    for (const { reject, timer } of this.waiting.splice(0)) {
      clearTimeout(timer);
      reject(new Lost());
    }
    // A script is not told why it was not let in: a plain request to the same place is.
    const status = await fetch("/ws").then((answer) => answer.status, () => 0);
    if (status === 401) return this.state("token");
    this.state("lost", this.delay);
    this.timer = setTimeout(() => this.connect(), this.delay);
    this.delay = Math.min(MOST_MS, 2 * this.delay);
  }

  hangUp() {
    this.socket.onclose = this.socket.onmessage = null;
    this.socket.close();
    this.closed();
  }

  hurry() {
    if (this.timer === undefined) return;
    this.delay = FIRST_MS;
    this.connect();
  }
}

/** The connection went before the answer came: it will be asked again. */
export class Lost extends Error {}
