// What the tab shows, as a description for dom.js: a pure function of what the daemon told.
import { h } from "./dom.js";
import { count, duration, percent, seconds, size } from "./numbers.js";

export const PARTS = ["queue", "wire", "compute", "collective"];
const UNREACHABLE = new Set(["ConnectionFailed", "ConnectionLost", "Unavailable"]);

// told: a reply of /taco_dit/status, or null before the first one. problem: a text that says why there is no newer one.
// failed: a text about the last button. actions: choose(endpoint), unload(model), dismiss(). unloads(model): whether it is
// being unloaded.
export function view(t, { told, problem, failed, unloads, actions }) {
    const status = told?.status;
    return [
        head(t, told, problem, actions),
        failed && alert(t, failed, actions),
        problem && h("p", { key: "problem", class: "taco-dit-note", role: "status" }, problem),
        told?.error && help(t, told),
        !told && !problem && h("p", { key: "asking", role: "status" }, t("asking")),
        ...(status
            ? [
                  ...groups(status).map((group, index, all) => ranks(t, group, index, all.length)),
                  models(t, status.models, unloads, actions),
                  queue(t, status, told.jobs),
                  lastRun(t, told.last_run),
                  step(t, told.stats),
              ]
            : []),
    ];
}

// Of a daemon with one group, that one; it has no name.
function groups(status) {
    return status.groups?.length ? status.groups : [status.group];
}

function section(t, key, title, ...children) {
    const id = `taco-dit-${key}`;
    return h("section", { key, "aria-labelledby": id }, h("h3", { id }, title), ...children);
}

function head(t, told, problem, actions) {
    const status = told?.status;
    const state = problem || told?.error ? "unreachable" : status?.state;
    return h(
        "header",
        { key: "head" },
        h(
            "p",
            { key: "state", class: "taco-dit-state", role: "status" },
            state && h("span", { class: "taco-dit-dot", "data-state": state, "aria-hidden": "true" }),
            state && h("strong", {}, t.or(`state.${state}`, state)),
            status && ` tacod ${status.version}, ${t("up", { time: duration(status.uptime_s) })}`,
        ),
        state && t.or(`about.${state}`, null) && h("p", { key: "about", class: "taco-dit-note" }, t(`about.${state}`)),
        told && endpoint(t, told, actions),
    );
}

function endpoint(t, told, actions) {
    if (told.endpoints.length < 2) return h("p", { key: "endpoint", class: "taco-dit-small" }, told.endpoint);
    const options = told.endpoints.map((each) => h("option", { key: each, value: each }, each));
    const onchange = (event) => actions.choose(event.target.value);
    return h("label", { key: "endpoints" }, t("endpoint"), " ", h("select", { value: told.endpoint, onchange }, ...options));
}

function alert(t, failed, actions) {
    return h(
        "div",
        { key: "alert", role: "alert", class: "taco-dit-alert" },
        h("p", {}, failed),
        h("button", { type: "button", onclick: actions.dismiss }, t("dismiss")),
    );
}

function help(t, told) {
    const unreachable = UNREACHABLE.has(told.error.code);
    return h(
        "div",
        { key: "help", class: "taco-dit-help" },
        h("p", {}, t(unreachable ? "help.unreachable" : "help.refused", { endpoint: told.endpoint })),
        h("p", { class: "taco-dit-small" }, told.error.message),
        unreachable &&
            h(
                "ul",
                {},
                ...["help.start", "help.doctor", "help.demo", "help.elsewhere"].map((key) => h("li", {}, t(key))),
            ),
    );
}

function ranks(t, group, index, several) {
    const title = several > 1 ? t("group", { name: group.name ?? index }) : t("ranks");
    const spread = new Set(group.ranks.map((each) => each.host)).size > 1;
    const once = group.restarts === 1;
    const facts = [
        t("ranks.count", { count: group.ranks.length, all: group.world_size, device: group.device }),
        group.restarts ? t(once ? "restarts.once" : "restarts", { count: group.restarts }) : null,
        several > 1 && group.state ? t.or(`state.${group.state}`, group.state) : null,
        several > 1 && group.queue ? t("queue.counts", group.queue) : null,
    ];
    return section(
        t,
        `ranks-${index}`,
        title,
        h("p", { class: "taco-dit-small" }, facts.filter(Boolean).join(" · ")),
        h("ul", { class: "taco-dit-list" }, ...group.ranks.map((each) => rank(t, each, group.device, spread))),
    );
}

// Ranks that are spread over hosts are told with theirs.
function rank(t, each, kind, spread) {
    const name = t(spread ? "rank.host" : "rank", { rank: each.rank, device: each.device, host: each.host });
    const memory = kind === "cuda" ? t("memory.gpu") : t("memory");
    const held = each.device_memory_used_bytes;
    const whole = each.memory_total_bytes;
    const own = each.memory_used_bytes ?? null;
    const use = each.utilization ?? null;
    return h(
        "li",
        { key: `rank-${each.rank}` },
        h("p", {}, h("strong", {}, name), each.device_name ? ` ${each.device_name}` : ""),
        whole > 0 && typeof held === "number"
            ? meter(`${name}: ${memory}`, memory, held / whole, `${size(held)} / ${size(whole)}`)
            : null,
        use !== null ? meter(`${name}: ${t("use")}`, t("use"), use, percent(use)) : null,
        own !== null && h("p", { class: "taco-dit-small" }, t("own", { size: size(own) })),
    );
}

