/* Browsers refuse workers to pages that lie in a folder. There the search's worker runs in a hidden frame instead. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      this.address = address;
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      const inside = (this.inside = frame.contentWindow);
      inside.postMessage = (data) => this.#tell(this, data); // what the worker says
      this.ready = this.#load(address);
      inside.importScripts = (...more) =>
        more.map((one) => this.#load(new URL(one, address).href)).reduce((before, next) => before.then(() => next), Promise.resolve());
    }
    #load(address) {
      return new Promise((resolve, reject) => {
        const script = this.inside.document.createElement("script");
        script.src = address;
        script.onload = resolve;
        script.onerror = () => reject(new Error(`cannot load ${address}`));
        this.inside.document.body.appendChild(script);
      });
    }
    #tell(target, data) {
      setTimeout(() => {
        const message = new MessageEvent("message", { data });
        target.dispatchEvent(message);
        if (target.onmessage) target.onmessage(message);
      });
    }
    postMessage(data) {
      this.ready.then(() => this.#tell(this.inside, data));
    }
    terminate() {
      this.inside.frameElement.remove();
    }
  };
}
