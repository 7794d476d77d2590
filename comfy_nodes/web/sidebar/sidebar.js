// The TACO-DiT tab in the sidebar: what the daemon does. It asks ComfyUI's server while it is looked at, and never else.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { h, patch } from "./dom.js";
import { language, texts } from "./texts.js";
import { view } from "./view.js";

const PERIOD_MS = 2000;
const PATIENCE_MS = 15000;

class Tab {
    constructor(root) {
        this.root = root;
        this.told = null;
        this.problem = null;
        this.failed = null;
        this.endpoint = "";
        this.unloading = new Set();
        this.stopped = false;
        this.asking = null;
        this.timer = null;
        this.look = () => this.poll();
        this.actions = {
            choose: (endpoint) => this.choose(endpoint),
            unload: (model) => this.unload(model),
            dismiss: () => this.fail(null),
        };
        document.addEventListener("visibilitychange", this.look);
        this.poll();
    }

    stop() {
        this.stopped = true;
        clearTimeout(this.timer);
        this.asking?.abort();
        document.removeEventListener("visibilitychange", this.look);
    }

    // Ask now, if somebody can see the answer, and again after a while.
    async poll() {
        clearTimeout(this.timer);
        this.asking?.abort();
        this.asking = null;
        if (this.stopped || document.visibilityState !== "visible") return;
        const asking = (this.asking = new AbortController());
        const late = setTimeout(() => asking.abort(), PATIENCE_MS);
        const answer = await this.ask(asking.signal);
        clearTimeout(late);
        // Another poll has begun in the meantime, or the tab was closed.
        if (this.asking !== asking || this.stopped) return;
        Object.assign(this, answer);
        this.asking = null;
        try {
            await this.show();
        } finally {
            // Whatever can't be shown now may be followed by what can.
            if (!this.stopped && this.asking === null) this.timer = setTimeout(this.look, PERIOD_MS);
        }
    }

    async ask(signal) {
        const t = await this.words();
        const query = new URLSearchParams({ endpoint: this.endpoint });
        let reply;
        try {
            reply = await api.fetchApi(`/taco_dit/status?${query}`, { signal, cache: "no-store" });
            if (reply.ok) return { told: await reply.json(), problem: null };
        } catch {
            return { problem: t("comfyui.gone") };
        }
        if (reply.status === 404 && this.endpoint) {
            // ComfyUI was restarted, and no node has named that daemon since: the default one is known.
            this.endpoint = "";
            return this.ask(signal);
        }
        const error = await reply.json().then((body) => body.error.message, () => null);
        return { problem: error ?? t("comfyui.old", { status: reply.status }) };
    }

    // Without its words the tab can't say anything: those of before serve, if there are any.
    async words() {
        if (this.t?.language !== language()) this.t = await texts().catch((error) => this.t ?? Promise.reject(error));
        return this.t;
    }

    async show() {
        const t = await this.words();
        const { told, problem, failed, actions } = this;
        const unloads = (model) => this.unloading.has(unloadKey(told.endpoint, model));
        const shown = [h("h2", { key: "title" }, "TACO-DiT"), ...view(t, { told, problem, failed, unloads, actions })];
        patch(this.root, shown.filter(Boolean));
        this.root.lang = t.language;
    }

    choose(endpoint) {
        this.endpoint = endpoint;
        this.failed = null;
        this.poll();
    }

    fail(message) {
        this.failed = message;
        return this.show();
    }

    async unload(model) {
        const t = await this.words();
        const { endpoint } = this.told;
        const key = unloadKey(endpoint, model);
        if (this.unloading.has(key) || !(await confirmed(t, model))) return;
        this.failed = null;
        this.unloading.add(key);
        await this.show();
        const reason = await unload(endpoint, model.id);
        this.unloading.delete(key);
        if (reason) this.failed = t("unload.failed", { name: model.name, reason });
        await this.show();
        await this.poll();
    }
}

// Daemons that hold the same model give it the same id.
function unloadKey(endpoint, model) {
    return `${endpoint} ${model.id}`;
}

async function confirmed(t, model) {
    const message = t("unload.sure", { name: model.name });
    const dialog = app.extensionManager.dialog;
    // Versions without it have the browser's.
    if (!dialog?.confirm) return window.confirm(message);
    return dialog.confirm({ title: t("unload.title"), message, type: "default" });
}

// Nothing, or why it was not done.
async function unload(endpoint, model) {
    try {
        const headers = { "Content-Type": "application/json" };
        const body = JSON.stringify({ endpoint, model });
        const reply = await api.fetchApi("/taco_dit/unload", { method: "POST", headers, body });
        if (reply.ok) return null;
        return await reply.json().then((answer) => answer.error.message, () => `${reply.status}`);
    } catch (error) {
        return String(error.message ?? error);
    }
}

let tab = null;

app.registerExtension({
    name: "TACO-DiT.Sidebar",
    async setup() {
        // Versions of the frontend without a sidebar have no tab.
        if (!app.extensionManager?.registerSidebarTab) return;
        const style = document.createElement("link");
        style.rel = "stylesheet";
        style.href = new URL("./sidebar.css", import.meta.url).href;
        document.head.append(style);
        const t = await texts();
        app.extensionManager.registerSidebarTab({
            id: "taco-dit",
            icon: "pi pi-microchip",
            title: "TACO-DiT",
            tooltip: t("tooltip"),
            type: "custom",
            // The frontend may call this again for the same element.
            render(element) {
                if (tab?.root.parentElement === element) return;
                tab?.stop();
                const root = document.createElement("div");
                root.className = "taco-dit-sidebar";
                element.replaceChildren(root);
                tab = new Tab(root);
            },
            destroy() {
                tab?.stop();
                tab = null;
            },
        });
    },
});