function meter(label, name, share, text) {
    const part = Math.min(Math.max(share, 0), 1);
    return h(
        "div",
        { class: "taco-dit-meter" },
        h("span", { "aria-hidden": "true" }, name),
        h(
            "div",
            {
                class: "taco-dit-bar",
                role: "meter",
                "aria-label": label,
                "aria-valuemin": 0,
                "aria-valuemax": 100,
                "aria-valuenow": Math.round(part * 100),
                "aria-valuetext": text,
            },
            h("div", { class: "taco-dit-fill", style: `width: ${(part * 100).toFixed(1)}%` }),
        ),
        h("span", { "aria-hidden": "true", class: "taco-dit-value" }, text),
    );
}

function models(t, all, unloads, actions) {
    return section(
        t,
        "models",
        t("models"),
        all.length
            ? h("ul", { class: "taco-dit-list" }, ...all.map((each) => model(t, each, unloads, actions)))
            : h("p", { class: "taco-dit-small" }, t("models.none")),
    );
}

function model(t, each, unloads, actions) {
    const busy = unloads(each);
    const streamed = Math.max(0, ...(each.streamed_bytes ?? []));
    const facts = [
        each.family,
        t("parameters", { count: count(each.parameters) }),
        each.dtype,
        ...Object.keys(each.quantization ?? {}),
        t("held", { size: size(each.weight_bytes) }),
        streamed ? t("fetched", { size: size(streamed) }) : null,
        each.patches ? t("patches", { count: each.patches }) : null,
        // Told only where there are several groups.
        ...(each.groups ?? []).map((name) => t("group", { name })),
    ];
    return h(
        "li",
        { key: each.id },
        h(
            "div",
            { class: "taco-dit-row" },
            h("strong", { class: "taco-dit-name", title: each.path }, each.name),
            h(
                "button",
                {
                    type: "button",
                    "aria-label": t("unload.of", { name: each.name }),
                    "aria-disabled": busy ? "true" : null,
                    onclick: busy ? null : () => actions.unload(each),
                },
                t(busy ? "unloading" : "unload"),
            ),
        ),
        h("p", { class: "taco-dit-small" }, facts.filter(Boolean).join(" · ")),
        each.plan && h("p", { class: "taco-dit-small" }, t("plan", { plan: each.plan })),
        each.network && h("p", { class: "taco-dit-small" }, each.network),
    );
}

function queue(t, status, jobs) {
    const names = new Map(status.models.map((each) => [each.id, each.name]));
    return section(
        t,
        "queue",
        t("queue"),
        h("p", { class: "taco-dit-small" }, t("queue.counts", status.queue)),
        jobs.length ? h("ol", { class: "taco-dit-list" }, ...jobs.map((each) => job(t, each, names))) : null,
    );
}

function job(t, each, names) {
    const steps = each.total ? t("job.step", { step: each.step, total: each.total }) : null;
    const blocks = each.blocks ? t("job.block", { block: each.block, blocks: each.blocks }) : null;
    const facts = [
        t.or(`job.${each.state}`, each.state),
        each.group === undefined ? null : t("group", { name: each.group }),
        steps,
        blocks,
        each.client ?? t("job.gone"),
        duration(each.age_s),
    ];
    return h(
        "li",
        { key: each.job },
        h("p", {}, h("strong", {}, each.verb), " ", names.get(each.model) ?? each.model ?? ""),
        h("p", { class: "taco-dit-small" }, facts.filter(Boolean).join(" · ")),
    );
}

function lastRun(t, run) {
    if (!run?.forwards) return section(t, "run", t("run"), h("p", { class: "taco-dit-small" }, t("run.none")));
    const alone = run.single_rank_s;
    const lines = [
        run.model,
        t("plan", { plan: run.plan }),
        t("run.forwards", { count: run.forwards, parallel: run.parallel_forwards, time: seconds(run.forward_s) }),
        run.retries ? t("run.retries", { count: run.retries }) : null,
        alone === null
            ? t("speed.unknown")
            : t("speed", { times: (alone / run.forward_s).toFixed(2), time: seconds(alone) }),
    ];
    return section(t, "run", t("run"), ...lines.filter(Boolean).map((line) => h("p", { class: "taco-dit-small" }, line)));
}

function step(t, stats) {
    const parts = PARTS.map((name) => ({ name, value: stats[`${name}_s`] }));
    const whole = parts.reduce((sum, each) => sum + each.value, 0);
    if (!stats.step_s.count || !whole) {
        return section(t, "step", t("step"), h("p", { class: "taco-dit-small" }, t("step.none")));
    }
    const said = parts.map((each) => `${t(`part.${each.name}`)} ${seconds(each.value)} (${percent(each.value / whole)})`);
    const times = { mean: seconds(stats.step_s.mean), p95: seconds(stats.step_s.p95), count: stats.step_s.count };
    return section(
        t,
        "step",
        t("step"),
        h("p", { class: "taco-dit-small" }, t("step.times", times)),
        h(
            "div",
            { class: "taco-dit-bar taco-dit-split", role: "img", "aria-label": said.join(", ") },
            ...parts.map((each) =>
                h("div", {
                    key: each.name,
                    "data-part": each.name,
                    style: `width: ${((each.value / whole) * 100).toFixed(2)}%`,
                }),
            ),
        ),
        h(
            "ul",
            { class: "taco-dit-legend", "aria-hidden": "true" },
            ...parts.map((each, index) =>
                h("li", {}, h("span", { class: "taco-dit-swatch", "data-part": each.name }), said[index]),
            ),
        ),
    );
}
